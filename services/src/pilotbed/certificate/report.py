"""A report: every check with its verdict, and the evidence for it. Its JSON is documented in docs/certification.md."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

#: Version of the JSON. A reader of another one must not guess.
SCHEMA = 1


class ReportError(Exception):
    """What is said to be a report is none; the message says why."""


class Verdict(Enum):
    """What a check came to. Only the first one is good; the second needs a reason."""

    PASS = "pass"  # noqa: S105
    NOT_APPLICABLE = "not applicable"
    NOT_TRIED = "not tried"
    FAIL = "fail"


@dataclass(frozen=True)
class Evidence:
    """A command, where it was run, and what it said.

    Args:
        node: the host.
        command: as a shell takes it, to be repeated there.
        code: its exit code.
        output: what it said, the last time, without private keys, the middle left out where it is long.
        seconds: how long it took, all times together.
        times: how often it was asked, one after the other.
    """

    node: str
    command: str
    code: int
    output: str
    seconds: float
    times: int = 1


@dataclass(frozen=True)
class Trial:
    """One test of a check.

    Args:
        name: its node id, by which pytest runs it alone.
        verdict: what it came to.
        control: the attack with the protection off, which must succeed: the check can fail.
        reason: why it failed, or why it does not apply.
        seconds: how long it took, with what it needed first.
        evidence: what was run, in order: places in the report's list, since tests share what prepared them.
    """

    name: str
    verdict: Verdict
    control: bool = False
    reason: str = ""
    seconds: float = 0.0
    evidence: tuple[int, ...] = ()


@dataclass(frozen=True)
class Check:
    """A question that is answered.

    Args:
        id: such as D3.2.
        question: the section that it belongs to.
        asks: the question.
        proves: what is tried.
        trials: its tests.
    """

    id: str
    question: str
    asks: str
    proves: str
    trials: tuple[Trial, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst that a test came to; what does not apply counts only where nothing does."""
        verdicts = {trial.verdict for trial in self.trials}
        if not verdicts:
            return Verdict.NOT_TRIED
        for one in (Verdict.FAIL, Verdict.NOT_TRIED, Verdict.PASS):
            if one in verdicts:
                return one
        return Verdict.NOT_APPLICABLE

    @property
    def reason(self) -> str:
        """Why it is not passed; "" if it is."""
        if self.verdict is Verdict.PASS:
            return ""
        told = [trial.reason for trial in self.trials if trial.verdict is self.verdict and trial.reason]
        return "; ".join(dict.fromkeys(told)) or "no test of it was run"

    @property
    def seconds(self) -> float:
        """How long its tests took."""
        return sum(trial.seconds for trial in self.trials)


@dataclass(frozen=True)
class Socket:
    """A socket that listens.

    Args:
        node, protocol, address, port, program: as ss(8) has them.
        declared: what the roles say of it, by whom and how it is protected; "" if nothing.
    """

    node: str
    protocol: str
    address: str
    port: int
    program: str
    declared: str = ""


@dataclass(frozen=True)
class Link:
    """A connection between two nodes, as it was found: who connected to which port of whom."""

    client: str
    server: str
    port: int


@dataclass(frozen=True)
class Report:
    """All of it.

    Args:
        grid: the grid's domain.
        release: which checkout was run (git describe).
        made: when it began, ISO 8601 with offset.
        seconds: how long it took.
        chosen: the ids that were asked for; all if empty.
        questions: the sections' names, in order.
        nodes: every node, with the groups that it is in.
        checks: in order.
        evidence: of all of them.
        sockets: what listens.
        links: who talks to whom.
    """

    grid: str
    release: str
    made: str
    seconds: float
    chosen: tuple[str, ...] = ()
    questions: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    sockets: tuple[Socket, ...] = ()
    links: tuple[Link, ...] = ()

    def counts(self, question: str = "") -> Counter[Verdict]:
        """Count the verdicts, of one section or of all."""
        return Counter(check.verdict for check in self.checks if question in ("", check.question))

    def where(self, check: Check) -> list[str]:
        """Return the nodes that a check's evidence comes from."""
        return sorted({self.evidence[place].node for trial in check.trials for place in trial.evidence})

    @property
    def good(self) -> bool:
        """Whether it can be signed: each check is passed, or does not apply, and has a reason then."""
        return {check.verdict for check in self.checks} <= {Verdict.PASS, Verdict.NOT_APPLICABLE}

    def text(self) -> str:
        """Return it as JSON."""
        found = {"schema": SCHEMA} | dataclasses.asdict(self)
        for check, one in zip(self.checks, found["checks"], strict=True):
            one |= {"verdict": check.verdict.value, "reason": check.reason, "nodes": self.where(check)}
            for trial, entry in zip(check.trials, one["trials"], strict=True):
                entry["verdict"] = trial.verdict.value
        return json.dumps(found, indent=1) + "\n"


def parse(text: str) -> Report:
    """Return the report of a JSON text.

    Raises:
        ReportError: it is none of this version.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ReportError(f"is no JSON: {error}") from error
    version = found.get("schema") if isinstance(found, dict) else None
    if version != SCHEMA:
        raise ReportError(f"has schema {version!r}; this program reads {SCHEMA}")
    try:
        checks = [
            Check(one["id"], one["question"], one["asks"], one["proves"], tuple(map(_trial, one["trials"])))
            for one in found["checks"]
        ]
        report = Report(
            **{name: found[name] for name in ("grid", "release", "made", "seconds", "questions", "nodes")},
            chosen=tuple(found["chosen"]), checks=tuple(checks),
            evidence=tuple(Evidence(**one) for one in found["evidence"]),
            sockets=tuple(Socket(**one) for one in found["sockets"]),
            links=tuple(Link(**one) for one in found["links"]),
        )  # fmt: skip
        for check in report.checks:
            report.where(check)  # the places are there
    except (LookupError, TypeError, ValueError) as error:
        raise ReportError(f"is no report of schema {SCHEMA}: {error!r}") from error
    return report


def _trial(one: Mapping[str, Any]) -> Trial:
    return Trial(**{**one, "verdict": Verdict(one["verdict"]), "evidence": tuple(one["evidence"])})


def differences(old: Report, new: Report) -> list[str]:
    """Return a line for everything that is not as it was: verdicts, nodes, and what listens."""
    lines = [f"{name}: {before} → {after}" for name, before, after in (
        ("grid", old.grid, new.grid), ("release", old.release, new.release),
    ) if before != after]  # fmt: skip
    before, after = ({check.id: check for check in report.checks} for report in (old, new))
    for name in dict.fromkeys([*before, *after]):
        was, now = (side[name].verdict.value if name in side else "not in the report" for side in (before, after))
        if was != now:
            why = after[name].reason if name in after else ""
            lines.append(f"{name}: {was} → {now}{': ' if why else ''}{why}")
    lines += _gone_and_come("node", old.nodes, new.nodes)
    lines += _gone_and_come("socket", map(_named, old.sockets), map(_named, new.sockets))
    return lines


def _named(one: Socket) -> str:
    return f"{one.node} {one.protocol} {one.address}:{one.port} {one.program}"


def _gone_and_come(what: str, old: Iterable[str], new: Iterable[str]) -> list[str]:
    before, after = set(old), set(new)
    return [f"{what} gone: {one}" for one in sorted(before - after)] + [
        f"{what} new: {one}" for one in sorted(after - before)
    ]
