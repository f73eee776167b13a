"""glexec under a batch system: the key tests of the field's list, each a batch job that calls glexec as a pilot does.

    CE ── batch system ──▶ worker: job of a pilot account ── glexec ──▶ payload

The names G1 to G14 are the rows of the table in docs/glexec.md. What a batch system has to be told to do is in one
class; another one needs no more than that.
"""

import itertools
import json
import re
from contextlib import contextmanager

import pytest
from pilotbed.batch import gridengine
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, as_user, ok, processes, until, write

pytestmark = [pytest.mark.stage(2), pytest.mark.batch]

HERE = "/var/tmp/pilotbed-test-batch"
_serial = itertools.count(1)


class Slurm:
    """A site's Slurm, asked on its computing element."""

    #: States of a job that was ended from outside.
    CANCELLED, TIMEOUT = "CANCELLED", "TIMEOUT"
    #: A signal that it can send to a running job, and options of a job that takes it.
    SIGNAL, SIGNALLED = "TERM", ()
    #: Whether its own program ends a job's strays, and counts them.
    PROGRAM_ENDS_STRAYS = True

    def __init__(self, controller, node):
        self.controller, self.node = controller, node

    def submit(self, account, script, *options):
        """Queue a script of ``account``'s with ``options`` of sbatch; return the job."""
        name = f"{HERE}/{next(_serial)}"
        told = ["--chdir=/", f"--nodelist={self.node}", f"--output={name}.out", f"--error={name}.err", *options]
        words = " ".join(["%s"] * len(told))
        said = ok(
            self.controller,
            f"printf %%s %s | runuser -u %s -- env -i PATH=/usr/bin:/bin HOME=/ sbatch --parsable {words}",
            script, account, *told,
        )  # fmt: skip
        return Job(self, said.strip(), name)

    def _shown(self, number, field):
        return re.search(rf"\b{field}=(\S+)", ok(self.controller, "scontrol --oneliner show job %s", number))[1]

    def state(self, number):
        """Return the job's state: RUNNING, COMPLETED, …"""
        return self._shown(number, "JobState")

    def code(self, number):
        """Return the exit code of a job's script."""
        return int(self._shown(number, "ExitCode").split(":")[0])

    def cancel(self, number):
        """Delete a job."""
        ok(self.controller, "scancel %s", number)

    def signal(self, number, name):
        """Send a signal to a job's script alone."""
        ok(self.controller, "scancel --batch --signal=%s %s", name, number)

    def suspend(self, number):
        """Stop a job, and what belongs to it."""
        ok(self.controller, "scontrol suspend %s", number)

    def resume(self, number):
        """Let it go on."""
        ok(self.controller, "scontrol resume %s", number)

    def over_in_a_minute(self):
        """Return the options that limit a job's wall-clock time to one minute."""
        return ("--time=1",)

    def reading(self, path):
        """Return the options that make a file a job's standard input."""
        return (f"--input={path}",)

    def told_after(self, worker, number):
        """Return what the program said that the batch system runs as root after a job, "" before."""
        log = worker.run("journalctl -o cat --no-pager -t slurm-epilog -g %s", f"^job={number} ")
        return str(log.stdout)


class GridEngine:
    """A site's Grid Engine, asked on its master: of jobs that are over it tells by its accounting file only."""

    CANCELLED, TIMEOUT = "failed 100", "failed 37"
    #: What it can send to a running job, before the end of it: qsub(1), -notify.
    SIGNAL, SIGNALLED = "USR2", ("-notify",)
    #: It has ended them by the job's group itself before its program runs.
    PROGRAM_ENDS_STRAYS = False

    def __init__(self, master, node):
        self.master, self.node = master, node

    def submit(self, account, script, *options):
        """Queue a script of ``account``'s with ``options`` of qsub; return the job."""
        name = f"{HERE}/{next(_serial)}"
        told = ["-terse", "-wd", "/", "-S", "/bin/sh", "-q", f"*@{GRID.fqdn(self.node)}", "-N", "pilotbed",
                "-o", f"{name}.out", "-e", f"{name}.err", *options]  # fmt: skip
        words = " ".join(["%s"] * len(told))
        said = ok(
            self.master, f"printf %%s %s | runuser -u %s -- env -i PATH=/usr/bin:/bin HOME=/ qsub {words}",
            script, account, *told,
        )  # fmt: skip
        return Job(self, said.strip(), name)

    def _record(self, number):
        # The file is there from the first job's end on.
        return gridengine.parse(str(self.master.run("cat %s", gridengine.ACCOUNTING).stdout)).get(number, {})

    def state(self, number):
        """Return the job's state: RUNNING, SUSPENDED, or what its record says once it is over."""
        if record := self._record(number):
            return record["state"]
        shown = re.search(rf"(?m)^ *{number} +\S+ +\S+ +\S+ +(\w+) ", str(self.master.run("qstat -u '*'").stdout))
        return "SUSPENDED" if shown and "s" in shown[1] else "RUNNING"  # not in either for a moment

    def code(self, number):
        """Return the exit code of a job's script."""
        fields = ok(self.master, f"grep -E '^([^:]*:){{5}}{number}:' {gridengine.ACCOUNTING}").split(":")
        return int(fields[12])

    def cancel(self, number):
        """Delete a job."""
        ok(self.master, "qdel %s", number)

    def signal(self, number, _name):
        """Send a signal to a job's script alone: it is what comes before the end of a job that is deleted."""
        self.cancel(number)

    def suspend(self, number):
        """Stop a job, and what belongs to it."""
        ok(self.master, "qmod -sj %s", number)

    def resume(self, number):
        """Let it go on."""
        ok(self.master, "qmod -usj %s", number)

    def over_in_a_minute(self):
        """Return the options that limit a job's wall-clock time to one minute."""
        return ("-l", "h_rt=60")

    def reading(self, path):
        """Return the options that make a file a job's standard input."""
        return ("-i", path)

    def told_after(self, worker, number):
        """Return what the program said that the batch system runs as root after a job, "" before."""
        log = worker.run("journalctl -o cat --no-pager -t gridengine-epilog -g %s", f"^job={number} ")
        return str(log.stdout)


SYSTEMS = {"slurm": Slurm, "gridengine": GridEngine}


class Job:
    """A batch job, and its output."""

    def __init__(self, system, number, name):
        self.system, self.number, self.name = system, number, name

    def said(self, stream="out"):
        """What it has written so far."""
        return str(host(self.system.node).run("cat %s", f"{self.name}.{stream}").stdout)

    def running(self):
        return self.system.state(self.number) in ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING")

    def done(self, deadline=60):
        """Wait for its end; return its script's code and its output."""
        until(f"batch job {self.number} has ended: {self.said('err')}", lambda: not self.running(), deadline)
        return self.system.code(self.number), self.said()

    def payload(self, word):
        """Wait for a process of the job's payload with ``word`` in its command line."""
        def found():
            if not self.running():
                pytest.fail(f"batch job {self.number} has ended: {self.said('err')}")
            return named(host(self.system.node), word)
        return until(f"payload {word} of batch job {self.number}", found)[0]


def named(worker, word):
    """The processes that are ``sleep WORD``."""
    return [process for process in processes(worker) if process.args == f"sleep {word}"]


def rest():
    """A number of seconds to sleep that no other process has: its name."""
    return f"900.{next(_serial):04}7"


@pytest.fixture(scope="module", params=SYSTEMS)
def batch(request):
    """A site with that batch system."""
    group = f"batch_{request.param}"
    site = GRID.site(f"with {request.param}", lambda site: site.ce in GRID.names(group))
    node = [name for name in site.workers if name in GRID.names(group)][-1]
    # Pilots that wait for jobs would have the slots.
    GRID.node("factory").run("pilotbed-factory-pool condor_rm -all")
    until("no pilot is left", lambda: not [one for one in processes(host(node)) if "glidein_startup" in one.args], 120)
    return SYSTEMS[request.param](host(site.ce), node)


@pytest.fixture(scope="module")
def worker(batch):
    return host(batch.node)


@pytest.fixture(scope="module")
def pilot(worker, submit, alice, bob):
    """A pilot account that nobody else uses on the worker; the users' proxies and the jobs' output are in HERE."""
    gid = ok(worker, "getent group glpilot").split(":")[2]
    accounts = (line.split(":") for line in ok(worker, "getent passwd").splitlines())
    busy = {process.user for process in processes(worker)}
    account = next(entry[0] for entry in accounts if entry[3] == gid and entry[0] not in busy)
    worker.run("rm -rf %s", HERE)
    ok(worker, "install -d -m 0711 -o %s %s", account, HERE)
    for who in (alice, bob):
        code, said = as_user(submit, who.account, f"voms-proxy-init --quiet --voms {who.voms}")
        assert code == 0, said
        proxy = ok(submit, "runuser --login %s --command %s", who.account, "cat /tmp/x509up_u$(id -u)")
        write(worker, f"{HERE}/{who.account}.pem", proxy, account)
    yield account
    worker.run("rm -rf %s", HERE)


@pytest.fixture(scope="module")
def run(batch, pilot):
    """Queue a job: ``run(script, *options)``; in the script, ``glexec`` runs a command as alice's account."""
    jobs = []

    def submitted(script, *options):
        head = f"#!/bin/sh\nexport GLEXEC_CLIENT_CERT={HERE}/alice.pem PATH=/usr/sbin:/usr/bin:/sbin:/bin\n"
        jobs.append(batch.submit(pilot, f"{head}{script}\n", *options))
        return jobs[-1]

    yield submitted
    for job in jobs:
        if job.running():
            batch.cancel(job.number)


@pytest.fixture(scope="module", autouse=True)
def limited(batch, run):
    """A job of bob's that will come to its wall-clock limit while the others are tried, and its payload's name."""
    word = rest()
    script = f"GLEXEC_CLIENT_CERT={HERE}/bob.pem glexec /bin/sh -c 'trap \"\" TERM; sleep {word}'"
    return run(script, *batch.over_in_a_minute()), word


@pytest.mark.parametrize(("ending", "code"), [("exit 0", 0), ("exit 1", 1), ("exit 42", 42), ("kill -KILL $$", 137)])
def test_g1_exit_code_is_passed_on(run, ending, code):
    assert run(f"glexec /bin/sh -c '{ending}'").done() == (code, "")


def test_g2_deleted_job_leaves_nothing(batch, run, worker):
    main, daemon = rest(), rest()
    job = run(f"glexec /bin/sh -c 'trap \"\" TERM; setsid sleep {daemon} & sleep {main}'")
    account = job.payload(main).user
    job.payload(daemon)
    batch.cancel(job.number)
    until("the payload is gone", lambda: not named(worker, main) + named(worker, daemon))
    job.done()
    assert batch.state(job.number) == batch.CANCELLED
    assert not [process for process in processes(worker) if process.user == account]


# Slurm keeps no sums of its own in the lab: tests/grid/test_site.py asks for its samples.
@pytest.mark.parametrize("batch", ["gridengine"], indirect=True)
def test_g4_cpu_time_is_in_the_batch_systems_sum(batch, run, worker, pilot):
    """Children and an orphan included; the two records are joined as an administrator joins them."""
    burn = 'python3 -c "import time; all(iter(lambda: time.process_time() < {}, False))"'
    job = run(f"glexec /bin/sh -c '({burn.format(3)} &); {burn.format(6)}; sleep 4; exit 5'")
    assert job.done(120)[0] == 5
    told = json.loads(ok(worker, "pilotbed-trace --json --node %s", batch.node))
    name = f"gridengine {job.number}"
    mine = json.dumps([one for one in told if one["batch"] == name])
    join = "printf %%s %s | pilotbed-trace --json --records - --node %s --batch %s"
    (joined,) = json.loads(ok(batch.master, join, mine, batch.node, gridengine.ACCOUNTING))
    assert (joined["job"]["user"], joined["job"]["state"]) == (pilot, "exit 5")
    assert joined["job"]["start"] <= joined["job"]["end"]
    assert joined["cpu"] >= 9, "both"
    assert joined["cpu"] == pytest.approx(float(joined["job"]["cpu"]), rel=0.05)


def test_g5_payload_stays_in_the_jobs_cgroup_and_limits(run):
    show = "ulimit -v; ulimit -n; cat /proc/self/cgroup"
    code, said = run(f"ulimit -v 3000000; ulimit -n 777; {show}; echo; glexec /bin/sh -c '{show}'").done()
    job, payload = (part.splitlines() for part in said.split("\n\n"))
    assert code == 0
    assert job[:2] == payload[:2] == ["3000000", "777"]
    assert job[2:]
    for outside, inside in zip(job[2:], payload[2:], strict=True):
        assert inside == outside or inside.startswith(f"{outside.rstrip('/')}/")


def test_g6_suspended_job_has_its_payload_stopped(batch, run, worker):
    word = rest()
    job = run(f"glexec /bin/sh -c 'sleep {word}; :'")
    pid = str(job.payload(word).pid)

    def state():
        return ok(worker, "ps -o state= %s", pid).strip()

    assert state() == "S", "control"
    batch.suspend(job.number)
    until("the payload is stopped", lambda: state() == "T")
    batch.resume(job.number)
    until("the payload goes on", lambda: state() == "S")
    batch.cancel(job.number)


def test_g7_signal_reaches_the_payload(batch, run, worker):
    word = rest()
    job = run(f"exec /usr/sbin/glexec /bin/sh -c 'trap \"echo heard; exit 7\" {batch.SIGNAL}; sleep {word} & wait'",
              *batch.SIGNALLED)  # fmt: skip
    job.payload(word)
    batch.signal(job.number, batch.SIGNAL)
    assert job.done() == (7, "heard\n")
    assert not named(worker, word)


def test_g8_standard_streams_are_the_jobs(batch, run, worker, pilot):
    write(worker, f"{HERE}/in", "what is read\n", pilot)
    job = run("glexec /bin/sh -c 'cat; echo what is wrong >&2; exit 3'", *batch.reading(f"{HERE}/in"))
    assert job.done() == (3, "what is read\n")
    assert job.said("err") == "what is wrong\n"


def test_g9_payload_has_a_scratch_directory_that_the_pilot_clears(run, worker, pilot):
    """The job's own is the pilot's: the payload gets one inside."""
    ok(worker, "install -d -m 0700 -o %s %s", pilot, f"{HERE}/scratch")
    ok(worker, "install -d -m 0711 -o %s %s", pilot, f"{HERE}/open")
    code, said = run(
        f"glexec /usr/bin/touch {HERE}/scratch/file && exit 9\n"
        f"made=$(mkgltempdir {HERE}/open) || exit 8\n"
        "glexec /bin/sh -c 'cd \"$0\" && mkdir deep && echo data > deep/file && stat -c %U deep/file && id -un' $made\n"
        "rm -rf $made 2>/dev/null; test -d $made && echo kept\n"
        "mkgltempdir -r -f $made && test ! -e $made && echo cleared"
    ).done()
    owner, account, *after = said.split()
    assert (code, owner, after) == (0, account, ["kept", "cleared"])
    assert account != pilot


def test_g11_strays_are_gone_after_the_job(batch, run, worker, pilot):
    """The pilot's own, for which the batch system answers, and the payload's, for which glexec does."""
    own, left, background = rest(), rest(), rest()
    job = run(
        f"setsid sleep {own} &\n"
        f"glexec /bin/sh -c 'setsid sleep {left} & :'\n"
        f"setsid glexec /bin/sh -c 'sleep {background}; :' &\n"
        f"while ! test -e {HERE}/seen; do sleep 0.1; done"
    )
    owners = [job.payload(word).user for word in (own, background)]
    assert owners[0] == pilot != owners[1], "control: they were there"
    write(worker, f"{HERE}/seen", "", pilot)
    assert job.done()[0] == 0
    until("the strays are gone", lambda: not [p for word in (own, left, background) for p in named(worker, word)], 20)
    told = until("the batch system's own word", lambda: batch.told_after(worker, job.number))
    assert (int(re.search(r"ended=(\d+)", told)[1]) >= 1) == batch.PROGRAM_ENDS_STRAYS


def test_g12_what_the_batch_system_runs_after_a_job_runs_as_before(batch, run, worker, pilot):
    """Once, as root, and told of the pilot's account, which is the job's: glexec has changed none of it."""
    with_it, without = run("glexec /usr/bin/true"), run("/usr/bin/true")
    for job in (with_it, without):
        assert job.done()[0] == 0
        told = until("the batch system's own word", lambda job=job: batch.told_after(worker, job.number))
        assert told == f"job={job.number} account={pilot} ended=0\n"


def test_g13_two_payloads_in_turn_have_two_accounts(run, pilot):
    code, said = run(f"glexec /usr/bin/id -un; GLEXEC_CLIENT_CERT={HERE}/bob.pem glexec /usr/bin/id -un").done()
    one, other = said.split()
    assert code == 0
    assert len({one, other, pilot}) == 3


@contextmanager
def powerless(worker):
    """A worker whose sudo lies on a mount without set-uid bits."""
    ok(worker, "mount --bind /usr/bin/sudo /usr/bin/sudo && mount -o remount,bind,nosuid /usr/bin/sudo")
    try:
        yield
    finally:
        ok(worker, "umount /usr/bin/sudo")


def test_g14_without_set_uid_bits_the_error_is_clear(run, worker):
    assert run("glexec /usr/bin/true").done()[0] == 0, "control"
    with powerless(worker):
        job = run("glexec /usr/bin/true")
        assert job.done() == (202, "")
    assert "nosuid" in job.said("err")


def test_g3_wall_clock_limit_ends_the_payload(batch, limited, worker):
    """Last, as it takes more than a minute."""
    job, word = limited
    job.done(150)
    assert batch.state(job.number) == batch.TIMEOUT
    until("its payload is gone", lambda: not named(worker, word))
