"""Jobs whose ads say odd things: the frontend goes on for everybody else, and says what becomes of them."""

import json

import pytest
from pilotbed_lab import status
from pilotbed_suite.support import GRID, as_user, ok, until

#: What the bug report had, and its like: attributes that the match and the sizes are made of. Edited into the job: the
#: schedd refuses what is submitted so.
ABSURD = """RequestCpus '"four"' RequestMemory '{1, 2}' RequestDisk error DESIRED_Sites '[a = 1]'"""


@pytest.fixture(scope="module")
def frontend():
    return GRID.node("frontend")


@pytest.fixture(scope="module")
def state(frontend):
    """What the group of the first VO says of itself: a function."""
    path = f"/run/pilotbed/frontend/{GRID.variable('grid_vos')[0]['frontend_group']}/state.json"
    return lambda: json.loads(ok(frontend, "cat %s", path))


@pytest.fixture(scope="module")
def restarts(frontend):
    show = "systemctl show --value --property NRestarts --property ActiveState 'pilotbed-frontend@*'"
    return lambda: ok(frontend, show).split()


def test_an_absurd_job_ends_no_frontend(jobs, alice, bob, hidden_site, restarts, state):
    """Held, it is read; released, it counts. Bob's job runs meanwhile."""
    before = restarts()
    job = jobs.submit(alice, hidden_site, extra="hold = true")
    code, said = as_user(jobs.node, alice.account, f"condor_qedit {job.id} {ABSURD}")
    assert code == 0, said
    assert (job.status(), job.ad()["RequestCpus"]) == ("held", "four")
    assert jobs.submit(bob, hidden_site).done()["ExitCode"] == 0
    ok(jobs.node, "condor_release %s", job.id)
    assert jobs.submit(bob, hidden_site).done()["ExitCode"] == 0
    assert restarts() == before
    until("the frontend says that it leaves it out", lambda: job.id in str(state()["left_out"]))
    job.remove()


def test_a_list_of_sites_means_what_it_says(jobs, alice, hidden_site, filtered_site):
    """In the frontend and in the pilot: warm pilots of another site are there, too."""
    job = jobs.submit(alice, filtered_site, extra=f'+DESIRED_Sites = {{"{hidden_site.name}"}}')
    ad = job.done()
    assert ad["MachineAttrGLIDEIN_Site0"] == hidden_site.name
    assert isinstance(ad["DESIRED_Sites"], list)


def test_a_job_larger_than_any_pilot_is_told(jobs, alice, hidden_site, state, capsys):
    job = jobs.submit(alice, hidden_site, extra="request_cpus = 64")
    why = until(
        "the frontend says why it asks for no pilot",
        lambda: [one["why"] for one in state()["left_out"] if "larger than any pilot" in one["why"]],
    )
    assert hidden_site.name in why[0]
    assert job.status() == "idle"
    status.show()
    assert why[0] in capsys.readouterr().out
    job.remove()
