"""GRAM's job managers: one is killed, and its pilots go on, get newer proxies, and can be removed.

    factory: gridmanager ─ gram-gahp ─▶ job manager (killed) ─▶ batch system ─▶ pilot
                                └─────▶ gatekeeper ─ "restart" ─▶ another one, which reads the job's state file
"""

import time
from dataclasses import dataclass

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, HOLD, ok, running_proxies, until

# By its name before test_batch: the collector remembers killed pilots for five minutes, and no others are asked for.
pytestmark = [pytest.mark.stage(2), pytest.mark.ce, pytest.mark.flavour("ce_gram")]

#: Seconds that a killed job manager's connections hold its port (60, where the kernel cannot be told to forget them),
#: some questions for each job, and what the pilot takes to look at its proxy again; as much again on a busy machine.
LATE = 300
#: Seconds of that minute in which the GAHP asks in vain (each five), before the kernel is told.
HELD_UP = 7


@pytest.fixture(scope="module")
def site():
    return GRID.site("with GRAM", lambda site: site.ce in GRID.names("ce_gram"))


@pytest.fixture(scope="module")
def factory(grid):
    return grid.node("factory")


def managers(site):
    """The job managers of the batch system's jobs."""
    lrms = GRID.variable("batch_system_for", site.ce)["ce_gram"]["lrms"]
    return host(site.ce).run("pgrep -f %s", f"^/usr/sbin/globus-job-manager .*-type {lrms}$").stdout.split()


@dataclass
class Killed:
    """What was there when job managers were killed: they, the pilots' proxies, and a pilot that had shown itself."""

    managers: set[str]
    proxies: dict[tuple[str, str], str]
    number: str
    record: str


@pytest.fixture(scope="module")
def killed(jobs, alice, bob, site, factory):
    """Two pilots without jobs, or more, whose job managers were killed, unasked, just now."""
    holding = [jobs.submit(who, site, f"#!/bin/sh\n{HOLD}\n") for who in (alice, bob)]
    for job in holding:
        job.holds(site)
    numbers = [f"{ad['MachineAttrGLIDEIN_ClusterId0']}.{ad['MachineAttrGLIDEIN_ProcId0']}"
               for ad in (job.ad() for job in holding)]  # fmt: skip
    assert len(set(numbers)) == len(numbers), "the jobs share a pilot"
    for job in holding:
        job.remove()
    known = ok(factory, "pilotbed-factory-pool condor_q -allusers %s -autoformat GridJobId", numbers[0]).split()[-1]
    found = managers(site)
    assert found
    proxies = running_proxies(site)
    ok(host(site.ce), f"kill -KILL {' '.join(found)}")
    assert running_proxies(site) == proxies, "control: it is not the kill that ends pilots"
    return Killed(set(found), proxies, numbers[0], f"/var/lib/pilotbed/factory/gram/{known}.json")


def test_a_pilot_whose_job_manager_was_killed_ends_when_it_is_removed(killed, site, factory):
    """As soon as another job manager can be started. Where none was killed: the fixture of test_batch."""
    assert factory.run("test -e %s", killed.record).rc == 0
    ok(factory, "pilotbed-factory-pool condor_rm %s", killed.number)
    met = time.monotonic() + HELD_UP
    until("it cannot be reached", lambda: time.monotonic() > met or killed.proxies != running_proxies(site), every=1)
    host(site.ce).run("ss --kill state time-wait")
    gone = until("a pilot is gone", lambda: killed.proxies.keys() - running_proxies(site).keys(), LATE)
    for one in gone:
        del killed.proxies[one]
    assert len(gone) == 1 <= len(killed.proxies)


def test_a_newer_proxy_reaches_a_pilot_whose_job_manager_was_killed(killed, grid, site):
    """Without a kill: test_credentials."""
    service = GRID.variable("grid_vos")[0]["pilot_service"]
    ok(grid.node("frontend"), "systemctl restart %s", f"pilotbed-pilot-credential@{service}.service")

    def renewed():
        now = running_proxies(site)
        assert killed.proxies.keys() <= now.keys(), "a pilot has ended"
        return all(now[one] != before for one, before in killed.proxies.items())

    until("every pilot has another proxy", renewed, LATE, every=3)
    assert killed.managers.isdisjoint(managers(site))


def test_nothing_is_kept_of_a_pilot_that_was_removed(killed, factory):
    """What could not be reached is tried again each minute."""
    until("the GAHP has forgotten it", lambda: factory.run("test -e %s", killed.record).rc == 1, LATE)
