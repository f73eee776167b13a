"""``python -m pilotbed_bench BENCH``: what the Makefile's bench targets run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pilotbed_suite import CHECKOUT, GridError

from . import glexec, grid, pilots
from .grid import claims
from .pilots import ongrid
from .relay import comparison

BENCHES = {
    "grid": grid.main, "claims": claims.main, "relay": comparison.main, "glexec": glexec.main, "pilots": pilots.main,
    "pilots-grid": ongrid.main,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one bench; return its exit code."""
    parser = argparse.ArgumentParser(prog="pilotbed_bench", description=__doc__)
    parser.add_argument("bench", choices=BENCHES)
    arguments = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("pilotbed: the benches make namespaces and mounts: run them as root", file=sys.stderr)
        return 1
    os.chdir(CHECKOUT)
    try:
        return BENCHES[arguments.bench]()
    except GridError as error:
        print(f"pilotbed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
