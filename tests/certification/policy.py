"""The policy on multi-user pilot jobs: what the questions have not answered."""

import re

import pytest
from pilotbed_suite.support import ok, until

RECORDS = "journalctl -t glexec -o cat --no-pager | grep -F %s"


@pytest.mark.check("P3")
def test_every_payload_has_its_record_of_glexecs(grid, any_site, jobs, alice, bob):
    """As many of a job's as HTCondor has started it."""
    made = [jobs.submit(who, any_site) for who in (alice, bob, alice, bob)]
    for job in made:
        ad = job.done()
        worker, wanted = grid.worker_of(ad), f'id="{ad["GlobalJobId"]}"'
        until("glexec's record", lambda worker=worker, wanted=wanted: worker.run(RECORDS, wanted).stdout)
        records = [line for line in ok(worker, RECORDS, wanted).splitlines() if re.search(r' exit=\d', line)]
        assert len(records) == ad["NumJobStarts"], records
        assert all(f'dn="{ad["x509userproxysubject"]}"' in line for line in records)
