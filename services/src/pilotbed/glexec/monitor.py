"""Starts one payload and watches it. Runs as root, in the supervisor's child (``root``)."""

# ruff: noqa: PTH109, PTH113
# Descriptors and single system calls: between two looks at a path it may have become another file.

from __future__ import annotations

import os
import pwd
import resource
import select
import stat

from ..lean import Record, signal, socket, suppress
from ..mapping import MAPPER_ACCOUNT
from . import mapper, policy, record
from .apart import become, open_as, run_as
from .policy import AUTHORISATION_ERROR, CLIENT_ERROR, SYSTEM_ERROR, Conf, Refusal
from .tree import KILLED, Tree, die_with_parent, new_session_keyring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .sandbox import Sandbox

REFRESH = 1.0  # seconds between looks at the source proxy
LIMITS = (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_CORE)

FileState = tuple[int, int, int, int]  # device, inode, time of change in ns, size


class Order(Record):
    """What has been decided about one call."""

    caller: pwd.struct_passwd
    target: pwd.struct_passwd
    gid: int  # the payload's primary group
    groups: list[int]  # its supplementary groups, gids
    identity: mapper.Identity
    conf: Conf
    command: list[str]
    environment: Mapping[str, str]  # of the caller, as sudo let it pass
    sandbox: Sandbox | None
    directory: str  # where the payload starts; empty: the caller's, or the target's home
    proxies: set[tuple[int, int]]  # (device, inode) of the caller's proxy files, which stay his
    source_proxy: str
    source_pem: bytes
    source_state: FileState | None
    target_proxy: str
    limits: list[tuple[int, int]]  # the caller's, of LIMITS


class Peers(Record):
    """Who else is there: the front end's socket, and pidfds of the front end and of the supervisor."""

    control: socket.socket
    caller: int
    supervisor: int


def read_proxy(variable: str, path: str, owner: pwd.struct_passwd) -> tuple[bytes, FileState]:
    """Return the content of a proxy file, opened with the caller's rights, and what identifies its state.

    Raises Refusal (201) unless it is a regular file of ``owner`` that nobody else may use.
    """
    if not path.startswith("/"):
        raise Refusal(CLIENT_ERROR, f"{variable} must be the absolute path of a proxy")
    try:
        with open(open_as(owner, path, os.O_RDONLY), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != owner.pw_uid or found.st_mode & 0o7077:
                raise Refusal(CLIENT_ERROR, f"{variable}: {path} must be the caller's own file, of mode 0600 or less")
            pem = file.read(policy.LARGEST_PROXY + 1)
    except OSError as error:
        raise Refusal(CLIENT_ERROR, f"{variable}: {path}: {error.strerror}") from error
    if len(pem) > policy.LARGEST_PROXY:
        raise Refusal(CLIENT_ERROR, f"{variable}: {path} is larger than {policy.LARGEST_PROXY} bytes")
    return pem, _state(found)


def _state(found: os.stat_result) -> FileState:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _write_target_proxy(order: Order, pem: bytes) -> None:
    """Put ``pem`` at the target proxy's path, as the target. Raises Refusal."""
    from . import target

    found = order.sandbox.found if order.sandbox else None
    sandbox = (found.st_dev, found.st_ino) if found else None
    run_as(order.target, lambda: target.write_proxy(order.target_proxy, pem, sandbox), order.groups)


def start(order: Order, tree: Tree) -> int:
    """Prepare what the payload needs and start it; return the pid to watch. Raises Refusal and OSError."""
    if order.sandbox:
        order.sandbox.hand_out(order.target.pw_uid, order.gid, order.proxies, order.source_proxy)
    if order.target_proxy:
        _write_target_proxy(order, order.source_pem)  # not what is there by now: that is for `_refresh`
    errors, error = os.pipe()
    payload = tree.spawn(lambda parent: _become_payload(order, parent, error))
    os.close(error)
    with open(errors, encoding="utf-8", errors="replace") as file:
        failed = file.read()  # empty when the command runs: exec closes the other end
    if failed:
        os.waitpid(payload, 0)
        code, _, reason = failed.partition(" ")
        raise Refusal(int(code), reason)
    return payload


def _become_payload(order: Order, parent: int, error: int) -> None:
    """Take the target's identity for good and execute the command; never returns. A failure goes to ``error``."""
    account, command = order.target, order.command
    code, step = SYSTEM_ERROR, "cannot take the payload's identity"
    try:
        os.setsid()
        for limit, value in zip(LIMITS, order.limits, strict=True):
            resource.setrlimit(limit, value)
        if order.conf.payload_processes:
            resource.setrlimit(resource.RLIMIT_NPROC, (order.conf.payload_processes,) * 2)
        become(account.pw_uid, order.gid, order.groups)
        die_with_parent(parent)
        new_session_keyring()
        code, step = CLIENT_ERROR, "working directory"
        if order.directory:
            os.chdir(order.directory)  # by name: the whole way must be open to the target
        else:
            try:
                os.chdir(os.getcwd())
            except OSError:
                os.chdir(account.pw_dir)
        step = command[0]
        if not os.path.isfile(step) or not os.access(step, os.X_OK):
            raise FileNotFoundError(0, f"not an executable file for {account.pw_name}")
        # Python ignores some of these, and what is ignored stays so over exec: a payload would miss its SIGPIPE.
        for number in signal.valid_signals():
            with suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        code = policy.CANNOT_EXECUTE
        known = {"name": account.pw_name, "home": account.pw_dir, "shell": account.pw_shell}
        environment = policy.payload_environment(known, order.conf, order.environment, order.target_proxy)
        os.execve(command[0], command, environment)  # noqa: S606
    except Exception as failure:
        reason = failure.strerror if isinstance(failure, OSError) else f"{type(failure).__name__}: {failure}"
        os.write(error, f"{code} {step}: {reason}".encode(errors="replace"))
    finally:
        os._exit(KILLED)


def watch(order: Order, payload: int, peers: Peers) -> tuple[str, int]:
    """Wait for the payload's end, pass on signals and fresh proxies; return words for the log and the exit code."""
    ended = os.pidfd_open(payload)
    wakes, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    # These signals come from a batch system, which is root and need not ask the front end.
    for name in (*policy.FORWARDED_SIGNALS, "SIGCHLD", "SIGPWR"):
        signal.signal(getattr(signal, name), lambda *_: None)
    poll = select.poll()
    for watched in (ended, peers.control.fileno(), peers.caller, peers.supervisor, wakes.fileno()):
        poll.register(watched, select.POLLIN)
    above, name = os.path.split(order.source_proxy)
    follow = open_as(order.caller, f"{above}/.", os.O_PATH) if order.sandbox and order.target_proxy else -1
    try:
        while True:
            ready = {fd for fd, _ in poll.poll(REFRESH * 1000 if follow >= 0 else None)}
            if ended in ready:
                _, status = os.waitpid(payload, 0)
                return f"ended {payload} {policy.how(status)}", policy.exit_code(status)
            if peers.supervisor in ready:
                return "the supervisor was killed", KILLED
            numbers = wakes.recv(64) if wakes.fileno() in ready else b""
            if policy.END_SIGNAL in numbers:
                return "the site has ended it", KILLED
            asked = _received(peers.control) if peers.control.fileno() in ready else b""
            if asked is None or peers.caller in ready:
                return "the caller has gone", KILLED
            _reap_orphans(payload)
            for number in numbers + asked:
                if number in policy.FORWARDED_NUMBERS:
                    signal.pidfd_send_signal(ended, number)
            if follow >= 0:
                _refresh(order, follow, name)
    finally:
        signal.set_wakeup_fd(-1)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(ended, signal.SIGKILL)


def _received(control: socket.socket) -> bytes | None:
    """Return the signal numbers that the front end sent, or None if it has gone."""
    try:
        return control.recv(64) or None
    except BlockingIOError:
        return b""
    except ConnectionError:  # it was killed before it had read our message
        return None


def _reap_orphans(payload: int) -> None:
    """Collect what the payload has orphaned and has ended; the payload itself is left to the one who waits for it."""
    with suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == payload:
                return
            os.waitpid(ended.si_pid, 0)


def _refresh(order: Order, above: int, name: str) -> None:
    """Give the payload the source proxy again if the caller has replaced it and it still is the same user's.

    ``above``, ``name``: the source proxy's directory, opened as the caller, and its name there.
    """
    try:
        state = _state(os.stat(name, dir_fd=above, follow_symlinks=False))
    except OSError:
        return  # it is just being replaced
    if state == order.source_state:
        return
    order.source_state = state  # a proxy is refused once, not every second
    try:
        pem, order.source_state = read_proxy("GLEXEC_SOURCE_PROXY", order.source_proxy, order.caller)
        fresh = mapper.identify(pem, order.conf, pwd.getpwnam(MAPPER_ACCOUNT))
        if (fresh.uid, fresh.dn) != (order.identity.uid, order.identity.dn):
            raise Refusal(AUTHORISATION_ERROR, f"it is {fresh.dn}'s")
        _write_target_proxy(order, pem)
    except (OSError, Refusal) as error:
        words = {"caller": order.caller.pw_name, "target": order.target.pw_name, "proxy": f"not refreshed: {error}"}
        record.note(words)
