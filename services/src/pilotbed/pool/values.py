"""Values of ads that somebody else wrote, and the one way to read them: nothing in an ad may end who reads it.

A job's owner can give any attribute any value; so can whoever starts a pilot with a changed script, or misspells an
entry's configuration. So a reader says what it needs, and what is not that is an AbsurdValue or, where the rest of the
ad counts all the same, a note and a default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

#: Numbers above this are as good as this one: HTCondor's own limits are below it, and no sum of some thousands of them
#: leaves 64 bits ("SystemError ... returned a result with an exception set" from classad2).
LARGEST = 2**31 - 1
_SHOWN = 60


class AbsurdValue(Exception):
    """An attribute that cannot be what it should be; the message names both."""


@dataclass(frozen=True)
class Expr:
    """A value that is no string, number or boolean: a list, a record, an error, an expression; as ClassAd writes it.

    ``open`` is one that is undefined by itself: it may mean something where it is matched.
    """

    text: str
    open: bool = False

    def __str__(self) -> str:
        return self.text


Value = str | int | float | bool | Expr
Ad = Mapping[str, Value]


def shown(value: object) -> str:
    """Return ``value`` for a message: as ClassAd writes it, in one line, and not for ever."""
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def number(  # one return for each way to be none
    ad: Ad,
    name: str,
    default: int | None = None,
    *,
    strings: bool = True,
    most: int = LARGEST,
    notes: list[str] | None = None,
) -> int:
    """Return the attribute ``name`` as a count or an amount: a whole number from 0 to ``most``, rounded up.

    Args:
        ad: the ad.
        name: the attribute.
        default: for an ad without it, or with an open expression; None if it must be there.
        strings: whether digits in a string will do; to HTCondor's own comparisons they are no number.
        most: a larger number becomes this.
        notes: takes the message of an absurd value, which then becomes ``default``.

    Raises:
        AbsurdValue: missing, not a number, not a finite one below zero, and nobody takes notes.
    """
    value = _value(ad, name, default)
    try:
        return _number(name, value, strings, most)
    except AbsurdValue as error:
        if notes is None or default is None:
            raise
        notes.append(str(error))
        return default


def _value(ad: Ad, name: str, default: Value | None) -> Value | None:
    value = ad.get(name, default)
    return default if isinstance(value, Expr) and value.open and default is not None else value


def _number(name: str, value: Value | None, strings: bool, most: int) -> int:
    if value is None:
        raise AbsurdValue(f"{name} is missing")
    if strings and isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value) if len(value) < 20 else most
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise AbsurdValue(f"{name} is {shown(value)}, not a number")
    if value < 0:
        raise AbsurdValue(f"{name} is {shown(value)}, below 0")
    return most if value > most else math.ceil(value)


def text(ad: Ad, name: str, default: str | None = None, *, notes: list[str] | None = None) -> str:
    """Return the attribute ``name`` as a string; arguments as for ``number``.

    Raises:
        AbsurdValue: missing or not a string, and nobody takes notes.
    """
    value = _value(ad, name, default)
    if isinstance(value, str):
        return value
    message = f"{name} is missing" if value is None else f"{name} is {shown(value)}, not a string"
    if notes is None or default is None:
        raise AbsurdValue(message)
    notes.append(message)
    return default
