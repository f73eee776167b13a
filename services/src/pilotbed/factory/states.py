"""Where a pilot is, whatever its computing element calls that."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where a pilot is, with the number that glideinWMS gives it."""

    UNSUBMITTED = 1001
    PENDING = 1002
    STAGE_IN = 1010
    OTHER = 1100
    RUNNING = 2
    STAGE_OUT = 4010
    HELD = 5

    @property
    def idle(self) -> bool:
        """Whether it waits before or at the CE."""
        return self in (State.UNSUBMITTED, State.PENDING, State.STAGE_IN, State.OTHER)
