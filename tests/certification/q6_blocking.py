"""Question 6: a site and a user are blocked."""

import json
from dataclasses import dataclass

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, HOLD, Job, Process, Site, ok, until
from testinfra.host import Host

pytestmark = pytest.mark.stage(2)


@pytest.fixture
def factory():
    return GRID.node("factory")


def state(factory):
    """What the factory says of itself after its last turn."""
    return json.loads(ok(factory, "cat /run/pilotbed/factory/state.json"))


def turns(factory, count):
    """Wait until the factory has had so many turns more; return what it says then."""
    first = state(factory)["turn"]
    return until(f"{count} turns", lambda: (found := state(factory))["turn"] >= first + count and found)


def pilots_of(factory, entry):
    """JobStatus of every pilot of an entry that is not on its way out."""
    queue = "pilotbed-factory-pool condor_q -allusers -constraint %s -autoformat JobStatus"
    said = ok(factory, queue, f'GlideinEntryName == "{entry}" && JobStatus != 3')
    return said.split()


def removed_pilots(factory, entry):
    """The pilots of an entry that a downtime has removed: their numbers."""
    wanted = f'GlideinEntryName == "{entry}" && regexp("^pilotbed-factory: downtime", RemoveReason)'
    asked = "pilotbed-factory-pool condor_history -constraint %s -autoformat ClusterId ProcId"
    return set(ok(factory, asked, wanted).splitlines())


#: A table of its own at the site's router, whatever else it filters.
CUT = "table inet pilotbed_test { chain cut { type filter hook forward priority -300; policy drop; }; }"


def usable(central, site):
    """The names of a site's slots to which the negotiator would give jobs."""
    rule = central.run("condor_config_val NEGOTIATOR_SLOT_CONSTRAINT")
    wanted = f'GLIDEIN_Site == "{site.name}" && ({rule.stdout.strip() if rule.rc == 0 else "true"})'
    return ok(central, "condor_status -constraint %s -autoformat Name", wanted).split()


@dataclass(frozen=True)
class CutOff:
    """A site that was cut off, and a job with the payload that ran there, after so many starts."""

    site: Site
    job: Job
    worker: Host
    process: Process
    starts: int


@pytest.fixture(scope="module")
def cut_off(central, any_site, jobs, alice, pilots):
    """A site whose router forwards nothing."""
    router = host(any_site.router)
    pilots(any_site)
    job = jobs.submit(alice, any_site, f"#!/bin/sh\n{HOLD}\n", "job_lease_duration = 60")
    worker, process = job.holds(any_site)
    starts = job.ad()["NumJobStarts"]
    assert usable(central, any_site), "control"
    ok(router, "nft %s", f"add {CUT}")
    yield CutOff(any_site, job, worker, process, starts)
    router.run("nft delete table inet pilotbed_test")


@pytest.fixture
def meanwhile(request, any_site, site):
    """What takes its time at another site, if it is asked for as well."""
    if site != any_site and any("cut_off" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("cut_off")


@pytest.fixture
def site():
    """One that need not be the one that is cut off."""
    return GRID.sites[-1]


@pytest.mark.check("D6.1")
@pytest.mark.parametrize("how", ["--drain", "--now"])
@pytest.mark.usefixtures("meanwhile")
def test_an_entry_in_downtime(factory, site, jobs, alice, pilots, how):
    """What runs there goes on to its end, or is removed, as the operator says; nothing new comes. Control: its end."""
    entry = site.name
    assert entry in state(factory)["entries"], "its only computing element's entry"
    pilots(site)
    running = jobs.submit(alice, site, f"#!/bin/sh\n{HOLD}\n")
    running.holds(site)
    until("its computing element says that its pilot runs", lambda: "2" in pilots_of(factory, entry))
    before = removed_pilots(factory, entry)
    ok(factory, "pilotbed-entry downtime %s %s --reason test", entry, how)
    try:
        assert turns(factory, 2)["entries"][entry]["downtime"] == "test"
        waiting = jobs.submit(alice, site)
        if how == "--now":
            until("no pilot is left", lambda: not pilots_of(factory, entry))
            assert removed_pilots(factory, entry) > before
            running.remove()
        else:
            assert "2" in pilots_of(factory, entry)
            assert running.status() == "running"
        turns(factory, 2)
        assert set(pilots_of(factory, entry)) <= {"2"}, "one was submitted, or still waits"
        running.remove()
    finally:
        ok(factory, "pilotbed-entry up %s", entry)
    assert waiting.done()["ExitCode"] == 0


@pytest.mark.check("D6.1")
def test_a_downtime_of_no_entry_is_refused(factory):
    done = factory.run("pilotbed-entry downtime nowhere")
    assert done.rc == 1
    assert "'nowhere' is none of ALL, " in done.stderr


@pytest.mark.check("D6.2")
def test_a_site_that_is_cut_off_loses_its_slots_and_no_job(central, cut_off):
    """The job's lease ends, the slots are given none. Let in again, it runs again."""
    site, job, gone = cut_off.site, cut_off.job, f"test ! -d /proc/{cut_off.process.pid}"
    with job.explained():
        until("its job waits for another slot", lambda: job.status() == "idle", 300)
        until("none of its slots is given jobs", lambda: not usable(central, site), 600)
    ok(host(site.router), "nft delete table inet pilotbed_test")
    until("the payload of before has ended", lambda: cut_off.worker.run(gone).rc == 0)
    job.holds(site)
    assert job.ad()["NumJobStarts"] == cut_off.starts + 1
    job.remove()
