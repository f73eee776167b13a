"""What a payload leaves on its worker: nothing, within 15 seconds of its end.

    starter ── glexec ── payload ──┬── child that left session, parent, directory and environment behind
                                   └── child that ignores every signal it can

Alice's payload ends and leaves daemons; bob's is removed (condor_rm) while it ignores SIGTERM. What is left is looked
for by root on the worker, by account: processes, files that are newer than the job, control groups; and private keys,
whoever's they are, outside the places where pilots have theirs.
"""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from pilotbed_suite.support import HOLD, as_user, ok, processes, until, work_dirs, write

pytestmark = pytest.mark.stage(2)

#: What the issue asks for, in seconds.
PROMPT = 15

DAEMONS = f"""#!/usr/bin/python3
import os, pathlib, pwd, signal, subprocess, sys
for number in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.chdir("/")
            for name in signal.valid_signals() - {{signal.SIGKILL, signal.SIGSTOP}}:
                signal.signal(name, signal.SIG_IGN)
            os.closerange(0, 64)
            os.execve("/usr/bin/sleep", "{HOLD}".split(), {{}})
        os._exit(0)
    os.wait()
closed = pathlib.Path("closed/deep")
closed.mkdir(parents=True)
(closed / "file").write_text("x")
closed.chmod(0)
print(pwd.getpwuid(os.getuid()).pw_name)
"""

STUBBORN = f"""#!/bin/sh
mkdir -m 700 own && echo x > own/file
trap '' TERM INT HUP QUIT
{HOLD} &
wait
"""


def left(worker, account, since):
    """What there is on a worker of an account's: processes, and files changed after ``since`` (seconds, Unix)."""
    places = "/ /tmp /dev/shm /run $(findmnt --raw --noheadings --output TARGET | grep ^/srv)"
    files = worker.run(f"find {places} -xdev -user %s -newerct %s", account, f"@{since}").stdout.split("\n")
    alive = [f"{process.pid} {process.args}" for process in processes(worker) if process.user == account]
    groups = worker.run("find /sys/fs/cgroup -name 'glexec-*' -type d").stdout.split()
    return [*alive, *filter(None, files), *groups]


def sandboxes(worker):
    """Directories of jobs, and files with private keys that are not the pilots' own."""
    dirs = [entry for place in work_dirs(worker) for entry in worker.run(f"ls -d {place}/execute/dir_*").stdout.split()]
    keys = worker.run("grep -rlE -- '-----BEGIN .*PRIVATE KEY' /tmp /var/tmp /dev/shm").stdout.split()
    return dirs + [key for key in keys if not key.endswith("/cred/pilot.pem")]


def clean(worker, account, since, begin):
    """Wait until nothing is left; the time is counted from ``begin`` (monotonic)."""
    rest = PROMPT - (time.monotonic() - begin)
    nothing = [None]

    def look():
        nothing[0] = left(worker, account, since) + sandboxes(worker)
        return not nothing[0]

    try:
        until("nothing is left", look, deadline=rest)
        print(f"clean after {time.monotonic() - begin:.1f} s")
    except pytest.fail.Exception:
        pytest.fail(f"left after {PROMPT} s: {nothing[0]}")


@pytest.fixture(scope="module")
def site(elsewhere, pilots):
    pilots(elsewhere)
    return elsewhere


@pytest.mark.check("D5.3")
@pytest.mark.check("D2.6")
def test_daemons_end_with_their_payload(grid, jobs, alice, site):
    since = int(time.time())
    job = jobs.submit(alice, site, DAEMONS)
    ad = job.done(60)
    begin = time.monotonic()
    assert ad["ExitCode"] == 0
    clean(grid.worker_of(ad), job.read("out").strip(), since, begin)


@pytest.mark.check("D5.3", control=True)
@pytest.mark.check("D3.5")
def test_control_without_glexec_the_same_daemons_stay(grid, site, workers):
    worker, script = workers[site.workers[0]], "/run/pilotbed-test-daemons"
    write(worker, script, DAEMONS.replace(HOLD, "sleep 900.1"), mode="0755")
    try:
        ok(worker, "cd $(mktemp -d -p /run) && chmod 777 . && runuser -u nobody -- %s", script)
        mine = [process for process in processes(worker) if process.args == "sleep 900.1"]
        assert len(mine) == 3
    finally:
        worker.run("pkill -KILL -u nobody -x sleep; rm -rf %s /run/tmp.*", script)


@pytest.mark.check("D5.2")
def test_removed_payload_that_ignores_sigterm_is_gone(jobs, bob, site):
    since = int(time.time())
    job = jobs.submit(bob, site, STUBBORN)
    worker, process = job.holds(site)
    assert left(worker, process.user, since), "the search finds what is there"
    assert sandboxes(worker)
    ignored = int(re.search(r"SigIgn:\s*(\w+)", ok(worker, "cat /proc/%s/status", str(process.pid)))[1], 16)
    assert ignored & 1 << 14, "SIGTERM is ignored"
    begin = time.monotonic()
    code, said = as_user(job.node, bob.account, f"condor_rm {job.id}")
    assert code == 0, said
    clean(worker, process.user, since, begin)
    until("the schedd has forgotten it", lambda: job.status() == "removed")


WAYS = ("condor_vacate_job", "condor_vacate_job -fast", "kill -9 of its starter")
#: End the starter above a process.
KILL_STARTER = """pid=%s
while [ "$pid" -gt 1 ]; do
    [ "$(cat /proc/$pid/comm)" = condor_starter ] && kill -KILL "$pid" && exit
    pid=$(($(ps -o ppid= "$pid")))
done
exit 1"""


def drive_out(job, worker, process, how):
    """Have a payload end; return how many seconds it took until its process was gone."""
    begin = time.monotonic()
    if how.startswith("kill"):
        ok(worker, "sh -c %s", KILL_STARTER % process.pid)
    else:
        code, said = as_user(job.node, job.owner, f"{how} {job.id}")
        assert code == 0, said
    until("its process is gone", lambda: worker.run("test -d /proc/%s", str(process.pid)).rc, deadline=2 * PROMPT)
    return time.monotonic() - begin


@pytest.fixture(scope="module")
def driven_out(jobs, bob, site, pilots):
    """Jobs that ignore SIGTERM, driven out in each way side by side: seconds until a process was gone, and starts."""
    pilots(site, len(WAYS))
    since = int(time.time())
    made = {how: jobs.submit(bob, site, STUBBORN) for how in WAYS}
    held = {how: job.holds(site) for how, job in made.items()}
    with ThreadPoolExecutor() as pool:
        gone = dict(zip(WAYS, pool.map(lambda how: drive_out(made[how], *held[how], how), WAYS), strict=True))
    until("the jobs run again", lambda: all(job.ad().get("NumJobStarts") == 2 for job in made.values()))
    again = [job.holds(site)[0] for job in made.values()]
    for job in made.values():
        job.remove()
    begin = time.monotonic()
    for node in [*again, *(worker for worker, _ in held.values())]:
        clean(node, held[WAYS[0]][1].user, since, begin)
    return gone


@pytest.mark.check("D5.2")
@pytest.mark.parametrize("how", WAYS)
def test_payload_that_is_driven_out_is_gone_and_runs_again(driven_out, how):
    """It ignores SIGTERM: the pilot's own times hold (MachineMaxVacateTime, KILLING_TIMEOUT)."""
    assert driven_out[how] < PROMPT
