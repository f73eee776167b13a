"""Of two of a kind each loses its power while jobs run, and comes back: no job is lost, none ends twice, users go on.

    make test-ha: inventory/ha, which is the lab's and a second one of each; docs/ha.md has the table that this writes

What a user has of it is measured with what a user does, at a submit host that is left: the tools, and a job of his own.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from pilotbed_lab import deploy
from pilotbed_suite import CHECKOUT, document, walk
from pilotbed_suite.bulk import Bulk
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, explained, ok, until, until_none

pytestmark = pytest.mark.timeout(3600)

#: Jobs that are there at each loss, and seconds that none of them sleeps.
JOBS, LONGEST = 200, 20
USERS = ("alice", "bob")
#: Whose jobs are the probes.
PROBE = "carol"
#: Seconds for which the halves do not see each other.
CUT = 60
#: Seconds within which a user's tools answer, and the user's job runs, after a host was lost: docs/ha.md promises it.
TOOLS, RUNS = 60, 180
PAIRS = {group: GRID.names(group) for group in ("central_manager", "submit", "frontend", "relay")}
VICTIMS = [(group, name) for group, names in PAIRS.items() for name in names]
PAGE = CHECKOUT / "docs/ha.md"


@pytest.fixture(scope="module")
def seen():
    """Seconds after the loss of a host, or of sight, until each thing was seen; by what was lost."""
    return {}


@pytest.fixture(scope="module")
def bulks():
    """The jobs that run meanwhile: each loss begins with as many as JOBS, in each submit host's queue a half."""
    made = []
    try:
        yield made
    finally:
        for bulk in made:
            bulk.clear()


def filled_up(bulks):
    share = JOBS // (len(USERS) * len(PAIRS["submit"]))
    for name in PAIRS["submit"]:
        # What was in /tmp is gone with its host's power.
        walk.as_user(host(name), PROBE, f"voms-proxy-init --quiet --voms {walk.walker(PROBE).voms}")
        for user in USERS:
            here = [bulk for bulk in bulks if (bulk.node, bulk.walker.account) == (host(name), user)]
            if count := share - sum(bulk.left() for bulk in here):
                bulks.append(Bulk(host(name), walk.walker(user), count, LONGEST, f"ha{len(bulks)}"))
    running = "condor_q -allusers -constraint 'JobStatus == 2' -autoformat ClusterId"
    until("jobs run", lambda: ok(host(PAIRS["submit"][0]), running), 300)


# -- what a user sees -----------------------------------------------------------------------------------------------


def tools_answer(submit):
    """A user's tools: his queue, and the pool's slots."""
    done = submit.run("runuser --login %s --command %s", PROBE, "condor_q -totals && condor_status -af Name")
    return done.rc == 0 and "slot" in done.stdout


def a_job_runs(submit, since):
    """Submit one, and wait for it; return the seconds from ``since`` until it had started."""
    who, name = walk.walker(PROBE), f"ha-{time.time_ns()}"
    job = until("the job is taken", lambda: _submitted(submit, who, name), RUNS)
    ad = walk.wait(submit, {PROBE: job}, RUNS)[PROBE]
    assert (ad["ExitCode"], ad["NumJobCompletions"]) == (0, 1)
    walk.as_user(submit, PROBE, f"rm -f {name}.*")
    return ad["JobCurrentStartDate"] - since


def _submitted(submit, who, name):
    try:
        return walk.submit(submit, who, name, ",".join(site.name for site in GRID.sites))
    except walk.GridError:
        return ""


def measured(submit, what, seen):
    """Tools and a job of a user's at ``submit``, since now."""
    since, begun = time.time(), time.monotonic()
    until("the tools answer", lambda: tools_answer(submit), TOOLS)
    row = seen[what] = {"tools": time.monotonic() - begun}
    row["job"] = a_job_runs(submit, since)
    assert row["job"] < RUNS


# -- what a service is, when it is whole ----------------------------------------------------------------------------


def at_work(group):
    """Those of a pair that are."""
    return [name for name in PAIRS[group] if AT_WORK[group](name)]


def negotiates(name):
    return host(name).run("pgrep --exact condor_negotiat").rc == 0


def collectors_know_all(name):
    """Every schedd, the slots that the other one knows, and one negotiator."""
    known = {}
    for each in PAIRS["central_manager"]:
        said = host(name).run(f"condor_status -pool {GRID.fqdn(each)} -any -autoformat MyType").stdout
        known[each] = Counter(said.split())
    schedds = len(PAIRS["submit"])
    return len(at_work("central_manager")) == 1 and all(
        found["Scheduler"] >= schedds and found["Machine"] and found["Negotiator"] == 1 for found in known.values()
    )


def schedd_runs_jobs(name):
    """Some of its jobs run, or none is left."""
    asked = host(name).run("condor_q -allusers -autoformat JobStatus")
    return asked.rc == 0 and (not asked.stdout or "2" in asked.stdout.split())


def asks(name):
    """Whether a frontend is the one of its name that asks for pilots."""
    path = f"/run/pilotbed/frontend/{GRID.variable('grid_vos')[0]['frontend_group']}/state.json"
    said = host(name).run("cat %s", path)
    return said.rc == 0 and json.loads(said.stdout)["active"] == GRID.fqdn(name)


def first_frontend_asks(_name):
    """Alone, whoever was lost."""
    return at_work("frontend") == PAIRS["frontend"][:1]


def relay_listens(name):
    return host(name).run(f"ss -Hltn sport = :{GRID.variable('grid_relay_port')}").stdout


WHOLE = {"central_manager": collectors_know_all, "submit": schedd_runs_jobs, "frontend": first_frontend_asks,
         "relay": relay_listens}  # fmt: skip
#: Of which one of two is at work, and how one sees which.
AT_WORK = {"central_manager": negotiates, "frontend": asks}


# -- who may speak to whom ------------------------------------------------------------------------------------------


def allowed(name, address, **settings):
    """Whether a host may speak to a daemon of HTCondor as a daemon, with its own certificate."""
    own = " ".join(f"_CONDOR_{key}={value}" for key, value in ({"SSL_SKIP_HOST_CHECK": "true"} | settings).items())
    said = host(name).run(f"{own} condor_ping -addr %s -table DAEMON", address).stdout
    return re.search(r"DAEMON .* ALLOW ", said) is not None


def test_only_central_managers_speak_to_each_others_had():
    """They know each other by address, which no certificate has: by whom it maps to, both ways."""
    first, second = PAIRS["central_manager"]
    collector = f"{next(iter(GRID.addresses(first).values()))}:9618"
    for daemon in ("had", "replication"):
        had = f"<{collector}?sock={daemon}>"
        assert allowed(second, had)
        assert not allowed(PAIRS["submit"][0], had)
        assert not allowed(second, had, ALLOW_CLIENT=f"submit@{GRID.variable('grid_domain')}")
    assert allowed(PAIRS["submit"][0], f"<{collector}>"), "the control: it is a daemon of the pool"


# -- losses ---------------------------------------------------------------------------------------------------------


@contextmanager
def without(name):
    """A host that has lost its power, as if somebody had pulled the plug; it comes back afterwards."""
    deploy.lab().stop_node(name, kill=True)
    try:
        yield
    finally:
        subprocess.run([sys.executable, "-m", "pilotbed_lab", "boot"], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def halves_apart():
    """The first of each kind and the second see nothing of each other."""
    first, second = ([names[at] for names in PAIRS.values()] for at in (0, 1))
    there = ", ".join(address for name in second for address in GRID.addresses(name).values())
    table = "inet pilotbed_ha"
    rules = [f"add table {table}"]
    for hook, end in (("input", "saddr"), ("output", "daddr")):
        chain = f"{table} {hook}"
        rules += [f"add chain {chain} {{ type filter hook {hook} priority -500; }}",
                  f"add rule {chain} ip {end} {{ {there} }} drop"]  # fmt: skip
    try:
        for name in first:
            ok(host(name), "nft %s", "; ".join(rules))
        yield
    finally:
        for name in first:
            host(name).run(f"nft delete table {table}")


def seconds_until_at_work(group, name):
    begun = time.monotonic()
    until(f"{name} is at work", lambda: AT_WORK[group](name), 300)
    return time.monotonic() - begun


def jobs_left(bulks):
    return sum(bulk.left() for bulk in bulks)


def test_nothing_is_lost(bulks, seen):
    """What the tools and a job take on this machine."""
    filled_up(bulks)
    measured(host(PAIRS["submit"][0]), "nothing", seen)


@pytest.mark.parametrize(("group", "name"), VICTIMS, ids=[name for _, name in VICTIMS])
def test_a_host_is_lost(group, name, bulks, seen):
    submit = host(next(each for each in PAIRS["submit"] if each != name))
    other = next(each for each in PAIRS[group] if each != name)
    filled_up(bulks)
    evidence = [(host(each), f"tail -n 30 /var/log/condor/{log}") for each in PAIRS["central_manager"]
                for log in ("HADLog", "NegotiatorLog")]  # fmt: skip
    with explained(*evidence), ThreadPoolExecutor(1) as beside:
        with without(name):
            taken_over = beside.submit(seconds_until_at_work, group, other) if group in AT_WORK else None
            measured(submit, name, seen)
            if taken_over:
                seen[name]["other"] = taken_over.result()
        begun = time.monotonic()
        until(f"{name} is whole again", lambda: WHOLE[group](name), 300)
        seen[name]["back"] = time.monotonic() - begun


def test_the_halves_lose_sight_of_each_other(bulks, seen):
    """Each half has its collector, and may have its negotiator: a slot goes to one claim all the same."""
    filled_up(bulks)
    with halves_apart():
        begun = time.monotonic()
        before = jobs_left(bulks)
        for at in (0, 1):
            measured(host(PAIRS["submit"][at]), f"sight, at {PAIRS['submit'][at]}", seen)
        time.sleep(max(begun + CUT - time.monotonic(), 0))
        assert jobs_left(bulks) < before
    begun = time.monotonic()
    until("there is one negotiator, which all know", lambda: collectors_know_all(PAIRS["central_manager"][0]), 300)
    seen[f"sight, at {PAIRS['submit'][0]}"]["back"] = time.monotonic() - begun


def test_every_job_ended_once_and_well(bulks):
    until_none("every job has ended", lambda: jobs_left(bulks), 1800, every=5)
    assert [problem for bulk in bulks for problem in bulk.problems()] == []


def test_the_page_has_it(bulks, seen):
    """Written only by a run that was good until here."""
    assert len(seen) == 1 + len(VICTIMS) + 2
    columns = {"tools": "tools answer", "job": "a new job has started", "other": "the other is at work",
               "back": "whole, once it has power or sight again"}  # fmt: skip
    rows = [[what, *(f"{row[each]:.0f}" if each in row else "" for each in columns)] for what, row in seen.items()]
    ended = sum(bulk.count for bulk in bulks)
    middle = statistics.median(row["job"] for row in seen.values())
    told = (f"`make test-ha`, {time.strftime('%Y-%m-%d')}: {JOBS} jobs of {len(USERS)} users meanwhile, at "
            f"{len(PAIRS['submit'])} submit hosts; {ended:,} ended in all, once each. Seconds since the loss; in the "
            f"middle a new job starts after {middle:.0f} s.")  # fmt: skip
    document.write(PAGE, "ha", "\n".join([told, "", *document.table(["lost", *columns.values()], rows)]))
