"""Into a running job through the relay: condor_ssh_to_job, condor_tail and condor_rm, from either side of a NAT.

The pilot does without glexec: with it, ssh and peeking would give the user the pilot's own account (docs/glexec.md).
"""

from dataclasses import replace

import pytest
from matrix import SUBMITS, join_schedd, status, submit_of, worker_of
from pilotbed_suite import walk
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, HOLD, as_user, frontend_stage, ok, processes, until, without_glexec

SCRIPT = f"""#!/bin/sh
echo "said on $(hostname)"
{HOLD}
"""


@pytest.fixture(scope="module")
def pilot(ways):
    """A pilot behind NAT that does without glexec, known to the pool."""
    site, name = worker_of("NAT")
    join_schedd(GRID.variable("submit_traversal", submit_of("NAT")))
    with frontend_stage(without_glexec) as options:
        made = ways.pilot("session", site, name, "relay", options)
        until("the pool knows the pilot", made.slots)
        yield made


@pytest.fixture(scope="module", params=SUBMITS)
def running(request, ways, pilot):
    """A job that has said something and waits; submitted from either submit host."""
    site = replace(worker_of("NAT")[0], name="ways")
    wanted = f'requirements = split(TARGET.Name, "@")[1] == "{pilot.name}"'
    job = ways.jobs[request.param].submit(walk.walker("alice"), site, SCRIPT, wanted)
    job.holds(site)
    return job


@pytest.fixture(scope="module")
def name(pilot):
    """The worker's full name."""
    return ok(pilot.worker, "hostname -f").strip()


def test_ssh_to_job_opens_a_shell_in_the_running_job(running, name):
    """The schedd hears where the starter is with its next update (SHADOW_QUEUE_UPDATE_INTERVAL)."""
    command = f"timeout 60 condor_ssh_to_job -auto-retry {running.id} 'hostname; cat _condor_stdout'"
    code, said = as_user(running.node, running.owner, command)
    assert (code, said.split("\n")[-3:]) == (0, [name, f"said on {name}", ""]), said


def test_condor_tail_shows_what_the_job_writes(running, name):
    code, said = as_user(running.node, running.owner, f"timeout 60 condor_tail {running.id}")
    assert (code, said) == (0, f"said on {name}\n")


def test_removed_job_ends_on_the_worker(running, pilot):
    running.remove()
    until("the payload has ended", lambda: running.hold not in [each.args for each in processes(pilot.worker)])
    until("no stream is left of it", lambda: running.status() == "removed")


def test_nothing_went_past_the_relay(running, pilot):
    """The worker cannot be connected to: all of this was a stream of its pilot's port."""
    leases = [lease for each in GRID.names("relay") for lease in status(host(each))["leases"]]
    assert next(lease for lease in leases if lease["pilot"] == pilot.name)["streams_total"] > 3
