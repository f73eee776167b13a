"""Figures that a run found, in the project's documents: tables between two markers of a page's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from . import GridError


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def aims(rows: Iterable[tuple[str, str, bool]]) -> list[str]:
    """Return the table of aims: what, the figure, and whether it is met."""
    return table(["aim", "measured", ""], [[what, value, "met" if met else "not met"] for what, value, met in rows])


def publish(document: str, name: str, text: str) -> str:
    """Return a page's text with ``text`` between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Raises:
        GridError: it has not each marker once, in order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = document.partition(begin)
    _old, ended, after = rest.partition(end)
    if not found or not ended or begin in rest or end in after:
        raise GridError(f"the page must have the lines {begin} and {end}, once each")
    return f"{before}{begin}\n{text.rstrip()}\n{end}{after}"


def write(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of a page on disk."""
    page.write_text(publish(page.read_text(), name, text))
