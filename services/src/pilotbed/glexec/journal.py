"""What is under way on this node, for the one who has to clean up when a call's own processes were killed.

A call's entry is a file below /run/glexec that its root processes hold locked; the kernel drops the lock with the last
of them. An entry without a holder is a call that was cut off: the next call, or the timer, cleans up after it.
"""

# ruff: noqa: PTH102, PTH104, PTH108, PTH208

from __future__ import annotations

import fcntl
import marshal  # json takes re, and that longer than all else here; nobody but root writes below DIRECTORY
import os
import stat

from ..lean import Record, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

DIRECTORY = "/run/glexec"


class Case(Record):
    """What a call has to undo at its end, and what it has to log. Uids, paths, the sandbox's device, inode and mode."""

    caller: int
    target: int
    cgroup: str = ""
    target_proxy: str = ""
    sandbox: str = ""
    sandbox_device: int = 0
    sandbox_inode: int = 0
    sandbox_mode: int = 0
    sweep: tuple[str, ...] = ()
    gridmapdir: str = ""
    monitor: int = 0  # its pid, as soon as there is one
    log: dict[str, object]


class Entry:
    """The open, locked entry of one call."""

    def __init__(self, path: str, fd: int) -> None:
        self._path, self._fd = path, fd

    def write(self, case: Case) -> None:
        """Replace the content. Raises OSError."""
        os.pwrite(self._fd, marshal.dumps(case.fields()).ljust(8192), 0)

    def read(self) -> Case | None:
        """Return the content; None if the call was cut off before it had changed anything."""
        try:
            return Case(**marshal.loads(os.pread(self._fd, 1 << 16, 0)))  # noqa: S302
        except (EOFError, ValueError, TypeError):
            return None

    def close(self) -> None:
        """Remove the entry: all is undone."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        self.leave()

    def leave(self) -> None:
        """Let go of the entry, which stays."""
        os.close(self._fd)


def enter(case: Case) -> Entry:
    """Make the entry of a call. Raises OSError."""
    with Locked(case.target):
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
        if _is_entry(name) and (fd := _taken(f"{DIRECTORY}/{name}")) >= 0:
            yield Entry(f"{DIRECTORY}/{name}", fd)


def under_way() -> Iterator[Case]:
    """Yield the calls whose payloads run. Raises OSError."""
    _make_directory()
    for name in os.listdir(DIRECTORY):
        if _is_entry(name):
            with suppress(FileNotFoundError):
                entry = Entry(name, os.open(f"{DIRECTORY}/{name}", os.O_RDONLY | os.O_CLOEXEC))
                case = entry.read()
                entry.leave()
                if case:
                    yield case


def _is_entry(name: str) -> bool:
    return name[0].isdigit() and name.count("-") == 2


def alone(uid: int) -> bool:
    """Tell whether the account ``uid`` has nothing else on this node: no other call's payload, no process.

    Ask while it is ``Locked``: then no call for it begins. Raises OSError.
    """
    others = sum(name.startswith(f"{uid}-") for name in os.listdir(DIRECTORY)) > 1  # one is this call's
    return not others and not any(uid in _uids(pid) for pid in os.listdir("/proc") if pid.isdigit())


def _uids(pid: str) -> list[int]:
    """Return real, effective, saved and file system uid of a process; none if it has gone."""
    with suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        lines = file.read().split(b"\n")
        if not any(line.startswith(b"State:\tZ") for line in lines):
            return [int(field) for line in lines if line.startswith(b"Uid:") for field in line.split()[1:]]
    return []


def _make_directory() -> None:
    with suppress(FileExistsError):
        os.mkdir(DIRECTORY, 0o700)
    found = os.lstat(DIRECTORY)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o077:
        raise PermissionError(0, "must be a directory of root's that nobody else can use", DIRECTORY)


class Locked:
    """While this context lasts no other call for the account ``uid`` begins or ends. Raises OSError."""

    def __init__(self, uid: int) -> None:
        self._path = f"{DIRECTORY}/{uid}.lock"

    def __enter__(self) -> None:
        _make_directory()
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


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
