"""The lab: local nodes to stand the grid up on, and what a trainer does with them."""

from pilotbed_suite import GridError


class LabError(GridError):
    """The lab cannot do what it was asked; the message names the value and the remedy."""
