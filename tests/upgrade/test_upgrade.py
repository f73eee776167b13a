"""Nothing is lost when this release is deployed over the previous one while jobs run and wait (before.py)."""

import pytest
from kept import BANNED, Before, seen
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, as_user, ok

pytestmark = pytest.mark.upgrade


@pytest.fixture(scope="module")
def before():
    found = Before.kept()
    yield found
    for ce in GRID.names("computing_element"):
        ok(host(ce), "pilotbed-ban --lift dn -- %s", BANNED)
    for job in (job for made in found.jobs.values() for job in made):
        if job.status() not in ("done", "removed"):
            job.remove()


@pytest.fixture(scope="module")
def now(before):
    return seen()


@pytest.mark.parametrize("what", ["certificates", "leases", "pilots", "bans"])
def test_what_there_was_is_there(before, now, what):
    assert any(before.seen[what].values()), "there was nothing to lose"
    for name, one in before.seen[what].items():
        assert now[what][name] == one, name


def test_running_jobs_end_well_in_their_first_start(before):
    for job in before.jobs["running"]:
        assert job.status() == "running", job.read("log")
        worker, process = job.holds(GRID.sites[0], 5)
        ok(worker, "kill %s", str(process.pid))
    for job in before.jobs["running"]:
        ad, said = job.done(), job.read("out").splitlines()
        # A schedd that was restarted, as another configuration of it may need, has a new shadow reconnect.
        assert (ad["ExitCode"], ad["NumJobStarts"]) == (0, 1), job.read("log")
        look, again, digest = said[: len(said) // 2], said[len(said) // 2 : -1], said[-1]
        assert look == again, "account, worker or certificates are others"
        assert as_user(job.node, job.owner, f"sha256sum < {job.name}.data")[1].strip() == digest


def test_waiting_jobs_run_when_they_may(before):
    waiting = before.jobs["waiting"]
    assert {job.status() for job in waiting} == {"held"}
    as_user(waiting[0].node, waiting[0].owner, f"condor_release {' '.join(job.id for job in waiting)}")
    account = before.jobs["running"][1].read("out").splitlines()[0]
    for job in waiting:
        ad = job.done()
        assert (ad["ExitCode"], ad["NumJobStarts"]) == (0, 1), job.read("log")
        assert job.read("out") == f"{account}\n", "bob has another account at the site"
