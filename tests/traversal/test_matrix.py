"""Which way joins which worker to which submit host: every cell is a job with 50 MB in and 50 MB out.

A cell that works has brought the right bytes both ways in one start; one that cannot work fails with its own symptom.
What came out is written to var/traversal.json, of which `make test-relay` makes the table in docs/traversal.md.
"""

import json
from dataclasses import asdict

import pytest
from matrix import (
    CELLS,
    SCHEDD,
    UNCLAIMED,
    UNNEGOTIATED,
    UNREGISTERED,
    UNTRANSFERRED,
    WORKERS,
    WORKS,
    join_schedd,
)
from pilotbed.factory.config import TRAVERSALS
from support import CHECKOUT, GRID, ok

#: The relay's border mode belongs to the way `relay`: the other ways have to do without it at a sealed site.
BORDERED = ("relay",)

EXPECTED = {
    # submit, worker: direct, ccb, ccb_streaming, ccb_tunnel, relay
    ("public", "public"): (WORKS, WORKS, WORKS, WORKS, WORKS),
    ("public", "filtered"): (UNCLAIMED, WORKS, WORKS, WORKS, WORKS),
    ("public", "NAT"): (UNCLAIMED, WORKS, WORKS, WORKS, WORKS),
    ("public", "sealed"): (UNREGISTERED, UNREGISTERED, UNREGISTERED, WORKS, WORKS),
    ("NAT", "public"): (UNNEGOTIATED, UNTRANSFERRED, WORKS, UNTRANSFERRED, WORKS),
    ("NAT", "filtered"): (UNNEGOTIATED, UNTRANSFERRED, WORKS, UNTRANSFERRED, WORKS),
    ("NAT", "NAT"): (UNNEGOTIATED, UNTRANSFERRED, WORKS, UNTRANSFERRED, WORKS),
    ("NAT", "sealed"): (UNREGISTERED, UNREGISTERED, UNREGISTERED, UNTRANSFERRED, WORKS),
}


@pytest.fixture(scope="module")
def border():
    """The sealed site's border."""
    return GRID.node("border")


@pytest.fixture(scope="module")
def outcomes(ways, border):
    """What became of every cell."""
    found = {}
    inside = [(worker, way) for worker in WORKERS for way in TRAVERSALS if worker != "sealed" or way in BORDERED]
    ways.warm()
    for worker, way in inside:
        ways.start(worker, way)
    ways.wait(inside)

    def run(submit, chosen):
        cells = [cell for cell in CELLS if cell.submit == submit and (cell.worker, cell.way) in chosen]
        found.update(ways.run(cells))
        written = [
            {**asdict(cell), "verdict": found[cell].verdict, "evidence": found[cell].evidence}
            for cell in CELLS if cell in found
        ]  # fmt: skip
        (CHECKOUT / "var/traversal.json").write_text(json.dumps(written, indent=1) + "\n")

    run("public", inside)
    # A daemon behind another broker ends the tunnel's broker (HTCondor 25.14): these cells come last.
    tunnels = [(worker, way) for worker, way in inside if way == "ccb_tunnel"]
    for flavour in dict.fromkeys(SCHEDD.values()):
        join_schedd(flavour)
        run("NAT", [pair for pair in inside if SCHEDD[pair[1]] == flavour and pair not in tunnels])
    sealed = [("sealed", way) for way in TRAVERSALS if way not in BORDERED]
    ok(border, "systemctl stop pilotbed-border")
    try:
        for worker, way in sealed:
            ways.start(worker, way)
        ways.wait([("sealed", "ccb_tunnel")])
        run("public", sealed)
        join_schedd("ccb")
        run("NAT", sealed + tunnels)
    finally:
        ok(border, "systemctl start pilotbed-border")
    return found


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.submit}-{cell.worker}-{cell.way}")
def test_cell(outcomes, cell):
    found = outcomes[cell]
    assert found.verdict == EXPECTED[cell.submit, cell.worker][TRAVERSALS.index(cell.way)], found.evidence
