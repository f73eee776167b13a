"""Question 5: which processes belong to which pilot."""

import re

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import ok, running_proxies, until_none


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


#: Fills its directory: with one file until there is no more room, then with names until there are no more.
FILLS = """#!/bin/sh
head -c 1G /dev/zero > big; code=$?
truncate -s 4096 big
echo "bytes: $code"
i=0; while true > name.$i; do i=$((i + 1)); [ $i -lt 100000 ] || break; done 2> /dev/null
echo "names: $i"
exit 7
"""


@pytest.mark.check("D5.4")
@pytest.mark.stage(2)
def test_a_payload_that_fills_its_directory_ends_and_the_next_one_runs(elsewhere, jobs, alice, bob, pilots):
    """Where the pilot's jobs have their directories there is little room for a while: 16 MiB and 300 names."""
    pilots(elsewhere)
    name, place = next(iter(running_proxies(elsewhere)))
    worker = host(name)
    owner = ok(worker, "stat --format=uid=%%u,gid=%%g,mode=%%a %s/execute", place).strip()
    ok(worker, "mount -t tmpfs -o size=16m,nr_inodes=300,%s tmpfs %s/execute", owner, place)
    try:
        # Another pilot on the same worker would take them as well.
        pilot = ok(worker, "grep '^GLIDEIN_Pilot_Name ' %s/glidein_config", place).split()[1]
        here = f'requirements = split(TARGET.Name, "@")[1] == "{pilot}"'
        full = jobs.submit(alice, elsewhere, FILLS, here)
        assert full.done()["ExitCode"] == 7
        assert re.fullmatch(r"bytes: 1\nnames: [1-9]\d{0,2}\n", full.read("out")), full.read("out")
        assert jobs.submit(bob, elsewhere, extra=here).done()["ExitCode"] == 0
        until_none("what is left", lambda: ok(worker, "find %s/execute -mindepth 1", place))
    finally:
        ok(worker, "umount --lazy %s/execute", place)
