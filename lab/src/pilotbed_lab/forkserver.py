"""What a node runs for Ansible's modules: a Python that has loaded what they share forks itself for each of them.

Python's start, that loading, and taking all of it down again in order were two thirds of what a task cost. The
connection plugin `nsenter` sends this file to a node's Python, with two open files:

* a socket of the host's. Whoever connects sends three files by it: the module, and those that take what it writes to
  its standard output and error. A ``+`` comes back when it begins, then its exit code, -N for signal N;
* Ansible's ``module_utils`` in a zip file.

Each module runs in a process of its own: nothing of it stays. It ends when none comes for a while.
"""

from __future__ import annotations

import atexit
import base64  # noqa: F401 # this and what has no use below either: modules' wrapper has
import contextlib
import hashlib
import importlib
import importlib.machinery
import marshal
import os
import runpy  # noqa: F401
import shutil  # noqa: F401
import signal
import socket
import sys
import tempfile  # noqa: F401
import threading
import traceback
import zipfile  # noqa: F401
import zipimport
from collections.abc import Sequence
from pathlib import Path
from types import CodeType

#: What is loaded before the first module; what an Ansible does not have is left out.
LOADED = (
    "ansible.module_utils.basic",
    "ansible.module_utils._internal._ansiballz._loader",
    "ansible.module_utils.service",
    "ansible.module_utils.urls",
)
#: Where a node keeps what it has compiled: Python compiles what it imports from a zip file each time anew.
COMPILED = "/var/cache/ansible-compiled"
_compile = zipimport._compile_source  # type: ignore[attr-defined]


def compiled(name: str, source: bytes, directory: str = COMPILED) -> CodeType:
    """Return the code of a source file that comes from a zip file: what was compiled once is used again."""
    path = Path(directory, hashlib.sha256(sys.version.encode() + source).hexdigest())
    try:
        with path.open("rb") as file:
            kept: CodeType = marshal.load(file)  # noqa: S302 # root's own file
            return kept
    except (OSError, EOFError, ValueError, TypeError):
        code: CodeType = _compile(name, source)
    with contextlib.suppress(OSError):
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        with partial.open("wb") as file:
            marshal.dump(code, file)
        partial.rename(path)
    return code


class Modules:
    """Finds a module in its own zip file, which is in sys.path by then; ``ansible`` itself is loaded already."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """As importlib.abc.MetaPathFinder says."""
        if not name.startswith("ansible."):
            return None
        below = name.split(".")[:-1]
        return importlib.machinery.PathFinder.find_spec(name, [str(Path(each, *below)) for each in sys.path])


def load(library: str) -> None:
    """Load what modules share, from a zip file."""
    zipimport._compile_source = compiled  # type: ignore[attr-defined]
    sys.meta_path.append(Modules)
    sys.path.insert(0, library)
    for name in LOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    del sys.path[0]


def serve(door: socket.socket, idle: float) -> bytes:
    """Return each module in a process forked for it; end the process that forks after ``idle`` seconds without one."""
    door.settimeout(idle)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        try:
            line, _ = door.accept()
        except TimeoutError:
            os._exit(0)
        if os.fork():
            line.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        line.settimeout(None)
        _, (module, *outputs), _, _ = socket.recv_fds(line, 1, 3)
        line.sendall(b"+")
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            line.sendall(str(code).encode())
            os._exit(0)
        line.close()
        door.close()
        for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *outputs]):
            os.dup2(file, number)
            os.close(file)
        with open(module, "rb") as content:
            return content.read()


def run(module: bytes) -> None:
    """Run a module, and end as it ends."""
    code = 0
    try:
        exec(compile(module, "<stdin>", "exec", dont_inherit=True), {"__name__": "__main__"})  # noqa: S102 # its purpose
    except SystemExit as end:
        if isinstance(end.code, str) or threading.active_count() > 1:
            raise
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    # In order, Python's end takes 60 ms: three times what a short module does.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(argv: Sequence[str]) -> None:
    """Serve: file descriptors of the socket and the zip file, and seconds to wait for a module."""
    door, library, idle = argv
    load(f"/proc/self/fd/{library}")
    sys.argv[:] = [""]  # a module with an argument would be taken to be debugged
    run(serve(socket.socket(fileno=int(door)), float(idle)))


if __name__ == "__main__":
    main(sys.argv[1:])
