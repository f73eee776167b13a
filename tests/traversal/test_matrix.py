"""Which way joins which worker to which submit host: every cell is a job with 50 MB in and 50 MB out.

A cell that works has brought the right bytes both ways in one start; one that cannot work fails with its own symptom.
What came out is written to var/traversal.json, with what said so, and as a table into docs/traversal.md.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import pytest
from matrix import (
    BROKEN,
    CELLS,
    MEGABYTES,
    SCHEDD,
    UNCLAIMED,
    UNNEGOTIATED,
    UNREGISTERED,
    UNTRANSFERRED,
    WORKERS,
    WORKS,
    Cell,
    Outcome,
    dropped,
    join_schedd,
    status,
    submit_of,
    table,
)
from pilotbed.factory.config import TRAVERSALS
from pilotbed_suite import CHECKOUT, document
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, ok

#: The relay's border mode belongs to the way `relay`: the other ways have to do without it at a sealed site.
BORDERED = ("relay",)

EXPECTED = {
    # submit, worker: direct, ccb, ccb_streaming, ccb_tunnel, relay
    ("public", "public"): (WORKS, WORKS, WORKS, WORKS, WORKS),
    ("public", "filtered"): (UNCLAIMED, WORKS, WORKS, WORKS, WORKS),
    ("public", "NAT"): (UNCLAIMED, WORKS, WORKS, WORKS, WORKS),
    ("public", "sealed"): (UNREGISTERED, UNREGISTERED, UNREGISTERED, WORKS, WORKS),
    # A claim asks the broker for a connection to a schedd that is itself behind a broker (HTCondor 25.14.1).
    ("NAT", "public"): (UNNEGOTIATED, UNTRANSFERRED, WORKS, BROKEN, WORKS),
    ("NAT", "filtered"): (UNNEGOTIATED, UNTRANSFERRED, WORKS, BROKEN, WORKS),
    ("NAT", "NAT"): (UNNEGOTIATED, UNTRANSFERRED, WORKS, BROKEN, WORKS),
    ("NAT", "sealed"): (UNREGISTERED, UNREGISTERED, UNREGISTERED, BROKEN, WORKS),
}


@pytest.fixture(scope="module")
def border():
    """The sealed site's border."""
    return GRID.node("border")


def drops():
    """What each site's router has dropped so far, by the site's flavour."""
    return {
        site.flavour: dropped(site.router, "outbound_dropped" if site.flavour == "sealed" else "inbound_dropped")
        for site in GRID.sites
    }


@dataclass
class Ran:
    """What became of every cell, and what the routers dropped and the sealed site's border carried meanwhile."""

    found: dict[Cell, Outcome]
    dropped: dict[str, int]
    carried: dict[str, Any]


@pytest.fixture(scope="module")
def ran(ways, border):
    found, before = {}, drops()
    inside = [(worker, way) for worker in WORKERS for way in TRAVERSALS if worker != "sealed" or way in BORDERED]
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
    carried = status(border, "border")
    ok(border, "systemctl stop pilotbed-border && nft flush chain inet site publish")
    try:
        for worker, way in sealed:
            ways.start(worker, way)
        ways.wait([("sealed", "ccb_tunnel")])
        run("public", sealed)
        join_schedd("ccb")
        run("NAT", sealed + tunnels)
        after = drops()
    finally:
        ok(border, "systemctl reload nftables && systemctl start pilotbed-border")
        join_schedd(GRID.variable("submit_traversal", submit_of("NAT")))
    document.write(CHECKOUT / "docs/traversal.md", "matrix", table(found))
    return Ran(found, {flavour: after[flavour] - before[flavour] for flavour in after}, carried)


@pytest.fixture(scope="module")
def outcomes(ran):
    return ran.found


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.submit}-{cell.worker}-{cell.way}")
def test_job_ends_as_its_way_through_the_firewalls_allows(outcomes, cell):
    found = outcomes[cell]
    assert found.verdict == EXPECTED[cell.submit, cell.worker][TRAVERSALS.index(cell.way)], found.evidence


def leases():
    """Every lease of every relay, also those that have ended, with its relay's full name."""
    return [
        lease | {"relay": GRID.fqdn(relay)}
        for relay in GRID.names("relay")
        for state in [status(host(relay))]
        for lease in [*state["leases"], *state["ended_leases"]]
    ]  # fmt: skip


@pytest.mark.parametrize("submit", ["public", "NAT"])
@pytest.mark.parametrize("worker", WORKERS)
def test_claim_came_through_the_relay(outcomes, submit, worker):
    """By the relay's own count. The files go another way: the pilot connects to the schedd for them."""
    place = outcomes[Cell(submit, worker, "relay")].ad["MachineAttrGLIDEIN_Relay_Address0"]
    lease = next(lease for lease in leases() if f"{lease['relay']}:{lease['port']}" == place)
    assert lease["streams_total"] > 0
    assert min(lease["bytes_inward"], lease["bytes_outward"]) > 10_000, "claim, job and proxy in, what came of it out"


def test_files_came_through_the_relay_of_the_schedd_behind_NAT(outcomes):
    name = submit_of("NAT")
    mine = [lease for lease in leases() if lease["pilot"] == name]
    wanted = len(WORKERS) * MEGABYTES << 20
    for way in ("bytes_inward", "bytes_outward"):
        assert sum(lease[way] for lease in mine) > wanted, mine


@pytest.mark.parametrize("flavour", ["filter", "sealed"])
def test_router_counted_what_it_dropped(ran, flavour):
    """Behind NAT there is nothing to drop: the schedd has no route to such a worker."""
    assert ran.dropped[flavour] > 0


def test_border_carried_what_a_sealed_site_may_have(ran):
    assert min(ran.carried["bytes_inward"], ran.carried["bytes_outward"]) > 2 * MEGABYTES << 20
