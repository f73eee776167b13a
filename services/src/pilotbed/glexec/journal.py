"""What is under way on this node, for the one who has to clean up when a call's own processes were killed.

A call's entry is a file below /run/glexec that its root processes hold locked; the kernel drops the lock with the last
of them. An entry without a holder is a call that was cut off: the next call, or the timer, cleans up after it.
"""

# ruff: noqa: PTH102, PTH104, PTH108, PTH208

import contextlib
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

DIRECTORY = "/run/glexec"
_ENTRY = re.compile(r"(\d+)-\d+-[0-9a-f]{8}")


@dataclass
class Case:
    """What a call has to undo at its end. Uids, paths, and the sandbox's device, inode and first mode."""

    caller: int
    target: int
    cgroup: str = ""
    target_proxy: str = ""
    sandbox: str = ""
    sandbox_device: int = 0
    sandbox_inode: int = 0
    sandbox_mode: int = 0
    sweep: tuple[str, ...] = ()


class Entry:
    """The open, locked entry of one call."""

    def __init__(self, path: str, fd: int) -> None:
        self._path, self._fd = path, fd

    def write(self, case: Case) -> None:
        """Replace the content. Raises OSError."""
        os.pwrite(self._fd, json.dumps(asdict(case)).encode().ljust(8192), 0)

    def read(self) -> Case | None:
        """Return the content; None if the call was cut off before it had changed anything."""
        try:
            case = Case(**json.loads(os.pread(self._fd, 1 << 16, 0)))
        except (ValueError, TypeError):
            return None
        case.sweep = tuple(case.sweep)
        return case

    def close(self) -> None:
        """Remove the entry: all is undone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        os.close(self._fd)


def enter(case: Case) -> Entry:
    """Make the entry of a call. Raises OSError."""
    with _locked(case.target):
        name = f"{case.target}-{os.getpid()}-{os.urandom(4).hex()}"
        fd = os.open(f"{DIRECTORY}/.{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        entry = Entry(f"{DIRECTORY}/{name}", fd)
        entry.write(case)
        os.rename(f"{DIRECTORY}/.{name}", f"{DIRECTORY}/{name}")  # never seen without lock and content
    return entry


def cut_off() -> Iterator[Entry]:
    """Yield the entries that nobody holds any more, locked for the caller, who closes them. Raises OSError."""
    _make_directory()
    for name in os.listdir(DIRECTORY):
        if _ENTRY.fullmatch(name) and (fd := _taken(f"{DIRECTORY}/{name}")) >= 0:
            yield Entry(f"{DIRECTORY}/{name}", fd)


@contextlib.contextmanager
def alone(uid: int) -> Iterator[bool]:
    """Tell whether the account ``uid`` has nothing else on this node: no other call's payload, no process.

    While the context lasts no call for it begins. Raises OSError.
    """
    with _locked(uid):
        others = sum(name.startswith(f"{uid}-") for name in os.listdir(DIRECTORY)) > 1  # one is this call's
        yield not others and not any(uid in _uids(pid) for pid in os.listdir("/proc") if pid.isdigit())


def _uids(pid: str) -> list[int]:
    """Return real, effective, saved and file system uid of a process; none if it has gone."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        fields = next(line for line in lines if line.startswith("Uid:")).split()[1:]
        if "State:\tZ" not in "\n".join(lines):
            return [int(field) for field in fields]
    return []


def _make_directory() -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(DIRECTORY, 0o700)
    found = os.lstat(DIRECTORY)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o077:
        raise PermissionError(0, "must be a directory of root's that nobody else can use", DIRECTORY)


@contextlib.contextmanager
def _locked(uid: int) -> Iterator[None]:
    _make_directory()
    fd = os.open(f"{DIRECTORY}/{uid}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _taken(path: str) -> int:
    """Return a descriptor of the entry, locked; -1 if it is held, or has been dealt with meanwhile."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return -1
