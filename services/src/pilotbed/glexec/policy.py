"""glexec's decisions, free of I/O: configuration, white list, pools, environment, exit codes, log line.

Names and codes are gLExec 0.9's (NIKHEF wiki, "Exit codes of gLExec"), so that pilots written for it need no change.
"""

import os
import re
import signal
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

CLIENT_ERROR = 201  # the caller's fault: proxy missing, readable to others or expired; command missing
SYSTEM_ERROR = 202  # the node's fault: configuration, LCMAPS, sandbox
AUTHORISATION_ERROR = 203  # the site says no: caller not white-listed, user banned, no mapping
PAYLOAD_CODE_HIDDEN = 204  # the payload itself exited with 201..204
CANNOT_EXECUTE = 126  # the kernel would not execute the command (as in a shell)

MAPPER_ACCOUNT = "glexec"
CONF_PATH = "/etc/glexec.conf"
LOWEST_UID = 1000  # no system account is ever a target, whatever LCMAPS answers
LARGEST_PROXY = 1 << 20  # bytes

CONTROL = 3  # descriptor of the socket between front end and root part: signal numbers go in, the verdict comes out
STARTED = b"S"  # the payload runs: from now on the exit code is its own
REFUSED = b"R"  # nothing ran: a byte with the exit code and the reason follow
FORWARDED_SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT")
FORWARDED_NUMBERS = frozenset(getattr(signal, name) for name in FORWARDED_SIGNALS)


class Refusal(Exception):
    """glexec runs nothing: ``code`` is its exit code (201..203), ``reason`` is for the caller and for the log."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Conf:
    """The keys of glexec.conf that this glexec knows; names and meanings are gLExec's unless marked."""

    user_white_list: tuple[str, ...]
    pool_accounts: tuple[str, ...]  # ours: the only accounts that a payload may get
    lcmaps_db_file: str = "/etc/lcmaps/lcmaps-glexec.db"
    lcmaps_log_file: str = ""  # empty: syslog
    lcmaps_debug_level: int = 3
    preserve_env_variables: tuple[str, ...] = ()
    sandbox_handover: bool = False  # ours: allows GLEXEC_SANDBOX


# Variables that steer a loader, an interpreter or sudo before the payload's identity is taken, or that glexec sets.
_NEVER_PRESERVED = re.compile(
    r"LD_.*|DYLD_.*|GCONV_PATH|GLIBC_TUNABLES|PYTHON.*|PERL.*|RUBY.*|BASH_.*|ENV|IFS|PATH|HOME|USER|LOGNAME|SHELL"
    r"|SUDO_.*|LCMAPS_.*|X509_USER_.*|GLEXEC_.*"
)
_POOL_OR_NAME = re.compile(r"\.?[a-z_][a-z0-9_-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINE = re.compile(r"([a-z0-9_]+)\s*=\s*(.*)")


def parse_conf(text: str, path: str = CONF_PATH) -> Conf:
    """Return what ``text``, the content of glexec.conf, says.

    The format is gLExec's: an optional section header ``[glexec]``, ``key = value`` lines, ``#`` comments. An unknown
    key is refused: a misspelt restriction would otherwise be no restriction.

    Raises Refusal (202) that names ``path``, the line and the remedy.
    """
    values: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#") or (line == "[glexec]" and not values):
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise Refusal(SYSTEM_ERROR, f"{path}:{number}: {line!r} is not 'key = value'")
        key, value = match.groups()
        if key not in Conf.__dataclass_fields__:
            known = ", ".join(Conf.__dataclass_fields__)
            raise Refusal(SYSTEM_ERROR, f"{path}:{number}: unknown key {key!r}; known: {known}")
        if key in values:
            raise Refusal(SYSTEM_ERROR, f"{path}:{number}: {key} is set twice; keep one")
        values[key] = value.strip('"')

    def names(key: str, form: re.Pattern[str]) -> tuple[str, ...]:
        found = tuple(values.get(key, "").replace(",", " ").split())
        for name in found:
            if not form.fullmatch(name):
                raise Refusal(SYSTEM_ERROR, f"{path}: {key}: {name!r} is neither a name nor a pool such as .pilot")
        return found

    def absolute(key: str, default: str) -> str:
        value = values.get(key, default)
        if value and not value.startswith("/"):
            raise Refusal(SYSTEM_ERROR, f"{path}: {key}: {value!r} is not an absolute path")
        return value

    for key in ("user_white_list", "pool_accounts"):
        if not names(key, _POOL_OR_NAME):
            raise Refusal(SYSTEM_ERROR, f"{path}: {key} is missing: without it glexec serves nobody")
    preserved = names("preserve_env_variables", _VARIABLE)
    for name in preserved:
        if _NEVER_PRESERVED.fullmatch(name):
            raise Refusal(SYSTEM_ERROR, f"{path}: preserve_env_variables: {name} may not be preserved; use GLEXEC_ENV")
    level = values.get("lcmaps_debug_level", str(Conf.lcmaps_debug_level))
    if level not in {"0", "1", "2", "3", "4", "5"}:
        raise Refusal(SYSTEM_ERROR, f"{path}: lcmaps_debug_level: {level!r} is not 0 to 5")
    handover = values.get("sandbox_handover", "no")
    if handover not in {"yes", "no"}:
        raise Refusal(SYSTEM_ERROR, f"{path}: sandbox_handover: {handover!r} is neither yes nor no")
    return Conf(
        user_white_list=names("user_white_list", _POOL_OR_NAME),
        pool_accounts=names("pool_accounts", _POOL_OR_NAME),
        lcmaps_db_file=absolute("lcmaps_db_file", Conf.lcmaps_db_file),
        lcmaps_log_file=absolute("lcmaps_log_file", Conf.lcmaps_log_file),
        lcmaps_debug_level=int(level),
        preserve_env_variables=preserved,
        sandbox_handover=handover == "yes",
    )


def listed(account: str, patterns: Iterable[str]) -> bool:
    """Tell whether ``patterns`` name ``account``: by its name, or by ``.pool`` for ``pool`` and digits."""
    for pattern in patterns:
        if pattern.startswith("."):
            if re.fullmatch(re.escape(pattern[1:]) + "[0-9]+", account, re.ASCII):
                return True
        elif pattern == account:
            return True
    return False


def check_target(name: str, uid: int, caller_uid: int, conf: Conf) -> None:
    """Accept the account ``name`` of ``uid``, which the mapper has answered, or raise Refusal (203).

    The mapper has read the user's bytes, so it may be lying: whatever it says, only an account of the configured
    pools is taken, never a system account and never the caller's own.
    """
    if uid < LOWEST_UID or uid == caller_uid or not listed(name, conf.pool_accounts):
        pools = ", ".join(conf.pool_accounts)
        reason = f"the proxy maps to the account {name}, which is not in pool_accounts ({pools})"
        raise Refusal(AUTHORISATION_ERROR, reason)


def check_group(name: str, gid: int, groups: Collection[int]) -> None:
    """Accept ``gid``, LCMAPS's answer, as primary group of the account ``name``, whose groups (gids) are ``groups``.

    Raises Refusal (203).
    """
    if gid < LOWEST_UID or gid not in groups:
        raise Refusal(AUTHORISATION_ERROR, f"the proxy maps to gid {gid}, of which the account {name} is no member")


def exit_code(status: int) -> int:
    """Return glexec's exit code for the payload's wait ``status``; a signal n gives 128 + n, as in a shell."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return 128 - code
    return PAYLOAD_CODE_HIDDEN if CLIENT_ERROR <= code <= PAYLOAD_CODE_HIDDEN else code


def payload_environment(
    account: Mapping[str, str], conf: Conf, callers: Mapping[str, str], proxy: str
) -> dict[str, str]:
    """Return the payload's environment, made anew: of the caller's only GLEXEC_ENV and what glexec.conf preserves.

    ``account`` holds name, home and shell of the target; ``callers`` is the environment that sudo let pass; ``proxy``
    is the path of the target proxy, or empty.
    """
    kept = {key: callers[key] for key in ("GLEXEC_ENV", *conf.preserve_env_variables) if key in callers}
    made = {
        "HOME": account["home"],
        "USER": account["name"],
        "LOGNAME": account["name"],
        "SHELL": account["shell"] or "/bin/sh",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
    }
    return kept | made | ({"X509_USER_PROXY": proxy} if proxy else {})


def printable(text: str, limit: int = 512) -> str:
    """Return ``text`` as one quoted field of a log line: control characters, quotes and backslashes become ``?``."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else "?" for c in text[:limit]) + '"'


def record(fields: Mapping[str, object]) -> str:
    """Return the log line of one call; strings are quoted, so that no field can forge another one or a line."""
    return " ".join(f"{key}={printable(value) if isinstance(value, str) else value}" for key, value in fields.items())


# --- process tree ---------------------------------------------------------------------------------------------------


def unified_cgroup(mountinfo: str, cgroup: str) -> str:
    """Return the directory of the caller's own cgroup v2, or an empty string where there is none to use.

    ``mountinfo`` and ``cgroup`` are the contents of /proc/self/mountinfo and /proc/self/cgroup. The hierarchy is
    mounted at /sys/fs/cgroup, or at /sys/fs/cgroup/unified on a hybrid host. A path with ``..`` lies outside the
    namespace.
    """
    own = next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), "")
    if not own or ".." in PurePosixPath(own).parts:
        return ""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        if right.split(" ")[:1] != ["cgroup2"]:
            continue
        root, mounted = left.split(" ")[3:5]
        if PurePosixPath(own).is_relative_to(root):
            return str(PurePosixPath(mounted) / PurePosixPath(own).relative_to(root))
    return ""


def monitor_name(pid_namespace: int, pid: int, start_time: int) -> str:
    """Return the name of the payload's cgroup: it identifies the monitor beyond doubt, even when pids are used again.

    ``pid_namespace`` is an inode number, ``start_time`` is field 22 of /proc/PID/stat (clock ticks).
    """
    return f"glexec-{pid_namespace}-{pid}-{start_time}"


def start_time(stat: str) -> int:
    """Return field 22 of the content of /proc/PID/stat; the command name before it may hold spaces and brackets."""
    return int(stat.rpartition(")")[2].split()[19])


def parent(stat: str) -> int:
    """Return field 4, the parent's pid, of the content of /proc/PID/stat."""
    return int(stat.rpartition(")")[2].split()[1])


def descendants(pid: int, parents: Mapping[int, int]) -> set[int]:
    """Return all processes below ``pid``; ``parents`` maps each pid to its parent's."""
    children: dict[int, list[int]] = {}
    for child, above in parents.items():
        children.setdefault(above, []).append(child)
    found: set[int] = set()
    rest = [pid]
    while rest:
        for child in children.get(rest.pop(), []):
            if child not in found:
                found.add(child)
                rest.append(child)
    return found


# --- sandbox --------------------------------------------------------------------------------------------------------

ACL_NAME = "system.posix_acl_access"


def acl(uid: int, owner: int, user: int) -> bytes:
    """Return a POSIX ACL (the value of the extended attribute ACL_NAME): nobody but the owner and one more user.

    ``owner`` and ``user`` are permission bits (0..7) of the owner and of ``uid``. Layout: linux/posix_acl_xattr.h.
    """
    anyone = 0xFFFFFFFF
    user_obj, named_user, group_obj, mask, other = 0x01, 0x02, 0x04, 0x10, 0x20
    entries = ((user_obj, owner, anyone), (named_user, user, uid), (group_obj, 0, anyone), (mask, user, anyone))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in (*entries, (other, 0, anyone)))


def stays_callers(name: str) -> bool:
    """Tell whether ``name``, at the top of a sandbox, is HTCondor's own file and so stays the caller's.

    HTCondor 25.14 keeps .update.ad and .chirp.config beside the sandbox; older versions keep them in it.
    """
    names = {".job.ad", ".machine.ad", ".update.ad", ".chirp.config", ".execution_overlay.ad"}
    return name in names or name.startswith(("_condor_std", ".condor_ssh_to_job", ".docker_std"))


def is_standard_stream(name: str) -> bool:
    """Tell whether HTCondor sends a job's output to ``name``: the payload may open it again as /dev/stdout."""
    return name in {"_condor_stdout", "_condor_stderr"}
