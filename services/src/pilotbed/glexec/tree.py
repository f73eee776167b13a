"""The payload's processes as one: an own cgroup below the caller's, or, where none can be made, a PID namespace.

Both end the same way: nothing of the payload is left, whatever it did (setsid, double fork, ignored signals).
"""

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from . import policy

PATIENCE = 10.0  # seconds that killed processes get to disappear
KILLED = 128 + signal.SIGKILL
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CLONE_NEWNS, _CLONE_NEWPID = 0x00020000, 0x20000000
_MS_NOSUID_NODEV_NOEXEC, _MS_REC_SLAVE = 0x2 | 0x4 | 0x8, 0x4000 | 0x80000
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Make this process the one that inherits its descendants' orphans. Raises OSError."""
    _checked("prctl", _PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent (pidfd) ends. Call it after the change of identity."""
    _checked("prctl", _PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if select.select([parent], [], [], 0)[0]:
        os._exit(KILLED)


def _checked(function: str, *arguments: object) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


class Tree:
    """The processes of one payload. ``tracking`` says how they are held together: ``cgroup`` or ``pid namespace``."""

    def __init__(self) -> None:
        """Make the cgroup, if one can be made here; ``cgroup`` is its path or empty."""
        self.cgroup = ""
        own = policy.unified_cgroup(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
        made = Path(own, f"glexec-{os.getpid()}-{os.urandom(4).hex()}")
        with contextlib.suppress(OSError):
            if own:
                made.mkdir(mode=0o755)
                if (made / "cgroup.kill").exists():  # Linux 5.14
                    self.cgroup = str(made)
                else:
                    made.rmdir()
        self.tracking = "cgroup" if self.cgroup else "pid namespace"

    def spawn(self, payload: Callable[[int], None]) -> int:
        """Have ``payload`` run in the tree and return the pid to watch; its end is the payload's, with its exit code.

        ``payload`` never returns and gets a pidfd of its parent. Raises OSError.
        """
        parent = os.pidfd_open(os.getpid())
        ours = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        if not self.cgroup:
            _checked("unshare", _CLONE_NEWPID)
        try:
            child = os.fork()
            if child == 0:
                try:
                    if self.cgroup:
                        Path(self.cgroup, "cgroup.procs").write_text("0")
                        payload(parent)
                    _be_init(payload, parent)
                finally:
                    os._exit(KILLED)
            return child
        finally:
            if not self.cgroup:
                _checked("setns", ours, _CLONE_NEWPID)
            os.close(ours)
            os.close(parent)


def _be_init(payload: Callable[[int], None], parent: int) -> None:
    """Be the first process of a PID namespace; never returns. All in there end with this one, and it with its parent.

    The payload is the second one: signals that it does not handle would not reach a first process.
    """
    die_with_parent(parent)
    with contextlib.suppress(OSError):  # in a container it may be forbidden: the payload then sees the outer /proc
        _checked("unshare", _CLONE_NEWNS)
        _checked("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC_SLAVE), None)
        _checked("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC), None)
    own = os.pidfd_open(os.getpid())
    first = os.fork()
    if first == 0:
        payload(own)
    os.closerange(3, 0x7FFFFFFF)
    for number in policy.FORWARDED_NUMBERS:
        signal.signal(number, lambda number, _: os.kill(first, number))
    while True:
        ended, status = os.wait()
        if ended == first:
            os._exit(policy.exit_code(status))


def end(cgroup: str) -> bool:
    """Kill all in the cgroup at this path (empty: there is none) and remove it; tell whether all is gone.

    Collects, too, what has become this process's child: the payload's orphans, or the first process of its namespace.
    """
    deadline = time.monotonic() + PATIENCE
    made = Path(cgroup)
    if cgroup and made.exists():
        with contextlib.suppress(OSError):
            (made / "cgroup.kill").write_text("1")
            while "populated 1" in (made / "cgroup.events").read_text() and time.monotonic() < deadline:
                time.sleep(0.005)
            for below in sorted(made.rglob("*/"), key=lambda below: len(below.parts), reverse=True):
                below.rmdir()
            made.rmdir()
    gone = not cgroup or not made.exists()
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return gone
        time.sleep(0.005)
    return False
