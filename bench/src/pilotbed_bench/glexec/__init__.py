"""What glexec, its mapping service and its records cost, measured in one run: var/bench-glexec.json and tables in docs.

Measured in the bed of tests/glexec: roles `worker` and `mapping_service` over the node image, in namespaces of their
own, with the real sudo, LCMAPS, nginx and systemd-journald.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pilotbed_suite import CHECKOUT, document

from .. import mapping, run, trace
from . import start

#: What is measured, in order; and the page that has the tables, between markers of that name.
PARTS = {
    "bench-glexec": (start, "docs/glexec.md"),
    "bench-mapping": (mapping, "docs/mapping.md"),
    "bench-trace": (trace, "docs/glexec.md"),
}


@contextlib.contextmanager
def bed() -> Iterator[Any]:
    """Make the bed of tests/glexec for a while; its modules can be imported from then on."""
    sys.path[:0] = [str(CHECKOUT / "tests"), str(CHECKOUT / "tests/glexec")]
    with tempfile.TemporaryDirectory() as directory:
        made = importlib.import_module("glexecbed").Bed(Path(directory))
        try:
            yield made
        finally:
            made.close()


def main() -> int:
    """Measure; write var/bench-glexec.json and the tables of the pages, and print these. Raises LabError."""
    for name, (_, page) in PARTS.items():
        document.publish((CHECKOUT / page).read_text(), name, "")  # rather now than after minutes
    found = run.conditions()
    with bed() as made:
        for name, (part, _) in PARTS.items():
            made.clear()
            found[name] = part.measure(made)
    found["load_at_the_end"] = os.getloadavg()[0]
    target = CHECKOUT / "var/bench-glexec.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    for name, (part, page) in PARTS.items():
        text = f"{run.heading('make bench-glexec', found)} {part.tables(found[name])}"
        document.write(CHECKOUT / page, name, text)
        print(text, end="\n\n")
    return 0
