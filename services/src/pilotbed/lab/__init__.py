"""The lab: local nodes to stand the grid up on, and what a trainer does with them."""


class LabError(Exception):
    """Something the user can mend; the message names the value and the remedy."""
