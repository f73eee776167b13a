"""Pilots that failed: what their output says of it, by entry, for who asks why there is no pilot."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from pathlib import Path

from pilotbed.pool.values import Value, shown

#: Seconds for which a failure counts.
RECENT = 3600
#: Octets of the end of a pilot's output that are looked at: its summary is last.
LOOKED_AT = 65536
#: Most failures of one entry that are remembered.
MOST = 1000

_STATUS = re.compile(r"<status>ERROR</status>")
_TEST = re.compile(r'<metric name="TestID"[^>]*>([^<]*)<')
_DETAIL = re.compile(r"<detail>\s*(.*?)\s*</detail>", re.DOTALL)
#: The script is named beside it.
_AGAIN = re.compile(r"^\S+ \(\w+\) failed with code \d+: ")
_OUTPUT = re.compile(r"(.+)\.([0-9]+\.[0-9]+)\.out")


@dataclass(frozen=True)
class Failure:
    """One pilot's end: when (seconds, Unix), its job and whose it was, the script that failed, and why.

    ``whose`` is SECURITYNAME_CLIENT, as the output's name begins.
    """

    when: float
    job: str
    whose: str
    test: str
    why: str


def read(path: Path, when: float) -> Failure | None:
    """Return the failure that a pilot's output tells of; None if it tells of none.

    A pilot's account wrote it, so it may say anything: it is one line here, and a short one.

    Raises:
        OSError: it cannot be read.
    """
    name = _OUTPUT.fullmatch(path.name)
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - LOOKED_AT, 0))
        text = file.read().decode("utf-8", "replace")
    if name is None or not _STATUS.search(text):
        return None
    test, detail = _TEST.search(text), _DETAIL.search(text)
    why = " ".join(html.unescape(detail[1]).split()) if detail else "it does not say why"
    return Failure(when, name[2], name[1], shown(html.unescape(test[1]) if test else "?").strip('"'),
                   _AGAIN.sub("", why)[:300])  # fmt: skip


@dataclass
class Failures:
    """Those of each entry, below ``directory`` with a directory ``entry_NAME`` of pilots' output each."""

    directory: Path
    #: By entry and job.
    found: dict[str, dict[str, Failure]] = field(default_factory=dict)
    _newest: dict[str, int] = field(default_factory=dict)

    def look(self, entry: str, now: float) -> None:
        """Read what has come of an entry's pilots since it was looked at last.

        Raises:
            OSError: the directory or an output cannot be read.
        """
        since = self._newest.get(entry, int((now - RECENT) * 1e9))
        # What HTCondor is just writing is read again: its time changes once more.
        fresh = sorted(
            (stat.st_mtime_ns, path) for path in (self.directory / f"entry_{entry}").glob("*.out")
            if (stat := path.stat()).st_mtime_ns > since and stat.st_size
        )  # fmt: skip
        known = self.found.get(entry, {})
        for when, path in fresh:
            if failure := read(path, when / 1e9):
                known[failure.job] = failure
            self._newest[entry] = when
        recent = {job: one for job, one in known.items() if one.when > now - RECENT}
        self.found[entry] = dict(list(recent.items())[-MOST:])

    def monitor(self, entry: str, whose: str) -> dict[str, Value]:
        """Return what the entry's answer to ``whose`` request says of it."""
        known = [one for one in self.found.get(entry, {}).values() if one.whose == whose]
        if not known:
            return {"Failed": 0}
        last = max(known, key=lambda one: one.when)
        return {"Failed": len(known), "FailedLast": int(last.when), "FailedWhy": f"{last.test}: {last.why}"}
