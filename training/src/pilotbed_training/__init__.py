"""Lessons: a grid is broken on purpose, a student mends it, and the grid itself is asked whether that has worked."""

from pilotbed_suite import GridError


class TrainingError(GridError):
    """A lesson cannot do what it was asked; the message names the value and the remedy."""
