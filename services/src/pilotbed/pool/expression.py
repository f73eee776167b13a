"""Match expressions: ClassAd, as everywhere in the field; a Python expression from a file would be code."""

from __future__ import annotations

from .door import PoolError, classad
from .values import Ad


class Expression:
    """A ClassAd expression over MY (the job) and TARGET (the entry).

    Raises:
        PoolError: it cannot be parsed.
    """

    def __init__(self, text: str) -> None:
        import classad2
        import htcondor2  # noqa: F401  # brings stringListIMember and the like; without it they evaluate to error

        self.text = text
        try:
            self._tree = classad2.ExprTree(text)
        except classad2.ClassAdException as error:
            raise PoolError(f"not a ClassAd expression: {text!r}: {error}") from error

    def __call__(self, my: Ad, target: Ad) -> bool:
        """Return whether it is true; undefined, an error or a number is no match."""
        # Value.Undefined and Value.Error are the integers 2 and 1, and so true in Python: only True itself counts.
        return self._tree.eval(classad(my), classad(target)) is True
