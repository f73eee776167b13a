"""The part that is root: decides, switches, watches, cleans up. Reached by sudo from ``front`` only.

Two processes of it live as long as the payload: the *supervisor*, which decided and which cleans up, and its child, the
*monitor*, which started the payload and watches it. If either is killed, the other one cleans up; if both are, the kernel
kills the payload's first process and the next call kills the rest (``tree``).
"""

import contextlib
import os
import pwd
import resource
import select
import signal
import socket
import stat
import sys
import syslog
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from . import mapper, policy
from .policy import AUTHORISATION_ERROR, CLIENT_ERROR, CONTROL, SYSTEM_ERROR, Conf, Refusal
from .sandbox import Sandbox
from .tree import Tree, adopt_orphans, die_with_parent

KILLED = 137
REFRESH = 1.0  # seconds between looks at the source proxy
_LIMITS = (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_DATA)

FileState = tuple[int, int, int, int]  # device, inode, time of change in ns, size


@dataclass
class Call:
    """One call of glexec, as far as it has been decided."""

    caller: pwd.struct_passwd
    conf: Conf
    command: list[str]
    environment: Mapping[str, str]
    identity: mapper.Identity | None = None
    target: pwd.struct_passwd | None = None
    groups: list[int] = field(default_factory=list)
    sandbox: Sandbox | None = None
    source_proxy: str = ""
    source_state: FileState | None = None
    target_proxy: str = ""
    proxies: set[tuple[int, int]] = field(default_factory=set)  # (device, inode) of the caller's, which stay his
    limits: list[tuple[int, int]] = field(default_factory=list)


def main() -> int:
    """Run one call and return the exit code; the command is in ``sys.argv[1:]``, the rest in GLEXEC_* variables."""
    os.umask(0o077)
    os.closerange(CONTROL + 1, 0x7FFFFFFF)
    for name in policy.FORWARDED_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # the terminal's are meant for the front end, which forwards
    syslog.openlog("glexec", syslog.LOG_PID, syslog.LOG_AUTHPRIV)
    began = time.monotonic()
    call: Call | None = None
    log: dict[str, object] = {}
    control: socket.socket | None = None
    try:
        control = _control()
        call = _begin(sys.argv[1:], os.environ)
        call.limits = _lift_limits()
        _decide(call)
        code = _supervise(call, control, log)
    except Refusal as refusal:
        code = refusal.code
        log["reason"] = refusal.reason
        _refuse(control, refusal)
    except Exception as error:  # any doubt: nothing runs, and the log says why
        code = SYSTEM_ERROR
        log["reason"] = f"{type(error).__name__}: {error}"
        _refuse(control, Refusal(code, "internal error: see the node's log (glexec)"))
    _log(call, code, time.monotonic() - began, log)
    return code


def _control() -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.fstat(CONTROL).st_mode):
            raise OSError
        control = socket.socket(fileno=CONTROL)
    except OSError:
        raise Refusal(CLIENT_ERROR, "glexec-root is not for direct use: call /usr/sbin/glexec") from None
    control.set_inheritable(False)
    control.setblocking(False)
    return control


def _lift_limits() -> list[tuple[int, int]]:
    """Free this process from the caller's resource limits, which could kill it half-way; return them for the payload."""
    found = [resource.getrlimit(limit) for limit in _LIMITS]
    for limit in _LIMITS:
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return found


def _refuse(control: socket.socket | None, refusal: Refusal) -> None:
    """Tell the front end that nothing ran; it writes the message, as the caller."""
    if control is None:
        print(f"glexec: {refusal.reason}", file=sys.stderr)
    else:
        with contextlib.suppress(OSError):
            control.send(policy.REFUSED + bytes([refusal.code]) + refusal.reason.encode())


def _log(call: Call | None, code: int, wall: float, more: Mapping[str, object]) -> None:
    """Write the one line of this call."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    identity, target = (call.identity, call.target) if call else (None, None)
    fields: dict[str, object] = {
        "caller": call.caller.pw_name if call else os.environ.get("SUDO_USER", "?"),
        "target": target.pw_name if target else "-",
        "dn": identity.dn if identity else "",
        "fqan": identity.fqan if identity else "",
        "id": call.environment.get("GLEXEC_ID", "") if call else "",
        "exit": code,
        "wall": f"{wall:.1f}",
        "cpu": f"{used.ru_utime + used.ru_stime:.1f}",
    }
    level = syslog.LOG_WARNING if CLIENT_ERROR <= code <= AUTHORISATION_ERROR else syslog.LOG_NOTICE
    syslog.syslog(level, policy.record({**fields, **more}))


# --- decisions ------------------------------------------------------------------------------------------------------


def _begin(command: list[str], environment: Mapping[str, str]) -> Call:
    """Return the call with its caller checked against the white list. Raises Refusal."""
    if os.geteuid() != 0:
        raise Refusal(SYSTEM_ERROR, "glexec-root runs without root's rights: is it on a nosuid mount or in a container?")
    conf = policy.parse_conf(_trusted(policy.CONF_PATH))
    _trusted(conf.lcmaps_db_file)
    try:
        caller = pwd.getpwuid(int(environment.get("SUDO_UID", "")))
    except (ValueError, KeyError):
        raise Refusal(AUTHORISATION_ERROR, "the caller has no account on this node") from None
    if not policy.listed(caller.pw_name, conf.user_white_list):
        raise Refusal(AUTHORISATION_ERROR, f"{caller.pw_name} is not in user_white_list of {policy.CONF_PATH}")
    return Call(caller, conf, command, dict(environment))


def _trusted(path: str) -> str:
    """Return the content of a file that only root can have written. Raises Refusal (202)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, encoding="utf-8", errors="strict") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
                raise Refusal(SYSTEM_ERROR, f"{path} must be a file of root's that nobody else can write (chmod go-w)")
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(SYSTEM_ERROR, f"{path}: {error}") from error


def _decide(call: Call) -> None:
    """Find out who the payload is for and what it gets. Raises Refusal."""
    environment, caller = call.environment, call.caller
    if not call.command:
        raise Refusal(CLIENT_ERROR, "no command given")
    if environment.get("GLEXEC_MODE", "lcmaps_get_account") != "lcmaps_get_account":
        raise Refusal(CLIENT_ERROR, "GLEXEC_MODE: only lcmaps_get_account is known")
    with _acting_as(caller):
        pem, state = _read_proxy("GLEXEC_CLIENT_CERT", environment.get("GLEXEC_CLIENT_CERT", ""), caller.pw_uid)
        if "GLEXEC_SOURCE_PROXY" in environment:
            call.source_proxy = environment["GLEXEC_SOURCE_PROXY"]
            _, call.source_state = _read_proxy("GLEXEC_SOURCE_PROXY", call.source_proxy, caller.pw_uid)
        if "GLEXEC_SANDBOX" in environment:
            if not call.conf.sandbox_handover:
                raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {policy.CONF_PATH} does not say sandbox_handover = yes")
            call.sandbox = Sandbox(environment["GLEXEC_SANDBOX"], caller.pw_uid)

    call.identity = mapper.identify(pem, call.conf, pwd.getpwnam(policy.MAPPER_ACCOUNT))
    try:
        target = pwd.getpwuid(call.identity.uid)
    except KeyError:
        raise Refusal(AUTHORISATION_ERROR, f"the proxy maps to uid {call.identity.uid}, which has no account") from None
    call.groups = os.getgrouplist(target.pw_name, target.pw_gid)
    policy.check_target(target.pw_name, target.pw_uid, call.identity.gid, call.groups, caller.pw_uid, call.conf)
    call.target = target
    call.proxies.add(state[:2])
    if call.source_state:
        call.proxies.add(call.source_state[:2])
        wanted = environment.get("GLEXEC_TARGET_PROXY") or f"/tmp/x509up_glexec_{target.pw_uid}_{os.getpid()}"  # noqa: S108
        call.target_proxy = "" if wanted == os.devnull else wanted


@contextlib.contextmanager
def _acting_as(account: pwd.struct_passwd) -> Iterator[None]:
    """Use files with the rights of ``account`` only, for a while."""
    groups = os.getgroups()
    os.setgroups(os.getgrouplist(account.pw_name, account.pw_gid))
    os.setegid(account.pw_gid)
    os.seteuid(account.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def _read_proxy(variable: str, path: str, owner: int) -> tuple[bytes, FileState]:
    """Return the content of a proxy file and what identifies its state; acts with the caller's rights.

    Raises Refusal (201) unless it is a regular file of ``owner`` that nobody else may use.
    """
    if not path.startswith("/"):
        raise Refusal(CLIENT_ERROR, f"{variable} must be the absolute path of a proxy")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != owner or found.st_mode & 0o7077:
                raise Refusal(CLIENT_ERROR, f"{variable}: {path} must be a file of the caller's that is his alone (mode 0600)")
            pem = file.read(policy.LARGEST_PROXY + 1)
    except OSError as error:
        raise Refusal(CLIENT_ERROR, f"{variable}: {path}: {error.strerror}") from error
    if len(pem) > policy.LARGEST_PROXY:
        raise Refusal(CLIENT_ERROR, f"{variable}: {path} is larger than {policy.LARGEST_PROXY} bytes")
    return pem, _state(found)


def _state(found: os.stat_result) -> FileState:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _write_target_proxy(call: Call, pem: bytes) -> None:
    """Put ``pem`` at the target proxy's path with the target's rights; it replaces only a file of the target's.

    Raises Refusal (201) where the path is not absolute or its directory is not the target's, /tmp's kind, or the sandbox.
    """
    path, target = call.target_proxy, call.target
    if target is None or not path.startswith("/"):
        raise Refusal(CLIENT_ERROR, "GLEXEC_TARGET_PROXY must be an absolute path")
    partial = f"{path}.{os.getpid()}"
    with _acting_as(target):
        try:
            above = os.stat(os.path.dirname(path))
            in_sandbox = call.sandbox is not None and os.path.samestat(above, os.fstat(call.sandbox.fd))
            sticky = bool(above.st_mode & stat.S_ISVTX) and above.st_uid == 0
            if not in_sandbox and not sticky and (above.st_uid != target.pw_uid or above.st_mode & 0o002):
                raise Refusal(CLIENT_ERROR, f"GLEXEC_TARGET_PROXY: the directory of {path} must belong to {target.pw_name} alone")
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(path)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != target.pw_uid:
                    raise Refusal(CLIENT_ERROR, f"GLEXEC_TARGET_PROXY: {path} exists and is not {target.pw_name}'s")
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(pem)
            os.rename(partial, path)
        except OSError as error:
            raise Refusal(CLIENT_ERROR, f"GLEXEC_TARGET_PROXY: {path}: {error.strerror}") from error


# --- supervisor and monitor -----------------------------------------------------------------------------------------


def _supervise(call: Call, control: socket.socket, log: dict[str, object]) -> int:
    """Have the monitor run the payload, clean up whatever happens, and return the exit code."""
    adopt_orphans()
    caller = os.pidfd_open(os.getppid())
    tree = Tree()
    log["tracking"] = tree.tracking
    supervisor = os.pidfd_open(os.getpid())
    reports, report = os.pipe()
    monitor = os.fork()
    if monitor == 0:
        os.close(reports)
        os._exit(_monitor(call, tree, control, caller, supervisor, report))
    os.close(report)
    with open(reports, encoding="utf-8", errors="replace") as file:
        words = file.read()  # ends when the monitor does: the payload has no copy of the descriptor
    _, status = os.waitpid(monitor, 0)
    _clean_up(call, tree, log)
    kind, _, text = words.partition(" ")
    if kind == "refused":
        code, _, reason = text.partition(" ")
        raise Refusal(int(code), reason)
    if not os.WIFEXITED(status):
        raise Refusal(SYSTEM_ERROR, "the monitor was killed, and the payload with it")
    if kind == "ended":
        log["pid"] = text
    elif words:
        log["reason"] = words
    return os.WEXITSTATUS(status)


def _clean_up(call: Call, tree: Tree, log: dict[str, object]) -> None:
    """Leave nothing of the payload: no process, no proxy, no file of its uid in the sandbox. Safe to call twice."""
    if not tree.kill():
        log["leftover"] = "processes"
    if call.target and call.target_proxy:
        with contextlib.suppress(OSError), _acting_as(call.target):
            if os.lstat(call.target_proxy).st_uid == call.target.pw_uid:
                os.unlink(call.target_proxy)
    if call.target and call.sandbox:
        withheld = call.sandbox.hand_back(call.target.pw_uid)
        if withheld:
            log["withheld"] = ", ".join(withheld)


def _monitor(call: Call, tree: Tree, control: socket.socket, caller: int, supervisor: int, report: int) -> int:
    """Start the payload and watch it; return the exit code. Runs in the supervisor's child, which never returns."""
    try:
        adopt_orphans()
        payload = _start(call, tree)
        with contextlib.suppress(OSError):
            control.send(policy.STARTED)
        try:
            words, code = _watch(call, payload, control, caller, supervisor)
        finally:
            signal.set_wakeup_fd(-1)
    except Refusal as refusal:
        words, code = f"refused {refusal.code} {refusal.reason}", refusal.code
    except Exception as error:
        words, code = f"refused {SYSTEM_ERROR} {type(error).__name__}: {error}", SYSTEM_ERROR
    if select.select([supervisor], [], [], 0)[0]:  # it was killed: there is no one else left to do this
        log: dict[str, object] = {"tracking": tree.tracking, "reason": "the supervisor was killed"}
        with contextlib.suppress(Exception):
            _clean_up(call, tree, log)
        _log(call, KILLED, 0.0, log)
    with contextlib.suppress(OSError):
        os.write(report, words.encode(errors="replace")[:4096])
    return code


def _start(call: Call, tree: Tree) -> int:
    """Prepare what the payload needs and start it; return its pid. Raises Refusal."""
    target, identity = call.target, call.identity
    if target is None or identity is None:
        raise Refusal(SYSTEM_ERROR, "nothing was decided")
    if call.sandbox:
        call.sandbox.hand_out(target.pw_uid, identity.gid, call.proxies)
    if call.target_proxy:
        with _acting_as(call.caller):
            pem, call.source_state = _read_proxy("GLEXEC_SOURCE_PROXY", call.source_proxy, call.caller.pw_uid)
        _write_target_proxy(call, pem)
    environment = policy.payload_environment(
        target.pw_name, target.pw_dir, target.pw_shell, call.conf, call.environment, call.target_proxy
    )
    monitor = os.getpid()
    errors, error = os.pipe()
    payload = os.fork()
    if payload == 0:
        _become_payload(call, target, identity.gid, tree, environment, monitor, error)
    os.close(error)
    with open(errors, encoding="utf-8", errors="replace") as file:
        failed = file.read()  # empty when the command runs: exec closes the other end
    if failed:
        os.waitpid(payload, 0)
        code, _, reason = failed.partition(" ")
        raise Refusal(int(code), reason)
    return payload


def _become_payload(
    call: Call, target: pwd.struct_passwd, gid: int, tree: Tree, environment: dict[str, str], monitor: int, error: int
) -> None:
    """Take the target's identity for good and execute the command; never returns."""
    code, step = SYSTEM_ERROR, "cannot take the payload's identity"
    try:
        os.setsid()
        tree.enter()
        for limit, value in zip(_LIMITS, call.limits, strict=True):
            resource.setrlimit(limit, value)
        os.setgroups(call.groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(target.pw_uid, target.pw_uid, target.pw_uid)
        die_with_parent()
        if os.getppid() != monitor:
            os._exit(KILLED)
        code, step = CLIENT_ERROR, "working directory"
        _change_directory(call, target)
        step = call.command[0]
        if not os.path.isfile(step) or not os.access(step, os.X_OK):
            raise FileNotFoundError(0, f"not an executable file for {target.pw_name}")
        # Python ignores some of these, and what is ignored stays so over exec: a payload would miss its SIGPIPE.
        for number in signal.valid_signals():
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        code = policy.CANNOT_EXECUTE
        os.execve(call.command[0], call.command, environment)  # noqa: S606
    except Exception as failure:
        reason = failure.strerror if isinstance(failure, OSError) else f"{type(failure).__name__}: {failure}"
        os.write(error, f"{code} {step}: {reason}".encode(errors="replace"))
    finally:
        os._exit(KILLED)


def _change_directory(call: Call, target: pwd.struct_passwd) -> None:
    """Go to the sandbox; without one stay where the caller is if the target may, or go to the target's home."""
    if call.sandbox:
        os.chdir(call.sandbox.path)  # by name: the whole way must be open to the target
        return
    try:
        os.chdir(os.getcwd())
    except OSError:
        os.chdir(target.pw_dir)


def _watch(call: Call, payload: int, control: socket.socket, caller: int, supervisor: int) -> tuple[str, int]:
    """Wait for the payload's end, pass on signals and fresh proxies; return words for the supervisor and the exit code."""
    ended = os.pidfd_open(payload)
    wakes, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    for name in (*policy.FORWARDED_SIGNALS, "SIGCHLD"):  # sent by a batch system, which is root and need not ask the front end
        signal.signal(getattr(signal, name), lambda *_: None)
    poll = select.poll()
    for watched in (ended, control.fileno(), caller, supervisor, wakes.fileno()):
        poll.register(watched, select.POLLIN)
    follow = bool(call.sandbox and call.target_proxy)
    allowed = {getattr(signal, name) for name in policy.FORWARDED_SIGNALS}
    while True:
        ready = {fd for fd, _ in poll.poll(REFRESH * 1000 if follow else None)}
        if ended in ready:
            _, status = os.waitpid(payload, 0)
            return f"ended {payload}", policy.exit_code(status)
        if supervisor in ready:
            return "the supervisor was killed", KILLED
        numbers = b""
        if wakes.fileno() in ready:
            numbers += wakes.recv(64)
            _reap_orphans(payload)
        if control.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                message = control.recv(64)
                if not message:
                    return "the caller has gone", KILLED
                numbers += message
        if caller in ready:
            return "the caller has gone", KILLED
        for number in numbers:
            if number in allowed:
                signal.pidfd_send_signal(ended, number)
        if follow:
            _refresh(call)


def _reap_orphans(payload: int) -> None:
    """Collect what the payload has orphaned and has ended; the payload itself is left to the one who waits for it."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == payload:
                return
            os.waitpid(ended.si_pid, 0)


def _refresh(call: Call) -> None:
    """Give the payload the source proxy again if the caller has replaced it and it still is the same user's."""
    try:
        with _acting_as(call.caller):
            state = _state(os.lstat(call.source_proxy))
            if state == call.source_state:
                return
            call.source_state = state  # a proxy is refused once, not every second
            pem, call.source_state = _read_proxy("GLEXEC_SOURCE_PROXY", call.source_proxy, call.caller.pw_uid)
        identity = mapper.identify(pem, call.conf, pwd.getpwnam(policy.MAPPER_ACCOUNT))
        if call.identity is None or (identity.uid, identity.dn) != (call.identity.uid, call.identity.dn):
            raise Refusal(AUTHORISATION_ERROR, f"it is {identity.dn}'s")
        _write_target_proxy(call, pem)
    except (OSError, Refusal) as error:
        syslog.syslog(syslog.LOG_WARNING, policy.record({"caller": call.caller.pw_name, "proxy": f"not refreshed: {error}"}))
