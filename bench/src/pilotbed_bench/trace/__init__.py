"""How soon `pilotbed-trace` answers, over a busy node's day in a real journal: a part of `make bench-glexec`.

One payload is run, and its record written again with other names and times, by glexec's own writer and among other
lines. The journal has all of them in the span that is asked for, so that its index of times spares nothing.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from typing import Any

from pilotbed_lab import LabError
from pilotbed_suite import document

from ..run import middle

#: Payloads of a day, so many at a time, and how many users they have.
RECORDS, AT_ONCE, USERS = 20_000, 16, 50
#: Lines of other programs of root's, a record.
OTHER_LINES = 10
DAY = 86400.0
ROUNDS = 7
#: Seconds for an answer.
AIM = 5.0

#: Runs as root in the bed: {"logs", "other"} on standard input.
WRITER = r"""
import json, socket, sys
sys.path.insert(0, "/usr/lib/pilotbed")
from pilotbed.glexec import policy, record
asked = json.load(sys.stdin)
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.connect("/run/systemd/journal/socket")
for number, log in enumerate(asked["logs"]):
    record.note(log)
    for line in range(asked["other"]):
        other = {"SYSLOG_IDENTIFIER": f"daemon{line}", "MESSAGE": f"job {number} has been seen {line} times"}
        journal.send(policy.journal_entry(other))
"""

Log = dict[str, str]


def day(template: Log, first: float, records: int = RECORDS) -> list[Log]:
    """Return the logs of a day's payloads from ``first`` (1970 s) on: ``template`` with their names and times."""
    gap = DAY / records
    return [
        template | {
            "dn": f"{template['dn']} {number % USERS}", "target": f"gl{number % AT_ONCE + 1:03}",
            "id": f"submit.grid.test#{number}.0#1", "started": f"{first + number * gap:.3f}",
            "wall": f"{AT_ONCE * gap:.2f}",
        } for number in range(records)
    ]  # fmt: skip


def ids(logs: Sequence[Log], *, dn: str = "", at: float | None = None) -> list[str]:
    """Return the ids, by start, of the payloads of a user, or of those that ran at a time (1970 s)."""
    return [
        log["id"] for log in logs
        if (not dn or log["dn"] == dn)
        and (at is None or float(log["started"]) <= at <= float(log["started"]) + float(log["wall"]))
    ]  # fmt: skip


def _one_record(bed: Any) -> tuple[str, Log]:
    """Run a payload; return the node's name and the record's fields, in the journal's words."""
    proxy = bed.write(f"{bed.directory()}/proxy", bed.proxy())
    done = bed.run("/usr/sbin/glexec", "/usr/bin/true", env={"GLEXEC_CLIENT_CERT": proxy})
    if done.code:
        raise LabError(f"glexec does not run a payload: {done}")
    shown = bed.root("journalctl --sync; journalctl --output=json SYSLOG_IDENTIFIER=glexec _UID=0")
    entry = json.loads(shown)
    fields = {key.removeprefix("GLEXEC_").lower(): text for key, text in entry.items() if key.startswith("GLEXEC_")}
    return entry["_HOSTNAME"], fields


def _fill(bed: Any, logs: Sequence[Log]) -> dict[str, int]:
    """Write the journal; return the number of its lines and its size in bytes."""
    writer = bed.start("python3", "-I", "-c", WRITER, user="root")
    _, err = writer.communicate(json.dumps({"logs": logs, "other": OTHER_LINES}), timeout=600)
    if writer.returncode:
        raise LabError(f"the journal could not be written: {err}")
    until = importlib.import_module("glexecbed").until
    expected = len(logs) * (1 + OTHER_LINES)

    def lines() -> int:
        return int(bed.root("journalctl --sync; journalctl --quiet --output=cat | wc -l"))

    until(f"the journal has {expected} lines (or is its space short?)", lambda: lines() >= expected)
    return {"lines": lines(), "bytes": int(bed.root("du -sb /run/log/journal").split()[0])}


def _asked(bed: Any, words: Sequence[str], expected: Sequence[str]) -> float:
    """Return the seconds of one answer. Raises LabError: it is not the expected one."""
    began = time.monotonic()
    process = bed.start("pilotbed-trace", "--json", *words, user="root")
    out, err = process.communicate(timeout=600)
    took = time.monotonic() - began
    found = [one["id"] for one in json.loads(out or "[]")]
    if process.returncode or found != expected:
        what = f"{len(found)} records that are not the {len(expected)} written"
        raise LabError(f"pilotbed-trace {' '.join(words)}: {what}. {err}")
    return took


def measure(bed: Any, records: int = RECORDS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return samples, one a round: seconds of each question. Raises LabError."""
    with importlib.import_module("glexecbed").journald(bed):
        node, template = _one_record(bed)
        first = float(int(time.time() - 2 * DAY))
        logs = day(template, first, records)
        at, dn = float(logs[records // 2]["started"]) + 1, logs[0]["dn"]
        span = ["--since", f"@{first:.0f}", "--until", f"@{first + DAY:.0f}"]
        questions = {
            "who ran on this node at this time": (["--node", node, "--at", f"@{at}"], ids(logs, at=at)),
            "where did this user run, in a day": (["--dn", dn, *span], ids(logs, dn=dn)),
            "who ran on this node, in a day": (["--node", node, *span], ids(logs)),
        }
        written = _fill(bed, logs)
        samples = [{what: _asked(bed, *each) for what, each in questions.items()} for _ in range(rounds)]
    counts = {what: len(expected) for what, (_, expected) in questions.items()}
    return {"samples": samples, "records": records, "found": counts, "journal": written}


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    samples, written = found["samples"], found["journal"]
    rows = [
        [what, str(count), f"{middle(samples, what):.2f}", f"{max(sample[what] for sample in samples):.2f}"]
        for what, count in found["found"].items()
    ]
    slowest = max(seconds for sample in samples for seconds in sample.values())
    return "\n".join([
        f"{found['records']} records among {written['lines']} lines, {written['bytes'] / 1e6:.0f} MB of journal in "
        f"memory; seconds of the whole command, median and slowest of {len(samples)}. Every answer was the right one.",
        "",
        *document.table(["question", "records found", "median, s", "slowest, s"], rows),
        "",
        *document.aims([(f"slowest answer, s (up to {AIM:.0f})", f"{slowest:.2f}", slowest <= AIM)]),
    ])
