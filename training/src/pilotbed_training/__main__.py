"""``python -m pilotbed_training``: what ``make lesson``, ``hint``, ``check`` and ``reset`` run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from pilotbed_suite import run

from . import TrainingError, lessons, stage


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: of ``check`` 0 only if all is well."""
    parser = argparse.ArgumentParser(prog="pilotbed_training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("lesson", "put the grid into a lesson's state, and tell the story"), ("hint", "one more hint"),
        ("check", "what is mended, what is not, and what else is broken"),
    ):  # fmt: skip
        commands.add_parser(name, help=what).add_argument("number", nargs="?", default="", help="such as 03")
    commands.add_parser("reset", help="the healthy grid back")
    arguments = parser.parse_args(argv)

    def work() -> int:
        if arguments.command == "reset":
            return _reset()
        return {"lesson": _lesson, "hint": _hint, "check": _check}[arguments.command](arguments.number)

    return run(work, "`make reset` brings the healthy grid back")


def _lesson(number: str) -> int:
    if not number:
        listed = "\n".join(f"  {lesson.number}  {lesson.title}" for lesson in lessons.every())
        raise TrainingError(f"say which lesson, such as `make lesson N=01`:\n{listed}")
    lesson = lessons.find(number)
    begun = time.monotonic()
    stage.begin(lesson)
    print(f"  the grid is in lesson {lesson.number} after {time.monotonic() - begun:.0f} s\n\n{lesson.story}")
    return 0


def _hint(number: str) -> int:
    lesson, state = stage.current(number)
    if state.hints == len(lesson.hints):
        print(f"lesson {lesson.number} has no more than these {len(lesson.hints)} hints:\n")
        print("\n\n".join(lesson.hints))
        return 0
    print(f"hint {state.hints + 1} of {len(lesson.hints)}: {lesson.hints[state.hints]}")
    state.hints += 1
    state.keep()
    return 0


def _check(number: str) -> int:
    lesson, state = stage.current(number)
    begun = time.monotonic()
    verdict = stage.examine(lesson, state)
    print(f"lesson {lesson.number}, {lesson.title}")
    print("\n".join(verdict.lines()))
    word = "done" if verdict.well else "not done yet; `make hint` helps on"
    print(f"  {word} ({time.monotonic() - begun:.0f} s)")
    return 0 if verdict.well else 1


def _reset() -> int:
    begun = time.monotonic()
    stage.reset()
    print(f"  the healthy grid is back after {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
