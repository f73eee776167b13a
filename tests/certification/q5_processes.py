"""Question 5: which processes belong to which pilot."""

import pytest
from pilotbed_suite.support import ok


@pytest.mark.check("D5.1")
def test_pilot_glexec_and_payload_are_one_tree(running):
    lines = (line.split(None, 3) for line in ok(running.worker, "ps -ww -eo pid=,ppid=,user:32=,args=").splitlines())
    tree = {int(pid): (int(parent), user, args) for pid, parent, user, args in lines}
    above, pid = [], running.process.pid
    while pid in tree:
        parent, user, args = tree[pid]
        above.append((user, args))
        pid = parent
    who = [user for user, _ in above]
    payload, pilot = who[0], next(user for user, args in above if "condor_starter" in args)
    assert payload != pilot
    for part in ("glexec", "condor_starter", "condor_startd", "condor_master", "glidein_startup.sh"):
        assert any(part in args for _, args in above), (part, above)
    assert {user for user in who if user not in ("root", "glexec")} <= {payload, pilot, "slurm", "condor", "sge"}
