"""What pilots cost on a deployed lab, with its own daemons: var/bench-pilots-grid.json, docs/scale.md.

    schedd with 50,000 idle jobs ─▶ frontend's whole turn ◀─ collector with 500 entries
    factory's schedd ◀─ submissions
    worker: a pilot's start in parts, what it holds when it is idle
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from pilotbed_lab import deploy
from pilotbed_suite import CHECKOUT, GridError, document, walk
from pilotbed_suite.support import (
    GRID,
    HandPilot,
    arguments,
    ok,
    until,
    until_none,
    worker_with_a_pilot,
    write,
)
from testinfra.host import Host

from ..run import conditions, heading

PAGE, MARK = CHECKOUT / "docs/scale.md", "bench-pilots-grid"
#: Idle jobs, their classes, and entries, of a whole turn; aim in seconds.
QUEUED, CLASSES, ENTRIES, TURN = 50_000, 2_000, 500, 30.0
#: Pilots that are submitted, and the aim: so many a minute.
SUBMITTED, A_MINUTE = 1_000, 1_000
#: Starts of a pilot; aims: seconds until it is in the pool, MB of an idle one beyond HTCondor's own.
STARTS, START, IDLE = 5, 4.0, 25.0

#: On the factory's node: real ads, as the factory's, of entries that nobody has.
OFFERS = """
import sys; sys.path.insert(0, "/usr/lib/pilotbed")
from pilotbed.pool import Collector
collector = Collector(sys.argv[1])
one = collector.query('GlideinMyType == "glidefactory"')[0]
gone = {"myaddress", "updatesequencenumber", "authenticatedidentity", "authenticationmethod", "lastheardfrom", "mytype"}
kept = {name: value for name, value in one.items() if name.lower() not in gone and not name.startswith("Updates")}
own = one["Name"].partition("@")[2]
ads = [kept | {"MyType": "glidefactory", "Name": f"bench{at}@{own}", "EntryName": f"bench{at}",
               "GLIDEIN_Site": f"bench{at}", "GLIDEIN_In_Downtime": False, "GLIDEIN_CPUS": (1, 8, 16)[at % 3],
               "GLIDEIN_MaxMemMBs": 16000}
       for at in range(int(sys.argv[2]))]
if ads:
    collector.advertise(ads, "UPDATE_AD_GENERIC")
else:
    collector.invalidate("glidefactory", 'regexp("^bench", EntryName)', "INVALIDATE_ADS_GENERIC")
"""
#: On the factory's node, as its user: pilots for a computing element that is not there, 100 at a time as in a turn.
SUBMIT = """
import sys, time; sys.path.insert(0, "/usr/lib/pilotbed")
from pilotbed.pool import Schedd
words = " ".join(f"-param_GLIDEIN_Bench{at} {at}" for at in range(30))
description = f'''universe = grid
grid_resource = condor nowhere.invalid nowhere.invalid:9619
executable = /usr/lib/pilotbed/pilotbed/glidein/glidein_startup.sh
arguments = "{words}"
x509userproxy = {sys.argv[1]}
output = /var/lib/pilotbed/factory/log/bench.$(Cluster).$(Process).out
error = /var/lib/pilotbed/factory/log/bench.$(Cluster).$(Process).err
log = /var/lib/pilotbed/factory/log/bench.log
MY.PilotbedBench = true
'''
schedd, started = Schedd(), time.perf_counter()
for _ in range(int(sys.argv[2]) // 100):
    schedd.submit(description, 100)
print(time.perf_counter() - started)
"""
QUEUE = """universe = vanilla
executable = /bin/true
transfer_executable = false
should_transfer_files = yes
x509userproxy = {proxy}
request_memory = $(memory)
request_cpus = $(cpus)
+DESIRED_Sites = "$(sites)"
queue {each} memory, cpus, sites from bench.items
"""
HERE = "/var/tmp/pilotbed-bench"  # noqa: S108 # on a lab's node


# -- frontend and factory -------------------------------------------------------------------------------------------


def _python(node: Host, text: str, *words: str) -> str:
    """Run a program of ours as the factory, on its node; return what it printed."""
    write(node, "/run/pilotbed-bench.py", text, mode="0644")
    quoted = shlex.join(["env", "CONDOR_CONFIG=/etc/condor-factory/condor_config", "python3", "-I",
                         "/run/pilotbed-bench.py", *words])  # fmt: skip
    return ok(node, "runuser -u factory -- /bin/sh -c %s", quoted)


@contextmanager
def _still(node: Host, unit: str) -> Iterator[None]:
    """A daemon that does nothing meanwhile; what it has advertised stays."""
    ok(node, "systemctl kill --kill-whom main --signal STOP %s", unit)
    try:
        yield
    finally:
        ok(node, "systemctl kill --kill-whom main --signal CONT %s", unit)


def turn() -> dict[str, float]:
    """Return the seconds of a frontend's turns with a queue and entries of production size."""
    submit, factory, frontend = (GRID.node(name) for name in ("submit", "factory", "frontend"))
    alice = walk.walkers()[0]
    collector = f"{GRID.fqdn(GRID.names('factory')[0])}:{GRID.variable('grid_factory_port')}"
    items = [f"{500 + at % 7 * 500}, {(1, 1, 2, 8)[at % 4]}, {' '.join(_some(at))}\n" for at in range(CLASSES)]
    home = ok(submit, "getent passwd %s", alice.account).split(":")[5]
    text = QUEUE.format(proxy=walk.proxy_of(submit, alice.account), each=QUEUED // CLASSES)
    write(submit, f"{home}/bench.sub", text, alice.account)
    state = f"/run/pilotbed/frontend/{GRID.variable('grid_vos')[0]['frontend_group']}/state.json"
    found: dict[str, float] = {}
    with _still(factory, "pilotbed-factory.service"):
        _python(factory, OFFERS, collector, str(ENTRIES))
        begun = time.monotonic()
        try:
            # MAX_JOBS_PER_SUBMISSION is 20,000.
            for at in range(0, CLASSES, CLASSES // 5):
                write(submit, f"{home}/bench.items", "".join(items[at : at + CLASSES // 5]), alice.account)
                walk.as_user(submit, alice.account, "condor_submit -terse bench.sub")
            found["submitting"] = time.monotonic() - begun
            seen = json.loads(ok(frontend, "cat %s", state))["turn"]
            seconds: list[float] = []
            while len(seconds) < 3:
                now = until("a turn is over", partial(_after, frontend, state, seen), 600, every=1)
                seen = now["turn"]
                # A share of a job is rounded up at each entry that it matches.
                if sum(entry["JobsIdle"] for entry in now["entries"].values()) >= QUEUED:
                    seconds.append(now["seconds"])
            found |= {"first": seconds[0], "next": statistics.median(seconds[1:])}
        finally:
            walk.as_user(submit, alice.account, "condor_rm -all; rm -f bench.items bench.sub")
            _python(factory, OFFERS, collector, "0")
    return found


def _some(at: int) -> list[str]:
    return [f"bench{(at * 7 + step * 31) % ENTRIES}" for step in range(1 + at % 8)]


def _after(frontend: Host, state: str, turn: int) -> dict[str, Any]:
    """Return the frontend's state once it is of a later turn."""
    found: dict[str, Any] = json.loads(ok(frontend, "cat %s", state))
    return found if found["turn"] > turn else {}


def submissions() -> float:
    """Return the seconds in which the factory's schedd takes pilots."""
    factory = GRID.node("factory")
    known = ok(factory, "find /var/lib/pilotbed/factory/credentials -type f -name '*.pem'").split()
    if not known:
        raise GridError("the factory holds no pilot's proxy: make walk has a frontend send one")
    proxy = known[0]
    try:
        return float(_python(factory, SUBMIT, proxy, str(SUBMITTED)))
    finally:
        for how in ("", "-forcex"):
            factory.run(f"pilotbed-factory-pool condor_rm {how} -constraint PilotbedBench")
        factory.run("rm -f /var/lib/pilotbed/factory/log/bench.*")


# -- one pilot ------------------------------------------------------------------------------------------------------


def start(worker: Host, options: dict[str, str]) -> dict[str, float]:
    """Return the seconds of a pilot's start, by part, and the MB that it holds then beyond HTCondor's own."""
    stamped = f"{HERE}-stamped"
    look = f"tail ---disable-inotify --sleep-interval 0.02 -n +1 -F {HERE}/out 2>/dev/null"
    follow = f"{look} | while IFS= read -r line; do echo \"$EPOCHREALTIME $line\"; done"
    worker.run("systemctl stop pilotbed-bench-stamps; rm -f %s", stamped)
    ok(worker, "systemd-run --quiet --unit pilotbed-bench-stamps --property StandardOutput=file:%s /bin/bash -c %s",
       stamped, follow)  # fmt: skip
    with HandPilot(worker, options, HERE, "pilotbed-bench") as pilot:
        until("it is in the pool", pilot.slots, every=0.1)
        registered = time.time()
        lines = [(float(line.split()[0]), line.split(" ", 1)[1])
                 for line in ok(worker, "cat %s", stamped).splitlines() if " " in line]  # fmt: skip
        own = _beyond_condor(worker, pilot.account)
    worker.run("systemctl stop pilotbed-bench-stamps; rm -f %s", stamped)
    first = lines[0][0]
    registered -= first
    marks = [(at - first, found[1]) for at, line in lines if (found := re.search(r" running (\S+) ", line))]
    ends = [at for at, _ in marks[1:]] + [registered]
    parts = {name: end - at for (at, name), end in zip(marks, ends, strict=True)}
    return {"fetching the lists": marks[0][0], **parts, "all": registered, "MB": own}


def _beyond_condor(worker: Host, account: str) -> float:
    said = ok(worker, "for pid in $(pgrep -u %s); do echo $(cat /proc/$pid/comm) "
              "$(sed -n 's/^Pss: *\\([0-9]*\\).*/\\1/p' /proc/$pid/smaps_rollup); done", account)  # fmt: skip
    rows = [line.split() for line in said.splitlines()]
    return sum(int(row[-1]) for row in rows if len(row) > 1 and not row[0].startswith("condor_")) / 1024


# -- all ------------------------------------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """Return what a run finds on the lab that runs."""
    site = GRID.site("behind a relay", lambda site: site.traversal == "relay")
    submit, alice = GRID.node("submit"), walk.walkers()[0]
    walk.as_user(submit, alice.account, f"voms-proxy-init --quiet --voms {alice.voms}")
    worker, options = worker_with_a_pilot(site), arguments(site)
    found: dict[str, Any] = {"starts": [start(worker, options) for _ in range(STARTS)]}
    print(found["starts"][-1], flush=True)
    found["submissions"] = submissions()
    print(f"{SUBMITTED} pilots submitted in {found['submissions']:.1f} s", flush=True)
    found["turn"] = turn()
    until_none("the queue is empty", lambda: submit.run("condor_q -allusers -af ClusterId").stdout, 600)
    return found


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    starts = found["starts"]
    parts = [name for name in starts[0] if name not in ("all", "MB")]
    middle = {name: statistics.median(one.get(name, 0.0) for one in starts) for name in (*parts, "all", "MB")}
    turn = found["turn"]
    a_minute = 60 * SUBMITTED / found["submissions"]
    lines = [
        f"Medians of {STARTS} starts.", "",
        *document.table(["a pilot's start", "s"], [[name, f"{middle[name]:.2f}"] for name in parts]), "",
        *document.aims([
            (f"a frontend's whole turn, {QUEUED:,} jobs in {CLASSES:,} classes, {ENTRIES} entries: below {TURN:.0f} s",
             f"{turn['first']:.1f} s, the next {turn['next']:.1f} s", turn["first"] < TURN),
            (f"submissions a minute: at least {A_MINUTE:,}", f"{a_minute:,.0f}", a_minute >= A_MINUTE),
            (f"a pilot in the pool: below {START:.0f} s", f"{middle['all']:.1f} s", middle["all"] < START),
            (f"an idle pilot beyond HTCondor's own: below {IDLE:.0f} MB", f"{middle['MB']:.1f} MB",
             middle["MB"] < IDLE),
        ]),
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Measure on the lab, deployed if it is not; write var/bench-pilots-grid.json and the page's tables."""
    document.publish(PAGE.read_text(), MARK, "")
    found = conditions()
    deploy.up()
    walk.walk()
    found |= measure() | {"load_at_the_end": os.getloadavg()[0]}
    (CHECKOUT / "var/bench-pilots-grid.json").write_text(json.dumps(found, indent=1) + "\n")
    text = f"{heading('make bench-pilots', found)} {tables(found)}"
    document.write(PAGE, MARK, text)
    print(text)
    return 0
