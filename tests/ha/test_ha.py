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
from functools import partial

import pytest
from pilotbed_lab import deploy
from pilotbed_suite import CHECKOUT, document, walk
from pilotbed_suite.bulk import Bulk
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, as_user, explained, ok, renewed, until, until_none

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
PAIRS = {group: GRID.names(group) for group in ("voms_server", "myproxy_server", "central_manager", "submit", "factory",
                                                "frontend", "relay")}  # fmt: skip
#: Two of one site.
PAIRS["computing_element"] = [name for name in GRID.names("computing_element")
                              if GRID.variable("site_name", name) == "beta"]  # fmt: skip
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


def seconds_until(what, look, deadline=300):
    """How long it took until something was so."""
    begun = time.monotonic()
    until(what, look, deadline)
    return time.monotonic() - begun


# -- what a user sees -----------------------------------------------------------------------------------------------


def tools_answer(submit):
    """A user's tools: a proxy, his queue, and the pool's slots."""
    asked = f"voms-proxy-init --quiet --voms {walk.walker(PROBE).voms} && condor_q -totals && condor_status -af Name"
    done = submit.run("runuser --login %s --command %s", PROBE, asked)
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
    since = time.time()
    row = seen[what] = {"tools": seconds_until("the tools answer", lambda: tools_answer(submit), TOOLS)}
    row["job"] = a_job_runs(submit, since)
    print(what, row)
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


def answer(name, rest):
    """The code by which a host's web service answers the host itself, with its certificate."""
    return host(name).run(
        "curl --silent --output /dev/null --write-out '%%{http_code}' --capath /etc/grid-security/certificates "
        "--cert /etc/grid-security/hostcert.pem --key /etc/grid-security/hostkey.pem %s",
        f"https://{GRID.fqdn(name)}{rest}",
    ).stdout  # fmt: skip


def gives_attributes(name):
    """Each VO's server answers: this host is no member. And the second one's database follows the first one's."""
    answers = {answer(name, f":{vo['voms_port']}/generate-ac") for vo in GRID.variable("grid_vos")}
    follows = host(PAIRS["voms_server"][1]).run("mariadb --execute 'SHOW REPLICA STATUS\\G'").stdout
    return answers == {"403"} and len(re.findall(r"_Running: Yes$", follows, re.MULTILINE)) == 2


def is_copied(_name):
    return host(PAIRS["myproxy_server"][1]).run("systemctl start myproxy-replica.service").rc == 0


def is_asked(name):
    """Whether a factory offers its entries, and has a frontend's requests."""
    said = host(name).run("pilotbed-factory-pool condor_status -any -autoformat GlideinMyType").stdout
    return {"glidefactory", "glideclient"} <= set(said.split())


def takes_pilots(name):
    return answer(name, "/arex/rest/1.0/info") in ("200", "403")


WHOLE = {"voms_server": gives_attributes, "myproxy_server": is_copied, "central_manager": collectors_know_all,
         "submit": schedd_runs_jobs, "factory": is_asked, "frontend": first_frontend_asks, "relay": relay_listens,
         "computing_element": takes_pilots}  # fmt: skip
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


def test_members_are_changed_at_the_first_server_and_known_at_both():
    first, second = map(host, PAIRS["voms_server"])
    dn = f"{GRID.variable('grid_dn_prefix')}/OU=People/CN={GRID.variable('grid_users')[2]['dn_name']}"
    tool, vo = "/usr/libexec/pilotbed/voms-database", GRID.vo
    assert ok(second, f"{tool} %s state %s", vo, dn) == "member\n"
    try:
        ok(first, f"{tool} %s suspend %s tried", vo, dn)
        until("the second knows", lambda: ok(second, f"{tool} %s state %s", vo, dn) == "suspended\n", 30)
        refused = second.run(f"{tool} %s resume %s", vo, dn)
        assert refused.rc != 0
        assert f"those of {GRID.fqdn(PAIRS['voms_server'][0])}" in refused.stderr
    finally:
        ok(first, f"{tool} %s resume %s", vo, dn)
    until("the second knows that, too", lambda: ok(second, f"{tool} %s state %s", vo, dn) == "member\n", 30)


def test_only_the_second_database_follows_the_first():
    first, second = PAIRS["voms_server"]
    tls = ("--ssl-capath=/etc/grid-security/certificates --ssl-verify-server-cert "
           "--ssl-cert=/etc/grid-security/hostcert.pem --ssl-key=/etc/grid-security/hostkey.pem")  # fmt: skip
    asks = f"mariadb --host={GRID.fqdn(first)} --user={GRID.fqdn(second)} --execute 'SELECT 1' "
    assert host(second).run(asks + tls).rc == 0, "control"
    without = host(second).run(asks + tls.partition(" --ssl-cert")[0])
    other = host(first).run(asks + tls)
    assert ("Access denied" in without.stderr, "Access denied" in other.stderr) == (True, True)


def test_only_the_second_repository_is_a_copy_of_the_first():
    first, second = PAIRS["myproxy_server"]
    assert is_copied(second), "control"
    asks = (f"openssl s_client -quiet -verify_quiet -connect {GRID.fqdn(first)}:"
            f"{GRID.variable('grid_myproxy_replication_port')} -cert /etc/grid-security/hostcert.pem "
            "-key /etc/grid-security/hostkey.pem -CApath /etc/grid-security/certificates")  # fmt: skip
    assert "@RSYNCD" in host(second).run(f"(echo '@RSYNCD: 31.0'; sleep 1) | {asks}").stdout
    assert "@RSYNCD" not in host(PAIRS["submit"][0]).run(f"sleep 1 | {asks}").stdout


def test_what_is_stored_at_the_first_server_is_had_from_the_second():
    """And nothing is stored at the second: the next copy would take it away."""
    submit, (first, second) = host(PAIRS["submit"][0]), map(GRID.fqdn, PAIRS["myproxy_server"])
    word, name = "a long passphrase", f"ha{time.time_ns()}"
    put = f"printf '{word}\\n' | myproxy-init -S -l {name} -c 1 -t 1 -s "
    get = f"printf '{word}\\n' | myproxy-logon -S -l {name} -t 1 -o /tmp/{name} -s {second}; rm -f /tmp/{name}"
    code, said = as_user(submit, PROBE, put + second)
    assert code != 0, said
    code, said = as_user(submit, PROBE, put + first)
    assert code == 0, said
    until("the second has it", lambda: as_user(submit, PROBE, f"set -e; {get}")[0] == 0, 60)
    as_user(submit, PROBE, f"myproxy-destroy -l {name} -s {first}")


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
    evidence = [(host(other), "journalctl --no-pager --lines 40 --output cat")]
    evidence += [(host(each), f"tail -n 30 /var/log/condor/{log}") for each in PAIRS["central_manager"]
                for log in ("HADLog", "NegotiatorLog")]  # fmt: skip
    with explained(*evidence), ThreadPoolExecutor(1) as beside:
        with without(name):
            taken_over = group in AT_WORK and beside.submit(
                seconds_until, f"{other} is at work", lambda: AT_WORK[group](other))  # fmt: skip
            measured(submit, name, seen)
            if group in ("voms_server", "myproxy_server"):
                for each in PAIRS["factory"]:
                    renewed(host(each))
            if taken_over:
                seen[name]["other"] = taken_over.result()
        seen[name]["back"] = seconds_until(f"{name} is whole again", lambda: WHOLE[group](name))


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
    whole = partial(collectors_know_all, PAIRS["central_manager"][0])
    back = seconds_until("there is one negotiator, which all know", whole)
    seen[f"sight, at {PAIRS['submit'][0]}"]["back"] = back


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
