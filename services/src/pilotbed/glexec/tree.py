"""The payload's processes as one: an own cgroup below the caller's, or, where none can be made, a child subreaper.

Both end the same way: nothing of the payload is left, whatever it did (setsid, double fork, ignored signals).
"""

# ruff: noqa: PTH208

import contextlib
import ctypes
import os
import re
import signal
import time
from pathlib import Path

from . import policy

PATIENCE = 10.0  # seconds that killed processes get to disappear
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Make this process the one that inherits its descendants' orphans. Raises OSError."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. Set it after the change of identity, which clears it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


class Tree:
    """The processes of one payload. ``tracking`` says how they are held together: ``cgroup`` or ``subreaper``."""

    def __init__(self) -> None:
        """Make the cgroup, after having removed what dead monitors have left beside it."""
        self._cgroup: Path | None = None
        own = policy.unified_cgroup(_read("/proc/self/mountinfo"), _read("/proc/self/cgroup"))
        if own:
            namespace = Path("/proc/self/ns/pid").stat().st_ino
            _sweep(Path(own), namespace)
            started = policy.start_time(_read("/proc/self/stat"))
            made = Path(own) / policy.monitor_name(namespace, os.getpid(), started)
            with contextlib.suppress(OSError):
                made.mkdir(mode=0o755)
                if (made / "cgroup.kill").exists():  # Linux 5.14
                    self._cgroup = made
                else:
                    made.rmdir()
        self.tracking = "cgroup" if self._cgroup else "subreaper"

    def enter(self) -> None:
        """Put the calling process into the cgroup. Raises OSError."""
        if self._cgroup:
            (self._cgroup / "cgroup.procs").write_text("0")

    def kill(self) -> bool:
        """Kill every process of the payload and every other descendant; tell whether all are gone."""
        gone = _kill_cgroup(self._cgroup) if self._cgroup else True
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for pid in policy.descendants(os.getpid(), _parents()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return gone
            time.sleep(0.01)
        return False


def _read(path: str) -> str:
    return Path(path).read_text(errors="replace")


def _parents() -> dict[int, int]:
    """Return the parent's pid of every process that can be seen."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                found[int(entry)] = policy.parent(_read(f"/proc/{entry}/stat"))
    return found


def _kill_cgroup(cgroup: Path) -> bool:
    """Kill all in ``cgroup`` (and below) and remove it; tell whether it is gone."""
    deadline = time.monotonic() + PATIENCE
    with contextlib.suppress(OSError):
        (cgroup / "cgroup.kill").write_text("1")
        while "populated 1" in _read(str(cgroup / "cgroup.events")) and time.monotonic() < deadline:
            time.sleep(0.005)
        for below in sorted(cgroup.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
            below.rmdir()
        cgroup.rmdir()
    return not cgroup.exists()


def _sweep(parent: Path, namespace: int) -> None:
    """Kill the payloads below ``parent`` whose monitor, of the same pid namespace, was itself killed."""
    with contextlib.suppress(OSError):
        for entry in parent.iterdir():
            match = re.fullmatch(r"glexec-(\d+)-(\d+)-(\d+)", entry.name)
            if not match or int(match[1]) != namespace:
                continue
            try:
                alive = policy.start_time(_read(f"/proc/{match[2]}/stat")) == int(match[3])
            except OSError:
                alive = False
            if not alive:
                _kill_cgroup(entry)
