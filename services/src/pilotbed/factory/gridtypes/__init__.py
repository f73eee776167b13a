"""What the factory has to know of a kind of computing element: a module each, named as HTCondor names the grid type.

A module has ``RECORD``, a `GridType`; nothing else in the factory names a grid type.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..states import State

_NAME = re.compile(r"[a-z][a-z0-9_]*")

#: Has jobs of a computing element go on under a newer proxy, and returns by job why not, "" where they do.
#: Its arguments: gatekeeper, the CE's names of the jobs, the proxy's file, directory of CAs and CRLs.
Renewer = Callable[[str, Sequence[str], Path, Path], Mapping[str, str]]


@dataclass(frozen=True)
class GridType:
    """A grid type of HTCondor's grid universe.

    Args:
        gatekeeper: what a gatekeeper of it has to look like.
        example: one that does, for messages.
        resource: ``grid_resource`` of the submit description; ``{gatekeeper}`` and ``{queue}`` stand for the entry's.
        submit: further lines of it, with the same.
        states: what the CE's word (GridJobStatus) means while HTCondor calls the job idle or running.
        renew: brings a newer proxy to jobs that the CE has, where HTCondor does not.
        takes_files: whether files come to a pilot with it.
    """

    gatekeeper: re.Pattern[str]
    example: str
    resource: str
    submit: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, State] = field(default_factory=dict)
    renew: Renewer | None = None
    takes_files: bool = True

    def description(self, gatekeeper: str, queue: str) -> dict[str, str]:
        """Return the lines of the submit description that say where a pilot goes."""
        lines = {"grid_resource": self.resource, **self.submit}
        return {name: value.format(gatekeeper=gatekeeper, queue=queue) for name, value in lines.items()}


@functools.cache
def load(name: str) -> GridType:
    """Return grid type ``name``.

    Raises:
        ValueError: there is none.
    """
    if _NAME.fullmatch(name):
        try:
            found: GridType = __import__(f"{__name__}.{name}", fromlist=["RECORD"]).RECORD
            return found
        except ModuleNotFoundError:
            pass
    raise ValueError(f"gridtype {name!r} has no module in pilotbed/factory/gridtypes")


def of(grid_id: str) -> GridType | None:
    """Return the grid type of a job by its GridJobId (``arc URL NAME``); None where that says nothing."""
    try:
        return load(grid_id.partition(" ")[0])
    except ValueError:
        return None
