"""The matrix: a pilot for each kind of worker and way, a job from each kind of submit host through each of them."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pilotbed.factory.config import TRAVERSALS
from pilotbed_suite import PATIENCE, document, walk
from pilotbed_suite.reach import host
from pilotbed_suite.support import (
    GRID,
    SESSIONS,
    HandPilot,
    Job,
    Jobs,
    Site,
    arguments,
    as_user,
    ok,
    pilot_proxies,
    playbook,
    with_parameters,
)
from testinfra.host import Host

MEGABYTES = 50
WORKERS = ("public", "filtered", "NAT", "sealed")
SUBMITS = ("public", "NAT")
#: How the schedd behind NAT joins in, for each way of the pilots.
SCHEDD = {"direct": "direct", "ccb": "ccb", "ccb_streaming": "ccb", "ccb_tunnel": "ccb", "relay": "relay"}
JOB = f"""#!/bin/sh
set -e
sha256sum < data.in
head -c {MEGABYTES}M /dev/urandom > data.out
sha256sum < data.out
"""
INPUT = "data.in"
#: Cells that are tried at the same time. Each moves 100 MB; sixteen at once, on two processors that two other labs used
#: as well, took more than half a minute each, and one of them lost its first start.
AT_ONCE = 6
#: What a cell can come to.
WORKS = "works"
UNREGISTERED = "the pilot cannot register"
UNNEGOTIATED = "the negotiator cannot reach the schedd"
UNCLAIMED = "the claim does not get through"
UNTRANSFERRED = "the files do not get through"
RESTARTED = "works, but not in one start"
SPOILED = "other bytes come than went"
FAILED = "the job fails"
BROKEN = "the broker ends"
UNSETTLED = "nothing came of it in time"


@dataclass(frozen=True)
class Cell:
    """One field of the matrix."""

    submit: str
    worker: str
    way: str

    def __str__(self) -> str:
        return f"{self.submit} submit, {self.worker} worker, {self.way}"


CELLS = [Cell(submit, worker, way) for submit in SUBMITS for worker in WORKERS for way in TRAVERSALS]


@dataclass
class Outcome:
    """What a cell came to, and what said so."""

    verdict: str
    evidence: str
    ad: dict[str, Any] = field(default_factory=dict)


def worker_of(kind: str) -> tuple[Site, str]:
    """Return the site and the name of a kind of worker."""
    flavour = {"public": "filter", "filtered": "filter", "NAT": "nat", "sealed": "sealed"}[kind]
    for site in GRID.sites:
        for name in site.workers:
            is_open = GRID.variable("node_open_ports", name) is not None
            if site.flavour == flavour and is_open == (kind == "public"):
                return site, name
    raise LookupError(f"the inventory has no {kind} worker")


def submit_of(kind: str) -> str:
    """Return the name of a kind of submit host."""
    hidden = [name for name in GRID.names("submit") if GRID.variable("submit_traversal", name)]
    return hidden[0] if kind == "NAT" else next(name for name in GRID.names("submit") if name not in hidden)


@contextlib.contextmanager
def warm() -> Iterator[None]:
    """Have had a pilot of the factory's at every site, by a job there: its proxy is kept for those started by hand."""
    with contextlib.ExitStack() as stack:
        jobs = Jobs(host(submit_of("public")))
        stack.callback(jobs.close)
        made = [jobs.submit(walk.walker("alice"), site) for site in GRID.sites]
        for site, job in zip(GRID.sites, made, strict=True):
            assert job.done(240)["ExitCode"] == 0
            # That pilot may have retired, and its proxy with it, when the last one is started by hand.
            worker, kept = host(site.workers[0]), f"{SESSIONS}/pilotbed-test"
            stack.callback(worker.run, "rm -rf %s", kept)
            ok(worker, "mkdir -p %s && cp -p %s %s/user.proxy", kept, pilot_proxies(worker)[0], kept)
        yield


class Ways:
    """Pilots by worker and way, and the jobs; a context that leaves nothing behind."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._pilots: dict[tuple[str, str], HandPilot] = {}
        self.jobs = {submit: Jobs(host(submit_of(submit))) for submit in SUBMITS}
        self.alice = walk.walker("alice")
        self._ended = 0  # how often the broker had ended before these jobs

    def __enter__(self) -> Ways:
        for made in self.jobs.values():
            self._stack.callback(made.close)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        return json.loads(ok(GRID.node("factory"), "cat /var/lib/pilotbed/factory/stage/manifest.json"))

    def start(self, worker: str, way: str) -> HandPilot:
        """Start a pilot of that way on that kind of worker, unless it runs already."""
        if (worker, way) not in self._pilots:
            site, node = worker_of(worker)
            self._pilots[worker, way] = self.pilot(f"{worker}-{way}".lower().replace("_", "-"), site, node, way)
        return self._pilots[worker, way]

    def pilot(
        self, tag: str, site: Site, node: str, way: str, options: Mapping[str, str] = {}, **parameters: str
    ) -> HandPilot:
        """Start a pilot of that way on a worker, with options of the start-up and parameters of its own."""
        entry = self._manifest["entries"][f"way_{way}"]
        all_options = {
            **arguments(GRID.site("with pilots", lambda site: site.flavour != "sealed")),
            "-entry": f"way_{way}", "-signentry": entry["sign"], "-descriptentry": entry["descript"],
            "-proxy": f"http://{GRID.fqdn(site.cache)}:3128" if site.cache else "None",
            **options,
        }  # fmt: skip
        pilot = HandPilot(
            host(node), with_parameters(all_options, **parameters), f"/var/tmp/pt-{tag}", f"pilotbed-test-{tag}"
        )
        return self._stack.enter_context(pilot)

    def registered(self) -> set[tuple[str, str]]:
        """Return (worker, way) of every pilot of the matrix that the pool knows."""
        command = "condor_status -json -constraint %s -attributes Name"
        said = GRID.node("central_manager").run(command, 'GLIDEIN_Site == "ways" && PartitionableSlot').stdout
        known = {ad["Name"].split("@")[1] for ad in json.loads(said or "[]")}
        return {place for place, pilot in self._pilots.items() if pilot.name in known}

    def wait(self, wanted: Iterable[tuple[str, str]], deadline: float = 180) -> None:
        """Wait until the pool knows these pilots; fail with what the missing ones said."""
        end, missing = time.monotonic() + deadline * PATIENCE, set(wanted)
        while missing := missing - self.registered():
            if time.monotonic() > end:
                told = [f"{worker}, {way}: {self._pilots[worker, way].said()[-2000:]}" for worker, way in missing]
                raise AssertionError("\n".join([f"not in the pool after {deadline:.0f} s:", *told]))
            time.sleep(0.5)

    def submit(self, cell: Cell) -> Job:
        """Submit a cell's job."""
        jobs = self.jobs[cell.submit]
        as_user(jobs.node, self.alice.account, f"test -s {INPUT} || head -c {MEGABYTES}M /dev/urandom > {INPUT}")
        extra = (
            f'requirements = split(TARGET.Name, "@")[1] == "{self._pilots[cell.worker, cell.way].name}"\n'
            f"transfer_input_files = {INPUT}\ntransfer_output_files = data.out\n"
            'transfer_output_remaps = "data.out = @NAME@.data"'
        )
        site = replace(worker_of(cell.worker)[0], name="ways")
        return jobs.submit(self.alice, site, JOB, extra)

    def outcome(self, cell: Cell, job: Job) -> Outcome | None:
        """Return what became of a cell's job, None while that is open."""
        ad = job.ad()
        if ad.get("JobStatus") == 4:
            return self._done(job, ad)
        starts = ad.get("NumShadowStarts", 0)
        claims = [] if starts else self._failed_claims(job)
        lost = re.search(r"(?m)^022 .*\n\s+(.*)", job.read("log"))
        given_back = starts and ad.get("JobStatus") == 1
        if cell.way == "ccb_tunnel" and (claims or lost or given_back) and (said := broker_ends()[self._ended :]):
            return Outcome(BROKEN, said[0], ad)
        # "Could not initiate file transfer", a minute after each start; once may be a moment's trouble.
        errors = re.findall(r"(?m)^021 .*\n\s+(.*)", job.read("log"))
        if lost or starts > 3 or len(errors) > 1:
            said = lost[1] if lost else errors[-1] if errors else "started and came back, again and again"
            return Outcome(UNTRANSFERRED, said, ad)
        if starts:
            return None
        # A tunnel's first one fails also where the schedd holds to a session of a broker that was started again.
        if len(claims) > (cell.way == "ccb_tunnel"):
            return Outcome(UNCLAIMED, claims[-1], ad)
        if schedd := re.search(r"submitted from host: (<.*>)", job.read("log")):
            log = ok(GRID.node("central_manager"), "tail -n 100 /var/log/condor/NegotiatorLog")
            if found := re.findall(rf"Failed to connect to {job.owner}@\S+ \({re.escape(schedd[1])}\)", log):
                return Outcome(UNNEGOTIATED, found[-1], ad)
        return None

    def _failed_claims(self, job: Job) -> list[str]:
        """Return what the schedd said of every claim for the job that it could not send."""
        log = ok(job.node, "tail -n 500 /var/log/condor/SchedLog")
        asked = set(re.findall(rf"Match record \((\S+) .*for {job.owner}, {job.id}\) deleted", log))
        failed = re.findall("Failed to send REQUEST_CLAIM to startd .*", log)
        return [line for line in failed if line.split()[6] in asked]

    def _done(self, job: Job, ad: dict[str, Any]) -> Outcome:
        sent, made, *_ = [*job.read("out").split("-"), "", ""]
        count = f"sha256sum < {INPUT}; sha256sum < {job.name}.data; rm -f {job.name}.data"
        there = as_user(job.node, job.owner, count)[1]
        if there.split()[::2] != [sent.strip(), made.strip()]:
            return Outcome(SPOILED, f"sent {sent.strip()}, made {made.strip()}, there {there}", ad)
        if ad["ExitCode"]:
            return Outcome(FAILED, f"exit code {ad['ExitCode']}: {job.read('err')}", ad)
        if ad["NumJobStarts"] != 1:
            return Outcome(RESTARTED, f"started {ad['NumJobStarts']} times: {job.read('log')}", ad)
        return Outcome(WORKS, str(ad.get("LastPublicClaimId", "")).partition("#")[0], ad)

    def run(self, cells: Iterable[Cell], deadline: float = 180) -> dict[Cell, Outcome]:
        """Run the cells' jobs, some side by side; return what became of each, at the latest ``deadline`` seconds later.

        A pilot that is not there is not waited for.
        """
        cells, known, self._ended = list(cells), self.registered(), len(broker_ends())
        missing = [cell for cell in cells if (cell.worker, cell.way) not in known]
        found = {cell: Outcome(UNREGISTERED, self._last_words(cell)) for cell in missing}
        waiting = [cell for cell in cells if cell not in found]
        tried: dict[Cell, tuple[Job, float]] = {}
        while waiting or tried:
            while waiting and len(tried) < AT_ONCE:
                cell = waiting.pop(0)
                tried[cell] = self.submit(cell), time.monotonic()
            for cell, (job, since) in list(tried.items()):
                came = self.outcome(cell, job)
                if not came and time.monotonic() - since > deadline * PATIENCE:
                    came = Outcome(UNSETTLED, f"{job.id} is {job.status()} after {deadline:.0f} s: {job.read('log')}")
                if came:
                    found[cell] = came
                    del tried[cell]
                    if job.status() != "completed":
                        job.remove()
            time.sleep(0.5)
        return found

    def _last_words(self, cell: Cell) -> str:
        pilot = self._pilots[cell.worker, cell.way]
        logs = "find /tmp /var/tmp -maxdepth 4 -path '*/log/MasterLog' -user %s -exec cat {} + 2>/dev/null"
        said = str(pilot.worker.run(logs, pilot.account).stdout).splitlines() + pilot.said().strip().splitlines()
        wanted = [line for line in said if re.search("attempt to connect|fail", line, re.IGNORECASE)]
        return (wanted or said)[-1][:200]


def broker_ends() -> list[str]:
    """Return what the site's broker said whenever it gave up."""
    log = GRID.node("ccb_broker").run("grep -h 'ERROR .* at line' /var/log/condor/CollectorLog").stdout
    return str(log).splitlines()


def status(node: Host, program: str = "relay") -> dict[str, Any]:
    """Return what a relay or a border says of itself."""
    return json.loads(ok(node, f"pilotbed-{program} status"))


def dropped(node: str, counter: str) -> int:
    """Return how many packets a site's router has dropped so far."""
    said = ok(host(node), "nft list counter inet site %s", counter)
    return int(said.partition("packets ")[2].split()[0])


def table(found: Mapping[Cell, Outcome]) -> str:
    """Return the matrix as it came out, for docs/traversal.md."""
    rows = [
        [submit, worker, *(found[Cell(submit, worker, way)].verdict for way in TRAVERSALS)]
        for submit in SUBMITS for worker in WORKERS
    ]  # fmt: skip
    return "\n".join(document.table(["submit host", "worker", *(f"`{way}`" for way in TRAVERSALS)], rows))


def join_schedd(way: str) -> None:
    """Have the schedd behind NAT joined in that way: role submit with another value of one variable."""
    playbook("pool", "--limit", submit_of("NAT"), submit_traversal=way)
