"""Faults while jobs run through the relay: each job ends exactly once, with the right bytes, in a bounded time.

A job waits on its worker until something breaks; it goes on meanwhile, and has 50 MB to bring home. Faults that cannot
disturb each other run at the same time, each through a pilot of its own. The bounds, and how often a job starts, are
those of docs/traversal.md.
"""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import permutations
from typing import Any

import pytest
from matrix import MEGABYTES, dropped, status
from pilotbed_suite import walk
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, HOLD, HandPilot, Job, Jobs, Site, as_user, ok, processes, until
from testinfra.host import Host

SCRIPT = f"""#!/bin/sh
{HOLD}
head -c {MEGABYTES}M /dev/urandom > data.out
sha256sum < data.out
"""
#: A pilot on each.
WORKERS = ("alpha-wn1", "alpha-wn2", "beta-wn1", "beta-wn2")
#: Forget every connection: a delete request of ctnetlink without a tuple (linux/netfilter/nfnetlink_conntrack.h).
FORGET = """
import socket, struct
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
netlink.send(struct.pack("=IHHIIBBH", 20, 1 << 8 | 2, 1 | 4, 1, 0, socket.AF_INET, 0, 0))
code = struct.unpack_from("=i", netlink.recv(4096), 16)[0]
assert code == 0, code
"""
#: Hold more connections to the relay's own port than it has descriptors, however often it gives one up.
CROWD = """
import socket, sys, time
held = []
while True:
    try:
        held.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), 1))
    except OSError:
        pass
    held = held[-100:]
    time.sleep(0.05)
"""
#: Listen at every port of a range that is free, and say so.
OCCUPY = """
import socket, sys, time
held = []
for port in range(int(sys.argv[1]), int(sys.argv[2]) + 1):
    each = socket.socket()
    try:
        each.bind(("0.0.0.0", port))
        each.listen()
    except OSError:
        continue
    held.append(each)
print(len(held), flush=True)
time.sleep(900)
"""


@dataclass
class Ended:
    """A job's end.

    Its ad, its log with the relay's, whether the bytes at home are those that the payload made, and how long it took.
    """

    ad: dict[str, Any]
    log: str
    intact: bool
    seconds: float

    def events(self, number: str) -> int:
        """Return how many events of a kind the job's log has."""
        return len(re.findall(rf"(?m)^{number} \(", self.log))


@dataclass(frozen=True)
class Pilot:
    """A pilot and where it is: its site, worker and relay."""

    made: HandPilot
    site: Site
    node: str
    relay: str

    @property
    def worker(self) -> Host:
        """The worker."""
        return host(self.node)

    def lease(self) -> dict[str, Any]:
        """Return its lease, as its relay sees it."""
        return next(lease for lease in status(host(self.relay))["leases"] if lease["pilot"] == self.made.name)

    def kill_agent(self) -> None:
        """End its relay agent as a node short of memory does."""
        agent = "^/usr/bin/python3.*relay_agent"
        said = ok(self.worker, "pkill --echo --signal KILL --euid %s --full %s", self.made.account, agent)
        assert said.count("\n") == 1, said

    def request_port(self) -> str:
        """Return what an agent that wants one more port of its relay is told, with its proxy."""
        command = (
            "runuser --user %s -- env PYTHONPATH=/usr/lib/pilotbed timeout 8 python3 -m pilotbed.relay.agent "
            "--server %s --proxy %s --cadir /etc/grid-security/certificates --state %s"
        )
        paths = f"{self.made.directory}/proxy.pem", f"{self.made.directory}/request_port.json"
        return str(
            self.worker.run(command, self.made.account, f"{GRID.fqdn(self.relay)}:{control_port()}", *paths).stderr
        )


class Run:
    """A job that waits on a worker for its fault; it starts again there, or on the spare pilot. A context.

    It takes the proxy that is there: a fresh one would be delegated to all jobs, which is another matter.
    """

    def __init__(self, jobs: Jobs, pilot: Pilot, *spare: Pilot, extra: str = "") -> None:
        self.pilot, self.since = pilot, time.monotonic()
        # The pool remembers a lost pilot for a while: who starts again is not to be sent there in vain.
        first, other = (f'split(TARGET.Name, "@")[1] == "{each.made.name}"' for each in (pilot, *spare, pilot)[:2])
        described = (
            f"requirements = (MY.NumJobStarts ?: 0) == 0 ? {first} : {other}\n"
            f'transfer_output_files = data.out\ntransfer_output_remaps = "data.out = @NAME@.data"\n{extra}'
        )
        site = replace(pilot.site, name="ways")
        self.job: Job = jobs.submit(walk.walker("alice"), site, SCRIPT, described, proxy="true")

    def __enter__(self) -> "Run":
        try:
            with self.job.explained():
                until(f"{self.job.id} waits on {self.pilot.node}", partial(self.waits, self.pilot))
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error:
            error.add_note(self.log())
            self.job.remove()

    def log(self) -> str:
        """Return the job's log, and what its pilot's relay said of that pilot meanwhile."""
        since = f"-{time.monotonic() - self.since:.0f}s"
        said = "journalctl --unit pilotbed-relay --output short-iso --since %s --grep %s | cut -c1-300 | tail -n 60"
        told = host(self.pilot.relay).run(said, since, f"adopted|paused|started|exited|{self.pilot.made.name}").stdout
        return f"{self.job.read('log')}\n{self.pilot.node}, {self.pilot.relay}:\n{told}"

    def waits(self, pilot: Pilot) -> list[int]:
        """Return the payload's process on a pilot's worker, if it waits there."""
        return [process.pid for process in processes(pilot.worker) if process.args == self.job.hold]

    def go_on(self, *pilots: Pilot) -> None:
        """End the payload's waiting."""
        for pilot in pilots or (self.pilot,):
            for pid in self.waits(pilot):
                pilot.worker.run("kill %s", str(pid))

    def ends(self, deadline: float, *pilots: Pilot) -> Ended:
        """Wait for the job's end; where it starts again, on its own pilot or these, it is not kept waiting."""
        since = time.monotonic()

        def over() -> dict[str, Any]:
            self.go_on(*pilots)
            ad = self.job.ad()
            return ad if ad.get("JobStatus") in (3, 4, 5) else {}

        ad = until(f"{self.job.id} has ended", over, deadline)
        took = time.monotonic() - since
        told = as_user(self.job.node, self.job.owner, f"sha256sum < {self.job.name}.data; rm -f {self.job.name}.data")
        return Ended(ad, self.log(), told[1].strip() == self.job.read("out").strip(), took)


def control_port() -> int:
    """Return where the relays listen for agents."""
    return int(GRID.variable("grid_relay_port"))


# -- faults: each takes what it breaks from the bed, and returns how its job ended ----------------------------------


def main_pid(relay):
    return ok(relay, "systemctl show --property MainPID --value pilotbed-relay").strip()


@contextmanager
def cut(worker):
    """No packet gets to or from a worker."""
    table = "inet pilotbed_cut"
    ok(
        worker, "nft %s",
        f"add table {table}; add chain {table} in {{ type filter hook input priority -500; }}; "
        f"add chain {table} out {{ type filter hook output priority -500; }}; "
        f'add rule {table} in iifname != "lo" drop; add rule {table} out oifname != "lo" drop',
    )  # fmt: skip
    try:
        yield
    finally:
        # slurmctld asks a node that it holds for down every six minutes only; a slurmd that starts tells it.
        ok(worker, f"nft delete table {table}; systemctl restart slurmd")


def relay_is_killed(bed):
    """Streams that have lasted do not notice: systemd keeps them for the next process."""
    pilot = bed.pilots["beta-wn1"]
    relay, before = host(pilot.relay), pilot.lease()
    with bed.run(pilot) as run:
        until("systemd keeps the job's connection", lambda: pilot.lease()["streams_kept"])
        pid = main_pid(relay)
        ok(relay, f"kill -9 {pid}")
        run.go_on()
        until("the relay runs again", lambda: main_pid(relay) not in ("0", pid))
        ended = run.ends(90)
    assert (pilot.lease()["lease"], pilot.lease()["port"]) == (before["lease"], before["port"])
    return ended


def relay_is_away(bed):
    """The other relay: what runs through it is not disturbed."""
    pilot = bed.chosen[1]
    relay = host(pilot.relay)
    with bed.run(pilot) as run:
        ok(relay, "systemctl stop pilotbed-relay")
        try:
            run.go_on()
            time.sleep(60)
            assert run.job.status() == "running", "it cannot have ended: nothing carries its output"
        finally:
            ok(relay, "systemctl start pilotbed-relay")
        return run.ends(180)


def agent_is_killed(bed):
    pilot = bed.pilots["beta-wn1"]
    before = pilot.lease()
    with bed.run(pilot) as run:
        pilot.kill_agent()
        run.go_on()
        ended = run.ends(90)
    after = pilot.lease()
    assert (after["lease"], after["port"]) == (before["lease"], before["port"])
    assert after["agent"] != before["agent"]
    return ended


def worker_is_cut_off(bed):
    pilot = bed.pilots["alpha-wn1"]
    with bed.run(pilot) as run:
        with cut(pilot.worker):
            run.go_on()
            time.sleep(60)
            assert run.job.status() == "running", "it cannot have ended: nothing carries its output"
        return run.ends(150)


def worker_is_cut_off_for_good(bed):
    """Longer than the job's lease: it starts again elsewhere, and what is left on the lost worker is ended there."""
    pilot = bed.pilots["alpha-wn2"]
    spare = bed.pilots["beta-wn2"]
    with bed.run(pilot, spare, extra="job_lease_duration = 60\n") as run, cut(pilot.worker):
        ended = run.ends(300, spare)
        until("the first payload is ended on the worker that is cut off", lambda: not run.waits(pilot), 180)
    return ended


def nat_forgets(bed):
    """Silent half-open connections: neither side hears anything of the other again."""
    pilot = bed.chosen[0]
    router = host(pilot.site.router)
    before = dropped(pilot.site.router, "invalid_dropped")
    with bed.run(pilot) as run:
        ok(router, "sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0 && python3 -c %s", FORGET)
        try:
            run.go_on()
            ended = run.ends(300)
        finally:
            ok(router, "sysctl -qw net.netfilter.nf_conntrack_tcp_loose=1")
    assert dropped(pilot.site.router, "invalid_dropped") > before
    return ended


def relay_has_no_ports_left(bed):
    pilot = bed.pilots["beta-wn1"]
    relay, unit = host(pilot.relay), "pilotbed-test-occupy"
    ports = status(relay)["ports"]
    with bed.run(pilot) as run:
        command = "systemd-run --quiet --unit %s python3 -c %s %s %s"
        ok(relay, command, unit, OCCUPY, str(ports["first"]), str(ports["last"]))
        try:
            # Its own word: systemd's, that it has started, is in the journal before it.
            taken = "journalctl --output cat --unit %s | grep -x '[0-9]*'"
            until("every port is taken", lambda: relay.run(taken, unit).rc == 0)
            assert "code=range_exhausted" in pilot.request_port()
            run.go_on()
            return run.ends(60)
        finally:
            ok(relay, "systemctl stop %s", unit)


def relay_has_no_descriptors_left(bed):
    pilot = bed.pilots["beta-wn1"]
    relay, unit = host(pilot.relay), "pilotbed-test-crowd"
    with bed.run(pilot) as run:
        pid = main_pid(relay)
        # As its own user: a node's root has no right to change another user's limits.
        prlimit = f"runuser --user $(stat --format %U /proc/{pid}) -- prlimit --pid {pid} --nofile"
        limit = ok(relay, f"{prlimit} --output SOFT --noheadings").strip()
        used = int(ok(relay, f"ls /proc/{pid}/fd | wc -l"))
        ok(relay, f"{prlimit}={used + 16}:")
        try:
            ok(relay, f"systemd-run --quiet --unit %s python3 -c %s {control_port()}", unit, CROWD)
            said = "journalctl --unit pilotbed-relay --since -60s --grep accept_paused"
            until("the relay has run out of descriptors", lambda: relay.run(said).rc == 0)
            run.go_on()
            time.sleep(15)
        finally:
            ok(relay, f"systemctl stop {unit}; {prlimit}={limit}:")
        ended = run.ends(60)
    assert main_pid(relay) == pid
    assert "event=registered" in pilot.request_port()
    return ended


def relay_has_no_disk_left(bed):
    pilot = bed.pilots["beta-wn1"]
    relay, state, kept = host(pilot.relay), "/var/lib/pilotbed-relay", "/run/pilotbed-test-state"
    with bed.run(pilot) as run:
        ok(
            relay,
            f"cp -a {state} {kept} && mount -t tmpfs -o size=64k,mode=0700,uid=$(id -u relay) tmpfs {state} && "
            f"cp -a {kept}/. {state} && {{ cat /dev/zero > {state}/filler 2>/dev/null || true; }}",
        )
        try:
            assert "code=storage" in pilot.request_port()
            run.go_on()
            time.sleep(15)
        finally:
            ok(relay, f"umount {state} && rm -rf {kept}")
        ended = run.ends(60)
    assert "event=registered" in pilot.request_port()
    return ended


#: In two waves; the faults of a chain follow each other.
WAVES = (
    ((relay_is_away,), (nat_forgets,)),
    (
        (
            agent_is_killed,
            relay_is_killed,
            relay_has_no_ports_left,
            relay_has_no_descriptors_left,
            relay_has_no_disk_left,
        ),
        (worker_is_cut_off,),
        (worker_is_cut_off_for_good,),
    ),
)


class Bed:
    """The pilots of these tests by worker, and jobs on them."""

    def __init__(self, pilots: dict[str, Pilot], jobs: Jobs) -> None:
        self.pilots, self.jobs = pilots, jobs

    def run(self, pilot: Pilot, *spare: Pilot, extra: str = "") -> Run:
        """Submit a job for a pilot."""
        return Run(self.jobs, pilot, *spare, extra=extra)

    @cached_property
    def chosen(self) -> tuple[Pilot, Pilot]:
        """A pilot behind NAT, and one of another site that took another relay."""
        return next(
            (hidden, other)
            for hidden, other in permutations(self.pilots.values(), 2)
            if hidden.site.flavour == "nat" and other.site != hidden.site and other.relay != hidden.relay
        )


@pytest.fixture(scope="module")
def bed(ways):
    """One after the other, so that each sees the load that the one before it made."""
    pilots = {}
    for node in WORKERS:
        site = next(site for site in GRID.sites if node in site.workers)
        made = ways.pilot(f"faults-{node}", site, node, "relay")
        slot = until(f"the pool knows the pilot on {node}", made.slots)[0]
        relay = next(each for each in GRID.names("relay") if slot["GLIDEIN_Relay_Address"].startswith(GRID.fqdn(each)))
        pilots[node] = Pilot(made, site, node, relay)
    assert {pilot.relay for pilot in pilots.values()} == set(GRID.names("relay")), "the pilots share the relays out"
    return Bed(pilots, ways.jobs["public"])


@pytest.fixture(scope="module")
def ended(bed, request):
    """What became of the job of each chosen fault: its end, or the error that the fault's own checks raised."""
    found = {}
    chosen = {item.callspec.params["fault"] for item in request.session.items if "fault" in item.fixturenames}

    def chain(faults):
        for fault in filter(chosen.__contains__, faults):
            try:
                found[fault.__name__] = fault(bed)
            except BaseException as error:
                found[fault.__name__] = error

    for wave in WAVES:
        with ThreadPoolExecutor() as pool:
            list(pool.map(chain, wave))
    return found


#: How often a job starts: where the shadow's connection breaks, HTCondor 25.14.1 reconnects, but then refuses what the
#: pilot brings ("transkey is invalid!", a debug message), and the pilot gives the job back.
AGAIN = (relay_is_away, agent_is_killed, worker_is_cut_off_for_good, nat_forgets)


@pytest.mark.parametrize("fault", [fault for wave in WAVES for chain in wave for fault in chain])
def test_job_ends_once_with_the_right_bytes(ended, fault):
    end = ended[fault.__name__]
    if isinstance(end, BaseException):
        raise end
    print(f"{fault.__name__}: {end.seconds:.0f} s after the fault; {end.log}")
    starts = 2 if fault in AGAIN else 1
    assert (end.ad["JobStatus"], end.ad["ExitCode"]) == (4, 0), end.log
    assert end.intact
    assert end.ad["NumJobStarts"] == starts, end.log
    assert (end.events("001"), end.events("005")) == (starts, 1), end.log
