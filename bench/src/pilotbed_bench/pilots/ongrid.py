"""What pilots cost on a deployed lab, with its own daemons: var/bench-pilots-grid.json, docs/scale.md.

    schedd with 50,000 idle jobs ─▶ frontend's whole turn ◀─ collector with 500 entries
    factory's schedd ◀─ submissions
    worker: a pilot's start in parts, what it holds when it is idle
    1,000 jobs of a second ─▶ 8 slots: of a startd alone, of a pilot without glexec and relay, with one, with both
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from pilotbed_lab import cgroups, deploy
from pilotbed_suite import CHECKOUT, GridError, document, walk
from pilotbed_suite.support import (
    GRID,
    HandPilot,
    arguments,
    ok,
    until,
    until_none,
    with_parameters,
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
#: Jobs of one second, slots, rounds; aim: of the rate without pilots, at least.
JOBS, SLOTS, ROUNDS, SHARE = 250, 8, 4, 0.8

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
ONE = """executable = /bin/sleep
arguments = 1
transfer_executable = false
should_transfer_files = yes
x509userproxy = {proxy}
request_memory = 64
log = bench.log
requirements = {wanted}
queue {jobs}
"""
#: The same pool without pilots: a startd of the pool's own HTCondor, beside the schedd, by the pilot's proxy.
PLAIN = """include : /etc/condor/required-security.conf
include : /etc/condor/config.d/10-pool.conf
RELEASE_DIR = /usr
LIB = /usr/lib/condor
LIBEXEC = /usr/libexec/condor
LOCAL_DIR = {here}
LOG = {here}/log
SPOOL = {here}/spool
EXECUTE = {here}/execute
LOCK = {here}/lock
RUN = {here}/lock
DAEMON_SOCKET_DIR = {here}/sock
DAEMON_LIST = MASTER, STARTD
MASTER_NAME = plain
STARTD_NAME = plain
USE_SHARED_PORT = false
NUM_CPUS = {slots}
MEMORY = 16000
NUM_SLOTS_TYPE_1 = 1
SLOT_TYPE_1 = 100%
SLOT_TYPE_1_PARTITIONABLE = true
START = true
SUSPEND = false
PREEMPT = false
KILL = false
WANT_SUSPEND = false
CLAIM_WORKLIFE = {life}
RunBenchmarks = false
SEC_ENABLE_MATCH_PASSWORD_AUTHENTICATION = true
STARTER_ALLOW_RUNAS_OWNER = false
AUTH_SSL_USE_CLIENT_PROXY_ENV_VAR = false
AUTH_SSL_CLIENT_CERTFILE = {here}/proxy.pem
AUTH_SSL_CLIENT_KEYFILE = {here}/proxy.pem
AUTH_SSL_SERVER_CERTFILE = {here}/proxy.pem
AUTH_SSL_SERVER_KEYFILE = {here}/proxy.pem
SEC_DEFAULT_AUTHENTICATION_METHODS = SSL, FS
SEC_CLIENT_AUTHENTICATION_METHODS = SSL, FS
ALLOW_DAEMON = *@{domain}, condor@child, submit-side@matchsession
ALLOW_WRITE = *@{domain}, condor@child, submit-side@matchsession
ALLOW_READ = *@{domain}, condor@child, submit-side@matchsession
ALLOW_NEGOTIATOR = *@{domain}
"""
HERE = "/var/tmp/pilotbed-bench"  # noqa: S108 # on a lab's node


# -- frontend and factory -------------------------------------------------------------------------------------------


def _python(node: Host, text: str, *words: str, user: str = "root") -> str:
    """Run a program of ours on the factory's node with its configuration; return what it printed."""
    write(node, "/run/pilotbed-bench.py", text, mode="0644")
    quoted = shlex.join(["env", "CONDOR_CONFIG=/etc/condor-factory/condor_config", "python3", "-I",
                         "/run/pilotbed-bench.py", *words])  # fmt: skip
    return ok(node, "runuser -u %s -- /bin/sh -c %s", user, quoted)


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
        _python(factory, OFFERS, collector, str(ENTRIES), user="factory")
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
            _python(factory, OFFERS, collector, "0", user="factory")
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
        return float(_python(factory, SUBMIT, proxy, str(SUBMITTED), user="factory"))
    finally:
        for how in ("", "-forcex"):
            factory.run(f"pilotbed-factory-pool condor_rm {how} -constraint PilotbedBench")
        factory.run("rm -f /var/lib/pilotbed/factory/log/bench.*")


# -- one pilot ------------------------------------------------------------------------------------------------------


def start(worker: Host, options: dict[str, str]) -> dict[str, float]:
    """Return the seconds of a pilot's start, by part, and the MB that it holds then beyond HTCondor's own."""
    stamped = f"{HERE}-stamped"
    look = f"tail --disable-inotify --sleep-interval 0.02 -n +1 -F {HERE}/out 2>/dev/null"
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


# -- jobs -----------------------------------------------------------------------------------------------------------


@contextmanager
def plain(node: Host, proxy: str, life: str) -> Iterator[None]:
    """A startd with its own slots on a node, which is no pilot's."""
    here = f"{HERE}-plain"
    ok(node, f"rm -rf {here} && install -d -o condor {here} && cd {here} && "
       "install -d -o condor log spool execute lock sock && chmod 755 execute")  # fmt: skip
    write(node, f"{here}/proxy.pem", proxy, "condor")
    config = PLAIN.format(here=here, slots=SLOTS, life=life, domain=GRID.variable("grid_domain"))
    write(node, f"{here}/condor_config", config, mode="0644")
    ok(node, "systemd-run --quiet --unit pilotbed-bench-plain --setenv CONDOR_CONFIG=%s condor_master -f",
       f"{here}/condor_config")  # fmt: skip
    try:
        yield
    finally:
        node.run("systemctl stop pilotbed-bench-plain; rm -rf %s", here)


def rate(submit: Host, wanted: str) -> dict[str, float]:
    """Return jobs a second that slots end which a job ``wanted``, and CPU-seconds a job by node."""
    alice = walk.walkers()[0]
    text = ONE.format(proxy=walk.proxy_of(submit, alice.account), wanted=wanted, jobs=JOBS)
    before = spent()
    command = f"rm -f bench.log; printf %s {shlex.quote(text)} > bench.sub && condor_submit -terse bench.sub"
    said = walk.as_user(submit, alice.account, command)
    cluster = said.split()[0].partition(".")[0]

    def ended() -> list[list[float]]:
        shown = ok(submit, f"condor_history {cluster} -limit {JOBS} -af JobStartDate CompletionDate").splitlines()
        return [list(map(float, line.split())) for line in shown] if len(shown) == JOBS else []

    times = until(f"{JOBS} jobs end", ended, 1800, every=3)
    after = spent()
    used = {f"CPU {name}": (after[name] - before[name]) / JOBS for name in after}
    seconds = max(end for _, end in times) - min(begin for begin, _ in times)
    return {"rate": JOBS / seconds} | used


def spent() -> dict[str, float]:
    """Return the CPU-seconds of the nodes that a job passes."""
    key = deploy.lab().key
    known = {"schedd": "submit", "collector": "central_manager", "relay": "relay"}
    found = {name: cgroups.cpu_seconds(f"{key}/{GRID.names(group)[0]}") for name, group in known.items()}
    found["workers"] = sum(cgroups.cpu_seconds(f"{key}/{one}") for one in GRID.names("worker"))
    return found


@contextmanager
def _closed() -> Iterator[None]:
    """No pilot of the factory's comes meanwhile."""
    factory = GRID.node("factory")
    for site in GRID.sites:
        ok(factory, "pilotbed-entry downtime %s --now --reason bench", site.name)
    try:
        yield
    finally:
        for site in GRID.sites:
            ok(factory, "pilotbed-entry up %s", site.name)


def throughput(worker: Host, options: dict[str, str], life: str) -> dict[str, list[dict[str, float]]]:
    """Return a sample of each way in each round; the order changes from round to round."""
    submit, central = GRID.node("submit"), GRID.node("central_manager")
    without = {"GLIDEIN_Glexec_Use": "NEVER", "GLIDEIN_REQUIRE_GLEXEC_USE": "False", "GLEXEC_BIN": "NONE"}
    found: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as running:
        wanted: dict[str, str] = {}
        for name, more in (("pilot with relay", without), ("pilot with relay and glexec", {})):
            unit = f"pilotbed-bench-{len(wanted)}"
            given = with_parameters(options, GLIDEIN_CPUS=str(SLOTS), GLIDEIN_MaxMemMBs="16000", **more)
            pilot = running.enter_context(HandPilot(worker, given, f"/var/tmp/{unit}", unit))  # noqa: S108
            until("the pilot is in the pool", pilot.slots)
            wanted[name] = f'split(TARGET.Name, "@")[1] == "{pilot.name}"'
            proxy = ok(worker, "cat %s", f"{pilot.directory}/proxy.pem")
        running.enter_context(_closed())
        running.enter_context(plain(central, proxy, life))
        until("the startd is in the pool", lambda: central.run("condor_status plain -af Name").stdout, 120)
        wanted["no pilot"] = 'regexp("@?plain@", TARGET.Name)'
        for number in range(ROUNDS):
            for name in sorted(wanted, reverse=number % 2 == 0):
                found.setdefault(name, []).append(rate(submit, wanted[name]))
                print(f"round {number + 1}: {name}: {found[name][-1]['rate']:.2f} jobs/s", flush=True)
    return found


# -- all ------------------------------------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """Return what a run finds on the lab that runs."""
    site = GRID.site("behind a relay", lambda site: site.traversal == "relay")
    submit, alice = GRID.node("submit"), walk.walkers()[0]
    walk.as_user(submit, alice.account, f"voms-proxy-init --quiet --voms {alice.voms}")
    worker, options = worker_with_a_pilot(site), arguments(site)
    standard = (CHECKOUT / "services/src/pilotbed/glidein/files/condor_vars.lst").read_text()
    (life,) = (line.split()[2] for line in standard.splitlines() if line.startswith("CLAIM_WORKLIFE"))
    found: dict[str, Any] = {"starts": [start(worker, options) for _ in range(STARTS)]}
    print(found["starts"][-1], flush=True)
    found["throughput"] = throughput(worker, options, life)
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
    ways = found["throughput"]
    rates = {name: statistics.median(one["rate"] for one in samples) for name, samples in ways.items()}
    alone = [one["rate"] for one in ways["no pilot"]]
    shares = {
        name: statistics.median(one["rate"] / rate for one, rate in zip(samples, alone, strict=True))
        for name, samples in ways.items()
    }
    nodes = [name for name in ways["no pilot"][0] if name.startswith("CPU ")]
    rows = [
        [name, f"{rates[name]:.2f}", f"{shares[name]:.0%}",
         *(f"{statistics.median(one[node] for one in ways[name]):.3f}" for node in nodes)]
        for name in ("no pilot", "pilot with relay", "pilot with relay and glexec")
    ]  # fmt: skip
    turn, both = found["turn"], shares["pilot with relay and glexec"]
    a_minute = 60 * SUBMITTED / found["submissions"]
    lines = [
        f"Medians of {STARTS} starts and of {ROUNDS} rounds, shares within a round.", "",
        *document.table(["a pilot's start", "s"], [[name, f"{middle[name]:.2f}"] for name in parts]), "",
        *document.table([f"{JOBS} jobs of 1 s, {SLOTS} slots", "jobs/s", "share",
                         *(f"{name} s a job" for name in nodes)], rows), "",
        *document.aims([
            (f"a frontend's whole turn, {QUEUED:,} jobs in {CLASSES:,} classes, {ENTRIES} entries: below {TURN:.0f} s",
             f"{turn['first']:.1f} s, the next {turn['next']:.1f} s", turn["first"] < TURN),
            (f"submissions a minute: at least {A_MINUTE:,}", f"{a_minute:,.0f}", a_minute >= A_MINUTE),
            (f"a pilot in the pool: below {START:.0f} s", f"{middle['all']:.1f} s", middle["all"] < START),
            (f"an idle pilot beyond HTCondor's own: below {IDLE:.0f} MB", f"{middle['MB']:.1f} MB",
             middle["MB"] < IDLE),
            (f"jobs of 1 s, of the rate without pilots: at least {SHARE:.0%}", f"{both:.0%}", both >= SHARE),
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
