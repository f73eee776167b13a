"""The way through: what reaches a worker, what does not, and who counts it.

    submit ──▶ relay:410xx ═══▶ agent ──▶ startd on a worker of the hidden site
    submit ◀══ CCB ══ startd on a worker of the filtered site
    submit ──▶ site's router ──✗  worker          (NAT: dropped and counted)
    wan    ──▶ site's router ──✗  worker          (routed or sealed: dropped and counted)
    CE     ──▶ worker                             (inside: the same ports answer, so the scan can tell)

The relay's dedicated ports are closed by a filter of the test's own on the relay's node, in a table that is deleted
again.
"""

import json
import re

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, ok, until

TABLE = "inet pilotbed_test"

SCAN = """
import concurrent.futures, json, socket, sys
def connects(target):
    try:
        socket.create_connection(target, timeout=1.5).close()
        return True
    except OSError:
        return False
targets = [(address, port) for address, port in json.loads(sys.argv[1])]
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    print(json.dumps([target for target, open in zip(targets, pool.map(connects, targets)) if open]))
"""


def reached(node, targets):
    """The (address, port) pairs of ``targets`` to which a node can open a connection."""
    found = json.loads(ok(node, "python3 -I -c %s %s", SCAN, json.dumps(targets)))
    return sorted(map(tuple, found))


def listening(grid, name):
    """(address, port) of all that a node offers beyond its own loopback."""
    lines = ok(host(name), "ss -Hltn").splitlines()
    places = (line.split()[3].rpartition(":") for line in lines)
    ports = {int(port) for address, _, port in places if not address.strip("[]").startswith(("127.", "::1"))}
    return [(address, port) for address in grid.addresses(name).values() for port in sorted(ports)]


def dropped(site, counter):
    """Packets that a site's router has dropped so far."""
    return int(re.search(r"packets (\d+)", ok(host(site.router), "nft list counter inet site %s", counter))[1])


def leases(relay):
    """The relay's leases by port."""
    return {lease["port"]: lease for lease in json.loads(ok(relay, "pilotbed-relay status"))["leases"]}


# -- the relay -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(relay, pilots, hidden_site):
    """The relay's dedicated ports are closed to everybody; returns (count of refused attempts, open them again)."""
    pilots(hidden_site)
    ports = json.loads(ok(relay, "pilotbed-relay status"))["ports"]
    rules = (
        f"add table {TABLE}; add counter {TABLE} knocks; "
        f"add chain {TABLE} closed {{ type filter hook input priority -10; }}; "
        f"add rule {TABLE} closed tcp dport {ports['first']}-{ports['last']} "
        "ct state new counter name knocks reject with tcp reset"
    )

    def knocks():
        return int(re.search(r"packets (\d+)", ok(relay, f"nft list counter {TABLE} knocks"))[1])

    def reopen():
        relay.run(f"nft delete table {TABLE}")

    reopen()
    ok(relay, "nft %s", rules)
    yield knocks, reopen
    reopen()


@pytest.fixture(scope="module")
def stranded(jobs, alice, hidden_site, closed):
    """A job after it was matched, and knocked for, twice while the ports were closed; its ad of that time."""
    knocks, _ = closed
    job = jobs.submit(alice, hidden_site)
    log = f"grep -c 'for {job.owner}, {job.id}) deleted' /var/log/condor/SchedLog"
    until("the schedd has given up two matches", lambda: knocks() > 1 and int(job.node.run(log).stdout) > 1)
    return job, job.ad()


def test_job_does_not_start_while_the_relays_ports_are_closed(stranded):
    _, ad = stranded
    assert (ad["JobStatus"], ad.get("NumJobStarts", 0)) == (1, 0)


@pytest.fixture(scope="module")
def released(stranded, closed, relay):
    """The same job after the ports were opened: its ad, and what the relay had counted before."""
    job, _ = stranded
    _, reopen = closed
    before = leases(relay)
    reopen()
    return job.done(90), before


def test_relay_counts_the_streams_when_its_ports_are_open(released, relay):
    ad, before = released
    assert ad["ExitCode"] == 0
    port = int(ad["MachineAttrGLIDEIN_Relay_Address0"].rpartition(":")[2])
    then, now = before[port], leases(relay)[port]
    assert now["streams_total"] > then["streams_total"]
    assert now["bytes_inward"] > then["bytes_inward"] + 1000, "claim, job and proxy went inward"
    assert now["bytes_outward"] > then["bytes_outward"]


def test_claim_came_by_the_relays_address(released, relay, grid):
    ad, _ = released
    address = next(iter(grid.addresses(grid.names("relay")[0]).values()))
    assert ad["LastPublicClaimId"].startswith(f"<{address}:")


@pytest.mark.check("D1.6")
def test_users_proxy_gets_no_port(submit, relay, grid, alice):
    """The relay serves pilots; a member of the VO who is none is refused, and it says so on both sides."""
    before = json.loads(ok(relay, "pilotbed-relay status"))["refusals"].get("not_authorized", 0)
    command = (
        f"voms-proxy-init --quiet --voms {alice.voms}; "
        f"timeout 20 pilotbed-relay-agent --server {grid.fqdn(grid.names('relay')[0])}:9700 "
        "--proxy /tmp/x509up_u$(id -u) --cadir /etc/grid-security/certificates --state ~/relay-test.json"
    )
    command += "; echo code $?; ls ~/relay-test.json"
    done = submit.run("runuser --login %s --command %s", alice.account, command)
    assert "code 3" in done.stdout
    assert "not_authorized" in done.stderr
    assert json.loads(ok(relay, "pilotbed-relay status"))["refusals"]["not_authorized"] == before + 1
    assert "No such file" in done.stderr


# -- the broker ----------------------------------------------------------------------------------------------------


def test_claim_at_the_filtered_site_takes_a_reversed_connection(jobs, alice, central, filtered_site, pilots):
    """One that only the collector's broker can arrange."""

    def reversed_connections():
        # With a projection the collector leaves its statistics out.
        return int(ok(central, "condor_status -collector -long | sed -n 's/^CCBRequestsSucceeded = //p'"))

    pilots(filtered_site)
    before = reversed_connections()
    jobs.submit(alice, filtered_site).done()
    until("the broker counts the claim", lambda: reversed_connections() > before)


# -- the sites' edges ----------------------------------------------------------------------------------------------


@pytest.fixture(params=GRID.sites, ids=lambda site: site.name)
def site(request):
    return request.param


@pytest.fixture
def outsider(grid, site, submit):
    """A node in the world that knows the way: behind NAT it has been told where the site's own addresses are."""
    route = f"{site.cidr} via {site.router_address}"
    known = submit.run("ip route show %s", site.cidr).stdout.strip()
    if not known:
        ok(submit, f"ip route add {route}")
    yield submit
    if not known:
        ok(submit, f"ip route del {route}")


@pytest.mark.check("D1.6")
@pytest.mark.edges
def test_nothing_from_outside_connects_to_a_worker(grid, site, outsider, pilots):
    pilots(site)  # whose startd listens there
    targets = [target for worker in site.workers for target in listening(grid, worker)]
    assert len(targets) > len(site.workers), "besides the pilots' there are Slurm's ports at least"
    before = dropped(site, "inbound_dropped")
    assert reached(outsider, targets) == []
    assert dropped(site, "inbound_dropped") >= before + len(targets)
    assert reached(host(site.ce), targets) == sorted(targets), "from inside, every one of them answers"


@pytest.mark.edges
def test_only_the_computing_elements_port_is_open_to_the_world(grid, site, outsider):
    inside = listening(grid, site.ce)
    assert len(inside) > 1
    public = grid.variable("node_public_address", site.ce) or next(iter(grid.addresses(site.ce).values()))
    routers_own = {(site.router_address, 22)}
    assert set(reached(outsider, [(public, port) for _, port in inside])) - routers_own == {(public, 443)}


@pytest.mark.edges
def test_router_itself_offers_the_world_only_its_administration(grid, site, outsider):
    before = dropped(site, "router_dropped")
    targets = [(site.router_address, port) for _, port in listening(grid, site.router)] + [(site.router_address, 3128)]
    found = reached(outsider, targets)
    assert set(found) <= {(site.router_address, 22)}
    assert dropped(site, "router_dropped") > before
