"""What is known of a payload, from what the grid's parts say of it. No input, no output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pilotbed import dn as names
from pilotbed.trace.records import Payload

from .. import GridError

_JOB = re.compile(r"(?:([A-Za-z0-9.-]+)#)?(\d{1,9})(?:\.(\d{1,9}))?(?:#(\d{1,12}))?")
#: JobStatus as a word.
STATUS = {1: "idle", 2: "running", 3: "removed", 4: "done", 5: "held", 6: "transferring output", 7: "suspended"}
#: Of a job whose pilot is not known to it.
_NOTHING = ("undefined", "error", "", None)


def plain(value: object) -> str:
    """Return a text for a terminal: what others have chosen cannot steer it."""
    return "".join(sign if sign.isprintable() else "?" for sign in str(value))


def job_of(text: str, schedds: Sequence[str]) -> tuple[str, str]:
    """Return the submit host and the job that are meant: 22.0, submit#22.0, or submit.grid.test#22.0#1795229257.

    Args:
        text: what was written.
        schedds: the inventory's submit hosts.

    Raises:
        GridError: it is no job's id, or may be one of several schedds.
    """
    found = _JOB.fullmatch(text)
    example = f"write CLUSTER.PROC, such as 22.0 or {schedds[0]}#22.0"
    if not found:
        raise GridError(f"{text[:80]!r} is no job's id: {example}")
    host, cluster, proc = found[1], int(found[2]), int(found[3] or 0)
    if host is None and len(schedds) > 1:
        raise GridError(f"{text}: which schedd's? There is {', '.join(schedds)}: write {schedds[0]}#{cluster}.{proc}")
    node = schedds[0] if host is None else host.partition(".")[0]
    if node not in schedds:
        raise GridError(f"{text}: {host} is no submit host of this inventory, which has {', '.join(schedds)}")
    return node, f"{cluster}.{proc}"


def machine(ad: Mapping[str, Any], attribute: str) -> str:
    """Return what a job's ad says of the pilot that had it last; "" where it says nothing."""
    value = ad.get(f"MachineAttr{attribute}0")
    return "" if value in _NOTHING or not isinstance(value, (str, int)) else str(value)


def text_of(ad: Mapping[str, Any], attribute: str) -> str:
    """Return a text of an ad; "" where it is none, as an expression is (``/Expr(…)/``)."""
    value = ad.get(attribute)
    return value if isinstance(value, str) and not value.startswith("/Expr(") else ""


def user_of(ad: Mapping[str, Any], people: Mapping[str, str]) -> dict[str, Any]:
    """Return whose a job is: account, user (of the schedd), dns, fqan.

    Args:
        ad: the job's.
        people: DN by account, for a job whose ad names none.

    Raises:
        GridError: nobody can be named, or what stands for a DN is none.
    """
    account, user = text_of(ad, "Owner"), text_of(ad, "User")
    if not account or not user:
        raise GridError(f"the job's ad names no owner: it says {ad.get('Owner')!r} and {ad.get('User')!r}")
    dn = text_of(ad, "x509userproxysubject") or people.get(account, "")
    if not dn:
        raise GridError(f"job of {account}: it has no proxy, and grid_users does not name {account}: ban him by "
                        "playbooks/ban.yml")  # fmt: skip
    try:
        names.readings(dn)
    except names.NotADn as error:
        raise GridError(f"job of {account}: x509userproxysubject cannot be banned: {error}") from error
    fqan = text_of(ad, "x509UserProxyFirstFQAN")
    return {"account": account, "user": user, "dns": [dn], "fqan": fqan}


def payload(one: Payload) -> dict[str, Any]:
    """Return a payload's record in the words of the report."""
    return {
        "node": one.node, "account": one.account, "dn": one.dn, "fqan": one.fqan, "job": one.id,
        "pilot account": one.pilot_account, "pilot": one.pilot, "batch job": one.batch, "start": one.start,
        "end": one.end, "ended": one.ended or "running", "exit": one.exit,
    }  # fmt: skip


def runs_of(job: str, runs: Iterable[Payload]) -> list[Payload]:
    """Return the runs of a job, HOST#CLUSTER.PROC, by start.

    glexec is told GlobalJobId, which ends with the time of the submission.
    """
    return sorted((one for one in runs if one.id.rpartition("#")[0] == job), key=lambda one: one.start)


def of_job(ad: Mapping[str, Any], mine: Sequence[Payload]) -> dict[str, Any]:
    """Return where a job ran: its last pilot as its ad names it, and its runs as the sites' glexec recorded them."""
    last = mine[-1] if mine else None
    number = f"{machine(ad, 'GLIDEIN_ClusterId')}.{machine(ad, 'GLIDEIN_ProcId')}"
    return {
        "site": machine(ad, "GLIDEIN_Site"),
        "entry": machine(ad, "GLIDEIN_Entry_Name"),
        "node": last.node if last else machine(ad, "GLIDEIN_Worker"),
        "payload account": last.account if last else "",
        "pilot": {
            "account": last.pilot_account if last else machine(ad, "GLIDEIN_Pilot_Account"),
            "dn": last.pilot if last else "",
            "factory job": number if re.fullmatch(r"\d+\.\d+", number) else "",
            "factory": machine(ad, "GLIDEIN_Schedd"),
            "batch job": last.batch if last else machine(ad, "GLIDEIN_Batch_Job"),
            "way": machine(ad, "GLIDEIN_Traversal"),
            "relay": machine(ad, "GLIDEIN_Relay_Address"),
            "slot": text_of(ad, "RemoteHost") or text_of(ad, "LastRemoteHost"),
        },
        "runs": [payload(one) for one in mine],
    }


def span(ad: Mapping[str, Any], mine: Sequence[Payload], queued: float, now: float) -> tuple[float, float]:
    """Return the time whose logs matter: from before the job's first start to after its end, or to now.

    Args:
        ad: the job's.
        mine: its runs; one that has none has logs from its submission on.
        queued: when that was; as all times seconds, Unix.
        now: what is logged later cannot be there.
    """
    margin = 600
    begun = [one.start for one in mine] or [queued]
    ends = [one.end for one in mine]
    over = ad.get("JobStatus") in (3, 4) and ends and None not in ends
    until = max(end for end in ends if end is not None) + margin if over else now
    return min(begun) - margin, min(until, now)


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return what was found as lines for a screen."""
    user, pilot = found["user"], found["pilot"]
    rows = [
        ("job", f"{found['job']} ({found['status']})"),
        ("user", f"{user['account']}, {', '.join(user['dns'])}, {user['fqan'] or 'no FQAN'}"),
        ("site, node", f"{found['site']}, {found['node']}" if found["node"] else "it never ran"),
        ("payload account", found["payload account"] or "-"),
        ("pilot", f"factory's {pilot.get('factory job') or '-'}, {pilot.get('computing element job') or '-'}, "
                  f"batch job {pilot.get('batch job') or '-'}, account {pilot.get('account') or '-'}"),
        ("runs", str(len(found["runs"]))),
        ("other payloads", f"{len(found['others'])}, {sum(one['end'] is None for one in found['others'])} run"),
        ("files", str(sum(len(one["files"]) for look in found["looks"] for one in look["payloads"]))),
        *(("proxy", f"SHA-256 {digest} in {where}") for digest, where in proxies(found).items()),
        ("contact", ", ".join(str(value) for _, value in sorted(found["contact"].items(), reverse=True))),
    ]  # fmt: skip
    return [plain(f"{name:<16} {value}") for name, value in rows]


def proxies(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the end certificate of every proxy that was found, by SHA-256: node and path."""
    result: dict[str, str] = {}
    for look in found["looks"]:
        files = [*look["files"], *(one for each in look["payloads"] for one in each["files"])]
        for one in files:
            if digests := one.get("certificates"):
                result.setdefault(digests[0], f"{look['node']}:{one['path']}")
    return result
