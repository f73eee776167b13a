"""pilotbed-certificate: what has changed between two reports, and a report's page made again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .page import page
from .report import Report, ReportError, differences, parse


def _read(path: Path) -> Report:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ReportError) as error:
        said = getattr(error, "strerror", None) or error
        raise ReportError(f"{path}: {said}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``pilotbed-certificate``: as diff(1), 0 if nothing differs, 1 if something does, 2 on trouble."""
    parser = argparse.ArgumentParser(prog="pilotbed-certificate", description="Compare reports, or show one.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    diff = verbs.add_parser("diff", help="a line for everything that is not as it was")
    diff.add_argument("old", type=Path, help="report.json")
    diff.add_argument("new", type=Path, help="report.json")
    show = verbs.add_parser("page", help="the page of a report, on standard output")
    show.add_argument("report", type=Path, help="report.json")
    options = parser.parse_args(argv)
    try:
        if options.verb == "page":
            print(page(_read(options.report)))
            return 0
        lines = differences(_read(options.old), _read(options.new))
    except ReportError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines) or "no difference")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
