"""The part that is root: decides, switches, watches, cleans up. Reached by sudo from ``front`` only.

Two processes of it live as long as the payload: the *supervisor*, which decided and which cleans up, and its child,
the *monitor*, which started the payload and watches it. If one is killed, the other one cleans up; if both are, the
kernel kills the payload's first process, and the next call or the timer does the rest (``journal``).
"""

from __future__ import annotations

import grp
import os
import pwd
import resource
import select
import stat
import sys
import time

from ..lean import signal, socket, suppress
from ..mapping import MAPPER_ACCOUNT
from . import journal, mapper, monitor, policy, record
from .apart import open_as, run_as
from .monitor import LIMITS, Order, Peers
from .policy import AUTHORISATION_ERROR, CLIENT_ERROR, CONTROL, SYSTEM_ERROR, Conf, Refusal
from .record import Log
from .tree import KILLED, Tree, adopt_orphans, end

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .sandbox import Sandbox

_SWEEP_PATIENCE = 60.0  # seconds


def main() -> int:
    """Run one call and return the exit code; the command is in ``sys.argv[1:]``, the rest in GLEXEC_* variables."""
    _isolate()
    log: Log = {"caller": os.environ.get("SUDO_USER", "?"), "target": "-", "dn": "", "fqan": ""}
    log |= {"id": os.environ.get("GLEXEC_ID", ""), "started": f"{time.time():.3f}"}
    control, file = None, -1
    try:
        control = _control()
        if os.geteuid() != 0:
            raise Refusal(SYSTEM_ERROR, "glexec-root runs without root's rights: is it on a nosuid mount?")
        _recover()
        conf = policy.parse_conf(_trusted(policy.CONF_PATH))
        file = record.open_log(conf.log_file) if conf.log_destination == "file" else -1
        log["batch"] = record.batch_job(os.getppid(), conf.batch_system) if conf.batch_system else ""
        code = _supervise(_decide(sys.argv[1:], os.environ, conf, log), control, log)
    except Refusal as refusal:
        code = refusal.code
        log["reason"] = refusal.reason
        _refuse(control, refusal)
    except Exception as error:  # any doubt: nothing runs, and the log says why
        code = SYSTEM_ERROR
        log["reason"] = f"{type(error).__name__}: {error}"
        _refuse(control, Refusal(code, "internal error: see the node's log (glexec)"))
    record.write(log, code, file)
    return code


def clean() -> int:
    """Clean up after calls that were cut off; for the timer."""
    _isolate()
    _recover()
    return 0


def _isolate() -> None:
    os.umask(0o077)
    os.closerange(CONTROL + 1, 0x7FFFFFFF)
    for name in policy.FORWARDED_SIGNALS:  # those of a terminal are meant for the front end, which passes them on
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def _control() -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.fstat(CONTROL).st_mode):
            raise OSError
        control = socket.socket(fileno=CONTROL)
    except OSError:
        raise Refusal(CLIENT_ERROR, "glexec-root is not for direct use: call /usr/sbin/glexec") from None
    os.set_inheritable(CONTROL, False)
    control.setblocking(False)
    return control


def _refuse(control: socket.socket | None, refusal: Refusal) -> None:
    """Tell the front end that nothing ran; it writes the message, as the caller."""
    if control is None:
        print(f"glexec: {refusal.reason}", file=sys.stderr)
    else:
        with suppress(OSError):
            control.send(policy.REFUSED + bytes([refusal.code]) + policy.clean(refusal.reason).encode())


# --- decisions ------------------------------------------------------------------------------------------------------


def _decide(command: list[str], environment: Mapping[str, str], conf: Conf, log: Log) -> Order:
    """Find out who calls, who the payload is for, and what it gets. Raises Refusal."""
    _trusted(conf.lcmaps_db_file)
    try:
        caller = pwd.getpwuid(int(environment.get("SUDO_UID", "")))
    except (ValueError, KeyError):
        raise Refusal(AUTHORISATION_ERROR, "the caller has no account on this node") from None
    members = {grp.getgrgid(gid).gr_name for gid in os.getgrouplist(caller.pw_name, caller.pw_gid)}
    policy.check_caller(caller.pw_name, members, conf)
    if not command:
        raise Refusal(CLIENT_ERROR, "no command given")
    if environment.get("GLEXEC_MODE", "lcmaps_get_account") != "lcmaps_get_account":
        raise Refusal(CLIENT_ERROR, "GLEXEC_MODE: only lcmaps_get_account is known")

    limits = _lift_limits()
    pem, state = monitor.read_proxy("GLEXEC_CLIENT_CERT", environment.get("GLEXEC_CLIENT_CERT", ""), caller)
    proxies, source_proxy, source_pem, source_state = {state[:2]}, environment.get("GLEXEC_SOURCE_PROXY"), b"", None
    if source_proxy is not None:
        source_pem, source_state = monitor.read_proxy("GLEXEC_SOURCE_PROXY", source_proxy, caller)
        proxies.add(source_state[:2])
    directory = environment.get("GLEXEC_SANDBOX", "")
    sandbox = _open_sandbox(directory, caller, conf) if "GLEXEC_SANDBOX" in environment else None

    identity = mapper.identify(pem, conf, pwd.getpwnam(MAPPER_ACCOUNT))
    log |= {"dn": identity.dn, "fqan": identity.fqan}
    try:
        account = pwd.getpwuid(identity.uid)
    except KeyError:
        raise Refusal(AUTHORISATION_ERROR, f"the proxy maps to uid {identity.uid}, which has no account") from None
    groups, gid = os.getgrouplist(account.pw_name, account.pw_gid), identity.gid
    policy.check_target(account.pw_name, account.pw_uid, caller.pw_name, caller.pw_uid, conf)
    policy.check_group(account.pw_name, gid, groups)
    log["target"] = account.pw_name
    if conf.logging_only:
        log["mode"] = "logging only"
        account, gid, sandbox = caller, caller.pw_gid, None
        groups = os.getgrouplist(caller.pw_name, caller.pw_gid)
    target_proxy = ""
    if source_state and conf.create_target_proxy:
        default = f"/tmp/x509up_glexec_{account.pw_uid}_{os.getpid()}"  # noqa: S108 - made with O_EXCL
        target_proxy = environment.get("GLEXEC_TARGET_PROXY") or default
    return Order(
        caller=caller,
        target=account,
        gid=gid,
        groups=groups + [kept for kept in os.getgroups() if kept in conf.tracking_gids],  # sudo leaves the caller's
        identity=identity,
        conf=conf,
        command=command,
        environment=dict(environment),
        sandbox=sandbox,
        directory=directory,
        proxies=proxies,
        source_proxy=source_proxy or "",
        source_pem=source_pem,
        source_state=source_state,
        target_proxy="" if target_proxy == os.devnull else target_proxy,
        limits=limits,
    )


def _trusted(path: str) -> str:
    """Return the content of a file that only root can have written. Raises Refusal (202)."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
                raise Refusal(SYSTEM_ERROR, f"{path} must be a file of root's that nobody else can write (chmod go-w)")
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(SYSTEM_ERROR, f"{path}: {error}") from error


def _lift_limits() -> list[tuple[int, int]]:
    """Free this process from the caller's resource limits, which could kill it half-way; return the payload's.

    It dumps no core: it has held private keys.
    """
    found = [resource.getrlimit(limit) for limit in LIMITS]
    for limit in LIMITS:
        with suppress(ValueError):  # root without CAP_SYS_RESOURCE, in a container
            resource.setrlimit(limit, (0, 0) if limit == resource.RLIMIT_CORE else (resource.RLIM_INFINITY,) * 2)
    return found


def _open_sandbox(path: str, caller: pwd.struct_passwd, conf: Conf) -> Sandbox:
    from .sandbox import Sandbox

    if not conf.sandbox_handover:
        raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {policy.CONF_PATH} does not say sandbox_handover = yes")
    if not path.startswith("/"):
        raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {path!r} is not an absolute path")
    try:
        return Sandbox(path, open_as(caller, path, os.O_RDONLY | os.O_DIRECTORY), caller.pw_uid)
    except OSError as error:
        raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {path}: {error.strerror}") from error


# --- supervisor -----------------------------------------------------------------------------------------------------


def _supervise(order: Order, control: socket.socket, log: Log) -> int:
    """Have the monitor run the payload, clean up whatever happens, and return the exit code. Raises Refusal."""
    adopt_orphans()
    peers = Peers(
        control=control, caller=os.pidfd_open(os.getppid()), supervisor=os.pidfd_open(os.getpid())
    )
    case = journal.Case(
        caller=order.caller.pw_uid, target=order.target.pw_uid, target_proxy=order.target_proxy, log=log
    )
    case.gridmapdir = order.conf.gridmapdir
    case.sweep = () if order.conf.logging_only else order.conf.sweep_directories
    if order.sandbox:
        case.sandbox, case.sandbox_mode = order.sandbox.path, order.sandbox.mode
        case.sandbox_device, case.sandbox_inode = order.sandbox.found.st_dev, order.sandbox.found.st_ino
    entry = journal.enter(case)
    tree = Tree()
    log["tracking"], case.cgroup = tree.tracking, tree.cgroup
    entry.write(case)
    reports, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reports)
        os._exit(_monitor(order, tree, peers, report, case, entry, log))
    os.close(report)
    case.monitor = child
    entry.write(case)
    with open(reports, encoding="utf-8", errors="replace") as file:
        words = file.read()  # ends when the monitor does: the payload has no copy of the descriptor
    _, status = os.waitpid(child, 0)
    _clean_up(case, order.sandbox, log)
    entry.close()
    kind, _, text = words.partition(" ")
    if kind == "refused":
        code, _, reason = text.partition(" ")
        raise Refusal(int(code), reason)
    log["ended"] = "killed"
    if not os.WIFEXITED(status):
        raise Refusal(SYSTEM_ERROR, "the monitor was killed, and the payload with it")
    if kind == "ended":
        log["pid"], _, log["ended"] = text.partition(" ")
    else:
        log["reason"] = words
    if order.conf.epilogue:
        _trusted(order.conf.epilogue)
        from .epilogue import run

        run(order.conf, order.caller, order.target, order.command, os.WEXITSTATUS(status))
    return os.WEXITSTATUS(status)


def _monitor(
    order: Order, tree: Tree, peers: Peers, report: int, case: journal.Case, entry: journal.Entry, log: Log
) -> int:
    """Start the payload and watch it; return the exit code. Runs in the supervisor's child, which never returns."""
    try:
        adopt_orphans()
        payload = monitor.start(order, tree)
        with suppress(OSError):
            peers.control.send(policy.STARTED)
        words, code = monitor.watch(order, payload, peers)
    except Refusal as refusal:
        words, code = f"refused {refusal.code} {refusal.reason}", refusal.code
    except Exception as error:
        words, code = f"refused {SYSTEM_ERROR} {type(error).__name__}: {error}", SYSTEM_ERROR
    if select.select([peers.supervisor], [], [], 0)[0]:  # it was killed: there is nobody else to do this
        log |= {"ended": "killed", "reason": "the supervisor was killed"}
        with suppress(Exception):
            _clean_up(case, order.sandbox, log)
            entry.close()
        record.write(log, KILLED)
    with suppress(OSError):
        os.write(report, words.encode(errors="replace")[:4096])
    return code


def _clean_up(case: journal.Case, sandbox: Sandbox | None, log: Log) -> None:
    """Leave nothing of the payload: no process, no proxy, no file of its uid. Safe to call twice."""
    from . import target

    gone, used = end(case.cgroup)
    log |= used
    if not gone:
        log["leftover"] = "processes"
    log["pilot"] = record.pilot(case.gridmapdir, case.caller)
    account = pwd.getpwuid(case.target)
    groups = os.getgrouplist(account.pw_name, account.pw_gid)
    if case.target_proxy:
        run_as(account, lambda: target.remove_proxy(case.target_proxy), groups)
    if sandbox and (withheld := sandbox.hand_back(case.target)):
        log["withheld"] = ", ".join(withheld)
    if case.sweep:
        with journal.Locked(case.target):
            if journal.alone(case.target) and (
                failed := run_as(account, lambda: target.sweep(case.sweep), groups, _SWEEP_PATIENCE)
            ):
                log["leftover"] = failed.decode(errors="replace")


def _recover() -> None:
    """Clean up after calls whose supervisor and monitor were both killed."""
    for entry in journal.cut_off():
        if case := entry.read():
            log = case.log | {"ended": "killed", "reason": "was killed; cleaned up later"}
            try:
                log |= end(case.cgroup)[1]  # before the sandbox is looked for
                _clean_up(case, _reopened(case) if case.sandbox else None, log)
            except (OSError, KeyError, Refusal) as error:
                log["leftover"] = str(error)
            record.write(log, KILLED)
        entry.close()


def _reopened(case: journal.Case) -> Sandbox:
    """Return the sandbox of a call that was cut off, if it is still the same directory. Raises OSError and Refusal."""
    from .sandbox import Sandbox

    fd = open_as(pwd.getpwuid(case.caller), case.sandbox, os.O_RDONLY | os.O_DIRECTORY)
    sandbox = Sandbox(case.sandbox, fd, case.caller)
    if (sandbox.found.st_dev, sandbox.found.st_ino) != (case.sandbox_device, case.sandbox_inode):
        raise FileNotFoundError(0, "is another directory by now", case.sandbox)
    sandbox.mode = case.sandbox_mode
    return sandbox
