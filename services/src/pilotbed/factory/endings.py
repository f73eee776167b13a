"""How pilots ended: what their output says of it, by entry. For who asks why there is no pilot, and for back-off."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from pilotbed.pool.values import Value, shown

#: Seconds for which a failure counts, and for which an end is known.
RECENT, KNOWN = 3600, 4 * 3600
#: Octets of the end of a pilot's output that are looked at: its summary is last.
LOOKED_AT = 65536
#: Most ends of one entry that are known.
MOST = 1000

_STATUS = re.compile(r"<status>(OK|ERROR)</status>")
_TEST = re.compile(r'<metric name="TestID"[^>]*>([^<]*)<')
_JOBS = re.compile(r'<metric name="jobs"[^>]*>([0-9]{1,9})<')
_DETAIL = re.compile(r"<detail>\s*(.*?)\s*</detail>", re.DOTALL)
#: The script is named beside it.
_AGAIN = re.compile(r"^\S+ \(\w+\) failed with code \d+: ")
#: The name of a pilot's output: whose it is, and its job.
OUTPUT = re.compile(r"(.+)\.([0-9]+\.[0-9]+)\.out")


@dataclass(frozen=True)
class Ending:
    """One pilot's end: when (seconds, Unix), its job and whose it was, and how.

    ``whose`` is SECURITYNAME_CLIENT, as the output's name begins; ``jobs`` how many it ran, where it says; of one that
    failed ``test`` is the script that did, and ``why`` what that said.
    """

    when: float
    job: str
    whose: str
    jobs: int | None = None
    test: str = ""
    why: str = ""

    @property
    def unused(self) -> bool:
        """Whether it was well, and no job wanted it."""
        return not self.test and self.jobs == 0


def read(path: Path, when: float) -> Ending | None:
    """Return the end that a pilot's output tells of; None if it tells of none.

    A pilot's account wrote it, so it may say anything: it is one line here, and a short one.

    Raises:
        OSError: it cannot be read.
    """
    name = OUTPUT.fullmatch(path.name)
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - LOOKED_AT, 0))
        text = file.read().decode("utf-8", "replace")
    status = _STATUS.search(text)
    if name is None or not status:
        return None
    if status[1] == "OK":
        jobs = _JOBS.search(text)
        return Ending(when, name[2], name[1], int(jobs[1]) if jobs else None)
    test, detail = _TEST.search(text), _DETAIL.search(text)
    why = " ".join(html.unescape(detail[1]).split()) if detail else "it does not say why"
    return Ending(when, name[2], name[1], None, shown(html.unescape(test[1]) if test else "?").strip('"') or "?",
                  _AGAIN.sub("", why)[:300])  # fmt: skip


@dataclass
class Endings:
    """Those of each entry, below ``directory`` with a directory ``entry_NAME`` of pilots' output each."""

    directory: Path
    #: By entry and job.
    found: dict[str, dict[str, Ending]] = field(default_factory=dict)
    _newest: dict[str, int] = field(default_factory=dict)

    def look(self, entry: str, now: float) -> None:
        """Read what has come of an entry's pilots since it was looked at last.

        Raises:
            OSError: the directory or an output cannot be read.
        """
        since = self._newest.get(entry, int((now - KNOWN) * 1e9))
        # What HTCondor is just writing is read again: its time changes once more.
        fresh = sorted(
            (stat.st_mtime_ns, path) for path in (self.directory / f"entry_{entry}").glob("*.out")
            if (stat := path.stat()).st_mtime_ns > since and stat.st_size
        )  # fmt: skip
        known = self.found.get(entry, {})
        for when, path in fresh:
            if ending := read(path, when / 1e9):
                known[ending.job] = ending
            self._newest[entry] = when
        kept = sorted((one for one in known.values() if one.when > now - KNOWN), key=lambda one: one.when)
        self.found[entry] = {one.job: one for one in kept[-MOST:]}

    def monitor(self, entry: str, whose: str, now: float) -> dict[str, Value]:
        """Return what the entry's answer to ``whose`` request says of it at ``now`` (seconds, Unix).

        ``Unused`` counts the last ones in a row that no job wanted.
        """
        mine = [one for one in self.found.get(entry, {}).values() if one.whose == whose]
        failed = [one for one in mine if one.test and one.when > now - RECENT]
        unused = list(takewhile(lambda one: one.unused, reversed(mine)))
        found: dict[str, Value] = {"Failed": len(failed), "Unused": len(unused)}
        if failed:
            found |= {"FailedLast": int(failed[-1].when), "FailedWhy": f"{failed[-1].test}: {failed[-1].why}"}
        if unused:
            found["UnusedLast"] = int(unused[0].when)
        return found
