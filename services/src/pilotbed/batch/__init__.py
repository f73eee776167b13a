"""Batch systems, a module each, named as glexec.conf names them: what their jobs are known by, and their own records.

glexec imports one at every call: no module of this package may import anything slow when it is imported itself. Each
has

* ``job(title)``: the job's id in the title of one of the batch system's own processes, "" for any other process;
* ``recorded(jobs)``: the batch system's records of these jobs, by id, as far as it can be asked on this host;
* ``parse(text)``: the same of all jobs in a file of records that it writes.

A record has ``user``, ``state``, ``start``, ``end``, ``nodes`` and, where it is known, ``cpu``, all of them texts.
"""

TYPE_CHECKING = False  # typing's would import typing
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol

    class BatchSystem(Protocol):
        """What a module of this package has."""

        def job(self, title: str) -> str: ...
        def recorded(self, jobs: Iterable[str]) -> dict[str, dict[str, str]]: ...
        def parse(self, text: str) -> dict[str, dict[str, str]]: ...


def load(name: str) -> "BatchSystem":
    """Return the module of batch system ``name``.

    Raises:
        ValueError: there is none.
    """
    if name.isidentifier() and name.isascii():
        try:
            found: BatchSystem = __import__(f"{__name__}.{name}", fromlist=["job"])
            return found
        except ModuleNotFoundError:
            pass
    raise ValueError(f"batch system {name!r} has no module in pilotbed/batch")


def moment(seconds: str) -> str:
    """Return a local ISO time of ``seconds`` since 1970; "" for no time (0), or rubbish; for records."""
    from datetime import datetime

    try:
        return datetime.fromtimestamp(int(seconds)).isoformat() if int(seconds) > 0 else ""
    except (ValueError, OverflowError, OSError):
        return ""
