"""Records of payloads, their choice and their join with other records: no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, BinaryIO

#: What journalctl is to show of an entry, and what it is to look for: any account may write fields to the journal, but
#: `_UID` is journald's own word.
MATCHES = ("SYSLOG_IDENTIFIER=glexec", "_UID=0")
FIELDS = ("DN", "FQAN", "ID", "CALLER", "TARGET", "PILOT", "BATCH", "STARTED", "WALL", "CPU", "MEMORY", "EXIT", "ENDED",
          "REASON", "TRACKING", "PID")  # fmt: skip


@dataclass(frozen=True)
class Payload:
    """One payload. Times in seconds since 1970, memory in bytes; ``end`` is None while it runs."""

    node: str
    account: str
    dn: str
    fqan: str
    id: str  # GLEXEC_ID: HTCondor's GlobalJobId
    pilot_account: str
    pilot: str  # DN, in lower case
    batch: str  # such as "slurm 6"
    start: float
    end: float | None
    cpu: float
    memory: int
    exit: int | None
    ended: str  # "exit 3", "signal 9", "killed"; empty: running
    reason: str
    job: Mapping[str, str] = field(default_factory=dict)  # the batch system's record
    condor: Mapping[str, Any] = field(default_factory=dict)  # HTCondor's


class Unreadable(ValueError):
    """A record that cannot be one; the message names field and value."""


#: Seconds since 1970 of a time that a date can be made of: the year 5138.
_LATEST = 1e11
#: Bytes of a field that journald takes (journald.conf(5), Storage in memory apart: DATA_SIZE_MAX, 768 MB).
_LONGEST = 768 << 20


def _amount(value: object, name: str) -> float:
    """Return a time or an amount. Raises Unreadable for what is none, NaN and infinity among it."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = -1
    if not 0 <= number <= _LATEST:
        raise Unreadable(f"{name} is {str(value)[:40]!r}")
    return number


def _whole(value: object, name: str, least: int = 0) -> int:
    """Return a whole number. Raises Unreadable for what is none."""
    try:
        number = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        number = least - 1
    if not least <= number < 1 << 63:
        raise Unreadable(f"{name} is {str(value)[:40]!r}")
    return int(number)


def exported(stream: BinaryIO) -> Iterator[dict[str, str]]:
    """Yield the entries of a stream in the journal's export format (systemd.io/JOURNAL_EXPORT_FORMATS).

    It takes journalctl a third of the time of its JSON. Of a field that is there twice, the first counts.

    Raises:
        ValueError: the stream ends within an entry.
    """
    entry: dict[str, str] = {}
    for line in stream:
        name, equals, value = line.rstrip(b"\n").partition(b"=")
        if equals:
            entry.setdefault(name.decode(errors="replace"), value.decode(errors="replace"))
        elif name:  # what is no plain text comes with its length
            size = int.from_bytes(stream.read(8), "little")
            data = stream.read(size) if size <= _LONGEST else b""
            if len(data) < size or stream.read(1) != b"\n":
                raise ValueError(f"the journal's {name.decode(errors='replace')} is cut off")
            entry.setdefault(name.decode(errors="replace"), data.decode(errors="replace"))
        elif entry:
            yield entry
            entry = {}
    if entry:
        yield entry


def payload(entry: Mapping[str, str], node: str = "") -> Payload | None:
    """Return the payload of a journal entry, on ``node`` or where the entry says; None if it is no record of one.

    Refused calls ran nothing, and are none. What root has not written is none, whatever it says.

    Raises:
        Unreadable: it is one, and a number in it is none.
    """
    if entry.get("_UID") != "0" or entry.get("SYSLOG_IDENTIFIER") != "glexec":
        return None
    found = {name: entry.get(f"GLEXEC_{name}", "") for name in FIELDS}
    if not found["STARTED"] or not found["ENDED"]:
        return None
    start = _amount(found["STARTED"], "STARTED")
    return Payload(
        node=node or entry.get("_HOSTNAME", ""), account=found["TARGET"], dn=found["DN"], fqan=found["FQAN"],
        id=found["ID"], pilot_account=found["CALLER"], pilot=found["PILOT"], batch=found["BATCH"], start=start,
        end=start + _amount(found["WALL"], "WALL"), cpu=_amount(found["CPU"], "CPU"),
        memory=_whole(found["MEMORY"], "MEMORY"), exit=_whole(found["EXIT"], "EXIT", -(1 << 31)),
        ended=found["ENDED"], reason=found["REASON"],
    )  # fmt: skip


def running(log: Mapping[str, Any], node: str) -> Payload:
    """Return the payload of a call that is under way on this node (`pilotbed.glexec.journal`).

    Raises:
        Unreadable: it lacks a field, or its start is no time.
    """
    said = {key: str(value) for key, value in log.items()}
    if missing := [name for name in ("target", "dn", "fqan", "id", "caller", "batch", "started") if name not in said]:
        raise Unreadable(f"{missing[0]} is missing")
    return Payload(
        node=node, account=said["target"], dn=said["dn"], fqan=said["fqan"], id=said["id"],
        pilot_account=said["caller"], pilot="", batch=said["batch"],
        start=_amount(said["started"], "started"), end=None, cpu=0.0, memory=0, exit=None, ended="", reason="",
    )  # fmt: skip


def chosen(
    found: Iterable[Payload], *, node: str = "", dn: str = "", account: str = "", since: float, until: float
) -> list[Payload]:
    """Return, by start, the payloads on a node, of a user or of an account that ran between two times (1970 s)."""
    return sorted(
        (one for one in found
         if (not node or one.node.partition(".")[0] == node.partition(".")[0])
         and (not dn or one.dn == dn) and (not account or one.account == account)
         and one.start <= until and (one.end is None or one.end >= since)),
        key=lambda one: one.start,
    )  # fmt: skip


# -- other records


def joined(
    found: Iterable[Payload], jobs: Mapping[str, Mapping[str, str]], ads: Iterable[Mapping[str, Any]] = ()
) -> list[Payload]:
    """Return the payloads with the records of their batch jobs (by name, ``slurm 6``) and of HTCondor's jobs (ads).

    A batch job of another account than the pilot's is not the payload's: ids begin anew when a batch system does.
    """
    by_id = {str(ad.get("GlobalJobId")): ad for ad in ads}
    result = []
    for one in found:
        job = jobs.get(one.batch, {})
        if job.get("user") != one.pilot_account:
            job = {}
        result.append(Payload(**{**vars(one), "job": job or one.job, "condor": by_id.get(one.id, one.condor)}))
    return result


# -- output


def as_json(found: Iterable[Payload]) -> list[dict[str, Any]]:
    """Return what `from_json` reads again."""
    return [asdict(one) for one in found]


def from_json(value: object) -> Payload:
    """Return one payload of `as_json`. Raises Unreadable."""
    if not isinstance(value, Mapping):
        raise Unreadable(f"{str(value)[:40]!r} is no record")
    texts = ("node", "account", "dn", "fqan", "id", "pilot_account", "pilot", "batch", "ended", "reason")
    if wrong := [name for name in texts if not isinstance(value.get(name), str)]:
        raise Unreadable(f"{wrong[0]} is {str(value.get(wrong[0]))[:40]!r}")
    tables = {name: value.get(name, {}) for name in ("job", "condor")}
    if wrong := [name for name, table in tables.items() if not isinstance(table, Mapping)]:
        raise Unreadable(f"{wrong[0]} is {str(tables[wrong[0]])[:40]!r}")
    end, code = value.get("end"), value.get("exit")
    return Payload(
        **{name: value[name] for name in texts}, start=_amount(value.get("start"), "start"),
        end=None if end is None else _amount(end, "end"), cpu=_amount(value.get("cpu"), "cpu"),
        memory=_whole(value.get("memory"), "memory"), exit=None if code is None else _whole(code, "exit", -(1 << 31)),
        job={str(name): str(said) for name, said in tables["job"].items()}, condor=tables["condor"],
    )  # fmt: skip


def table(found: Sequence[Payload]) -> str:
    """Return the payloads as a table for a terminal; nothing in it can be a control character."""
    rows = [("start (UTC)", "end", "node", "account", "user", "pilot", "batch job", "job", "CPU s", "ended")]
    for one in found:
        state = f" {one.job.get('state', '')}" if one.job else ""
        rows.append((
            _when(one.start), _when(one.end) if one.end is not None else "running", one.node.partition(".")[0],
            one.account, one.dn, one.pilot_account, f"{one.batch}{state}", one.id, f"{one.cpu:.1f}",
            f"{one.ended}: {one.reason}" if one.reason else one.ended,
        ))  # fmt: skip
    clean = [["".join(c if c.isprintable() else "?" for c in cell) or "-" for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in clean) for at in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in clean)  # fmt: skip


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
