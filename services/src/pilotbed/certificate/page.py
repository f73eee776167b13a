"""The report as one page: nothing is fetched, and it can be printed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from .report import Link, Report, Verdict

#: Of the diagram, in its own units.
_BOX, _HEIGHT, _GAP, _ROW, _MARGIN = 118, 44, 16, 128, 24
#: Boxes in a row.
_ACROSS = 8


@dataclass(frozen=True)
class Box:
    """A node in the diagram, with what listens on it."""

    name: str
    x: int
    y: int
    listens: str

    @property
    def centre(self) -> tuple[int, int]:
        """Its middle."""
        return self.x + _BOX // 2, self.y + _HEIGHT // 2


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
    says: str


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
    rows, boxes, y = [], {}, _MARGIN
    for title in sorted(places, key=lambda title: title != "central services"):
        names = places[title]
        for first in range(0, len(names), _ACROSS):
            here = []
            for column, name in enumerate(names[first : first + _ACROSS]):
                programs = sorted({one.program for one in report.sockets if one.node == name})
                box = Box(name, _MARGIN + column * (_BOX + _GAP), y + 18, ", ".join(programs))
                boxes[name] = box
                here.append(box)
            rows.append(Row(title if first == 0 else "", y, tuple(here)))
            y += _ROW
    return Diagram(2 * _MARGIN + _ACROSS * (_BOX + _GAP) - _GAP, y - _ROW + _HEIGHT + 2 * _MARGIN, tuple(rows),
                   tuple(_lines(report.links, boxes)))  # fmt: skip


def _lines(links: tuple[Link, ...], boxes: dict[str, Box]) -> list[Line]:
    ports: dict[tuple[str, str], set[int]] = defaultdict(set)
    for link in links:
        if link.client in boxes and link.server in boxes and link.client != link.server:
            ports[link.client, link.server].add(link.port)
    found = []
    for (client, server), numbers in sorted(ports.items()):
        (x1, y1), (x2, y2) = boxes[client].centre, boxes[server].centre
        bend = 46 if y1 == y2 else 0
        path = f"M {x1} {y1} Q {(x1 + x2) // 2} {(y1 + y2) // 2 + bend} {x2} {y2}"
        found.append(Line(path, f"{client} → {server}: {', '.join(map(str, sorted(numbers)))}"))
    return found


def page(report: Report) -> str:
    """Return the page's HTML. Whatever a command has said is text in it, never markup."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files(__package__) / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(report=report, diagram=diagram(report), verdicts=list(Verdict), box=(_BOX, _HEIGHT))
