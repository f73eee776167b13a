"""Half an hour of short jobs of three users, and a fault each minute: every job once, flat memory, clean workers.

    MINUTES=30 JOBS=5000 make soak

Faults, in turn: a pilot is killed, the relay, a computing element, and a site's network is cut for half a minute. The
grid is the lab's, as its users find it; the figures are printed, and nothing is tuned for it. Faster than its workers'
slots take them the jobs do not end: after the minutes of faults the rest is waited for.
"""

import os
import re
import statistics
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from pilotbed_suite import walk
from pilotbed_suite.bulk import Bulk
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, ok, processes, until_none

pytestmark = pytest.mark.timeout(6 * 3600)

MINUTES, JOBS = (int(os.environ.get(name, default)) for name, default in (("MINUTES", "30"), ("JOBS", "5000")))
USERS = ("alice", "bob", "carol")
#: Seconds that no job sleeps.
LONGEST = 3
#: How long each cut of a site's network lasts, in seconds.
CUT = 30
#: What a service may grow by from the second third of the faults to the last one: by this share, and so many KiB.
GROWTH, SLACK = 1.2, 20000
#: Jobs a second that the slowest machine does; what is left after the faults is waited for as long as that takes.
SLOWEST = 0.5


@dataclass
class Soak:
    """What was done, and what was seen meanwhile."""

    bulks: list[Bulk] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    #: KiB by node and unit, a figure for each minute.
    memory: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    seconds: float = 0


# -- faults ---------------------------------------------------------------------------------------------------------


def a_pilot_is_killed(at):
    """Its start-up script, or its master, as a node short of memory does."""
    what = ("glidein_startup.sh", "condor_master -f")[at % 2]
    for name in sorted(GRID.names("worker")):
        if found := [one for one in processes(host(name)) if what in one.args]:
            ok(host(name), f"kill -KILL {found[-1].pid}")
            return


def the_relay_is_killed(at):
    ok(host(GRID.names("relay")[at % len(GRID.names("relay"))]), "systemctl kill --signal KILL pilotbed-relay")


def a_computing_element_is_restarted(at):
    ce = GRID.names("computing_element")[at % len(GRID.names("computing_element"))]
    units = GRID.variable(f"{GRID.variable('computing_element_flavour', ce)}_logs", ce)["units"]
    ok(host(ce), f"systemctl restart {' '.join(units)}")


def a_sites_network_is_cut(at):
    router = host(GRID.names("site_router")[at % len(GRID.names("site_router"))])
    table = "inet pilotbed_soak"
    chain = f"add chain {table} cut {{ type filter hook forward priority -500; policy drop; }}"
    ok(router, "nft %s", f"add table {table}; {chain}")
    try:
        time.sleep(CUT)
    finally:
        ok(router, f"nft delete table {table}")


FAULTS = (a_pilot_is_killed, the_relay_is_killed, a_computing_element_is_restarted, a_sites_network_is_cut)


# -- what is seen ---------------------------------------------------------------------------------------------------


def memory_of(name):
    """KiB of each service's processes on a node; pilots and payloads are no services."""
    said = ok(host(name), "ps -e -o rss=,unit:80= --no-headers")
    found = Counter()
    for rss, unit in (line.split()[:2] for line in said.splitlines() if len(line.split()) > 1):
        if unit.endswith(".service") and not unit.startswith(("slurmd", "systemd", "gridengine-exec", "user@")):
            found[f"{name} {unit}"] += int(rss)
    return found


def everything_is_seen(soak):
    names = sorted({name for group in ("central_manager", "submit", "factory", "frontend", "relay", "computing_element")
                    for name in GRID.names(group)})  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(memory_of, names):
            for unit, size in found.items():
                soak.memory[unit].append(size)


@contextmanager
def submitted(submit, soak):
    """The jobs, a third of them each user's; what is left of them goes at the end."""
    try:
        for at, name in enumerate(USERS):
            count = JOBS // len(USERS) + (at < JOBS % len(USERS))
            soak.bulks.append(Bulk(submit, walk.walker(name), count, LONGEST, "soak"))
        yield
    finally:
        for bulk in soak.bulks:
            bulk.clear()


@pytest.fixture(scope="module")
def submit():
    return GRID.node("submit")


@pytest.fixture(scope="module")
def soak(submit):
    """All of it, once: submitted, broken for so many minutes, and done."""
    made, begun = Soak(), time.monotonic()
    with submitted(submit, made):
        for minute in range(MINUTES):
            fault = FAULTS[minute % len(FAULTS)]
            fault(minute // len(FAULTS))
            made.faults[fault.__name__] += 1
            everything_is_seen(made)
            print(f"{minute + 1:3} min  {left(made):5} jobs left  {fault.__name__}", flush=True)
            time.sleep(max(begun + 60 * (minute + 1) - time.monotonic(), 0))
        until_none("every job has ended", lambda: left(made), JOBS / SLOWEST, every=10)
        made.seconds = time.monotonic() - begun
        rate = JOBS / made.seconds
        print(f"{JOBS} jobs in {made.seconds:.0f} s, {rate:.2f} a second; {dict(made.faults)}", flush=True)
        yield made


def left(soak):
    return sum(bulk.left() for bulk in soak.bulks)


# -- what has to hold -----------------------------------------------------------------------------------------------


def test_every_job_ended_once_and_well(soak):
    assert [problem for bulk in soak.bulks for problem in bulk.problems()] == []


def test_every_fault_was_there(soak):
    assert set(soak.faults) == {fault.__name__ for fault in FAULTS[: max(MINUTES, 1)]}


def test_no_service_grows(soak):
    """From the second third of the minutes to the last: what a service needs for all that it knows, it has by then."""
    third = max(MINUTES // 3, 1)
    grown = {}
    for unit, sizes in soak.memory.items():
        if len(sizes) >= 3 * third and third >= 3:
            before, after = statistics.median(sizes[third : 2 * third]), statistics.median(sizes[2 * third :])
            if after > GROWTH * before + SLACK:
                grown[unit] = (before, after)
    assert grown == {}, "KiB before and after"
    assert soak.memory


def test_nothing_is_left_on_the_workers(soak):
    """No payload, no control group of one; of pilots that were killed only what no later one has found."""
    payload = re.compile(r"(?!pilot)[a-z]+[0-9]{3}")

    def rest():
        found = {}
        for name in GRID.names("worker"):
            running = processes(host(name))
            groups = ok(host(name), "find /sys/fs/cgroup -name 'glexec-*' -type d").split()
            directories = ok(host(name), "find /tmp /var/tmp -maxdepth 1 -name 'glide_*'").split()
            which = f"for d in {' '.join(directories)}; do flock --nonblock $d/.alive true && echo $d; done; true"
            free = ok(host(name), which).split()
            found[name] = [one.args for one in running if payload.fullmatch(one.user)] + groups + free[1:]
        return {name: left for name, left in found.items() if left}

    until_none("the workers are clean", rest, every=5)
