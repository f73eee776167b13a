"""The part that is root: decides, switches, watches, cleans up. Reached by sudo from ``front`` only.

Two processes of it live as long as the payload: the *supervisor*, which decided and which cleans up, and its child,
the *monitor*, which started the payload and watches it. If one is killed, the other one cleans up; if both are, the
kernel kills the payload's first process and the next call kills the rest (``tree``).
"""

# ruff: noqa: PTH104, PTH108, PTH109, PTH113, PTH116, PTH120
# Descriptors and single system calls: between two looks at a path it may have become another file.

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
from dataclasses import dataclass

from . import mapper, policy
from .policy import AUTHORISATION_ERROR, CLIENT_ERROR, CONTROL, SYSTEM_ERROR, Conf, Refusal
from .sandbox import Sandbox
from .tree import Tree, adopt_orphans, die_with_parent

KILLED = 137
REFRESH = 1.0  # seconds between looks at the source proxy
_LIMITS = (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_DATA)

FileState = tuple[int, int, int, int]  # device, inode, time of change in ns, size
Log = dict[str, object]


@dataclass
class Order:
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
    proxies: set[tuple[int, int]]  # (device, inode) of the caller's proxy files, which stay his
    source_proxy: str
    source_state: FileState | None
    target_proxy: str
    limits: list[tuple[int, int]]  # the caller's, of _LIMITS


@dataclass(frozen=True)
class Peers:
    """Who else is there: the front end's socket, and pidfds of the front end and of the supervisor."""

    control: socket.socket
    caller: int
    supervisor: int


def main() -> int:
    """Run one call and return the exit code; the command is in ``sys.argv[1:]``, the rest in GLEXEC_* variables."""
    os.umask(0o077)
    os.closerange(CONTROL + 1, 0x7FFFFFFF)
    for name in policy.FORWARDED_SIGNALS:  # those of a terminal are meant for the front end, which passes them on
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    syslog.openlog("glexec", syslog.LOG_PID, syslog.LOG_AUTHPRIV)
    began = time.monotonic()
    log: Log = {"caller": os.environ.get("SUDO_USER", "?"), "target": "-", "dn": "", "fqan": ""}
    log["id"] = os.environ.get("GLEXEC_ID", "")
    control: socket.socket | None = None
    try:
        control = _control()
        order = _decide(sys.argv[1:], os.environ, log)
        code = _supervise(order, control, log)
    except Refusal as refusal:
        code = refusal.code
        log["reason"] = refusal.reason
        _refuse(control, refusal)
    except Exception as error:  # any doubt: nothing runs, and the log says why
        code = SYSTEM_ERROR
        log["reason"] = f"{type(error).__name__}: {error}"
        _refuse(control, Refusal(code, "internal error: see the node's log (glexec)"))
    _write(log, code, time.monotonic() - began)
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


def _refuse(control: socket.socket | None, refusal: Refusal) -> None:
    """Tell the front end that nothing ran; it writes the message, as the caller."""
    if control is None:
        print(f"glexec: {refusal.reason}", file=sys.stderr)
    else:
        with contextlib.suppress(OSError):
            control.send(policy.REFUSED + bytes([refusal.code]) + refusal.reason.encode(errors="replace"))


def _write(log: Log, code: int, wall: float) -> None:
    """Write the one line of this call."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    counted = {"exit": code, "wall": f"{wall:.1f}", "cpu": f"{used.ru_utime + used.ru_stime:.1f}"}
    level = syslog.LOG_WARNING if code in {CLIENT_ERROR, SYSTEM_ERROR, AUTHORISATION_ERROR} else syslog.LOG_NOTICE
    syslog.syslog(level, policy.record(log | counted))


# --- decisions ------------------------------------------------------------------------------------------------------


def _decide(command: list[str], environment: Mapping[str, str], log: Log) -> Order:
    """Find out who calls, who the payload is for, and what it gets. Raises Refusal."""
    if os.geteuid() != 0:
        raise Refusal(SYSTEM_ERROR, "glexec-root runs without root's rights: is it on a nosuid mount?")
    conf = policy.parse_conf(_trusted(policy.CONF_PATH))
    _trusted(conf.lcmaps_db_file)
    try:
        caller = pwd.getpwuid(int(environment.get("SUDO_UID", "")))
    except (ValueError, KeyError):
        raise Refusal(AUTHORISATION_ERROR, "the caller has no account on this node") from None
    if not policy.listed(caller.pw_name, conf.user_white_list):
        raise Refusal(AUTHORISATION_ERROR, f"{caller.pw_name} is not in user_white_list of {policy.CONF_PATH}")
    if not command:
        raise Refusal(CLIENT_ERROR, "no command given")
    if environment.get("GLEXEC_MODE", "lcmaps_get_account") != "lcmaps_get_account":
        raise Refusal(CLIENT_ERROR, "GLEXEC_MODE: only lcmaps_get_account is known")

    limits = _lift_limits()
    source_proxy, source_state, sandbox = environment.get("GLEXEC_SOURCE_PROXY"), None, None
    with _acting_as(caller):
        pem, state = _read_proxy("GLEXEC_CLIENT_CERT", environment.get("GLEXEC_CLIENT_CERT", ""), caller.pw_uid)
        proxies = {state[:2]}
        if source_proxy is not None:
            _, source_state = _read_proxy("GLEXEC_SOURCE_PROXY", source_proxy, caller.pw_uid)
            proxies.add(source_state[:2])
        if "GLEXEC_SANDBOX" in environment:
            if not conf.sandbox_handover:
                raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {policy.CONF_PATH} does not say sandbox_handover = yes")
            sandbox = Sandbox(environment["GLEXEC_SANDBOX"], caller.pw_uid)

    identity = mapper.identify(pem, conf, pwd.getpwnam(policy.MAPPER_ACCOUNT))
    log |= {"dn": identity.dn, "fqan": identity.fqan}
    try:
        target = pwd.getpwuid(identity.uid)
    except KeyError:
        raise Refusal(AUTHORISATION_ERROR, f"the proxy maps to uid {identity.uid}, which has no account") from None
    groups = os.getgrouplist(target.pw_name, target.pw_gid)
    policy.check_target(target.pw_name, target.pw_uid, caller.pw_uid, conf)
    policy.check_group(target.pw_name, identity.gid, groups)
    log["target"] = target.pw_name
    target_proxy = ""
    if source_state:
        default = f"/tmp/x509up_glexec_{target.pw_uid}_{os.getpid()}"  # noqa: S108 - made with O_EXCL
        target_proxy = environment.get("GLEXEC_TARGET_PROXY") or default
    return Order(
        caller=caller,
        target=target,
        gid=identity.gid,
        groups=groups,
        identity=identity,
        conf=conf,
        command=command,
        environment=dict(environment),
        sandbox=sandbox,
        proxies=proxies,
        source_proxy=source_proxy or "",
        source_state=source_state,
        target_proxy="" if target_proxy == os.devnull else target_proxy,
        limits=limits,
    )


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


def _lift_limits() -> list[tuple[int, int]]:
    """Free this process from the caller's resource limits, which could kill it half-way; return the payload's."""
    found = [resource.getrlimit(limit) for limit in _LIMITS]
    for limit in _LIMITS:
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return found


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


def _state(found: os.stat_result) -> FileState:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


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
                raise Refusal(CLIENT_ERROR, f"{variable}: {path} must be the caller's own file, of mode 0600 or less")
            pem = file.read(policy.LARGEST_PROXY + 1)
    except OSError as error:
        raise Refusal(CLIENT_ERROR, f"{variable}: {path}: {error.strerror}") from error
    if len(pem) > policy.LARGEST_PROXY:
        raise Refusal(CLIENT_ERROR, f"{variable}: {path} is larger than {policy.LARGEST_PROXY} bytes")
    return pem, _state(found)


def _write_target_proxy(order: Order, pem: bytes) -> None:
    """Put ``pem`` at the target proxy's path with the target's rights; it replaces only a file of the target's.

    Raises Refusal (201) where the path is not absolute or its directory is not the target's, /tmp's kind, or the
    sandbox.
    """
    path, owner, name = order.target_proxy, order.target.pw_uid, order.target.pw_name
    if not path.startswith("/"):
        raise Refusal(CLIENT_ERROR, "GLEXEC_TARGET_PROXY must be an absolute path")
    partial = f"{path}.{os.getpid()}"
    with _acting_as(order.target):
        try:
            above = os.stat(os.path.dirname(path))
            in_sandbox = order.sandbox is not None and os.path.samestat(above, os.fstat(order.sandbox.fd))
            sticky = bool(above.st_mode & stat.S_ISVTX) and above.st_uid == 0
            if not in_sandbox and not sticky and (above.st_uid != owner or above.st_mode & 0o002):
                raise Refusal(CLIENT_ERROR, f"GLEXEC_TARGET_PROXY: the directory of {path} must be {name}'s alone")
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(path)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != owner:
                    raise Refusal(CLIENT_ERROR, f"GLEXEC_TARGET_PROXY: {path} exists and is not {name}'s")
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(pem)
            os.rename(partial, path)
        except OSError as error:
            raise Refusal(CLIENT_ERROR, f"GLEXEC_TARGET_PROXY: {path}: {error.strerror}") from error


# --- supervisor -----------------------------------------------------------------------------------------------------


def _supervise(order: Order, control: socket.socket, log: Log) -> int:
    """Have the monitor run the payload, clean up whatever happens, and return the exit code. Raises Refusal."""
    adopt_orphans()
    peers = Peers(control, os.pidfd_open(os.getppid()), os.pidfd_open(os.getpid()))
    tree = Tree()
    log["tracking"] = tree.tracking
    reports, report = os.pipe()
    monitor = os.fork()
    if monitor == 0:
        os.close(reports)
        os._exit(_monitor(order, tree, peers, report, log))
    os.close(report)
    with open(reports, encoding="utf-8", errors="replace") as file:
        words = file.read()  # ends when the monitor does: the payload has no copy of the descriptor
    _, status = os.waitpid(monitor, 0)
    _clean_up(order, tree, log)
    kind, _, text = words.partition(" ")
    if kind == "refused":
        code, _, reason = text.partition(" ")
        raise Refusal(int(code), reason)
    if not os.WIFEXITED(status):
        raise Refusal(SYSTEM_ERROR, "the monitor was killed, and the payload with it")
    log["pid" if kind == "ended" else "reason"] = text if kind == "ended" else words
    return os.WEXITSTATUS(status)


def _clean_up(order: Order, tree: Tree, log: Log) -> None:
    """Leave nothing of the payload: no process, no proxy, no file of its uid in the sandbox. Safe to call twice."""
    if not tree.kill():
        log["leftover"] = "processes"
    if order.target_proxy:
        with contextlib.suppress(OSError), _acting_as(order.target):
            if os.lstat(order.target_proxy).st_uid == order.target.pw_uid:
                os.unlink(order.target_proxy)
    if order.sandbox:
        withheld = order.sandbox.hand_back(order.target.pw_uid)
        if withheld:
            log["withheld"] = ", ".join(withheld)


# --- monitor --------------------------------------------------------------------------------------------------------


def _monitor(order: Order, tree: Tree, peers: Peers, report: int, log: Log) -> int:
    """Start the payload and watch it; return the exit code. Runs in the supervisor's child, which never returns."""
    try:
        adopt_orphans()
        payload = _start(order, tree)
        with contextlib.suppress(OSError):
            peers.control.send(policy.STARTED)
        words, code = _watch(order, payload, peers)
    except Refusal as refusal:
        words, code = f"refused {refusal.code} {refusal.reason}", refusal.code
    except Exception as error:
        words, code = f"refused {SYSTEM_ERROR} {type(error).__name__}: {error}", SYSTEM_ERROR
    if select.select([peers.supervisor], [], [], 0)[0]:  # it was killed: there is nobody else to do this
        log["reason"] = "the supervisor was killed"
        with contextlib.suppress(Exception):
            _clean_up(order, tree, log)
        _write(log, KILLED, 0.0)
    with contextlib.suppress(OSError):
        os.write(report, words.encode(errors="replace")[:4096])
    return code


def _start(order: Order, tree: Tree) -> int:
    """Prepare what the payload needs and start it; return its pid. Raises Refusal."""
    if order.sandbox:
        order.sandbox.hand_out(order.target.pw_uid, order.gid, order.proxies)
    if order.target_proxy:
        with _acting_as(order.caller):
            pem, order.source_state = _read_proxy("GLEXEC_SOURCE_PROXY", order.source_proxy, order.caller.pw_uid)
        _write_target_proxy(order, pem)
    monitor = os.getpid()
    errors, error = os.pipe()
    payload = os.fork()
    if payload == 0:
        _become_payload(order, tree, monitor, error)
    os.close(error)
    with open(errors, encoding="utf-8", errors="replace") as file:
        failed = file.read()  # empty when the command runs: exec closes the other end
    if failed:
        os.waitpid(payload, 0)
        code, _, reason = failed.partition(" ")
        raise Refusal(int(code), reason)
    return payload


def _become_payload(order: Order, tree: Tree, monitor: int, error: int) -> None:
    """Take the target's identity for good and execute the command; never returns. A failure goes to ``error``."""
    target, command = order.target, order.command
    code, step = SYSTEM_ERROR, "cannot take the payload's identity"
    try:
        os.setsid()
        tree.enter()
        for limit, value in zip(_LIMITS, order.limits, strict=True):
            resource.setrlimit(limit, value)
        os.setgroups(order.groups)
        os.setresgid(order.gid, order.gid, order.gid)
        os.setresuid(target.pw_uid, target.pw_uid, target.pw_uid)
        die_with_parent()
        if os.getppid() != monitor:
            os._exit(KILLED)
        code, step = CLIENT_ERROR, "working directory"
        _change_directory(order)
        step = command[0]
        if not os.path.isfile(step) or not os.access(step, os.X_OK):
            raise FileNotFoundError(0, f"not an executable file for {target.pw_name}")
        # Python ignores some of these, and what is ignored stays so over exec: a payload would miss its SIGPIPE.
        for number in signal.valid_signals():
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        code = policy.CANNOT_EXECUTE
        account = {"name": target.pw_name, "home": target.pw_dir, "shell": target.pw_shell}
        environment = policy.payload_environment(account, order.conf, order.environment, order.target_proxy)
        os.execve(command[0], command, environment)  # noqa: S606
    except Exception as failure:
        reason = failure.strerror if isinstance(failure, OSError) else f"{type(failure).__name__}: {failure}"
        os.write(error, f"{code} {step}: {reason}".encode(errors="replace"))
    finally:
        os._exit(KILLED)


def _change_directory(order: Order) -> None:
    """Go to the sandbox; without one stay where the caller is if the target may, or go to the target's home."""
    if order.sandbox:
        os.chdir(order.sandbox.path)  # by name: the whole way must be open to the target
        return
    try:
        os.chdir(os.getcwd())
    except OSError:
        os.chdir(order.target.pw_dir)


def _watch(order: Order, payload: int, peers: Peers) -> tuple[str, int]:
    """Wait for the payload's end, pass on signals and fresh proxies; return words for the log and the exit code."""
    ended = os.pidfd_open(payload)
    wakes, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    # These signals come from a batch system, which is root and need not ask the front end.
    for name in (*policy.FORWARDED_SIGNALS, "SIGCHLD"):
        signal.signal(getattr(signal, name), lambda *_: None)
    poll = select.poll()
    for watched in (ended, peers.control.fileno(), peers.caller, peers.supervisor, wakes.fileno()):
        poll.register(watched, select.POLLIN)
    follow = bool(order.sandbox and order.target_proxy)
    try:
        while True:
            ready = {fd for fd, _ in poll.poll(REFRESH * 1000 if follow else None)}
            if ended in ready:
                _, status = os.waitpid(payload, 0)
                return f"ended {payload}", policy.exit_code(status)
            if peers.supervisor in ready:
                return "the supervisor was killed", KILLED
            numbers = wakes.recv(64) if wakes.fileno() in ready else b""
            asked = _received(peers.control) if peers.control.fileno() in ready else b""
            if asked is None or peers.caller in ready:
                return "the caller has gone", KILLED
            _reap_orphans(payload)
            for number in numbers + asked:
                if number in policy.FORWARDED_NUMBERS:
                    signal.pidfd_send_signal(ended, number)
            if follow:
                _refresh(order)
    finally:
        signal.set_wakeup_fd(-1)


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
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == payload:
                return
            os.waitpid(ended.si_pid, 0)


def _refresh(order: Order) -> None:
    """Give the payload the source proxy again if the caller has replaced it and it still is the same user's."""
    try:
        with _acting_as(order.caller):
            state = _state(os.lstat(order.source_proxy))
            if state == order.source_state:
                return
            order.source_state = state  # a proxy is refused once, not every second
            pem, order.source_state = _read_proxy("GLEXEC_SOURCE_PROXY", order.source_proxy, order.caller.pw_uid)
        fresh = mapper.identify(pem, order.conf, pwd.getpwnam(policy.MAPPER_ACCOUNT))
        if (fresh.uid, fresh.dn) != (order.identity.uid, order.identity.dn):
            raise Refusal(AUTHORISATION_ERROR, f"it is {fresh.dn}'s")
        _write_target_proxy(order, pem)
    except (OSError, Refusal) as error:
        words = {"caller": order.caller.pw_name, "target": order.target.pw_name, "proxy": f"not refreshed: {error}"}
        syslog.syslog(syslog.LOG_WARNING, policy.record(words))
