"""What glexec's key tests have shown under each batch system: kept by each run, and a table in docs/batch-systems.md.

``tests/grid/test_batch.py`` leaves a file for each pair of batch system and computing element that it ran on;
``make matrix`` writes the table from those of this checkout, molecule's scenarios among them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TypedDict

from . import CHECKOUT, document

#: One file a pair.
RESULTS = CHECKOUT / "var/batch"
PAGE = CHECKOUT / "docs/batch-systems.md"
#: Which of several outcomes of one check counts.
WORST = ("passed", "not tried", "failed")


class Shown(TypedDict):
    """What a run has shown: the groups, the day, and the outcome by test."""

    batch: str
    ce: str
    day: str
    tests: dict[str, str]


def keep(batch: str, ce: str, tests: Mapping[str, str]) -> None:
    """Keep what a run has shown.

    Args:
        batch, ce: the groups' names.
        tests: outcome by test, without ``test_`` and parameters: passed, failed, or "not tried".
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = Shown(batch=batch, ce=ce, day=date.today().isoformat(), tests=dict(tests))
    (RESULTS / f"{batch}-{ce}.json").write_text(json.dumps(found, indent=1))


def rows(found: Sequence[Shown]) -> list[str]:
    """Return the lines of the table: a row a check, G1 first, and a column a pair."""
    names = {name for one in found for name in one["tests"]}

    def order(name: str) -> tuple[int, str]:
        number = re.match(r"g(\d+)_", name)
        return (int(number[1]) if number else 99, name)

    def words(name: str) -> str:
        number, _, rest = name.partition("_") if re.match(r"g\d", name) else ("", "", name)
        return f"{number.upper()} {rest.replace('_', ' ')}".strip()

    heads = ["", *(f"`{one['batch']}`, `{one['ce']}`" for one in found)]
    body = [[words(name), *(one["tests"].get(name, "") for one in found)] for name in sorted(names, key=order)]
    days = ["last run", *(one["day"] for one in found)]
    return document.table(heads, [*body, days])


def main() -> int:
    """Write the table; return the exit code."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    if not found:
        print(f"nothing in {RESULTS}: `molecule test` or `make test` first", file=sys.stderr)
        return 1
    document.write(PAGE, "matrix", "\n".join(rows(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
