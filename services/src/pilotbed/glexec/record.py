"""What is written about a call: one line, which in systemd's journal is one entry that has every field by itself.

That entry is the record of accounting; ``pilotbed-trace`` reads it.
"""

# ruff: noqa: PTH116

from __future__ import annotations

import os
import pwd
import resource
import stat
import time

from pilotbed import batch

from ..lean import socket, suppress
from ..mapping import MAPPER_ACCOUNT
from . import policy
from .apart import run_as
from .policy import AUTHORISATION_ERROR, CLIENT_ERROR, SYSTEM_ERROR, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

Log = dict[str, object]

_JOURNAL = "/run/systemd/journal/socket"
_AUTHPRIV, _WARNING, _NOTICE = 10, 4, 5  # syslog(3)
_ANCESTORS = 64  # a pilot's payload has some ten


def write(log: Log, code: int, file: int = -1) -> None:
    """Write the record of a call: to the open log ``file`` if there is one, else to the journal or syslog."""
    now, used = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    own = {"cpu": f"{used.ru_utime + used.ru_stime:.2f}", "memory": used.ru_maxrss * 1024}  # of what has been reaped
    log |= {"exit": code, "wall": f"{now - float(str(log['started'])):.2f}"} | own | log
    if file >= 0:
        with suppress(OSError):
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
            os.write(file, f"{stamp} glexec[{os.getpid()}]: {policy.record(log)}\n".encode(errors="replace"))
            return
    note(log, _WARNING if code in {CLIENT_ERROR, SYSTEM_ERROR, AUTHORISATION_ERROR} else _NOTICE)


def note(log: Mapping[str, object], level: int = _WARNING) -> None:
    """Write a line about a call to the journal, or to syslog where there is none."""
    entry = {
        "MESSAGE": policy.record(log), "PRIORITY": level, "SYSLOG_FACILITY": _AUTHPRIV,
        "SYSLOG_IDENTIFIER": "glexec", "SYSLOG_PID": os.getpid(),
    } | {f"GLEXEC_{key.upper()}": value for key, value in log.items()}  # fmt: skip
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sender.sendto(policy.journal_entry(entry), _JOURNAL)
    except OSError:
        import syslog

        syslog.openlog("glexec", syslog.LOG_PID, syslog.LOG_AUTHPRIV)
        syslog.syslog(level, policy.record(log))


def open_log(path: str) -> int:
    """Return a descriptor of the log file. Raises Refusal (202)."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
            raise Refusal(SYSTEM_ERROR, f"log_file: {path} must be a file of root's that nobody else can write")
    except OSError as error:
        raise Refusal(SYSTEM_ERROR, f"log_file: {path}: {error.strerror}") from error
    return file


def pilot(gridmapdir: str, uid: int) -> str:
    """Return the DN, in lower case, that the account ``uid`` is leased to at this site: the pilot's; or nothing."""

    def look() -> bytes:
        leased = os.stat(f"{gridmapdir}/{account.pw_name}").st_ino
        with os.scandir(gridmapdir) as entries:
            names = (entry.name for entry in entries if entry.inode() == leased and entry.name.startswith("%"))
            return next(names, "").encode(errors="replace")

    with suppress(OSError, KeyError, Refusal):
        account = pwd.getpwuid(uid)
        if gridmapdir:
            found = run_as(pwd.getpwnam(MAPPER_ACCOUNT), look)
            return policy.lease_holder(found.decode(errors="replace"))
    return ""


def batch_job(pid: int, system: str) -> str:
    """Return the job of batch system ``system`` that the process ``pid`` is in, such as ``slurm 6``; empty for none.

    Told by the batch system's own process among its ancestors, which is root's. What the caller's environment says is
    the caller's word.

    Raises:
        ValueError: there is no such batch system.
    """
    job = batch.load(system).job
    with suppress(OSError, ValueError, IndexError):
        for _ in range(_ANCESTORS):
            with open(f"/proc/{pid}/status", "rb") as file:
                status = dict(line.split(":", 1) for line in file.read().decode(errors="replace").splitlines())
            if status["Uid"].split()[0] == "0":
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    if found := job(file.read().decode(errors="replace")):
                        return f"{system} {found}"
            pid = int(status["PPid"])
    return ""
