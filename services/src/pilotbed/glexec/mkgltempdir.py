"""mkgltempdir: a directory of the payload's account inside one of the caller's, for pilots that work without HTCondor.

    directory=$(mkgltempdir [-t mode] [-m parentmode] [parent])      mkgltempdir -r [-f] directory

GLEXEC_CLIENT_CERT says for whom, as with glexec, which this program calls; it has no rights but the caller's.
"""

import argparse
import os
import secrets
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

GLEXEC = "/usr/sbin/glexec"
_PREFIX = "glexec."
#: While the payload's account makes or removes its directory: everybody may make a file here, nobody look, and nobody
#: remove what is another's.
_OPEN = 0o1733


class Failure(Exception):
    """The program ends with ``code``; the reason is None where glexec has already given it."""

    def __init__(self, code: int, reason: str | None = None) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


def _mode(text: str) -> int:
    value = int(text, 8)
    if not 0 <= value <= 0o777:
        raise ValueError
    return value


def _glexec(*command: str) -> None:
    code = subprocess.run([GLEXEC, "--", *command], stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise Failure(code)


def make(above: str, target_mode: int, parent_mode: int) -> Path:
    """Return a new directory of the payload's account inside a new one of the caller's, below ``above``.

    Raises Failure and OSError.
    """
    parent = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=above))
    made = parent / secrets.token_hex(8)
    try:
        parent.chmod(_OPEN)
        _glexec("/bin/mkdir", "-m", f"{target_mode:o}", str(made))
        found = made.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid == os.getuid():
            raise Failure(202, f"{made} is no directory of another account's")
    except BaseException:
        parent.rmdir()
        raise
    parent.chmod(parent_mode)
    return made


def remove(directory: Path, force: bool) -> None:
    """Remove what ``make`` has made; with ``force`` also what is in it. Raises Failure and OSError."""
    parent = directory.parent
    found = parent.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and parent.name.startswith(_PREFIX)
    if not ours or not directory.is_absolute():
        raise Failure(201, f"{directory} was not made by mkgltempdir for this account")
    parent.chmod(_OPEN)
    try:
        _glexec("/bin/rm", "-rf", "--", str(directory)) if force else _glexec("/bin/rmdir", "--", str(directory))
    except BaseException:
        parent.chmod(0o755)
        raise
    parent.rmdir()


def main() -> int:
    """Run the program and return its exit code: glexec's, or mkdir's, or 1 for its own errors."""
    parser = argparse.ArgumentParser(prog="mkgltempdir", description="A directory of glexec's target account.")
    octal: Callable[[str], int] = _mode
    parser.add_argument("-t", metavar="MODE", type=octal, default=0o700, help="mode of the directory (0700)")
    parser.add_argument("-m", metavar="MODE", type=octal, default=0o755, help="mode of the caller's above it (0755)")
    parser.add_argument("-r", action="store_true", help="remove the directory and the caller's above it")
    parser.add_argument("-f", action="store_true", help="with -r: also what is in it")
    parser.add_argument("directory", nargs="?", default="", help="where to make it ($TMPDIR), or what to remove")
    given = parser.parse_args()
    try:
        if given.r:
            remove(Path(given.directory), given.f)
        else:
            print(make(given.directory or os.environ.get("TMPDIR") or "/tmp", given.t, given.m))  # noqa: S108
    except (Failure, OSError) as error:
        reason = error.reason if isinstance(error, Failure) else str(error)
        if reason:
            print(f"mkgltempdir: {reason}", file=sys.stderr)
        return error.code if isinstance(error, Failure) else 1
    return 0
