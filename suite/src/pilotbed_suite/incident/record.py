"""The record of an incident on disk: what was the case before, written before anything is changed.

So a freeze that is killed at any point can be gone on with, and can be taken back: a step that is in the record has
been begun, one that is not has changed nothing. A block that was there before is not the incident's to lift. Where two
incidents are of one user, the one that is thawed first hands its blocks over to the other.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pilotbed.files import replace_file

from .. import GridError

SCHEMA = 1
NAME = "record.json"
#: Of an incident; also safe as a directory's name and in a constraint of HTCondor's.
ID = re.compile(r"[a-z0-9][A-Za-z0-9.-]{0,99}")
_WRITING = threading.Lock()


@dataclass
class Step:
    """A block at one place.

    Args:
        kind: of ``blocks.KINDS``.
        node: where.
        subject: whom or what: a DN, a VO and a DN, a user of the schedd, a constraint.
        before: whether it was blocked already; None: there is nothing to block, or that is not known yet.
        outcome: "": begun, and nothing heard since; "done", "nothing to do" or "failed: …".
        also: incidents whose own blocks here were handed over to this one.
        undone: "", "lifted", "failed: …", or to which incident it was left.
    """

    kind: str
    node: str
    subject: str
    before: bool | None = None
    outcome: str = ""
    at: float = 0.0
    also: list[str] = field(default_factory=list)
    undone: str = ""

    @property
    def place(self) -> tuple[str, str, str]:
        """What tells it from others."""
        return self.kind, self.node, self.subject

    @property
    def ours(self) -> bool:
        """Whether it is this incident's to take back: begun, and not so before."""
        return self.before is False or bool(self.also)


@dataclass
class Record:
    """An incident.

    Args:
        directory: where it is kept.
        job: the payload's job, ``submit#22.0#1795229257``.
        state: freezing, frozen, "frozen, not all", thawing, thawed.
        found: what is known of the payload (``found``).
        acts: what else was done, a line each with time and outcome: ended payloads, collected logs.
    """

    directory: Path
    id: str
    job: str
    reason: str = ""
    state: str = "freezing"
    opened: float = 0.0
    closed: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    acts: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> str:
        """Return the record as JSON."""
        said = asdict(self)
        del said["directory"]
        return json.dumps({"schema": SCHEMA, **said}, indent=1) + "\n"

    def save(self) -> None:
        """Write the record, so that it survives a crash of this host. Raises OSError."""
        with _WRITING:  # what is written last has all that was noted
            replace_file(self.directory / NAME, self.text(), 0o600, durable=True)

    # -- freeze

    def step(self, kind: str, node: str, subject: str) -> Step:
        """Return the step of this place, the one that there is or a new one, which is not in the record yet."""
        wanted = Step(kind, node, subject)
        return next((one for one in self.steps if one.place == wanted.place), wanted)

    def begin(self, step: Step, before: bool | None) -> None:
        """Note that a step is about to be taken. What was the case before its first time is not forgotten."""
        if not any(one is step for one in self.steps):
            self.steps.append(step)
        if step.before is None:
            step.before = before
        step.outcome, step.at = "", time.time()
        self.save()

    def end(self, step: Step, outcome: str) -> None:
        """Note what a step came to."""
        if not any(one is step for one in self.steps):
            self.steps.append(step)
        step.outcome, step.at = outcome, time.time()
        self.save()

    def act(self, what: str, outcome: str) -> None:
        """Note something that was done and needs no taking back."""
        self.acts.append({"what": what, "outcome": outcome, "at": time.time()})
        self.save()

    # -- thaw

    def to_undo(self) -> list[Step]:
        """Return what thaw has to take back, the last first."""
        left = (one for one in reversed(self.steps) if not one.undone or one.undone.startswith("failed"))
        return [one for one in left if one.ours]

    def heir(self, step: Step, others: Iterable[Record]) -> tuple[Record, Step] | None:
        """Return the incident that needs this block still, with its step; ``others`` are the open ones."""
        for other in others:
            for theirs in other.steps:
                if other.id != self.id and theirs.place == step.place and theirs.before is not None:
                    return other, theirs
        return None

    def hand_over(self, step: Step, heir: Record, theirs: Step) -> None:
        """Leave a block to another incident, which takes it back when it is thawed; it is written there first."""
        theirs.before = False
        theirs.also = list(dict.fromkeys([*theirs.also, *step.also, self.id]))
        heir.save()
        step.undone = f"left to incident {heir.id}"
        self.save()

    def undid(self, step: Step, outcome: str) -> None:
        """Note that a block was taken back, or why not."""
        step.undone = outcome
        self.save()


def parse(text: str, directory: Path) -> Record:
    """Return the record that ``text`` is.

    Raises:
        GridError: it is none; the message names the file.
    """
    place = directory / NAME
    try:
        said = json.loads(text)
        if not isinstance(said, dict) or said.pop("schema", None) != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        known = {one.name for one in fields(Record)} - {"directory"}
        steps = [Step(**one) for one in said.pop("steps", [])]
        return Record(directory=directory, steps=steps, **{name: said[name] for name in known & set(said)})
    except (ValueError, TypeError, KeyError) as error:
        raise GridError(f"{place} is no incident's record: {error}") from error


def load(directory: Path) -> Record:
    """Return the incident that is kept in ``directory``. Raises GridError."""
    try:
        return parse((directory / NAME).read_text(), directory)
    except OSError as error:
        raise GridError(f"no incident {directory.name}: pilotbed-incident list has those that there are") from error


def every(top: Path, broken: list[str] | None = None) -> list[Record]:
    """Return all incidents below ``top``, the oldest first; ``broken`` takes why one is none: that stops no other."""
    found = []
    for path in top.glob(f"*/{NAME}"):
        try:
            found.append(load(path.parent))
        except GridError as error:
            if broken is not None:
                broken.append(str(error))
    return sorted(found, key=lambda one: one.opened)


def unfinished(top: Path, job: str) -> Record | None:
    """Return the incident of a job, HOST#CLUSTER.PROC, that is not thawed yet."""
    theirs = (one for one in every(top) if one.job.rpartition("#")[0] == job and one.state != "thawed")
    return next(theirs, None)


def open_one(top: Path, stem: str, job: str, reason: str) -> Record:
    """Return the incident of a job that is not thawed yet, or a new one.

    Args:
        top: where incidents are.
        stem: what its id begins with.
        job: the payload's job.
        reason: why, for a new one.

    Raises:
        GridError: it is being thawed.
    """
    theirs = [one for one in every(top) if one.job == job]
    for one in theirs:
        if one.state == "thawing":
            raise GridError(f"incident {one.id} of job {job} is half thawed: first pilotbed-incident thaw {one.id}")
        if one.state != "thawed":
            return one
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if not (top / name / NAME).exists())
    top.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = Record(top / name, name, job, reason, opened=time.time())
    new.directory.mkdir(mode=0o700, exist_ok=True)  # one that was killed before it wrote its record
    new.save()
    return new
