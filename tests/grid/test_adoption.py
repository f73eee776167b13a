"""GRAM's job managers: one is killed, and its pilots go on, get newer proxies, and can be removed.

    factory: gridmanager ─ gram-gahp ─▶ job manager (killed) ─▶ batch system ─▶ pilot
                                └─────▶ gatekeeper ─ "restart" ─▶ another one, which reads the job's state file
"""

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, HOLD, ok, running_proxies, until

# By its name before test_batch: the collector remembers killed pilots for five minutes, and no others are asked for.
pytestmark = [pytest.mark.stage(2), pytest.mark.ce, pytest.mark.flavour("ce_gram")]

#: Seconds that a killed job manager's connections hold its port (60), some questions for each job, and what the pilot
#: takes to look at its proxy again; as much again on a busy machine.
LATE = 300


@pytest.fixture(scope="module")
def site():
    return GRID.site("with GRAM", lambda site: site.ce in GRID.names("ce_gram"))


@pytest.fixture(scope="module", autouse=True)
def pilot(jobs, alice, site):
    """A pilot that has shown that it runs, and has no job."""
    job = jobs.submit(alice, site, f"#!/bin/sh\n{HOLD}\n")
    job.holds(site)
    job.remove()


def managers(site):
    """The job managers of the batch system's jobs."""
    lrms = GRID.variable("batch_system_for", site.ce)["ce_gram"]["lrms"]
    return host(site.ce).run("pgrep -f %s", f"^/usr/sbin/globus-job-manager .*-type {lrms}$").stdout.split()


def kill(site):
    """Kill them, unasked."""
    found = managers(site)
    assert found
    ok(host(site.ce), f"kill -KILL {' '.join(found)}")
    return found


def test_a_newer_proxy_reaches_a_pilot_whose_job_manager_was_killed(grid, site):
    """Without a kill: test_credentials."""
    before = running_proxies(site)
    assert before
    killed = kill(site)
    service = GRID.variable("grid_vos")[0]["pilot_service"]
    ok(grid.node("frontend"), "systemctl restart %s", f"pilotbed-pilot-credential@{service}.service")

    def renewed():
        now = running_proxies(site)
        assert before.keys() <= now.keys(), "a pilot has ended"
        return all(now[one] != before[one] for one in before)

    until("every pilot has another proxy", renewed, LATE, every=3)
    assert set(managers(site)).isdisjoint(killed)


def test_a_pilot_whose_job_manager_was_killed_ends_when_it_is_removed(grid, site):
    """At once, while no other job manager can be started. With one: the fixture of test_batch."""
    assert running_proxies(site)
    kill(site)
    assert running_proxies(site), "control: it is not the kill that ends pilots"
    factory = grid.node("factory")
    ok(factory, "pilotbed-factory-pool condor_rm -all")
    until("no pilot is left", lambda: not running_proxies(site), LATE)
    # What could not be reached is tried again each minute.
    until("the GAHP has forgotten them", lambda: not ok(factory, "ls /var/lib/pilotbed/factory/gram"), LATE)
