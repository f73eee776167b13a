"""A lesson from its begin to its end: the state that is kept between commands, and what each command does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pilotbed_suite import GridError, inventory, record

from . import TrainingError, fingerprint, ground, lessons
from .lessons import Check, Lesson


@dataclass
class State:
    """The lesson that this lab is in.

    Args:
        number: the lesson's.
        hints: how many were given.
        healthy: the grid's fingerprint before its fault.
        faulty: the same with the fault in.
    """

    number: str
    hints: int = 0
    healthy: fingerprint.Fingerprint = field(default_factory=dict)
    faulty: fingerprint.Fingerprint = field(default_factory=dict)

    @staticmethod
    def path() -> Path:
        """Return where it is kept."""
        return record("lesson.json")

    def keep(self) -> None:
        """Write it."""
        self.path().parent.mkdir(parents=True, exist_ok=True)
        self.path().write_text(json.dumps(asdict(self)))


def begun() -> State | None:
    """Return the state of the lesson that was begun last, if there is one."""
    if not State.path().is_file():
        return None
    return State(**json.loads(State.path().read_text()))


def current(number: str) -> tuple[Lesson, State]:
    """Return the lesson that was begun last, and its state.

    Args:
        number: the one that is meant; "" for whichever was begun.

    Raises:
        TrainingError: none was begun, or another one.
    """
    wanted = lessons.find(number) if number else None
    state = begun()
    if state is None:
        raise TrainingError(f"no lesson has been begun: `make lesson N={wanted.number if wanted else '01'}` first")
    if wanted and wanted.number != state.number:
        raise TrainingError(
            f"N={number}: lesson {state.number} has been begun, not this one: `make lesson N={wanted.number}` first"
        )
    return lessons.find(state.number), state


def begin(lesson: Lesson, by_solution: bool = False) -> State:
    """Put the grid into the state of a lesson.

    Args:
        lesson: which.
        by_solution: see `ground.restore`.

    Raises:
        GridError: there is no healthy grid.
    """
    reset(by_solution)
    state = State(lesson.number, healthy=fingerprint.take())
    state.keep()  # before the fault: who is interrupted can reset
    ground.play(lesson.path / "fault.yml")
    state.faulty = fingerprint.take()
    state.keep()
    return state


def reset(by_solution: bool = False) -> None:
    """Bring the healthy grid back, and be in no lesson.

    Raises:
        GridError: it cannot be brought back.
    """
    state = begun()
    ground.restore(lessons.find(state.number) if state else None, by_solution)
    State.path().unlink(missing_ok=True)


@dataclass
class Verdict:
    """What a check of the grid has found; each list is of sentences."""

    mended: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    besides: list[str] = field(default_factory=list)

    @property
    def well(self) -> bool:
        """Whether the lesson is done."""
        return not (self.missing or self.waiting or self.besides)

    def lines(self) -> list[str]:
        """Return it for a screen."""
        return [
            *(f"  mended      {what}" for what in self.mended),
            *(f"  NOT MENDED  {what}" for what in self.missing),
            *(f"  not asked   {what}: first the rest" for what in self.waiting),
            *(f"  BROKEN      {what}" for what in self.besides),
        ]


def examine(lesson: Lesson, state: State) -> Verdict:
    """Return what is mended, what is not, and what was changed besides."""
    verdict = Verdict()
    _ask(lesson.checks, verdict)
    if verdict.missing:
        verdict.waiting += map(lessons.statement, lesson.jobs)
    else:
        _ask(lesson.jobs, verdict)
    known = inventory.load()
    allowed = [(name, pattern) for group, pattern in lesson.allowed for name in known.names(group)]
    now = fingerprint.take()
    left: list[str] = []
    for (name, item), told in fingerprint.differences(state.healthy, now, allowed).items():
        faulty = state.faulty.get(name, {}).get(item)
        of_fault = now[name].get(item) == faulty != state.healthy[name].get(item)
        (left if of_fault else verdict.besides).append(told)
    if not verdict.missing:  # before, it would tell a student what the fault is
        verdict.missing += [f"Nothing is left of the fault: {told}" for told in left]
    return verdict


def _ask(checks: Iterable[Check], verdict: Verdict) -> None:
    for check in checks:
        try:
            found = list(check())
        except GridError as error:
            found = [str(error)]
        if found:
            verdict.missing += [f"{lessons.statement(check)}: {what}" for what in found]
        else:
            verdict.mended.append(lessons.statement(check))
