"""The lessons on disk: ``training/NN-name`` with the pages, the two playbooks and the checks of each."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from pilotbed_suite import CHECKOUT

from . import TrainingError

TRAINING = CHECKOUT / "training"
#: What every lesson has.
FILES = ("student.md", "trainer.md", "hints.md", "fault.yml", "solution.yml", "check.py")

#: One thing that must be so again. The first line of its docstring says what; it yields a sentence for each way in
#: which it is not.
Check = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Lesson:
    """A lesson.

    Args:
        path: its directory.
    """

    path: Path

    @property
    def number(self) -> str:
        """Its number, two digits."""
        return self.path.name[:2]

    @property
    def story(self) -> str:
        """The student's page."""
        return (self.path / "student.md").read_text()

    @property
    def title(self) -> str:
        """The heading of the student's page."""
        return self.story.partition("\n")[0].lstrip("# ")

    @cached_property
    def hints(self) -> list[str]:
        """The hints, from the vaguest on: a heading of hints.md each, with what stands below it."""
        parts = re.split(r"^## ", (self.path / "hints.md").read_text(), flags=re.MULTILINE)
        return [part.strip() for part in parts[1:]]

    @cached_property
    def _module(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"lesson_{self.number}", self.path / "check.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @property
    def checks(self) -> tuple[Check, ...]:
        """What must be so again (CHECKS of check.py): each is asked, in this order."""
        return tuple(self._module.CHECKS)

    @property
    def jobs(self) -> tuple[Check, ...]:
        """What takes a job through the grid (JOBS): asked when all of `checks` is well, as it would wait in vain."""
        return tuple(self._module.JOBS)

    @property
    def allowed(self) -> tuple[tuple[str, str], ...]:
        """What a student may leave otherwise (ALLOWED): groups of hosts, and patterns of a fingerprint's items."""
        return tuple(self._module.ALLOWED)


def every() -> list[Lesson]:
    """Return all lessons, in their order."""
    return [Lesson(path) for path in sorted(TRAINING.glob("[0-9][0-9]-*")) if path.is_dir()]


def find(number: str) -> Lesson:
    """Return the lesson of a number, such as 03 or 3.

    Raises:
        TrainingError: there is none.
    """
    known = {lesson.number: lesson for lesson in every()}
    if found := known.get(number.zfill(2)):
        return found
    listed = "\n".join(f"  {lesson.number}  {lesson.title}" for lesson in known.values())
    raise TrainingError(f"N={number}: there is no such lesson; take one of\n{listed}")


def statement(check: Check) -> str:
    """Return what is so when a check finds nothing."""
    return (check.__doc__ or "").strip().partition("\n")[0].rstrip(".")
