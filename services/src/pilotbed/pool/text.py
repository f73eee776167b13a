"""ClassAd text: string literals and constraints from values that others have chosen."""

from __future__ import annotations

from collections.abc import Iterable


def quote(text: str) -> str:
    r"""Return ``text`` as a ClassAd string literal (backslash and quote escaped, line ends as ``\n``).

    Raises:
        ValueError: a NUL, which ends a string inside HTCondor.
    """
    if "\0" in text:
        raise ValueError("a ClassAd string cannot hold a NUL character")
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(plain, escaped)
    return f'"{text}"'


def equals(**values: str) -> str:
    """Return the constraint that every named attribute is exactly that string (``=?=``: case counts)."""
    return " && ".join(f"{name} =?= {quote(value)}" for name, value in values.items())


def any_of(attribute: str, values: Iterable[str]) -> str:
    """Return the constraint that ``attribute`` is one of ``values``; ``false`` if there are none."""
    return " || ".join(f"{attribute} =?= {quote(value)}" for value in values) or "false"
