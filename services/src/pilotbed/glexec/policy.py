"""glexec's decisions, free of I/O: configuration, white list, pools, environment, exit codes, log line.

Names and codes are gLExec 0.9's (NIKHEF wiki, "Exit codes of gLExec"), so that pilots written for it need no change.
"""

from __future__ import annotations

import itertools
import os

from ..lean import Record, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

CLIENT_ERROR = 201  # the caller's fault: proxy missing, readable to others or expired; command missing
SYSTEM_ERROR = 202  # the node's fault: configuration, LCMAPS, sandbox
AUTHORISATION_ERROR = 203  # the site says no: caller not white-listed, user banned, no mapping
PAYLOAD_CODE_HIDDEN = 204  # the payload itself exited with 201..204
CANNOT_EXECUTE = 126  # the kernel would not execute the command (as in a shell)

CONF_PATH = "/etc/glexec.conf"
LOWEST_UID = 1000  # no system account is ever a target, whatever LCMAPS answers
LARGEST_PROXY = 1 << 20  # bytes

CONTROL = 3  # descriptor of the socket between front end and root part: signal numbers go in, the verdict comes out
STARTED = b"S"  # the payload runs: from now on the exit code is its own
REFUSED = b"R"  # nothing ran: a byte with the exit code and the reason follow
FORWARDED_SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT")
END_SIGNAL = signal.SIGPWR  # to the monitor, from root: the site ends this payload
FORWARDED_NUMBERS = frozenset(getattr(signal, name) for name in FORWARDED_SIGNALS)


class Refusal(Exception):
    """glexec runs nothing: ``code`` is its exit code (201..203), ``reason`` is for the caller and for the log."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Conf(Record):
    """The keys of glexec.conf that this glexec knows; names and meanings are gLExec's unless marked."""

    user_white_list: tuple[str, ...] = ()
    group_white_list: tuple[str, ...] = ()
    pool_accounts: tuple[str, ...] = ()  # ours: the only accounts that a payload may get
    caller_pools: tuple[str, ...] = ()  # ours: CALLERS:PAYLOADS, a pool and the only one that its payloads may get
    lcmaps_db_file: str = "/etc/lcmaps/lcmaps-glexec.db"
    lcmaps_log_file: str = ""  # empty: syslog
    lcmaps_debug_level: int = 3
    lcmaps_get_account_policy: str = "glexec"  # with mapping = service: verify
    mapping: str = "local"  # ours: who names the account, LCMAPS here or the site's mapping service
    mapping_service: str = ""  # ours: its host name and port, host:port
    mapping_credential: str = "/etc/grid-security/glexec"  # ours: directory of cert.pem and key.pem, shown to it
    mapping_timeout: int = 30  # ours: seconds that it has
    crl_directory: str = "/etc/grid-security/certificates"  # ours: a proxy's CA must have a CRL here; empty: need not
    log_destination: str = "syslog"  # or file
    log_file: str = ""
    create_target_proxy: bool = True
    preserve_env_variables: tuple[str, ...] = ()
    epilogue: str = ""
    epilogue_timeout: int = 300  # seconds
    sandbox_handover: bool = False  # ours: allows GLEXEC_SANDBOX
    logging_only: bool = False  # ours: all checks and the log, but the payload runs as the caller
    sweep_directories: tuple[str, ...] = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - ours: cleared of leftovers
    payload_processes: int = 0  # ours: limit of an account's processes; 0: none
    batch_system: str = ""  # ours: whose job a call is in, for the record; a module of pilotbed.batch
    tracking_gids: range = range(0)  # ours: groups of the caller that a batch system tracks by and a payload keeps
    gridmapdir: str = ""  # ours: the leases of pool accounts, for the lock of ``mapping = local`` and the record
    linger: str = "yes"
    use_lcas: str = "no"
    user_identity_switch_by: str = "glexec"


#: Keys of gLExec's that have only one meaning here: another value would promise what is not done.
_FIXED = ("linger", "use_lcas", "user_identity_switch_by")
# Variables that steer a loader, an interpreter or sudo before the payload's identity is taken, or that glexec sets.
_NEVER_PRESERVED = {"GCONV_PATH", "GLIBC_TUNABLES", "ENV", "IFS", "PATH", "HOME", "USER", "LOGNAME", "SHELL"}
_NEVER_PRESERVED_PREFIXES = (
    "LD_", "DYLD_", "PYTHON", "PERL", "RUBY", "BASH_", "SUDO_", "LCMAPS_", "X509_USER_", "GLEXEC_"
)  # fmt: skip
_LETTERS, _DIGITS = frozenset("abcdefghijklmnopqrstuvwxyz_"), frozenset("0123456789")


# No regular expressions below: `re` alone takes longer to import than all of glexec's own modules.
def _is_pool_or_name(text: str) -> bool:
    name = text.removeprefix(".")
    return name[:1] in _LETTERS and _LETTERS | _DIGITS | {"-"} >= set(name)


def _is_pair(text: str) -> bool:
    callers, _, payloads = text.partition(":")
    return _is_pool_or_name(callers) and _is_pool_or_name(payloads)


def _is_variable(text: str) -> bool:
    return text.isascii() and text.isidentifier()


def _is_number(text: str) -> bool:
    return 0 < len(text) < 10 and set(text) <= _DIGITS


def _is_service(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return host.isascii() and host.replace("-", "").replace(".", "").isalnum() and _is_number(port) and len(port) < 6


def parse_conf(text: str, path: str = CONF_PATH) -> Conf:
    """Return what ``text``, the content of glexec.conf, says.

    The format is gLExec's: an optional section header ``[glexec]``, ``key = value`` lines, ``#`` comments. An unknown
    key is refused: a misspelt restriction would otherwise be no restriction.

    Raises Refusal (202) that names ``path``, the line and the remedy.
    """
    values: dict[str, str] = {}
    for at, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#") or (line == "[glexec]" and not values):
            continue
        key, equals, value = (word.strip() for word in line.partition("="))
        if not equals:
            raise Refusal(SYSTEM_ERROR, f"{path}:{at}: {line!r} is not 'key = value'")
        if key not in Conf.__annotations__:
            known = ", ".join(Conf.__annotations__)
            raise Refusal(SYSTEM_ERROR, f"{path}:{at}: unknown key {key!r}; known: {known}")
        if key in values:
            raise Refusal(SYSTEM_ERROR, f"{path}:{at}: {key} is set twice; keep one")
        values[key] = value.strip('"')

    def wrong(key: str, what: str) -> Refusal:
        return Refusal(SYSTEM_ERROR, f"{path}: {key}: {what}")

    def names(key: str, form: Callable[[str], bool], what: str) -> tuple[str, ...]:
        found = tuple(values[key].replace(",", " ").split()) if key in values else getattr(Conf, key)
        for name in found:
            if not form(name):
                raise wrong(key, f"{name!r} is not {what}")
        return tuple(found)

    def absolute(key: str) -> str:
        value = values.get(key, getattr(Conf, key))
        if value and not value.startswith("/"):
            raise wrong(key, f"{value!r} is not an absolute path")
        return str(value)

    def one_of(key: str, *known: str) -> str:
        value = values.get(key, known[0])
        if value not in known:
            raise wrong(key, f"{value!r} is not {' or '.join(known)}")
        return value

    def whole(key: str, highest: int) -> int:
        value = values.get(key, str(getattr(Conf, key)))
        if not _is_number(value) or int(value) > highest:
            raise wrong(key, f"{value!r} is not a number from 0 to {highest}")
        return int(value)

    for key in _FIXED:
        one_of(key, getattr(Conf, key))
    mapping = one_of("mapping", "local", "service")
    policy = "glexec" if mapping == "local" else "verify"
    callers, account = "a name, or a pool such as .pilot", "an account, or a pool such as .pilot"
    conf = Conf(
        user_white_list=names("user_white_list", _is_pool_or_name, callers),
        group_white_list=names("group_white_list", _is_pool_or_name, callers),
        pool_accounts=names("pool_accounts", _is_pool_or_name, account),
        caller_pools=names("caller_pools", _is_pair, "CALLERS:PAYLOADS, such as .pilot:.gl"),
        lcmaps_db_file=absolute("lcmaps_db_file"),
        lcmaps_log_file=absolute("lcmaps_log_file"),
        lcmaps_debug_level=whole("lcmaps_debug_level", 5),
        lcmaps_get_account_policy=values.get("lcmaps_get_account_policy", policy),
        mapping=mapping,
        mapping_service=values.get("mapping_service", ""),
        mapping_credential=absolute("mapping_credential"),
        mapping_timeout=whole("mapping_timeout", 60),
        crl_directory=absolute("crl_directory"),
        log_destination=one_of("log_destination", "syslog", "file"),
        log_file=absolute("log_file"),
        create_target_proxy=one_of("create_target_proxy", "yes", "no") == "yes",
        preserve_env_variables=names("preserve_env_variables", _is_variable, "the name of a variable"),
        epilogue=absolute("epilogue"),
        epilogue_timeout=whole("epilogue_timeout", 86400),
        sandbox_handover=one_of("sandbox_handover", "no", "yes") == "yes",
        logging_only=one_of("logging_only", "no", "yes") == "yes",
        sweep_directories=names("sweep_directories", lambda name: name.startswith("/"), "an absolute path"),
        payload_processes=whole("payload_processes", 1 << 22),
        gridmapdir=absolute("gridmapdir"),
        batch_system=values.get("batch_system", ""),
        tracking_gids=_gids(values.get("tracking_gids", ""), path),
    )
    local = conf.mapping == "local"
    for met, key, what in (
        (conf.user_white_list or conf.group_white_list, "user_white_list",
         "is missing, and group_white_list, too: without them glexec serves nobody"),
        (conf.pool_accounts, "pool_accounts", "is missing: without it no payload gets an account"),
        (conf.log_destination != "file" or conf.log_file, "log_file", "is missing: log_destination = file needs it"),
        (local or _is_service(conf.mapping_service), "mapping_service",
         f"{conf.mapping_service!r} is not host:port; mapping = service needs it"),
        (local or conf.crl_directory, "crl_directory", "is empty: by its CAs mapping = service knows the service"),
        (not conf.batch_system or _is_variable(conf.batch_system), "batch_system",
         f"{conf.batch_system!r} is no name of a batch system, such as slurm"),
        (local or conf.mapping_timeout, "mapping_timeout", "is 0: give the mapping service a second at least"),
    ):  # fmt: skip
        if not met:
            raise wrong(key, what)
    for name in conf.preserve_env_variables:
        if name in _NEVER_PRESERVED or name.startswith(_NEVER_PRESERVED_PREFIXES):
            raise wrong("preserve_env_variables", f"{name} may not be preserved; use GLEXEC_ENV")
    return conf


def _gids(value: str, path: str) -> range:
    """Return the gids of ``first-last``; no system group is among them."""
    if not value:
        return range(0)
    first, _, last = value.partition("-")
    if not _is_number(first) or not _is_number(last) or int(first) < LOWEST_UID:
        raise Refusal(SYSTEM_ERROR, f"{path}: tracking_gids: {value!r} is not a range such as 65000-65049")
    return range(int(first), int(last) + 1)


def check_caller(name: str, groups: Iterable[str], conf: Conf) -> None:
    """Accept the account ``name``, a member of ``groups``, as caller, or raise Refusal (203)."""
    if not listed(name, conf.user_white_list) and not any(listed(group, conf.group_white_list) for group in groups):
        reason = f"{name} is neither in user_white_list nor by a group in group_white_list of {CONF_PATH}"
        raise Refusal(AUTHORISATION_ERROR, reason)


def listed(account: str, patterns: Iterable[str]) -> bool:
    """Tell whether ``patterns`` name ``account``: by its name, or by ``.pool`` for ``pool`` and digits."""
    for pattern in patterns:
        if pattern.startswith("."):
            number = account.removeprefix(pattern[1:])
            if number != account and number and set(number) <= _DIGITS:
                return True
        elif pattern == account:
            return True
    return False


def check_target(name: str, uid: int, caller: str, caller_uid: int, conf: Conf) -> None:
    """Accept the account ``name`` of ``uid``, which the mapper has answered, for ``caller``, or raise Refusal (203).

    The mapper has read the user's bytes, so it may be lying: whatever it says, only an account of the configured
    pools is taken, never a system account and never the caller's own.
    """
    if uid < LOWEST_UID or uid == caller_uid or not listed(name, conf.pool_accounts):
        pools = ", ".join(conf.pool_accounts)
        reason = f"the proxy maps to the account {name}, which is not in pool_accounts ({pools})"
        raise Refusal(AUTHORISATION_ERROR, reason)
    # Pilots of one VO may not run another's payloads.
    pairs = (pair.partition(":") for pair in conf.caller_pools)
    own = [payloads for callers, _, payloads in pairs if listed(caller, (callers,))]
    if own and not listed(name, own):
        pools = ", ".join(own)
        reason = f"the proxy maps to the account {name}, but {caller} may run payloads of {pools} only (caller_pools)"
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


def how(status: int) -> str:
    """Return how a process of this wait ``status`` ended: ``exit 3`` or ``signal 9``, which its code cannot tell."""
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit {code}"


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


def clean(text: str, limit: int = 512) -> str:
    """Return ``text`` for a terminal or a log line: control characters, quotes and backslashes become ``?``.

    But for a backslash of OpenSSL's one-line form of a DN: before x, / or +, where it escapes nothing in other forms.
    """
    cut = f"{text[:limit]}."
    return "".join(
        c if (c.isprintable() and c not in '"\\') or (c == "\\" and after in "x/+") else "?"
        for c, after in itertools.pairwise(cut)
    )


def record(fields: Mapping[str, object]) -> str:
    """Return the log line of one call; strings are quoted, so that no field can forge another one or a line."""
    return " ".join(f'{key}="{clean(value)}"' if isinstance(value, str) else f"{key}={value}"
                    for key, value in fields.items())  # fmt: skip


def journal_entry(fields: Mapping[str, object]) -> bytes:
    """Return a datagram of the journal's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).

    Every value goes with its length, so that none can forge another field.
    """
    entry = b""
    for key, value in fields.items():
        data = str(value)[:2048].encode(errors="replace")
        entry += key.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return entry


def lease_holder(name: str) -> str:
    """Return the DN in the name of a lease (``%2fdc%3dtest…:group``), in lower case, as LCMAPS writes it."""
    first, *rest = name.partition(":")[0].encode(errors="replace").split(b"%")
    try:
        return (first + b"".join(bytes.fromhex(part[:2].decode()) + part[2:] for part in rest)).decode(errors="replace")
    except ValueError:
        return ""


# --- process tree ---------------------------------------------------------------------------------------------------


def unified_cgroup(mountinfo: str, cgroup: str) -> str:
    """Return the directory of the caller's own cgroup v2, or an empty string where there is none to use.

    ``mountinfo`` and ``cgroup`` are the contents of /proc/self/mountinfo and /proc/self/cgroup. The hierarchy is
    mounted at /sys/fs/cgroup, or at /sys/fs/cgroup/unified on a hybrid host. A path with ``..`` lies outside the
    namespace.
    """
    own = next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), "")
    if not own or ".." in own.split("/"):
        return ""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        if right.split(" ")[:1] != ["cgroup2"]:
            continue
        root, mounted = left.split(" ")[3:5]
        if f"{own}/".startswith(f"{root.rstrip('/')}/"):
            return f"{mounted}/{own[len(root):].lstrip('/')}".rstrip("/")
    return ""


# --- sandbox --------------------------------------------------------------------------------------------------------

ACL_NAME = "system.posix_acl_access"


def acl(uid: int, owner: int, user: int) -> bytes:
    """Return a POSIX ACL (the value of the extended attribute ACL_NAME): nobody but the owner and one more user.

    ``owner`` and ``user`` are permission bits (0..7) of the owner and of ``uid``. Layout: linux/posix_acl_xattr.h.
    """
    import struct

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
