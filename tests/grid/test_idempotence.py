"""Once more over a grid that works: it changes nothing, and nothing that works is disturbed.

Nor does a look (--check), which says exactly what somebody changed by hand; nor a run over one host alone (--limit).
"""

import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import yaml
from pilotbed_suite import CHECKOUT, ansible, ansible_environment, inventory
from pilotbed_suite.reach import ansible_connection, host
from pilotbed_suite.support import GRID, HOLD, edited, ok, until

pytestmark = pytest.mark.stage(3)

#: Seconds for one host's run.
DEADLINE = 300
#: A VOMS server that no inventory has.
GONE = "gone.example.org"


@dataclass
class Run:
    """A run of a playbook: its exit code, what it said, its totals, and its log."""

    code: int
    said: str
    totals: dict[str, int]
    log: str

    def changes(self):
        """Return what was changed, a line each."""
        told, task = [], ""
        for line in self.log.splitlines():
            task = line.partition(" TASK ")[2] or task
            if "   changed " in line:
                told.append(f"{task}: {line}")
        return told


def site(directory, *arguments, **environment):
    """Run site.yml; its log goes to ``directory``."""
    log = directory / "site.log"
    done = subprocess.run(
        [ansible("ansible-playbook"), "playbooks/site.yml", *ansible_connection(), *arguments], cwd=CHECKOUT,
        env=ansible_environment(PILOTBED_LOG=str(log), **environment), capture_output=True, text=True, check=False,
        timeout=DEADLINE,
    )  # fmt: skip
    text = log.read_text()
    totals = json.loads(text.rpartition(" STATS ")[2].partition("\n")[0])
    return Run(done.returncode, done.stdout + done.stderr, totals, text)


# -- a look ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """A run with --check and --diff after somebody has changed three hosts by hand; the hosts are as that left them."""
    router, worker, relay = GRID.names("site_router")[0], GRID.names("worker")[0], GRID.names("relay")[0]
    timer = "pilotbed-fetch-crl.timer"
    # Of trees without units: the next run would restart those once more, as the files are newer then.
    with (
        edited(host(router), "/etc/hosts", "echo '10.99.0.1 by-hand' >> $f"),
        edited(host(worker), "/etc/cron.allow", "chmod 0600 $f"),
    ):
        ok(host(relay), f"systemctl stop {timer}")
        try:
            run = site(tmp_path_factory.mktemp("check"), "--check", "--diff")
            left = (
                host(router).run("grep -c by-hand /etc/hosts").stdout.strip(),
                host(worker).run("stat --format %a /etc/cron.allow").stdout.strip(),
                host(relay).run(f"systemctl is-active {timer}").stdout.strip(),
            )
        finally:
            ok(host(relay), f"systemctl start {timer}")
    assert run.code == 0, run.said
    return run, left, (router, worker, relay)


def test_a_look_says_exactly_what_was_changed_by_hand(looked):
    run, _, (router, worker, relay) = looked
    found = re.findall(r"^ {2}(\S+: .*)", run.said, re.MULTILINE)
    wanted = [f"{router}: /etc/hosts", f"{worker}: /etc/cron.allow", f"{relay}: pilotbed-fetch-crl.timer"]
    assert sorted(found) == sorted(wanted), run.said
    assert re.findall(r"^ {4}[-+](?![-+]).*", run.said, re.MULTILINE) == ["    -10.99.0.1 by-hand"]
    assert "    /etc/cron.allow: owner or mode\n" in run.said
    assert run.totals["changed"] == 3, "\n".join(run.changes())


def test_a_look_changes_nothing(looked):
    assert looked[1] == ("1", "600", "inactive")


# -- the whole grid once more ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(looked, tmp_path_factory, jobs, alice, filtered_site, pilots):
    """A second run of site.yml while a payload runs, and the payload.

    A file of glexec's is newer meanwhile where services run that do not import it: they are none of its concern.
    """
    for group in ("factory", "frontend", "relay"):
        ok(GRID.node(group), "touch /usr/lib/pilotbed/pilotbed/glexec/root.py")
    pilots(filtered_site)
    job = jobs.submit(alice, filtered_site, f"#!/bin/sh\n{HOLD}\n")
    job.holds(filtered_site)
    run = site(tmp_path_factory.mktemp("site"))
    assert run.code == 0, run.said[-6000:]
    return run, job


def test_second_deployment_changes_nothing(again):
    run, _ = again
    assert run.totals["changed"] == 0, "\n".join(run.changes())
    assert run.totals["failures"] == run.totals["dark"] == 0
    assert run.totals["executions"] > 100


def test_second_deployment_leaves_running_payloads_alone(again):
    _, job = again
    assert job.status() == "running"
    assert job.ad()["NumJobStarts"] == 1
    job.remove()


def test_grid_works_afterwards(again, jobs, alice, hidden_site):
    assert jobs.submit(alice, hidden_site).done(120)["ExitCode"] == 0


# -- one host alone --------------------------------------------------------------------------------------------------

ROLES = {path.name for path in (CHECKOUT / "roles").iterdir()}


def hosts_of_every_role():
    """Return hosts that have every group among them, of which no other has as many: none stands for another."""
    known = inventory.load()
    parts = {name: ROLES & set(known.groups_of(name)) for name in known.hosts()}
    found = {}
    for name in sorted(parts, key=lambda name: -len(parts[name])):
        if not any(parts[name] <= parts[other] for other in found):
            found[name] = None
    return list(found)


@pytest.fixture(scope="module")
def alone(again, tmp_path_factory):
    """A run over each of the hosts of every role alone, two at a time.

    The first is a worker without its key, and the second has believed a VOMS server that is not there any more.
    validate.yml, which looks at the inventory only, is left out: it takes as long as the rest.
    """
    broken = GRID.names("worker")[-1]
    ok(host(broken), "systemctl stop slurmd munge && rm /etc/munge/munge.key")
    names = [broken, *(name for name in hosts_of_every_role() if name not in GRID.names("worker"))]

    def limited(name, *arguments):
        return site(tmp_path_factory.mktemp(name), "--limit", name, "--skip-tags", "validate", *arguments)

    more = json.dumps({"trust_voms_hosts": [GRID.fqdn(GRID.names("voms_server")[0]), GONE]})
    run = limited(names[1], "--tags", "trust_configure", "--extra-vars", more)
    assert run.code == 0, run.said
    assert believed(names[1]), "control"
    with ThreadPoolExecutor(2) as pool:
        return broken, dict(zip(names, pool.map(limited, names), strict=True))


def believed(name):
    """For which VOs a host believes the server that is gone."""
    return ok(host(name), f"find /etc/grid-security/vomsdir -name {GONE}.lsc").split()


def test_a_run_over_one_host_mends_a_worker(alone):
    broken, runs = alone
    assert runs[broken].code == 0, runs[broken].said
    assert [line for line in runs[broken].changes() if broken not in line] == []
    assert [line.partition(" : ")[0] for line in runs[broken].changes()] == ["munge", "batch_slurm"], "the two units"
    state = "sinfo --noheader --nodes=%s --states=idle,mixed,allocated --format=%%D"
    until("the batch system has the worker again", lambda: host(broken).run(state, broken).stdout.strip() == "1")


def test_a_voms_server_that_the_inventory_has_no_more_is_not_believed(alone):
    _, runs = alone
    name = list(runs)[1]
    assert [line.partition(" : ")[0] for line in runs[name].changes()] == ["trust"]
    assert not believed(name)


def test_a_run_over_one_host_works_for_every_role(alone):
    _, runs = alone
    covered = {group for name in runs for group in inventory.load().groups_of(name)}
    assert {group for group in ROLES if GRID.names(group)} <= covered
    for name, run in runs.items():
        assert run.code == 0, f"--limit {name}: {run.said}"
        if name not in list(runs)[:2]:
            assert run.changes() == [], name
        assert run.totals["executions"] > 10


def test_a_host_that_nobody_was_told_of_is_refused_alone(tmp_path):
    """It is not there at all: only the hosts that have to know it are asked."""
    worker = GRID.names("worker")[0]
    network, address = next(iter(GRID.addresses(worker).items()))
    groups = [group for group in inventory.load().groups_of(worker) if group not in ("all", "batch_system")]
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {
        "hosts": {"new-wn": {"node_addresses": {network: address.rpartition(".")[0] + ".250"}}},
        "children": {group: {"hosts": {"new-wn": None}} for group in groups},
    }}))  # fmt: skip
    sources = os.environ.get("ANSIBLE_INVENTORY", "inventory/common,inventory/lab") + f",{tmp_path}/hosts.yml"
    run = site(tmp_path, "--limit", "new-wn", "--skip-tags", "validate", ANSIBLE_INVENTORY=sources)
    here = next(one for one in GRID.sites if worker in one.workers)
    assert run.code != 0
    (added,) = re.findall(r" not been told of new-wn yet, .* --limit new-wn,(\S+)$", run.said, re.MULTILINE)
    told = {*GRID.names(f"site_{here.name}"), *GRID.names("log_collector")}
    assert set(added.split(",")) == told - {"new-wn"}
    assert run.changes() == []
