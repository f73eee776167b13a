"""HTCondor's side of a payload under its user's account: what the job's owner sees is what he would see without glexec.

    schedd ── shadow ──▶ starter (pilot's account) ── job_wrapper.sh ── glexec ── payload (user's account)
"""

import pytest
from pilotbed_suite.support import HOLD, HandPilot, arguments, as_user, edited, worker_with_a_pilot

#: The first time it waits to be told to go, and leaves word; the second time it finds that.
POLITE = f"""#!/bin/sh
if [ -e word ]; then cat word; exit 5; fi
trap 'id -un > word; exit 1' TERM
{HOLD} &
wait
"""


@pytest.fixture(scope="module")
def site(any_site, pilots):
    pilots(any_site)
    return any_site


@pytest.mark.parametrize(("ending", "code"), [("exit 42", 42), ("exit 203", 204), ("kill -SEGV $$", 139)])
def test_exit_code_and_streams_are_the_payloads(jobs, alice, site, ending, code):
    """glexec's own codes cannot be the payload's; a signal comes as 128 and its number, as from a shell."""
    script = f"#!/bin/sh\nread -r line\necho \"$line\"\necho wrong >&2\n{ending}\n"
    job = jobs.submit(alice, site, script, "input = @NAME@.sh")
    ad = job.done(60)
    assert (ad["ExitBySignal"], ad["ExitCode"]) == (False, code)
    assert (job.read("out"), job.read("err")) == ("#!/bin/sh\n", "wrong\n")


def test_vacated_payload_is_told_and_what_it_leaves_comes_with_the_job(jobs, bob, site):
    """SIGTERM reaches it over the border of accounts, and its files come back over that."""
    job = jobs.submit(bob, site, POLITE, "when_to_transfer_output = ON_EXIT_OR_EVICT\ntransfer_output_files = word")
    _, process = job.holds(site)
    code, said = as_user(job.node, bob.account, f"condor_vacate_job {job.id}")
    assert code == 0, said
    ad = job.done(90)
    assert (ad["ExitCode"], ad["NumJobStarts"]) == (5, 2)
    assert job.read("out").strip() == process.user


@pytest.mark.check("P9")
@pytest.mark.check("P10")
def test_pilot_whose_glexec_does_not_work_takes_no_jobs_and_says_why(site):
    worker = worker_with_a_pilot(site)
    with edited(worker, "/etc/glexec.conf", "chmod o+w $f"), HandPilot(worker, arguments(site)) as pilot:
        said = pilot.refusal()
    assert "glexec does not work here" in said
    assert "/etc/glexec.conf must be a file of root's that nobody else can write" in said
    assert "condor_startup" not in said
