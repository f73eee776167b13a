"""The report as one page: nothing is fetched, and it can be printed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from .report import Link, Report, Verdict

#: Of the diagram, in its own units.
_BOX, _NAME, _PROGRAM, _GAP, _MARGIN = 118, 26, 11, 16, 24
#: Between two rows, for the lines.
_BETWEEN = 84
#: Boxes in a row.
_ACROSS = 8


@dataclass(frozen=True)
class Box:
    """A node in the diagram, with what listens on it."""

    name: str
    x: int
    y: int
    height: int
    listens: tuple[str, ...]

    @property
    def middle(self) -> int:
        """Where lines meet it, from left to right."""
        return self.x + _BOX // 2

    @property
    def below(self) -> int:
        """Its lower edge."""
        return self.y + self.height


@dataclass(frozen=True)
class Row:
    """Nodes of one place: a site's, or those of none."""

    title: str
    y: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Line:
    """Who connects to whom, and to which ports."""

    path: str
    client: str
    server: str
    ports: tuple[int, ...]


@dataclass(frozen=True)
class Diagram:
    """The components as they were found."""

    width: int
    height: int
    rows: tuple[Row, ...]
    lines: tuple[Line, ...]


def diagram(report: Report) -> Diagram:
    """Return where each node of a report is drawn, and who is joined with whom."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, groups in report.nodes.items():
        site = next((group.removeprefix("site_") for group in groups if group.startswith("site_")
                     and group not in ("site_router", "site_storage")), "")  # fmt: skip
        places[f"site {site}" if site else "central services"].append(name)
    rows, y = [], _MARGIN
    boxes: dict[str, Box] = {}
    for title in sorted(places, key=lambda title: title != "central services"):
        names = places[title]
        for first in range(0, len(names), _ACROSS):
            listens = {name: tuple(sorted({one.program for one in report.sockets if one.node == name}))
                       for name in names[first : first + _ACROSS]}  # fmt: skip
            height = _NAME + _PROGRAM * max(map(len, listens.values()))
            here = tuple(Box(name, _MARGIN + column * (_BOX + _GAP), y + 18, height, programs)
                         for column, (name, programs) in enumerate(listens.items()))  # fmt: skip
            boxes |= {box.name: box for box in here}
            rows.append(Row(title if first == 0 else "", y, here))
            y += height + _BETWEEN
    return Diagram(2 * _MARGIN + _ACROSS * (_BOX + _GAP) - _GAP, y, tuple(rows), tuple(_lines(report.links, boxes)))


def _lines(links: tuple[Link, ...], boxes: dict[str, Box]) -> list[Line]:
    ports: dict[tuple[str, str], set[int]] = defaultdict(set)
    for link in links:
        if link.client in boxes and link.server in boxes and link.client != link.server:
            ports[link.client, link.server].add(link.port)
    found = []
    for (client, server), numbers in sorted(ports.items()):
        one, other = boxes[client], boxes[server]
        if one.y == other.y:  # below their row, the further the wider
            begin, end = one.below, other.below
            bend = begin + min(30 + abs(one.x - other.x) // 8, 2 * (_BETWEEN - 20))
        else:
            begin, end = (one.below, other.y) if one.y < other.y else (one.y, other.below)
            bend = (begin + end) // 2
        path = f"M {one.middle} {begin} Q {(one.middle + other.middle) // 2} {bend} {other.middle} {end}"
        found.append(Line(path, client, server, tuple(sorted(numbers))))
    return found


def page(report: Report) -> str:
    """Return the page's HTML. Whatever a command has said is text in it, never markup."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files(__package__) / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(report=report, diagram=diagram(report), verdicts=list(Verdict), width=_BOX)
