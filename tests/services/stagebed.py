"""Stage areas behind a web server, and pilots that are started with them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import urlopen

from pilotbed.glidein import builder
from pilotbed.glidein.arguments import pilot_arguments
from pilotbed.glidein.builder import Area, Staged, function_files, render, script
from pilotbed_suite import stock

STARTUP = Path(builder.__file__).parent / "glidein_startup.sh"

#: What every script of a stage needs.
STANDARD = (script("error_gen.sh", "regular", output="ERROR_GEN_PATH"), *function_files())

#: Notes its name, its area and who waits at its stdin.
NOTE = """#!/bin/bash
echo "ran ${0##*/} $2 $(wc -c)"
"""


class Handler(SimpleHTTPRequestHandler):
    """Serves a directory, and notes the paths that are asked for."""

    def __init__(self, *arguments: Any, asked: list[str], **more: Any) -> None:
        self.asked = asked
        super().__init__(*arguments, **more)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Cache(SimpleHTTPRequestHandler):
    """A web cache whose copy of one file differs by a byte."""

    def __init__(self, *arguments: Any, spoils: str, **more: Any) -> None:
        self.spoils = spoils
        super().__init__(*arguments, **more)

    def do_GET(self) -> None:
        with urlopen(self.path) as origin:
            body = origin.read()
        if self.spoils and self.spoils in self.path:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(handler: Callable[..., Any]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return server


@dataclass
class Site:
    """Two stage areas behind a web server, and a worker's directory to start pilots in."""

    root: Path
    url: str
    asked: list[str]
    worker: Path
    areas: dict[str, tuple[str, str]] = field(default_factory=dict)

    def put(
        self, where: str, *files: Staged, extra: dict[str, str] | None = None, loose: tuple[Staged, ...] = ()
    ) -> None:
        """Publish an area: ``factory``, ``factory/entry_alpha``, ``frontend`` or ``frontend/group_main``."""
        area: Area = render(files, extra, loose)
        self.areas[where] = area.descript, area.sign
        self.empty(where)
        for name, content in area.files.items():
            (self.root / where / name).write_bytes(content)

    def empty(self, where: str) -> None:
        """Have an area's directory there, without the files of an earlier one."""
        (self.root / where).mkdir(parents=True, exist_ok=True)
        for old in (self.root / where).iterdir():
            if old.is_file():
                old.unlink()

    def put_stock(self, where: str, constants: dict[str, str], *files: stock.File, **more: Any) -> None:
        """Publish an area as glideinWMS would: ``frontend`` or ``frontend/group_main``."""
        self.empty(where)
        self.areas[where] = stock.write_area(self.root / where, constants, files, **more)

    def options(self) -> dict[str, str]:
        names = {
            "factory": ("web", "sign", "descript"),
            "factory/entry_alpha": (None, "signentry", "descriptentry"),
            "frontend": ("clientweb", "clientsign", "clientdescript"),
            "frontend/group_main": ("clientwebgroup", "clientsigngroup", "clientdescriptgroup"),
        }
        found = {"v": "fast", "name": "v1", "entry": "alpha", "factory": "gridlab", "clientname": "vo.main", "dir": "."}
        for where, (descript, digest) in self.areas.items():
            web, sign, described = names[where]
            found |= {sign: digest, described: descript} | ({web: f"{self.url}/{where}"} if web else {})
        return found

    def command(self, parameters: dict[str, str] | None = None, **options: str) -> list[str]:
        parameters = {"GLIDEIN_Failure_Delay": "0"} | (parameters or {})
        return ["bash", str(STARTUP), *pilot_arguments(self.options() | options, parameters.items())]

    def pilot(self, environment: dict[str, str] | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a pilot to its end; it must leave nothing behind, whatever happens."""
        done = subprocess.run(
            self.command(**more), cwd=self.worker, env=clean() | (environment or {}), capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert list(self.worker.iterdir()) == []
        return done

    def real(self, where: str, prefix: str) -> Path:
        """Return the path of the one staged file whose name starts with ``prefix``."""
        (path,) = (self.root / where).glob(f"{prefix}.*")
        return path


def clean() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}


def note(name: str, list_: str = "file_list", **more: Any) -> Staged:
    return Staged(name, f"{NOTE}# {name}\n".encode(), "exec", list_, **more)


def last(text: str = NOTE) -> dict[str, Any]:
    file = Staged("last.sh", text.encode())
    return {"loose": (file,), "extra": {"last_script": builder.stamped(file.name, file.content)}}


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the scripts of ``note`` that a pilot ran, in their order."""
    return re.findall(r"^ran (\S+) (?:\S+) 0$", done.stdout, re.MULTILINE)
