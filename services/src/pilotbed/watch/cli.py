"""``pilotbed-watch``: tell what a host has that nobody has declared, and what was changed since its last deployment.

``look`` (a timer's) writes a line for each finding that is new, and for each that is over, to the journal and to a
file. ``accept`` (the deployment's) takes what is there now as what is right, and says what that is.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotbed.files import replace_file

from . import facts

AIDE = "/usr/bin/aide --config=/etc/pilotbed/aide.conf"
#: Exit codes of aide from here on are errors; below, a sum of what it found (aide(1)).
_AIDE_ERROR = 14
#: Seconds that one command may take.
_PATIENCE = 120


@dataclass(frozen=True, order=True)
class Finding:
    """Something that is not as it was declared, or accepted: ``kind`` socket, unit, setuid, file or watch (itself)."""

    kind: str
    what: str

    def __str__(self) -> str:
        """Return one line, whatever a file or a unit is called."""
        return f"{self.kind}: {self.what.encode('unicode_escape').decode()}"


class Watch:
    """A host's watch.

    Args:
        settings: ``sockets`` and ``units`` as they are declared.
        state: directory of what was accepted and told.
        run: runs a command line and returns its exit code and its output.
    """

    def __init__(self, settings: dict[str, Any], state: Path, run: Callable[[str], tuple[int, str]]) -> None:
        self.settings, self.state, self.run = settings, state, run

    def look(self) -> set[Finding]:
        """Return what is found now. A look that fails is a finding, and keeps the others from nothing."""
        found = set()
        for look in (self._sockets, self._units, self._setuid, self._files):
            try:
                found |= look()
            except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
                found.add(Finding("watch", f"{look.__name__.strip('_')} could not be looked at: {error}"))
        return found

    def _said(self, command: str) -> str:
        code, said = self.run(command)
        if code:
            raise ValueError(f"{command}: exit code {code}: {said[-200:]}")
        return said

    def _sockets(self) -> set[Finding]:
        return {
            Finding("socket", f"{one.program} listens at {one.protocol} {one.address}:{one.port}")
            for one in facts.listeners(self._said(facts.SOCKETS))
            if not facts.protection(one, self.settings["sockets"])
        }

    def _units(self) -> set[Finding]:
        there = facts.units(self._said(facts.UNITS))
        return {Finding("unit", f"{name} runs") for name in facts.undeclared(there, self.settings["units"])}

    def _all_setuid(self) -> set[str]:
        # Its exit code says that a directory was gone before it was read.
        return set(self.run(facts.SETUID)[1].split("\0")) - {""}

    def _setuid(self) -> set[Finding]:
        known = set(json.loads((self.state / "setuid.json").read_text()))
        return {Finding("setuid", path) for path in self._all_setuid() - known}

    def _files(self) -> set[Finding]:
        code, said = self.run(f"{AIDE} --check")
        if code >= _AIDE_ERROR:
            raise ValueError(f"aide: exit code {code}: {said[-200:]}")
        report = json.loads(said) if code else {}
        if not isinstance(report, dict):
            raise ValueError(f"aide: no report: {said[-200:]}")
        return {
            Finding("file", f"{path} was {how}")
            for how in ("added", "removed", "changed") for path in report.get(how, {})
        }  # fmt: skip

    def told(self) -> set[Finding]:
        """Return what was told before and is not over. What cannot be read is told once more."""
        try:
            return {Finding(kind, what) for kind, what in json.loads((self.state / "told.json").read_text())}
        except (OSError, ValueError, TypeError):
            return set()

    def tell(self, found: set[Finding], out: Callable[[str], None]) -> None:
        """Tell what is new and what is over, and only then remember it: interrupted, it is told again."""
        before = self.told()
        for finding in sorted(found - before):
            out(str(finding))
        for finding in sorted(before - found):
            out(f"over: {finding}")
        if found != before:
            pairs = [[finding.kind, finding.what] for finding in sorted(found)]
            replace_file(self.state / "told.json", json.dumps(pairs), 0o600)

    def accept(self) -> list[str]:
        """Take set-uid files and watched files as they are for what is right; return what that changes, a line each."""
        try:
            known = set(json.loads((self.state / "setuid.json").read_text()))
        except (OSError, ValueError):
            known = set()
        there = self._all_setuid()
        changes = [str(Finding("setuid", path)) for path in sorted(there - known)]
        changes += [str(Finding("no setuid", path)) for path in sorted(known - there)]
        if (self.state / "aide.db").exists():
            try:
                files = self._files()
            except ValueError as error:  # its settings are others now, say
                files = {Finding("watch", str(error))}
            changes += [str(finding) for finding in sorted(files)]
        else:
            changes.append("file: nothing was accepted before")
        if changes:
            code, said = self.run(f"{AIDE} --init")
            if code:
                raise ValueError(f"aide --init: exit code {code}: {said[-400:]}")
            (self.state / "aide.db.new").replace(self.state / "aide.db")
            replace_file(self.state / "setuid.json", json.dumps(sorted(there)), 0o600)
        return changes


def _run(command: str) -> tuple[int, str]:
    done = subprocess.run(
        shlex.split(command), capture_output=True, timeout=_PATIENCE, check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    said = done.stdout or done.stderr
    return done.returncode, said.decode(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Look or accept, as the command line says; 1 if it could not."""
    parser = argparse.ArgumentParser(prog="pilotbed-watch", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=["look", "accept"])
    parser.add_argument("--settings", type=Path, default=Path("/etc/pilotbed/watch.json"))
    parser.add_argument("--state", type=Path, default=Path("/var/lib/pilotbed-watch"))
    parser.add_argument("--alerts", type=Path, default=Path("/var/log/pilotbed-alerts.log"))
    options = parser.parse_args(argv)
    try:
        watch = Watch(json.loads(options.settings.read_text()), options.state, _run)
        options.state.mkdir(mode=0o700, exist_ok=True)
        if options.what == "accept":
            for line in watch.accept():
                print(line)
        else:
            watch.tell(watch.look(), _teller(options.alerts))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"pilotbed-watch: {error}", file=sys.stderr)
        return 1
    return 0


def _teller(path: Path) -> Callable[[str], None]:
    """Return what writes a line to the journal, as an alert (RFC 5424: 1), and to the file, which may be full."""

    def tell(line: str) -> None:
        print(f"<1>{line}", flush=True)
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o640), "a") as out:
                out.write(f"{now} {line}\n")
        except OSError as error:
            print(f"<3>{path}: {error}", flush=True)

    return tell


if __name__ == "__main__":
    sys.exit(main())
