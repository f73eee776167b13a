"""glexec under a batch system: the key tests of the field's list, each a batch job that calls glexec as a pilot does.

    CE ── batch system ──▶ worker: job of a pilot account ── glexec ──▶ payload

The names G1 to G14 are the rows of the table in docs/glexec.md. What a batch system has to be told to do is in one
class; another one needs no more than that.
"""

import itertools
import json
import re
import time
from contextlib import contextmanager

import pytest
from pilotbed.batch import gridengine, htcondor
from pilotbed_suite.reach import host
from pilotbed_suite.support import (
    GRID,
    TESTS_OWN,
    as_user,
    explained,
    ok,
    processes,
    slurm_cpu_time,
    until,
    until_none,
    write,
)

pytestmark = [pytest.mark.stage(-1), pytest.mark.batch]

HERE = f"{TESTS_OWN}-batch"
_serial = itertools.count(1)
#: What runs beside other tests is carol's: they look at what alice's account has, or ban bob and end what he runs.
AS_CAROL = f"GLEXEC_CLIENT_CERT={HERE}/carol.pem glexec"
#: Uses 40 s of CPU time in two processes, the second one an orphan, which goes on to sleep; says how much it was, and
#: stays until the file of its argument is there.
BURN = """import os, sys, time
heard, say = os.pipe()
def burn():
    while time.process_time() < 20:
        sum(range(10000))
    os.write(say, b"%f " % time.process_time())
if os.fork() == 0:
    if os.fork() == 0:
        burn()
        time.sleep(900)
    os._exit(0)
os.wait()
burn()
told = b""
while told.count(b" ") < 2:
    told += os.read(heard, 100)
print(sum(map(float, told.split())), flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.1)
"""


#: Tells the processes of a worker, but for the kernel's.
PROCESSES = "ps -ww -eo pid,ppid,user:20,stat,etimes,args --sort=pid | grep -v ' \\['"


class Slurm:
    """A site's Slurm, asked on its computing element."""

    #: States of a job that was ended from outside.
    COMPLETED, CANCELLED, TIMEOUT = "COMPLETED", "CANCELLED", "TIMEOUT"
    #: How a process may leave its job, and is ended with it all the same: the epilog knows it by its environment.
    STRAY = "setsid"
    RECORDS = "/var/log/slurm/jobcomp.log"
    #: A signal that it can send to a running job, and options of a job that takes it.
    SIGNAL, SIGNALLED = "TERM", ()
    #: Whether its own program ends a job's strays, and counts them.
    PROGRAM_ENDS_STRAYS = True
    #: Whether what the first process has started may end by itself when that one has ended.
    WAITS_FOR_ALL = False
    #: Whether it tells the CPU time of jobs that run: its records have none, they would need a database.
    CPU_WHILE_IT_RUNS = True
    #: What tells, on the computing element, why a job does not run, or does not end.
    WHY = ("squeue", "sinfo --Node --long", "tail --lines=40 /var/log/slurm/slurmctld.log")

    def __init__(self, server, node):
        self.server, self.node = server, node

    def submit(self, account, script, *options):
        """Queue a script of ``account``'s with ``options`` of sbatch; return the job."""
        name = f"{HERE}/{next(_serial)}"
        told = ["--chdir=/", f"--nodelist={self.node}", f"--output={name}.out", f"--error={name}.err", *options]
        words = " ".join(["%s"] * len(told))
        said = ok(
            self.server,
            f"printf %%s %s | runuser -u %s -- env -i PATH=/usr/bin:/bin HOME=/ sbatch --parsable {words}",
            script, account, *told,
        )  # fmt: skip
        return Job(self, said.strip(), name)

    def _shown(self, number, field):
        # It forgets a job ten minutes after its end (MinJobAge).
        said = ok(self.server, f"scontrol --oneliner show job %s || grep '^JobId={number} ' {self.RECORDS}", number)
        return re.search(rf"\b{field}=(\S+)", said)[1]

    def state(self, number):
        """Return the job's state: RUNNING, COMPLETED, …"""
        return self._shown(number, "JobState")

    def code(self, number):
        """Return the exit code of a job's script."""
        return int(self._shown(number, "ExitCode").split(":")[0])

    def cancel(self, number):
        """Delete a job."""
        ok(self.server, "scancel %s", number)

    def signal(self, number, name):
        """Send a signal to a job's script alone."""
        ok(self.server, "scancel --batch --signal=%s %s", name, number)

    def suspend(self, number):
        """Stop a job, and what belongs to it."""
        ok(self.server, "scontrol suspend %s", number)

    def resume(self, number):
        """Let it go on."""
        ok(self.server, "scontrol resume %s", number)

    def over_in_a_minute(self):
        """Return the options that limit a job's wall-clock time to one minute."""
        return ("--time=1",)

    def reading(self, path):
        """Return the options that make a file a job's standard input."""
        return (f"--input={path}",)

    #: It does not limit memory, as it is set up here.
    memory = None
    def cpu(self, number):
        """Return the seconds of CPU time that a running job has used."""
        return slurm_cpu_time(self.server, number)

    def told_after(self, worker, number):
        """Return what the program said that the batch system runs as root after a job, "" before."""
        log = worker.run("journalctl -o cat --no-pager -t slurm-epilog -g %s", f"^job={number} ")
        return str(log.stdout)


class PBS(Slurm):
    """PBS's commands with Slurm behind them, which alone tells a job's exit code, and how it has ended.

    What qstat says of a job, which GRAM goes by, is looked at wherever the state is known.
    """

    def submit(self, account, script, *options):
        """Queue a script of ``account``'s as GRAM does, with ``options`` of qsub or, "<FILE", of its own."""
        name = f"{HERE}/{next(_serial)}"
        head, script = script.split("\n", 1)
        own = [f"exec {option}" for option in options if option.startswith("<")]
        script = "\n".join([head, f"#PBS -o {name}.out", f"#PBS -e {name}.err", *own, script])
        told = ["-wd", "/", "-l", f"nodes={self.node}", *(option for option in options if not option.startswith("<"))]
        words = " ".join(["%s"] * len(told))
        said = ok(
            self.server,
            "printf %%s %s | runuser -u %s -- env -i PATH=/usr/bin:/bin HOME=/ "
            f"/usr/libexec/pilotbed/pbs/qsub {words}",
            script, account, *told,
        )  # fmt: skip
        return Job(self, said.strip(), name)

    def _shows(self, number, letter):
        said = ok(self.server, "/usr/libexec/pilotbed/pbs/qstat -f %s", number)
        return re.search(r"job_state = (\w)", said)[1] == letter

    def code(self, number):
        """Return the exit code of a job's script."""
        assert self._shows(number, "C")
        return super().code(number)

    def cancel(self, number):
        """Delete a job."""
        ok(self.server, "qdel %s", number)

    def suspend(self, number):
        """Stop a job, and what belongs to it."""
        until("qstat shows that it runs", lambda: self._shows(number, "R"))
        super().suspend(number)
        until("qstat shows that it is suspended", lambda: self._shows(number, "S"))

    def over_in_a_minute(self):
        """Return the options that limit a job's wall-clock time to one minute: of two -l the last one counts."""
        return ("-l", f"nodes={self.node},walltime=60")

    def reading(self, path):
        """Return what makes a file a job's standard input."""
        return (f"<{path}",)


#: HTCondor's JobStatus. A job that is held (5) is about to be removed.
STATES = {"1": "PENDING", "2": "RUNNING", "3": "COMPLETING", "4": "COMPLETED", "5": "COMPLETING", "6": "RUNNING",
          "7": "SUSPENDED"}  # fmt: skip


class HTCondor:
    """A site's own HTCondor pool, asked on the host of its schedd."""

    COMPLETED, CANCELLED, TIMEOUT = "COMPLETED", "REMOVED via condor_rm", "REMOVED by its limit"
    STRAY = "env -i setsid"
    RECORDS = "/var/spool/condor-site/history"
    WAITS_FOR_ALL = True
    #: It can send no other than the one that comes before the end of a job that is removed.
    SIGNAL, SIGNALLED = "TERM", ()
    CPU_WHILE_IT_RUNS = False
    WHY = ("pilotbed-site-pool condor_q -allusers -nobatch", "pilotbed-site-pool condor_status")

    def __init__(self, server, node):
        self.server, self.node = server, node

    def submit(self, account, script, *options):
        """Queue a script of ``account``'s with ``options``, lines of a submit description; return the job."""
        name = f"{HERE}/{next(_serial)}"
        write(host(self.node), f"{name}.sh", script, account)
        told = ("executable = /bin/sh", f"arguments = {name}.sh", "transfer_executable = false", "initialdir = /",
                "should_transfer_files = NO", f"output = {name}.out", f"error = {name}.err", f"log = {name}.log",
                f'requirements = Machine == "{GRID.fqdn(self.node)}"', "request_memory = 64", *options,
                "queue")  # fmt: skip
        said = ok(
            self.server,
            "printf '%%s\n' %s | runuser -u %s -- env -i PATH=/usr/bin:/bin HOME=/ "
            "pilotbed-site-pool condor_submit -terse -disable -",
            "\n".join(told), account,
        )  # fmt: skip
        return Job(self, said.split()[0], name)

    def _asked(self, tool, number, *names):
        """Return values of a job's ad that a tool tells; none if it does not know the job."""
        words = " ".join(names)
        said = ok(self.server, f"pilotbed-site-pool {tool} %s -autoformat:t {words}", number)
        return said.rstrip("\n").split("\t") if said.strip() else []

    def state(self, number):
        """Return the job's state: RUNNING, COMPLETED, …; of one that was ended from outside also by what."""
        if queued := self._asked("condor_q -allusers", number, "JobStatus"):
            return STATES[queued[0]]
        over = self._asked("condor_history -limit 1", number, "JobStatus", "RemoveReason")
        if not over:  # in neither for a moment
            return "COMPLETING"
        state, reason = over
        if state != "3":
            return STATES[state]
        limit = reason.startswith("The job attribute PeriodicRemove expression")
        return self.TIMEOUT if limit else self.CANCELLED if reason.startswith("via condor_rm") else f"REMOVED {reason}"

    def code(self, number):
        """Return the exit code of a job's script; of one that was killed there is none."""
        # While another job's record is being written it finds none.
        (code,) = until(f"job {number} is in the history",
                        lambda: self._asked("condor_history -limit 1", number, "ExitCode"), 10)  # fmt: skip
        return int(code) if code != "undefined" else None

    def cpu(self, number):
        """Return the seconds of CPU time in the record of a job that is over."""
        record = htcondor.parse(ok(self.server, "pilotbed-site-pool condor_history -limit 1 -long %s", number))
        return float(record[number]["cpu"])

    def memory(self, limit):
        """Return the options by which a job asks for so many MB."""
        return (f"request_memory = {limit}",)

    def cancel(self, number):
        """Delete a job."""
        ok(self.server, "pilotbed-site-pool condor_rm %s", number)

    def signal(self, number, _name):
        """Send a signal to a job's script alone."""
        self.cancel(number)

    def suspend(self, number):
        """Stop a job, and what belongs to it."""
        ok(self.server, "pilotbed-site-pool condor_suspend %s", number)

    def resume(self, number):
        """Let it go on."""
        ok(self.server, "pilotbed-site-pool condor_continue %s", number)

    def over_in_a_minute(self):
        """Return the options that limit a job's wall-clock time to one minute."""
        return ("periodic_remove = JobStatus == 2 && time() - JobCurrentStartDate > 60",)

    def reading(self, path):
        """Return the options that make a file a job's standard input."""
        return (f"input = {path}",)

    #: HTCondor runs no program of root's after a job.
    told_after = None


class GridEngine:
    """A site's Grid Engine, asked on its master: of jobs that are over it tells by its accounting file only."""

    COMPLETED, CANCELLED, TIMEOUT = "exit 0", "failed 100", "failed 37"
    STRAY = "env -i setsid"
    RECORDS = gridengine.ACCOUNTING
    #: What it can send to a running job, before the end of it: qsub(1), -notify.
    SIGNAL, SIGNALLED = "USR2", ("-notify",)
    #: It has ended them by the job's group itself before its program runs.
    PROGRAM_ENDS_STRAYS = WAITS_FOR_ALL = False
    CPU_WHILE_IT_RUNS = False
    WHY = ("qstat -u '*' -f -explain aAcE",)

    def __init__(self, server, node):
        self.server, self.node = server, node

    def submit(self, account, script, *options):
        """Queue a script of ``account``'s with ``options`` of qsub; return the job."""
        name = f"{HERE}/{next(_serial)}"
        told = ["-terse", "-wd", "/", "-S", "/bin/sh", "-q", f"*@{GRID.fqdn(self.node)}", "-N", "pilotbed",
                "-o", f"{name}.out", "-e", f"{name}.err", *options]  # fmt: skip
        words = " ".join(["%s"] * len(told))
        said = ok(
            self.server, f"printf %%s %s | runuser -u %s -- env -i PATH=/usr/bin:/bin HOME=/ qsub {words}",
            script, account, *told,
        )  # fmt: skip
        return Job(self, said.strip(), name)

    def _record(self, number):
        # The file is there from the first job's end on.
        return gridengine.parse(str(self.server.run("cat %s", gridengine.ACCOUNTING).stdout)).get(number, {})

    def state(self, number):
        """Return the job's state: RUNNING, SUSPENDED, or what its record says once it is over."""
        if record := self._record(number):
            return record["state"]
        shown = re.search(rf"(?m)^ *{number} +\S+ +\S+ +\S+ +(\w+) ", str(self.server.run("qstat -u '*'").stdout))
        return "SUSPENDED" if shown and "s" in shown[1] else "RUNNING"  # not in either for a moment

    def code(self, number):
        """Return the exit code of a job's script."""
        fields = ok(self.server, f"grep -E '^([^:]*:){{5}}{number}:' {gridengine.ACCOUNTING}").split(":")
        return int(fields[12])

    def cpu(self, number):
        """Return the seconds of CPU time in the record of a job that is over."""
        return float(self._record(number)["cpu"])

    #: It does not limit memory, as it is set up here.
    memory = None

    def cancel(self, number):
        """Delete a job."""
        ok(self.server, "qdel %s", number)

    def signal(self, number, _name):
        """Send a signal to a job's script alone: it is what comes before the end of a job that is deleted."""
        self.cancel(number)

    def suspend(self, number):
        """Stop a job, and what belongs to it."""
        ok(self.server, "qmod -sj %s", number)

    def resume(self, number):
        """Let it go on."""
        ok(self.server, "qmod -usj %s", number)

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


SYSTEMS = {"slurm": Slurm, "pbs": PBS, "htcondor": HTCondor, "gridengine": GridEngine}


class Job:
    """A batch job, and its output."""

    def __init__(self, system, number, name):
        self.system, self.number, self.name = system, number, name

    def said(self, stream="out"):
        """What it has written so far."""
        return str(host(self.system.node).run("cat %s", f"{self.name}.{stream}").stdout)

    def running(self):
        return self.system.state(self.number) in ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING")

    def end(self):
        """Delete it, if it is not over."""
        if self.running():
            self.system.cancel(self.number)

    def explained(self):
        """Add to what is raised what the batch system, the job and its worker say."""
        there = (f"cat {self.name}.err", PROCESSES)
        return explained(
            *((self.system.server, why) for why in self.system.WHY),
            *((host(self.system.node), why) for why in there),
        )

    def done(self, deadline=180):
        """Wait for its end; return its script's code and its output."""
        with self.explained():
            until(f"batch job {self.number} has ended", lambda: not self.running(), deadline)
        return self.system.code(self.number), self.said()

    def payload(self, word):
        """Wait for a process of the job's payload with ``word`` in its command line."""
        def found():
            if not self.running():
                pytest.fail(f"batch job {self.number} has ended: {self.said('err')}")
            return named(host(self.system.node), word)

        with self.explained():
            return until(f"payload {word} of batch job {self.number}", found)[0]


def named(worker, word):
    """The processes that are ``sleep WORD``."""
    return [process for process in processes(worker) if process.args == f"sleep {word}"]


def trap(signal, then):
    """What a shell does at a signal, once: Grid Engine sends two, to the process group and to all of the job."""
    return f'trap "trap \\"\\" {signal}; {then}" {signal}'


#: Waits for a signal. Its sleep may be told first, and end: a shell that waits for that one only would be gone by then.
RESTS = "while :; do sleep {} & wait; done"


def rest():
    """A number of seconds to sleep that no other process has: its name."""
    return f"900.{next(_serial):04}7"


@contextmanager
def downtime(factory):
    """A downtime of all entries: no pilot is submitted, whoever waits for one, and none is left in the queue."""
    path, pool = "/var/lib/pilotbed/factory/downtime/ALL", "pilotbed-factory-pool"
    told = f"""{pool} condor_status -any -constraint 'MyType == "glidefactory"' -autoformat GLIDEIN_In_Downtime"""
    write(factory, path, "the batch system is tried\n", "factory", "0644")
    try:
        until("every entry is in downtime", lambda: set(ok(factory, told).split()) == {"True"})
        factory.run(f"{pool} condor_rm -all")
        queue = f"{pool} condor_q -allusers -autoformat ClusterId"
        until_none("the factory has no pilot", lambda: ok(factory, queue))
        yield
    finally:
        ok(factory, "rm -f %s", path)


@pytest.fixture(scope="session")
def systems(submit, alice, bob, carol):
    """Each batch system of the inventory, at a site that has it, with a job that comes to its limit meanwhile."""
    found = {}
    for name, kind in SYSTEMS.items():
        if nodes := GRID.names(f"batch_{name}"):
            site = GRID.site(f"with {name}", lambda site, nodes=nodes: site.ce in nodes)
            system = kind(host(site.ce), [node for node in site.workers if node in nodes][-1])
            found[name] = system
            prepare(system, submit, alice, bob, carol)
            system.word = rest()
            script = f"{AS_CAROL} /bin/sh -c 'trap \"\" TERM; sleep {system.word}'"
            system.limited = queue(system, script, *system.over_in_a_minute())
    for system in found.values():
        system.limited.payload(system.word)
    yield found
    for system in found.values():
        system.limited.end()
        host(system.node).run("rm -rf %s", HERE)


def prepare(system, submit, *users):
    """Choose a pilot account that nobody else uses on the worker; put the users' proxies where jobs' output is."""
    worker = host(system.node)
    gid = ok(worker, "getent group glpilot").split(":")[2]
    accounts = (line.split(":") for line in ok(worker, "getent passwd").splitlines())
    busy = {process.user for process in processes(worker)}
    # The last one: pilots that come later are given the first ones.
    system.pilot = [entry[0] for entry in accounts if entry[3] == gid and entry[0] not in busy][-1]
    worker.run("rm -rf %s", HERE)
    ok(worker, "install -d -m 0711 -o %s %s", system.pilot, HERE)
    for who in users:
        code, said = as_user(submit, who.account, f"voms-proxy-init --quiet --voms {who.voms}")
        assert code == 0, said
        proxy = ok(submit, "runuser --login %s --command %s", who.account, "cat /tmp/x509up_u$(id -u)")
        write(worker, f"{HERE}/{who.account}.pem", proxy, system.pilot)


def queue(system, script, *options):
    """Queue a job of the pilot account's; in the script, ``glexec`` runs a command as alice's account."""
    head = f"#!/bin/sh\nexport GLEXEC_CLIENT_CERT={HERE}/alice.pem PATH=/usr/sbin:/usr/bin:/sbin:/bin\n"
    return system.submit(system.pilot, f"{head}{script}\n", *options)


@pytest.fixture(scope="session", params=[name for name in SYSTEMS if GRID.names(f"batch_{name}")])
def system(request, systems):
    """Each batch system."""
    return systems[request.param]


@pytest.fixture(scope="module")
def batch(system):
    """Each batch system, without pilots: those that wait for jobs would have its slots.

    What takes a while goes on beside the tests: a job of G4's computes, one of G2's is deleted.
    """
    worker = host(system.node)
    with downtime(GRID.node("factory")):
        with explained(*((system.server, why) for why in system.WHY), (worker, PROCESSES)):
            until_none("no pilot is left", lambda: [one for one in processes(worker) if "glidein_startup" in one.args],
                       300)  # fmt: skip
        write(worker, f"{HERE}/burn", BURN, system.pilot, "0644")
        system.burning = queue(system, f"{AS_CAROL} /usr/bin/python3 {HERE}/burn {HERE}/burnt")
        script = "glexec /bin/sh -c 'trap \"\" TERM; setsid sleep {} & sleep {}'"
        system.deleted = queue(system, script.format(*(words := (rest(), rest()))))
        system.account = {system.deleted.payload(word).user for word in words}
        system.cancel(system.deleted.number)
        yield system
        system.burning.end()
        system.deleted.end()


@pytest.fixture(scope="module")
def worker(batch):
    return host(batch.node)


@pytest.fixture(scope="module")
def pilot(batch):
    return batch.pilot


@pytest.fixture(scope="module")
def run(batch):
    """Queue a job: ``run(script, *options)``; in the script, ``glexec`` runs a command as alice's account."""
    jobs = []

    def submitted(script, *options):
        jobs.append(queue(batch, script, *options))
        return jobs[-1]

    yield submitted
    for job in jobs:
        job.end()


#: How a payload ends, and the batch job's exit code.
ENDINGS = {"exit 0": 0, "exit 1": 1, "exit 42": 42, "kill -KILL $$": 137}
LIMITS = "ulimit -v; ulimit -n; cat /proc/self/cgroup"
GROUPS = "id -G; id -G $(id -un)"
#: What needs nothing but to run to its end: all are queued at once, and each is looked at by the test of its name.
AT_ONCE = {
    **{f"G1 {ending}": f"glexec /bin/sh -c '{ending}'" for ending in ENDINGS},
    "G5": f"ulimit -v 3000000; ulimit -n 777; {LIMITS}; echo; glexec /bin/sh -c '{LIMITS}'",
    "G8": "glexec /bin/sh -c 'cat; echo what is wrong >&2; exit 3'",
    "G9": f"glexec /usr/bin/touch {HERE}/scratch/file && exit 9\n"
          f"made=$(mkgltempdir {HERE}/open) || exit 8\n"
          "glexec /bin/sh -c 'cd \"$0\" && mkdir deep && echo data > deep/file && stat -c %U deep/file && id -un' "
          "$made\n"
          "rm -rf $made 2>/dev/null; test -d $made && echo kept\n"
          "mkgltempdir -r -f $made && test ! -e $made && echo cleared",
    "G10": f"{GROUPS}; glexec /bin/sh -c '{GROUPS}'",
    "G12 with": "glexec /usr/bin/true",
    "G12 without": "/usr/bin/true",
    "G13": f"glexec /usr/bin/id -un; GLEXEC_CLIENT_CERT={HERE}/bob.pem glexec /usr/bin/id -un",
    "D4.2": "glexec /usr/bin/id -un",
}  # fmt: skip


@pytest.fixture(scope="module")
def queued(batch, worker, pilot):
    """The jobs of AT_ONCE."""
    write(worker, f"{HERE}/in", "what is read\n", pilot)
    ok(worker, "install -d -m 0700 -o %s %s && install -d -m 0711 -o %s %s",
       pilot, f"{HERE}/scratch", pilot, f"{HERE}/open")  # fmt: skip
    options = {"G8": batch.reading(f"{HERE}/in")}
    jobs = {name: queue(batch, script, *options.get(name, ())) for name, script in AT_ONCE.items()}
    yield jobs
    for job in jobs.values():
        job.end()


@pytest.mark.check("G1")
@pytest.mark.parametrize(("ending", "code"), ENDINGS.items())
def test_g1_exit_code_is_passed_on(queued, ending, code):
    assert queued[f"G1 {ending}"].done() == (code, "")


@pytest.mark.check("G2")
def test_g2_deleted_job_leaves_nothing(batch, worker):
    """Its payload does not heed SIGTERM, and has a daemon. Jobs of AT_ONCE have the same account for a moment."""
    batch.deleted.done()
    assert batch.state(batch.deleted.number) == batch.CANCELLED
    (account,) = batch.account
    until_none("the payload's account has no process",
               lambda: [process for process in processes(worker) if process.user == account])  # fmt: skip


@pytest.mark.check("G5")
@pytest.mark.check("P7")
def test_g5_payload_stays_in_the_jobs_cgroup_and_limits(queued):
    code, said = queued["G5"].done()
    job, payload = (part.splitlines() for part in said.split("\n\n"))
    assert code == 0
    assert job[:2] == payload[:2] == ["3000000", "777"]
    assert job[2:]
    for outside, inside in zip(job[2:], payload[2:], strict=True):
        assert inside == outside or inside.startswith(f"{outside.rstrip('/')}/")


@pytest.mark.check("G6")
def test_g6_suspended_job_has_its_payload_stopped(batch, run):
    """Batch systems stop processes by a signal or by the freezer: what tells is that the payload says no more."""
    job = run("glexec /bin/sh -c 'while :; do echo; sleep 0.1; done'")

    def says_more():
        before = len(job.said())
        time.sleep(1)
        return len(job.said()) > before

    until("the payload says something", says_more)
    batch.suspend(job.number)
    until("the payload is stopped", lambda: not says_more())
    batch.resume(job.number)
    until("the payload goes on", says_more)
    batch.cancel(job.number)


@pytest.mark.check("G7")
def test_g7_signal_reaches_the_payload(batch, run, worker):
    word = rest()
    heard = trap(batch.SIGNAL, "echo heard; exit 7")
    job = run(f"exec /usr/sbin/glexec /bin/sh -c '{heard}; {RESTS.format(word)}'", *batch.SIGNALLED)
    job.payload(word)
    batch.signal(job.number, batch.SIGNAL)
    assert job.done() == (7, "heard\n")
    assert not named(worker, word)


def test_end_is_told_to_processes_below_the_jobs_first_one(batch, run):
    """As a pilot is, below a computing element's script; that one stays until then, where a job ends with it."""
    stays = "" if batch.WAITS_FOR_ALL else f"{trap(batch.SIGNAL, ':')}; "
    heard = trap(batch.SIGNAL, "echo heard; sleep 1; echo done; exit")
    job = run(f"{stays}/bin/sh -c '{heard}; echo; {RESTS.format(rest())}' & wait; wait", *batch.SIGNALLED)
    with job.explained():
        until("it runs", job.said)
        batch.cancel(job.number)
        job.done()
        assert job.said() == "\nheard\ndone\n"


@pytest.mark.check("G8")
def test_g8_standard_streams_are_the_jobs(queued):
    job = queued["G8"]
    assert job.done() == (3, "what is read\n")
    assert job.said("err") == "what is wrong\n"


@pytest.mark.check("G9")
def test_g9_payload_has_a_scratch_directory_that_the_pilot_clears(queued, pilot):
    """The job's own is the pilot's: the payload gets one inside."""
    code, said = queued["G9"].done()
    owner, account, *after = said.split()
    assert (code, owner, after) == (0, account, ["kept", "cleared"])
    assert account != pilot


@pytest.mark.check("G10")
@pytest.mark.check("D5.5")
def test_g10_groups_by_which_a_batch_system_tracks_stay(queued):
    """Groups of the job's that its account has not are the batch system's, and the payload's, too."""
    code, said = queued["G10"].done()
    job, account, payload, target = (set(line.split()) for line in said.splitlines())
    assert code == 0
    assert payload - target == job - account


@pytest.mark.check("G11")
def test_g11_strays_are_gone_after_the_job(batch, run, worker, pilot):
    """The pilot's own, for which the batch system answers, and the payload's, for which glexec does."""
    own, left, background = rest(), rest(), rest()
    job = run(
        f"{batch.STRAY} sleep {own} &\n"
        f"glexec /bin/sh -c 'setsid sleep {left} & :'\n"
        f"setsid glexec /bin/sh -c 'sleep {background}; :' &\n"
        f"while ! test -e {HERE}/seen; do sleep 0.1; done"
    )
    owners = [job.payload(word).user for word in (own, background)]
    assert owners[0] == pilot != owners[1], "control: they were there"
    write(worker, f"{HERE}/seen", "", pilot)
    assert job.done()[0] == 0
    until_none("the strays are gone", lambda: [p for word in (own, left, background) for p in named(worker, word)])
    if batch.told_after:
        told = until("the batch system's own word", lambda: batch.told_after(worker, job.number))
        assert (int(re.search(r"ended=(\d+)", told)[1]) >= 1) == batch.PROGRAM_ENDS_STRAYS


@pytest.mark.check("G12")
@pytest.mark.needs("told_after")
def test_g12_what_the_batch_system_runs_after_a_job_runs_as_before(batch, queued, worker, pilot):
    """Once, as root, and told of the pilot's account, which is the job's: glexec has changed none of it."""
    for job in (queued["G12 with"], queued["G12 without"]):
        assert job.done()[0] == 0
        told = until("the batch system's own word", lambda job=job: batch.told_after(worker, job.number))
        assert told == f"job={job.number} account={pilot} ended=0\n"


@pytest.mark.check("G13")
def test_g13_two_payloads_in_turn_have_two_accounts(queued, pilot):
    code, said = queued["G13"].done()
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


@pytest.mark.check("G14")
def test_g14_without_set_uid_bits_the_error_is_clear(run, worker):
    assert run("glexec /usr/bin/true").done()[0] == 0, "control"
    with powerless(worker):
        job = run("glexec /usr/bin/true")
        assert job.done() == (202, "")
    assert "nosuid" in job.said("err")


@pytest.mark.check("P7")
@pytest.mark.needs("memory")
def test_job_that_needs_more_memory_than_it_said_is_ended(batch, run):
    """Its payload's counts, which glexec gives another account."""
    # tail keeps what has no end of line.
    within, beyond = (
        run(f"glexec /bin/sh -c 'head -c {size}M /dev/zero | tail > /dev/null; echo $?'", *batch.memory(100))
        for size in (20, 200)
    )
    assert within.done() == (0, "0\n"), "control"
    beyond.done()
    assert "memory" in batch.state(beyond.number)
    assert beyond.said() != "0\n"


@pytest.mark.check("D4.2")
def test_record_of_a_payload_is_joined_with_its_batch_jobs(batch, queued, worker, pilot):
    """By pilotbed-trace, on the worker and then where the batch system's records are."""
    job = queued["D4.2"]
    code, account = job.done()
    assert code == 0
    asked = "pilotbed-trace --json --account %s"
    found = ok(worker, asked, account.strip())
    told = ok(batch.server, f"printf %%s %s | {asked} --records - --batch {batch.RECORDS}", found, account.strip())
    (own,) = (one for one in json.loads(told) if one["batch"].split()[1:] == [job.number])
    assert (own["pilot_account"], own["ended"]) == (pilot, "exit 0")
    assert (own["job"]["user"], own["job"]["state"], own["job"]["nodes"]) == (pilot, batch.COMPLETED, batch.node)


@pytest.mark.check("G4")
@pytest.mark.check("D4.3")
def test_g4_cpu_time_of_a_payload_and_its_orphan_is_in_the_batch_systems_sum(batch, worker, pilot):
    """Both have computed while others were tried; the orphan is there when the job ends."""
    job = batch.burning
    with job.explained():
        used = float(until("the payload says what it has used", job.said, 600))
    if batch.CPU_WHILE_IT_RUNS:
        told = batch.cpu(job.number)
    write(worker, f"{HERE}/burnt", "", pilot)
    assert job.done()[0] == 0
    if not batch.CPU_WHILE_IT_RUNS:
        told = batch.cpu(job.number)
    assert told == pytest.approx(used, rel=0.05)


@pytest.mark.check("G3")
@pytest.mark.check("P7")
@pytest.mark.stage(2)
def test_g3_wall_clock_limit_ends_the_payload(system):
    """Long after the others, as it takes more than a minute."""
    system.limited.done(150)
    assert system.state(system.limited.number) == system.TIMEOUT
    until_none("its payload is gone", lambda: named(host(system.node), system.word))
