"""What the grid tests share: who is who in the inventory, polling, jobs, and pilots that are started by hand.

Everything goes through a root shell on a node (`reach`: nsenter, or ssh with PILOTBED_CONNECTION=paramiko)
or through what a user can do on a submit host, so that the tests run against any inventory.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import pytest
from pilotbed.glidein.arguments import encode
from testinfra.host import Host

from . import CHECKOUT, PATIENCE, ansible, ansible_environment, inventory, walk
from .reach import ansible_connection, host, service

Found = TypeVar("Found")


def _poll(
    what: str, look: Callable[[], Found], wanted: Callable[[Found], bool], told: Callable[[Found], str],
    deadline: float, every: float,
) -> Found:  # fmt: skip
    deadline *= PATIENCE
    end = time.monotonic() + deadline
    while not wanted(found := look()):
        if time.monotonic() > end:
            pytest.fail(f"not within {deadline:.0f} s: {what}; {told(found)}")
        time.sleep(every)
    return found


def until(what: str, look: Callable[[], Found], deadline: float = 180, every: float = 0.3) -> Found:
    """Return the first true value of ``look``; fail when ``deadline`` (seconds) passes without one."""
    return _poll(what, look, bool, lambda found: f"last seen: {found!r}", deadline, every)


def until_none(what: str, look: Callable[[], Found], deadline: float = 180, every: float = 0.3) -> None:
    """Wait until ``look`` finds nothing; fail with what is left when ``deadline`` (seconds) passes."""
    _poll(what, look, lambda left: not left, lambda left: f"left: {str(left)[:600]}", deadline, every)


@contextmanager
def explained(*asked: tuple[Host, str]) -> Iterator[None]:
    """Add to what is raised what each command says, on its node, at that moment."""
    try:
        yield
    except BaseException as error:
        for node, command in asked:
            done = node.run(command)
            error.add_note(f"{command}:\n{done.stdout}{done.stderr}")
        raise


# -- who is who ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A site by its nodes' names; ``cache`` is "" where there is none, ``vos`` empty where it accepts all."""

    name: str
    cidr: str
    flavour: str
    traversal: str
    router: str
    router_address: str
    ce: str
    workers: tuple[str, ...]
    cache: str
    vos: tuple[str, ...] = ()

    def slots(self, central: Host) -> list[dict[str, Any]]:
        """Return the partitionable slots of this site's pilots of the first VO, from the collector."""
        group = GRID.variable("grid_vos")[0]["frontend_group"]
        wanted = f'GLIDEIN_Site == "{self.name}" && GLIDECLIENT_Group == "{group}" && PartitionableSlot'
        shown = central.run("condor_status -json -constraint %s", wanted).stdout
        found: list[dict[str, Any]] = json.loads(shown or "[]")
        return found


class Grid:
    """The inventory as the tests ask it: which node has which part."""

    @property
    def _inventory(self) -> inventory.Inventory:
        return inventory.load()

    def names(self, group: str) -> list[str]:
        """Return the hosts of a group."""
        return self._inventory.names(group)

    def variable(self, name: str, node: str | None = None) -> Any:
        """Return a plain variable of a node, or of any."""
        return self._inventory.variable(name, node)

    def addresses(self, node: str) -> dict[str, str]:
        """Return a node's address in each of its networks, by the network's name."""
        return dict(self.variable("node_addresses", node))

    def node(self, group: str) -> Host:
        """Return the first host of ``group``."""
        return service(group)

    def fqdn(self, node: str) -> str:
        """Return a node's full name."""
        return f"{node}.{self.variable('grid_domain')}"

    @property
    def vo(self) -> str:
        """The name of the first VO."""
        return str(self.variable("grid_vos")[0]["name"])

    @cached_property
    def sites(self) -> list[Site]:
        """Every site that has a computing element."""
        return [self._site(ce) for ce in self.names("computing_element")]

    def _site(self, ce: str) -> Site:
        name, network = self.variable("site_name", ce), self.variable("site_network", ce)
        here = set(self.names(f"site_{name}"))
        router = next(node for node in self.names("site_router") if node in here)
        outside = [address for other, address in self.addresses(router).items() if other != network]
        return Site(
            name=name,
            cidr=self.variable("grid_networks")[network]["cidr"],
            flavour=self.variable("site_router_flavour", ce),
            traversal=self.variable("site_traversal", ce),
            router=router,
            router_address=outside[0],
            ce=ce,
            workers=tuple(node for node in self.names("worker") if node in here),
            cache=next((node for node in self.names("web_cache") if node in here), ""),
            vos=tuple(self.variable("site_vos", ce) or ()),
        )

    def site(self, what: str, wanted: Callable[[Site], bool]) -> Site:
        """Return the first site that is ``wanted``; the test is skipped where there is none."""
        found = next((site for site in self.sites if wanted(site)), None)
        return found or pytest.skip(f"this inventory has no site {what}")

    def worker_of(self, ad: Mapping[str, Any]) -> Host:
        """Return the worker that a slot's or a job's ad names."""
        name = str(ad.get("GLIDEIN_Worker") or ad["MachineAttrGLIDEIN_Worker0"])
        return host(next(node for node in self.names("worker") if name in (node, self.fqdn(node))))


# -- commands ------------------------------------------------------------------------------------------------------


def ok(node: Host, command: str, *args: str) -> str:
    """Run a command that must succeed; return what it printed."""
    done = node.run(command, *args)
    assert done.rc == 0, f"{command % tuple(map(shlex.quote, args)) if args else command}: {done.stderr or done.stdout}"
    return str(done.stdout)


def as_user(node: Host, account: str, command: str) -> tuple[int, str]:
    """Run a command as a user; return its exit code and all that it said."""
    done = node.run("runuser --login %s --command %s", account, f"exec 2>&1; {command}")
    return done.rc, str(done.stdout)


def playbook(name: str, *arguments: str, **variables: Any) -> str:
    """Run a playbook of the project against this grid; return what it printed.

    Args:
        name: without ``.yml``.
        arguments: of ansible-playbook.
        variables: extra ones.
    """
    given = [word for key, value in variables.items() for word in ("--extra-vars", json.dumps({key: value}))]
    done = subprocess.run(
        [ansible("ansible-playbook"), f"playbooks/{name}.yml", *ansible_connection(), *arguments, *given], cwd=CHECKOUT,
        env=ansible_environment(PILOTBED_LOG=os.devnull), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(node: Host, path: str, content: str, owner: str = "root", mode: str = "0600") -> None:
    """Write a file on a node."""
    ok(
        node, "install -m 0600 /dev/null %s && printf %%s %s > %s && chown %s %s && chmod %s %s",
        path, content, path, owner, path, mode, path,
    )  # fmt: skip


@contextmanager
def edited(node: Host, path: str, command: str, *args: str) -> Iterator[None]:
    """Change a file on a node with a shell command (``$f`` is its path); it is put back, with its times, at the end."""
    kept = f"{path}.pilotbed-test"
    ok(node, "test ! -e %s || mv %s %s; cp -a %s %s", kept, kept, path, path, kept)
    try:
        ok(node, f"f=%s; {command}", path, *args)
        yield
    finally:
        ok(node, "mv %s %s", kept, path)


@contextmanager
def lenient_schedd(node: Host) -> Iterator[None]:
    """Have a schedd refuse no job at submission: a pilot must not rely on another host's refusals."""
    path, asked = "/etc/condor/config.d/99-pilotbed-test.conf", "condor_config_val -schedd SUBMIT_REQUIREMENT_NAMES"
    before = ok(node, asked)
    write(node, path, "SUBMIT_REQUIREMENT_NAMES =\n", mode="0644")
    try:
        ok(node, "condor_reconfig")
        until("the schedd refuses nothing", lambda: node.run(asked).stdout.strip() != before.strip())
        yield
    finally:
        ok(node, "rm -f %s && condor_reconfig", path)
        until("the schedd refuses again", lambda: node.run(asked).stdout == before)


# -- jobs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process on a node."""

    pid: int
    user: str
    args: str


def processes(node: Host) -> list[Process]:
    """Return every process of a node."""
    lines = (line.split(None, 2) for line in ok(node, "ps -ww -eo pid=,user:32=,args=").splitlines())
    return [Process(int(line[0]), line[1], line[2]) for line in lines if len(line) == 3]


#: The proxy that the frontend sends to the factory, on the frontend's host.
PILOT_PROXY = "/var/lib/pilotbed/pilot-credential/pilot.pem"
#: In a script: wait there until the job is removed or killed, so that a test can see on the worker how far it came.
HOLD = "@HOLD@"
#: Of a site's ARC, on all its nodes: a directory for each pilot.
SESSIONS = "/srv/site/arc-session"
#: Names that tests give to what they keep on a node begin with it; who searches a node for keys leaves it out.
TESTS_OWN = "/var/tmp/pilotbed-test"  # noqa: S108 (made anew, for one account)


@dataclass(frozen=True)
class Job:
    """A submitted job; ``name`` is the stem of its files in its owner's home."""

    owner: str
    id: str
    name: str
    node: Host

    @property
    def hold(self) -> str:
        """What HOLD stands for in this job's script."""
        return f"sleep 900.{self.name.rpartition('-')[2]}"

    def ad(self) -> dict[str, Any]:
        """Return the job's ad, from the queue or from history, once the schedd answers."""
        return until(f"the schedd tells of job {self.id}", lambda: walk.job_ad(self.node, self.id), 60)

    def status(self) -> str:
        """Return the job's state in a word."""
        return walk.STATUS.get(int(self.ad().get("JobStatus", 0)), "unknown")

    def read(self, suffix: str) -> str:
        """Return one of the job's files (``out``, ``err``, ``log``), as far as it is there."""
        return as_user(self.node, self.owner, f"cat {self.name}.{suffix} 2>/dev/null")[1]

    def done(self, deadline: float = 180) -> dict[str, Any]:
        """Wait for the job's end; return its ad."""
        with self.explained():
            return walk.wait(self.node, {self.owner: self.id}, deadline)[self.owner]

    def explained(self) -> AbstractContextManager[None]:
        """Add to what is raised why the job has not come further: its log, its matches, what the pool says of it."""
        manager = GRID.node("central_manager")
        return explained(
            (self.node, f"condor_q -better-analyze {self.id}"),
            (self.node, f"grep -wF '{self.id}' /var/log/condor/SchedLog | tail -n 20"),
            (manager, "tail -n 40 /var/log/condor/NegotiatorLog"),
            (manager, "condor_status -af Name State Activity RemoteOwner GLIDEIN_Site"),
            (self.node, f"runuser --login {self.owner} --command 'cat {self.name}.log'"),
        )

    def holds(self, site: Site, deadline: float = 180) -> tuple[Host, Process]:
        """Wait until the payload has come to HOLD; return the worker and the process there."""

        def look() -> tuple[Host, Process] | None:
            # Unknown: while its schedd starts, there is a moment in which neither queue nor history has the job.
            if self.status() not in ("idle", "running", "unknown"):
                pytest.fail(f"job {self.id} does not wait, it is {self.status()}: {self.read('log')}")
            for worker in map(host, site.workers):
                if found := next((process for process in processes(worker) if process.args == self.hold), None):
                    return worker, found
            return None

        with self.explained():
            found = until(f"{self.owner}'s job {self.id} has come to its HOLD", look, deadline)
        assert found
        return found

    def remove(self) -> None:
        """Remove the job from the queue, as its owner."""
        as_user(self.node, self.owner, f"condor_rm {self.id}")


class Jobs:
    """Submits jobs and forgets none of them."""

    _serial = itertools.count(1)

    def __init__(self, node: Host) -> None:
        self.node = node
        self.submitted: list[Job] = []

    def submit(self, owner: walk.Walker, site: Site, script: str = walk.JOB, extra: str = "", proxy: str = "") -> Job:
        """Submit a job for a site.

        Args:
            owner: who submits, with which FQAN.
            site: where it may run.
            script: the payload; see HOLD.
            extra: more lines of the submit file.
            proxy: command instead of voms-proxy-init; ``true`` for the proxy that is there.
        """
        name = f"test-{int(time.time()) % 10**6}{next(self._serial):03}"
        job = Job(owner.account, "", name, self.node)
        text = walk.SUBMIT.format(name=name, sites=site.name, proxy=walk.proxy_of(self.node, owner.account))
        described = text.replace("\nqueue\n", f"\n{extra.replace('@NAME@', name)}\nqueue\n")
        steps = [
            proxy or f"voms-proxy-init --quiet --voms {owner.voms}",
            f"printf %s {shlex.quote(script.replace(HOLD, job.hold))} > {name}.sh",
            f"chmod 755 {name}.sh",
            f"printf %s {shlex.quote(described)} > {name}.sub",
            f"condor_submit -terse {name}.sub",
        ]
        with explained((self.node, "tail -n 40 /var/log/condor/SchedLog; uptime; df -h /var/lib/condor /tmp")):
            code, said = as_user(self.node, owner.account, " && ".join(steps))
            assert code == 0, f"{owner.account} cannot submit: {said}"
        job = replace(job, id=said.split()[-1])
        self.submitted.append(job)
        return job

    def close(self) -> None:
        """Remove what is left of the jobs: in the queue and in their owners' homes."""
        for job in self.submitted:
            if job.status() not in ("done", "removed"):
                job.remove()
            as_user(self.node, job.owner, f"rm -rf {job.name} {job.name}.*")


def slurm_cpu_time(ce: Host, job: str) -> float:
    """Return the seconds of CPU time, in whole ones, that a running job of Slurm's has used; 0 before it is sampled."""
    told = ce.run("sstat --noheader --parsable2 --allsteps --jobs %s --format=AveCPU", job).stdout.split()
    hours, minutes, seconds = (told or ["0:0:0"])[0].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


# -- a site that is cut off ----------------------------------------------------------------------------------------

#: A table of its own at a site's router, whatever else it filters.
CUT = "table inet pilotbed_test { chain cut { type filter hook forward priority -300; policy drop; }; }"


@dataclass(frozen=True)
class CutOff:
    """A site whose router forwards nothing, and a job with the payload that ran there, after so many starts."""

    site: Site
    central: Host
    job: Job
    worker: Host
    process: Process
    starts: int

    def usable(self) -> list[str]:
        """Return the names of the site's slots to which the negotiator would give jobs."""
        rule = self.central.run("condor_config_val NEGOTIATOR_SLOT_CONSTRAINT")
        wanted = f'GLIDEIN_Site == "{self.site.name}" && ({rule.stdout.strip() if rule.rc == 0 else "true"})'
        return ok(self.central, "condor_status -constraint %s -autoformat Name", wanted).split()

    def begin(self) -> None:
        """Let nothing through any more; it has usable slots before."""
        assert self.usable(), "control"
        ok(host(self.site.router), "nft %s", f"add {CUT}")

    def end(self) -> None:
        """Let everything through again that its own filter does; at any time."""
        host(self.site.router).run("nft delete table inet pilotbed_test")


# -- pilots by hand ------------------------------------------------------------------------------------------------


def work_dirs(worker: Host) -> list[str]:
    """Return the work directory of every pilot whose startd runs on ``worker``."""
    found = worker.run(
        "for pid in $(pgrep -x condor_startd); do "
        "tr '\\0' '\\n' < /proc/$pid/environ | sed -n 's/^GLIDEIN_WORK_DIR=//p'; done"
    )
    return str(found.stdout).split()


def owned_by_first_vo(worker: Host, files: Iterable[str]) -> list[tuple[str, str]]:
    """Return those of ``files`` that a pilot account of the first VO owns, in their order, each with its account."""
    prefix = GRID.variable("grid_vos")[0]["pilot_accounts"]["prefix"]
    found = str(worker.run(f"stat --format='%n %U' {shlex.join(files)}").stdout)
    return re.findall(rf"^(\S+) ({prefix}\d+)$", found, re.MULTILINE)


def work_dir(worker: Host) -> tuple[str, str]:
    """Return the work directory and the account of one of the first VO's pilots on ``worker``, once there is one."""
    return until("a pilot of the first VO", lambda: owned_by_first_vo(worker, work_dirs(worker)))[0]


def running_proxies(site: Site) -> dict[tuple[str, str], str]:
    """Return whose the proxy of each pilot of the first VO at a site is and when it ends, by worker and directory."""
    look = "openssl x509 -noout -subject -nameopt compat -enddate -in %s"
    places = [
        (name, place) for name in site.workers for place, _ in owned_by_first_vo(host(name), work_dirs(host(name)))
    ]
    found = {(name, place): str(host(name).run(look, f"{place}/cred/pilot.pem").stdout) for name, place in places}
    return {pilot: said for pilot, said in found.items() if said}


def pilot_proxies(worker: Host) -> list[str]:
    """Return the proxies of the first VO's pilots in a site's session directories, the newest first."""
    newest_first = str(worker.run(f"ls -t {SESSIONS}/*/user.proxy").stdout).split()
    return [proxy for proxy, _ in owned_by_first_vo(worker, newest_first)]


def worker_with_a_pilot(site: Site) -> Host:
    """Return a worker of the site where one of the first VO's pilots is, whose proxy can be borrowed."""
    there = until(f"a pilot at {site.name}", lambda: [node for node in map(host, site.workers) if pilot_proxies(node)])
    return there[0]


def arguments(site: Site) -> dict[str, str]:
    """Return the arguments of the factory's newest pilot of the first VO at ``site``: option to value."""
    factory, group = GRID.node("factory"), GRID.variable("grid_vos")[0]["frontend_group"]
    theirs = f'GlideinEntryName == "{site.name}" && split(GlideinClient, ".")[1] == "{group}"'
    for tool in ("condor_q -allusers", "condor_history -limit 1"):
        found = factory.run(f"pilotbed-factory-pool {tool} -constraint %s -af Arguments", theirs).stdout
        if words := found.rstrip("\n").rpartition("\n")[2].split():
            return dict(zip(words[::2], words[1::2], strict=True))
    pytest.fail(f"the factory has never had a pilot at {site.name}")


@dataclass
class HandPilot:
    """The start-up script, run as a unit on a worker by a pilot account that nobody else uses there.

    Its proxy is that of a pilot of the factory's at the site: session directories are shared by the site's nodes.
    Its test ends it, unless ``options`` says otherwise: on a busy machine it may wait for its next job for longer than
    GLIDEIN_Max_Tail (seen as a pilot that "cannot register" after its first job).
    """

    worker: Host
    options: Mapping[str, str]
    directory: str = TESTS_OWN
    unit: str = "pilotbed-test-pilot"
    group: str = "glpilot"
    #: What a factory sends along with the job: name and content.
    files: Mapping[str, str] = field(default_factory=dict)
    account: str = field(init=False, default="")

    def __enter__(self) -> HandPilot:
        self._clear()
        source = until("a pilot of the factory's is at the site", lambda: pilot_proxies(self.worker))[0]
        busy = {process.user for process in processes(self.worker)}
        gid = ok(self.worker, "getent group %s", self.group).split(":")[2]
        accounts = (line.split(":") for line in ok(self.worker, "getent passwd").splitlines())
        self.account = next(entry[0] for entry in accounts if entry[3] == gid and entry[0] not in busy)
        directory, proxy = self.directory, f"{self.directory}/proxy.pem"
        ok(self.worker, "install -d -m 0711 -o %s %s && install -m 0600 -o %s %s %s",
           self.account, directory, self.account, source, proxy)  # fmt: skip
        for name, content in self.files.items():
            write(self.worker, f"{directory}/{name}", content, self.account)
        patient = with_parameters({}, GLIDEIN_Max_Idle="14400", GLIDEIN_Max_Tail="14400")
        words = [word for pair in {**patient, **self.options}.items() for word in pair]
        ok(
            self.worker,
            # exec: once it returns, the account is seen to be busy, and the next pilot takes another one
            "systemd-run --quiet --service-type exec --unit %s --uid %s --gid %s --working-directory %s --setenv %s "
            "--property StandardOutput=file:%s --property StandardError=file:%s --property TimeoutStopSec=20 "
            f"/bin/bash /usr/lib/pilotbed/pilotbed/glidein/glidein_startup.sh {shlex.join(words)}",
            self.unit, self.account, gid, directory, f"X509_USER_PROXY={proxy}", f"{directory}/out", f"{directory}/err",
        )  # fmt: skip
        return self

    @cached_property
    def name(self) -> str:
        """The pilot's name with pool and relay; its slots are ``slotN@NAME@worker``."""
        config = "find /tmp /var/tmp -maxdepth 2 -name glidein_config -user %s -newer %s -exec grep -h %s {} +"
        named = "^GLIDEIN_Pilot_Name "

        def named_or_dead() -> str:
            told = str(self.worker.run(config, self.account, f"{self.directory}/proxy.pem", named).stdout)
            if not told:
                self.check()
            return told

        return until("the pilot has a name", named_or_dead).split()[1]

    def slots(self) -> list[dict[str, Any]]:
        """Return its partitionable slots as the pool knows them; it remembers those of dead pilots, too."""
        wanted = f'split(Name, "@")[1] == "{self.name}" && PartitionableSlot'
        found = GRID.node("central_manager").run("condor_status -json -constraint %s", wanted).stdout
        slots: list[dict[str, Any]] = json.loads(found or "[]")
        return slots

    def check(self) -> None:
        """Fail with the pilot's own words if it has ended."""
        if self.worker.run("systemctl is-active --quiet %s", self.unit).rc:
            pytest.fail(f"the pilot that was started by hand has ended: {self.said()[-3000:]}")

    def refusal(self) -> str:
        """Return what the pilot says when it has ended its attempt."""
        until("the pilot refuses", lambda: "with code 1 after" in self.said())
        return self.said()

    def said(self) -> str:
        """Return what the pilot has written so far."""
        return str(self.worker.run("cat %s %s", f"{self.directory}/out", f"{self.directory}/err").stdout)

    def _clear(self) -> None:
        self.worker.run("systemctl stop %s; systemctl reset-failed %s; rm -rf %s", self.unit, self.unit, self.directory)

    def __exit__(self, *exception: object) -> None:
        self._clear()


def renewed(factory: Host) -> str:
    """Have a factory's own unit renew the pilots' proxies, fresh as they are; return what it says. It must succeed."""
    unit = "pilotbed-test-renew"
    file = f"/run/systemd/system/{unit}.service"
    try:
        write(factory, file, ok(factory, "sed 's/--least [0-9]*/--least 9999999/' "
                                "/etc/systemd/system/pilotbed-renew.service"), mode="0644")  # fmt: skip
        with explained((factory, logged := f"journalctl --unit {unit} --output cat --no-pager --lines 20")):
            ok(factory, "systemctl daemon-reload && systemctl start %s", unit)
        return ok(factory, logged)
    finally:
        factory.run(f"rm -f {file}; systemctl daemon-reload")


def with_parameters(options: Mapping[str, str], **parameters: str) -> dict[str, str]:
    """Return ``options`` with parameters of the pilot added or replaced."""
    return {**options, **{f"-param_{name}": encode(value) for name, value in parameters.items()}}


@contextmanager
def frontend_stage(change: Callable[[str], str]) -> Iterator[dict[str, str]]:
    """Make a stage area from the frontend's changed configuration; yield what a pilot must be told of it."""
    frontend = GRID.node("frontend")
    config = ok(frontend, "cat /etc/pilotbed/frontend-stage.toml")
    web = re.search(r'^web = "(.*)"$', config, re.MULTILINE)[1]  # type: ignore[index]
    group = re.search(r"^\[groups\.([\w-]+)", config, re.MULTILINE)[1]  # type: ignore[index]
    root = "/var/lib/pilotbed/frontend/stage/test"
    write(frontend, "/run/pilotbed-test.toml", change(config.replace(f'"{web}"', f'"{web}/test"')))
    try:
        ok(frontend, "mkdir -p %s && pilotbed-stage --config /run/pilotbed-test.toml --out %s", root, root)
        manifest = json.loads(ok(frontend, "cat %s", f"{root}/manifest.json"))
        main, part = manifest["main"], manifest["groups"][group]
        yield {
            "-clientweb": f"{web}/test", "-clientsign": main["sign"], "-clientdescript": main["descript"],
            "-clientwebgroup": f"{web}/test/group_{group}", "-clientsigngroup": part["sign"],
            "-clientdescriptgroup": part["descript"],
        }  # fmt: skip
    finally:
        frontend.run("rm -rf %s /run/pilotbed-test.toml", root)


def without_glexec(config: str) -> str:
    """Return a frontend's configuration that has its pilots do without glexec."""
    assert 'GLIDEIN_Glexec_Use = "REQUIRED"' in config
    return config.replace('"REQUIRED"', '"NEVER"')


GRID = Grid()
