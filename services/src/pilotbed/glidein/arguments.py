"""The arguments of a pilot's start-up script (glidein_startup.sh), in the coding of glideinWMS 3.10."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

#: Characters that did not survive the way through a CE and a batch system, and how a parameter's value writes them.
CODES = {
    ".": "dot", ",": "comma", "&": "amp", "\\": "backslash", "|": "pipe", "`": "fork", '"': "quot", "'": "singquot",
    "=": "eq", "+": "plus", "-": "minus", "<": "lt", ">": "gt", "(": "open", ")": "close", "{": "gopen", "}": "gclose",
    "[": "sopen", "]": "sclose", "#": "comment", "$": "dollar", "*": "star", "?": "question", "!": "not", "~": "tilde",
    ":": "colon", ";": "semicolon", " ": "nbsp",
}  # fmt: skip


def encode(value: str) -> str:
    """Return a parameter's value as one word of harmless characters.

    >>> encode("central.grid.test:9618")
    'central.dot,grid.dot,test.colon,9618'

    Raises:
        ValueError: the value is empty or has a control character; neither has a code.
    """
    if not value or not value.isprintable():
        raise ValueError(
            f"parameter value {value!r}: an empty value or a control character cannot be passed to a pilot"
        )
    return "".join(f".{CODES[character]}," if character in CODES else character for character in value)


def pilot_arguments(options: Mapping[str, str], parameters: Iterable[tuple[str, str]]) -> list[str]:
    """Return the argument list of one pilot.

    Args:
        options: option without its dash -> value, for example ``{"web": "http://…", "sign": "ab12…"}``.
        parameters: name and plain value of each ``-param_NAME``.

    Raises:
        ValueError: a parameter's value cannot be passed on.
    """
    words = [word for name, value in options.items() for word in (f"-{name}", value)]
    return words + [word for name, value in parameters for word in (f"-param_{name}", encode(value))]
