"""A pool without daemons: ads are HTCondor's own ClassAds, constraints and projections are done by its own library.

Stands for `Collector` and `Schedd` of pilotbed.pool, in a test of what factory and frontend make of ads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import classad2
import htcondor2  # noqa: F401  # brings HTCondor's own functions, such as stringListIMember
from hypothesis import strategies as st
from pilotbed.daemon import Daemon
from pilotbed.pool.door import classad, plain
from pilotbed.pool.values import Ad, Expr, Value

#: Values as anybody can write them into an ad.
ABSURD = (
    "undefined", "error", "1/0", "true", "false", '""', '" "', '"four"', '"4"', '"auto"', '"ALL"', '"-1"', "-1", "0",
    "1.5", "1e308", "-1e308", 'real("NaN")', 'real("INF")', 'real("-INF")', "9223372036854775807",
    "-9223372036854775808", "{}", '{ "alpha" }', '{ 1, "a", { error } }', "[]", '[ a = 1; b = { "x" } ]', "TARGET.x",
    "MY.Name", "x", "JobStatus", r'"\351"', r'{ "\351" }', '"\N{LATIN SMALL LETTER U WITH DIAERESIS}\N{BELL}"',
    r'"a\nb\tc\"d\\"', r'"\001\033[31m"', '"../../etc/passwd"', '"$(Cluster)"', '"x"'.replace("x", "x" * 5000),
    'absTime("2020-01-01T00:00:00")', "relTime(3)", "time()", 'strcat("be", "ta")', 'split("a b")', "random(5)",
    'eval("1/0")', "unknown(1)",
)  # fmt: skip
expressions = st.one_of(
    st.sampled_from(ABSURD),
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20).map(
        lambda text: repr(classad2.ExprTree(classad2.quote(text)))
    ),
)


def spoilt(ad: Ad, more: Iterable[str] = ()) -> st.SearchStrategy[dict[str, Value]]:
    """Return ``ad`` with some of its attributes, or of those in ``more``, gone or turned into anything."""
    name = st.sampled_from(sorted({*ad, *more}))
    name |= name.map(str.lower) | name.map(str.upper)
    value = st.one_of(st.none(), expressions.map(Expr))

    def change(changes: Mapping[str, Expr | None]) -> dict[str, Value]:
        gone = {name.lower() for name in changes}
        found: dict[str, Value] = {name: value for name, value in ad.items() if name.lower() not in gone}
        return found | {name: value for name, value in changes.items() if value is not None}

    return st.dictionaries(name, value, min_size=1, max_size=3).map(change)


class Pool:
    """What collectors and schedds of one pool know, and what was done there."""

    def __init__(self, ads: Iterable[Ad] = (), jobs: Iterable[Ad] = ()) -> None:
        self.ads = [classad(ad) for ad in ads]
        self.jobs = [classad(job) for job in jobs]
        self.sent: list[dict[str, Value]] = []
        self.submitted: list[tuple[str, int]] = []
        self.acted: list[tuple[str, tuple[str, ...]]] = []
        self.taken_back: list[tuple[str, str]] = []

    # -- as Collector and Schedd

    def query(self, constraint: str, attributes: Sequence[str] = (), ads: Iterable[Any] | None = None) -> list[Any]:
        wanted = classad2.ExprTree(constraint)
        found = []
        for ad in self.ads if ads is None else ads:
            if wanted.eval(ad) is not True:
                continue
            asked = {name.lower() for name in attributes}
            shown = classad2.ClassAd({name: ad.lookup(name) for name in ad if not asked or name.lower() in asked})
            found.append(plain(shown, attributes))
        return found

    def advertise(self, ads: Iterable[Ad], command: str) -> None:
        self.sent += [plain(classad(ad)) for ad in ads]

    def invalidate(self, my_type: str, constraint: str, command: str) -> None:
        classad2.ExprTree(constraint)
        self.taken_back.append((my_type, constraint))

    def submit(self, description: str, count: int) -> int:
        self.submitted.append((description, count))
        return 100 + len(self.submitted)

    def remove(self, jobs: Sequence[str], reason: str, forced: bool = False) -> None:
        self.acted += [("remove", tuple(jobs))] if jobs else []

    def release(self, jobs: Sequence[str], reason: str) -> None:
        self.acted += [("release", tuple(jobs))] if jobs else []

    # -- for the test

    def installed(self, module: str) -> ExitStack:
        """Return a context in which a daemon's ``module`` finds this pool behind the door."""
        schedd = mock.Mock()
        schedd.query = lambda constraint, attributes: self.query(constraint, attributes, self.jobs)
        schedd.submit, schedd.remove, schedd.release = self.submit, self.remove, self.release
        stack = ExitStack()
        stack.enter_context(mock.patch(f"{module}.Collector", lambda address: self))
        stack.enter_context(mock.patch(f"{module}.Schedd", lambda *_: schedd))
        return stack

    def told(self, my_type: str) -> dict[str, dict[str, Value]]:
        """Return the ads of a kind that were sent, by name."""
        return {str(ad["Name"]): ad for ad in self.sent if ad.get("GlideinMyType") == my_type}


def state(daemon: Daemon) -> dict[str, Any]:
    """Return the status file, which must be JSON for every reader: without NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    found: dict[str, Any] = json.loads(daemon.status_file.read_text(), parse_constant=refuse)
    return found


def manifest(path: Path, **parts: Iterable[str]) -> None:
    """Write the manifest of a stage area with these parts (``entries`` or ``groups``)."""
    one = {"descript": "description.cfg", "sign": "ab" * 32}
    tables = {kind: dict.fromkeys(names, one) for kind, names in parts.items()}
    path.write_text(json.dumps({"web": "http://stage.test/stage", "signtype": "sha256", "main": one} | tables))
