"""Question 6: a site and a user are blocked."""

import json

import pytest
from pilotbed_suite.support import GRID, HOLD, PATIENCE, ok, until

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


@pytest.mark.check("D6.1")
@pytest.mark.parametrize("how", ["--drain", "--now"])
def test_an_entry_in_downtime(factory, elsewhere, jobs, alice, pilots, how):
    """What runs there goes on to its end, or is removed, as the operator says; nothing new comes. Control: its end."""
    site, entry = elsewhere, elsewhere.name
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
            # The queue has them until the computing element has ended them.
            until("the downtime has removed them", lambda: removed_pilots(factory, entry) > before)
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
def test_other_sites_get_pilots_meanwhile(cut_off, elsewhere, factory, central, jobs, alice):
    """One program for all computing elements would wait for the one that is away: 139 s were seen."""
    site = GRID.site("besides the one that is cut off", lambda site: site == elsewhere != cut_off.site)
    wanted = f'GlideinEntryName == "{site.name}" && QDate > {cut_off.job.ad()["JobStartDate"]}'

    def took():
        """Of each pilot that was sent there since the cut, and came: the seconds from the one to the other."""
        asked = """pilotbed-factory-pool condor_q -allusers -constraint %s -af QDate 'strcat(ClusterId, ".", ProcId)'"""
        sent = sorted(line.split() for line in ok(factory, asked, wanted).splitlines())
        came = {f"{slot['GLIDEIN_ClusterId']}.{slot['GLIDEIN_ProcId']}": slot for slot in site.slots(central)}
        return [came[pilot]["DaemonStartTime"] - int(when) for when, pilot in sent if pilot in came]

    if not took():
        ok(factory, "pilotbed-factory-pool condor_rm -constraint %s", f'GlideinEntryName == "{site.name}"')
        assert jobs.submit(alice, site).done()["ExitCode"] == 0
    assert until("a pilot has come", took)[-1] < 60 * PATIENCE


@pytest.mark.check("D6.2")
def test_a_site_that_is_cut_off_loses_its_slots_and_no_job(cut_off):
    """The job's lease ends, the slots are given none. Let in again, it runs again."""
    job, gone = cut_off.job, f"test ! -d /proc/{cut_off.process.pid}"
    with job.explained():
        until("its job waits for another slot", lambda: job.status() == "idle", 300)
        until("none of its slots is given jobs", lambda: not cut_off.usable(), 600)
    cut_off.end()
    until("the payload of before has ended", lambda: cut_off.worker.run(gone).rc == 0)
    job.holds(cut_off.site)
    assert job.ad()["NumJobStarts"] == cut_off.starts + 1
    job.remove()
