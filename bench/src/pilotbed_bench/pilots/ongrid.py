"""What pilots cost on a deployed lab, with its own daemons: var/bench-pilots-grid.json, docs/scale.md.

    schedd with 50,000 idle jobs ─▶ frontend's whole turn ◀─ collector with 500 entries
    factory's schedd ◀─ submissions
    worker: a pilot's start in parts, what it holds when it is idle
    worker: 200 pilots' files ─▶ the site's Squid ─▶ stage areas
    1,000 jobs of a second ─▶ a pilot of 8 slots behind the relay, with glexec │ HTCondor's own 8 slots in the same pool
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

from pilotbed_lab import cgroups, deploy
from pilotbed_suite import CHECKOUT, GridError, document, reach, walk
from pilotbed_suite.support import (
    GRID,
    HandPilot,
    Site,
    arguments,
    explained,
    ok,
    until,
    until_none,
    with_parameters,
    worker_with_a_pilot,
    write,
)
from testinfra.host import Host

from ..grid.claims import OURS, rate
from ..run import conditions, heading

PAGE, MARK = CHECKOUT / "docs/scale.md", "bench-pilots-grid"
#: Idle jobs, their classes, and entries, of a whole turn; aim in seconds.
QUEUED, CLASSES, ENTRIES, TURN = 50_000, 2_000, 500, 30.0
#: Pilots that are submitted, and the aim: so many a minute.
SUBMITTED, A_MINUTE = 1_000, 1_000
#: Starts of a pilot; aims: seconds until it is in the pool, MB of an idle one beyond HTCondor's own.
STARTS, START, IDLE = 5, 4.0, 25.0
#: Pilots that fetch their files at once through an empty cache; aim in seconds.
FETCHING, FETCHED = 200, 60.0
#: Jobs of a second each, the slots for them, and the aim: of what HTCondor's own slots end in a second.
SHORT, SLOTS, KEPT = 1_000, 8, 0.8

#: HTCondor's own slots, on the central manager's node. Claims end as a pilot's do: that is for the pool's fair share.
PLAIN = f"""DAEMON_LIST = $(DAEMON_LIST), STARTD
ALLOW_ADVERTISE_STARTD = $(ALLOW_ADVERTISE_STARTD), $(HERE)
STARTD_NAME = bench
NUM_CPUS = {SLOTS}
MEMORY = {SLOTS * 256}
SLOT_TYPE_1 = 100%
SLOT_TYPE_1_PARTITIONABLE = true
NUM_SLOTS_TYPE_1 = 1
CLAIM_WORKLIFE = {OURS}
START = true
STARTER_ALLOW_RUNAS_OWNER = false
SEC_ENABLE_MATCH_PASSWORD_AUTHENTICATION = true
"""

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


# -- many pilots' files ---------------------------------------------------------------------------------------------

#: Empties a Squid, and starts it.
EMPTY = "systemctl stop squid && find /var/spool/squid -mindepth 1 -delete && systemctl start squid"


def _served() -> int:
    """Return the bytes of stage files that factories and frontends have sent so far."""
    counted = "awk '$7 ~ /stage/ {sum += $10} END {print sum + 0}' /var/log/nginx/access.log"
    nodes = {*GRID.names("factory"), *GRID.names("frontend")}
    return sum(int(ok(reach.host(name), counted)) for name in nodes)


def fetching(site: Site, worker: Host, options: dict[str, str]) -> dict[str, float]:
    """Return what it takes until many pilots of a site have what one fetches, all at once and from an empty cache.

    Args:
        site: has a Squid.
        worker: where they fetch.
        options: arguments of its pilots; one is started, to see what it fetches.
    """
    cache, log = reach.host(site.cache), "/var/log/squid/access.log"
    lines = int(ok(cache, "wc -l < %s", log))
    address = next(iter(GRID.addresses(ok(worker, "hostname --short").strip()).values()))
    with HandPilot(worker, options, HERE, "pilotbed-bench") as pilot:
        until("it is in the pool", pilot.slots)
        said = ok(cache, f"tail -n +{lines + 1} %s | awk '$3 == \"{address}\" && $6 == \"GET\" {{print $7}}'", log)
    urls = list(dict.fromkeys(said.split()))
    proxy = f'proxy = "http://{site.cache}:3128"\n'
    write(worker, f"{HERE}-urls", proxy + "".join(f'url = "{url}"\noutput = "/dev/null"\n' for url in urls))
    one = f"curl --silent --show-error --fail --write-out '%{{size_download}}\\n' --config {HERE}-urls"
    all_of_them = f"for n in $(seq {FETCHING}); do {one} & done; for job in $(jobs -p); do wait $job || exit 1; done"
    try:
        ok(cache, EMPTY)
        before, begun = _served(), time.monotonic()
        sizes = [int(word) for word in ok(worker, all_of_them).split()]
        seconds = time.monotonic() - begun
    finally:
        worker.run(f"rm -f {HERE}-urls")
    return {"files": len(urls), "seconds": seconds, "MB": sum(sizes) / FETCHING / 1e6,
            "times": (_served() - before) * FETCHING / sum(sizes)}  # fmt: skip


# -- throughput -----------------------------------------------------------------------------------------------------


@contextmanager
def _plain() -> Iterator[str]:
    """Slots of HTCondor's own in the pool, and what they are called."""
    central, file = GRID.node("central_manager"), "/etc/condor/config.d/99-bench.conf"
    slots = "condor_status -constraint 'split(Name, \"@\")[1] == \"bench\"' -af Name"
    write(central, file, PLAIN, mode="0644")
    try:
        ok(central, "systemctl restart condor")
        with explained((central, "tail -n 30 /var/log/condor/StartLog")):
            until("the plain slots are in the pool", lambda: central.run(slots).stdout)
        yield "bench"
    finally:
        ok(central, "rm -f %s && systemctl restart condor", file)


def _spent() -> dict[str, float]:
    """Return the CPU-seconds that each node has used so far."""
    lab = deploy.lab()
    return {name: cgroups.cpu_seconds(f"{lab.key}/{name}") for name in lab.running()}


def throughput(site: Site, worker: Host, options: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return for "plain" and "pilot" the jobs a second that are ended, and each node's CPU-seconds for one.

    Args:
        site: behind a relay.
        worker: one of its; the pilot is started there.
        options: arguments of its pilots.
    """
    frontend, group = GRID.node("frontend"), GRID.variable("grid_vos")[0]["frontend_group"]
    wide = with_parameters(options, GLIDEIN_CPUS=str(SLOTS))
    found: dict[str, dict[str, float]] = {}
    # It would ask for pilots, which would start beside what is measured.
    with (
        _still(frontend, f"pilotbed-frontend@{group}.service"),
        _plain() as plain,
        HandPilot(worker, wide, HERE, "pilotbed-bench") as pilot,
    ):
        until("it is in the pool", pilot.slots)
        for name, slots in (("plain", plain), ("pilot", pilot.name)):
            before = _spent()
            found[name] = {"rate": rate(slots, site, SHORT, 1)}
            found[name] |= {node: (spent - before[node]) / SHORT for node, spent in _spent().items()}
    return found


# -- all ------------------------------------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """Return what a run finds on the lab that runs."""
    site = GRID.site("behind a relay", lambda site: site.traversal == "relay")
    submit, alice = GRID.node("submit"), walk.walkers()[0]
    walk.as_user(submit, alice.account, f"voms-proxy-init --quiet --voms {alice.voms}")
    worker, options = worker_with_a_pilot(site), arguments(site)
    found: dict[str, Any] = {"starts": [start(worker, options) for _ in range(STARTS)]}
    print(found["starts"][-1], flush=True)
    found["fetching"] = fetching(site, worker, options)
    print(found["fetching"], flush=True)
    found["throughput"] = throughput(site, worker, options)
    print(found["throughput"], flush=True)
    found["submissions"] = submissions()
    print(f"{SUBMITTED} pilots submitted in {found['submissions']:.1f} s", flush=True)
    found["turn"] = turn()
    return found


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    starts = found["starts"]
    parts = [name for name in starts[0] if name not in ("all", "MB")]
    middle = {name: statistics.median(one.get(name, 0.0) for one in starts) for name in (*parts, "all", "MB")}
    turn, fetched = found["turn"], found["fetching"]
    a_minute = 60 * SUBMITTED / found["submissions"]
    plain, pilot = found["throughput"]["plain"], found["throughput"]["pilot"]
    costs = [[node, f"{plain[node]:.3f}", f"{pilot[node]:.3f}"] for node in sorted(plain)
             if node != "rate" and max(plain[node], pilot[node]) >= 0.01]  # fmt: skip
    share = pilot["rate"] / plain["rate"]
    lines = [
        f"Medians of {STARTS} starts.", "",
        *document.table(["a pilot's start", "s"], [[name, f"{middle[name]:.2f}"] for name in parts]), "",
        f"CPU-seconds of one of {SHORT:,} jobs of 1 s on {SLOTS} slots, by node: HTCondor's own slots, on the central "
        "manager's node, and a pilot's, behind the relay and with glexec.", "",
        *document.table(["node", "plain", "pilot"], costs), "",
        *document.aims([
            (f"a frontend's whole turn, {QUEUED:,} jobs in {CLASSES:,} classes, {ENTRIES} entries: below {TURN:.0f} s",
             f"{turn['first']:.1f} s, the next {turn['next']:.1f} s", turn["first"] < TURN),
            (f"submissions a minute: at least {A_MINUTE:,}", f"{a_minute:,.0f}", a_minute >= A_MINUTE),
            (f"{FETCHING} pilots' files ({fetched['files']:.0f}, {fetched['MB']:.1f} MB) through an empty Squid: below "
             f"{FETCHED:.0f} s", f"{fetched['seconds']:.1f} s", fetched["seconds"] < FETCHED),
            ("what the stage areas sent for them: once what one pilot needs", f"{fetched['times']:.2f} times",
             fetched["times"] < 1.1),
            (f"jobs of 1 s on {SLOTS} slots: at least {KEPT:.0%} of the same pool's without pilot, glexec and relay",
             f"{pilot['rate']:.2f} of {plain['rate']:.2f} a second, {share:.0%}", share >= KEPT),
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
    queue = "condor_q -allusers -limit 5 -autoformat ClusterId"
    # It removes some 50 a second.
    until_none("the queue is empty", lambda: GRID.node("submit").run(queue).stdout, 2400, every=5)
    return 0
