"""The payload's processes as one: an own cgroup below the caller's, or, where none can be made, a PID namespace.

Both end the same way: nothing of the payload is left, whatever it did (setsid, double fork, ignored signals).
"""

# ruff: noqa: PTH102, PTH106, PTH110

from __future__ import annotations

import ctypes
import os
import select
import time

from ..lean import signal, suppress
from . import policy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 10.0  # seconds that killed processes get to disappear
KILLED = 128 + signal.SIGKILL
KEYCTL = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine)  # keyctl(2) has no wrapper in libc
_JOIN_SESSION_KEYRING = 1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_INTO_CGROUP = 0x00020000, 0x20000000, 0x200000000
_CLONE3 = 435  # the same number on every architecture
_MS_NOSUID_NODEV_NOEXEC, _MS_REC_SLAVE = 0x2 | 0x4 | 0x8, 0x4000 | 0x80000
_libc = ctypes.PyDLL(None, use_errno=True)


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


def new_session_keyring() -> None:
    """Leave the session keyring, which is the caller's and lets who possesses it read its keys. Raises OSError."""
    if KEYCTL and _libc.syscall(KEYCTL, _JOIN_SESSION_KEYRING, None) < 0:
        number = ctypes.get_errno()
        if number != 38:  # ENOSYS: a kernel without keyrings
            raise OSError(number, f"keyctl: {os.strerror(number)}")


class Tree:
    """The processes of one payload. ``tracking`` says how they are held together: ``cgroup`` or ``pid namespace``."""

    def __init__(self) -> None:
        """Make the cgroup, if one can be made here; ``cgroup`` is its path or empty."""
        self.cgroup = ""
        own = policy.unified_cgroup(_read("/proc/self/mountinfo"), _read("/proc/self/cgroup"))
        made = f"{own}/glexec-{os.getpid()}-{os.urandom(4).hex()}"
        with suppress(OSError):
            if own:
                os.mkdir(made, 0o755)
                if os.path.exists(f"{made}/cgroup.kill"):  # Linux 5.14
                    self.cgroup = made
                else:
                    os.rmdir(made)
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
            child = _fork_into(self.cgroup) if self.cgroup else os.fork()
            if child == 0:
                try:
                    if self.cgroup:
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


def _fork_into(cgroup: str) -> int:
    """Fork, with the child in the cgroup from its first instruction. Raises OSError.

    A process that is moved there by cgroup.procs first waits for an RCU grace period, 15 ms.
    """
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # struct clone_args, include/uapi/linux/sched.h: flags first, exit_signal fifth, cgroup last
    arguments = (ctypes.c_uint64 * 11)(_CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, directory)
    _libc.PyOS_BeforeFork()
    child = int(_libc.syscall(_CLONE3, ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(arguments))))
    if child == 0:
        _libc.PyOS_AfterFork_Child()
        return 0
    _libc.PyOS_AfterFork_Parent()
    os.close(directory)
    if child < 0:  # seccomp in a container may not know clone3
        child = os.fork()
        if child == 0:
            _write(f"{cgroup}/cgroup.procs", "0")
    return child


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _be_init(payload: Callable[[int], None], parent: int) -> None:
    """Be the first process of a PID namespace; never returns. All in there end with this one, and it with its parent.

    The payload is the second one: signals that it does not handle would not reach a first process.
    """
    die_with_parent(parent)
    with suppress(OSError):  # in a container it may be forbidden: the payload then sees the outer /proc
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
            break
    if os.getpid() == 1:  # -1 is all of the namespace, or of the node
        with suppress(OSError):  # the kernel would do the same, but forget their CPU time
            os.kill(-1, signal.SIGKILL)
            while True:
                os.wait()
    os._exit(policy.exit_code(status))


def end(cgroup: str) -> tuple[bool, dict[str, object]]:
    """Kill all in the cgroup at this path (empty: there is none) and remove it.

    Collects, too, what has become this process's child: the payload's orphans, or the first process of its namespace.
    Returns whether all is gone, and what the cgroup says of it: ``cpu`` in seconds, and ``memory``, the most of it in
    bytes, where the memory controller is on.
    """
    deadline = time.monotonic() + PATIENCE
    used: dict[str, object] = {}
    if cgroup and os.path.exists(cgroup):
        with suppress(OSError):
            _write(f"{cgroup}/cgroup.kill", "1")
            while "populated 1" in _read(f"{cgroup}/cgroup.events") and time.monotonic() < deadline:
                time.sleep(0.005)
            used["cpu"] = f"{int(_read(f'{cgroup}/cpu.stat').split()[1]) / 1e6:.2f}"  # usage_usec comes first
            if os.path.exists(f"{cgroup}/memory.peak"):  # Linux 5.19
                used["memory"] = int(_read(f"{cgroup}/memory.peak"))
        with suppress(OSError):
            for below, _, _ in os.walk(cgroup, topdown=False):
                os.rmdir(below)
    gone = not cgroup or not os.path.exists(cgroup)
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return gone, used
        time.sleep(0.005)
    return False, used
