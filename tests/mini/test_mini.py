"""A grid on three machines: services that share a host work, and have nothing else in common. `make mini` deploys it.

    submit  CA, VOMS, MyProxy, collector, negotiator, schedd, factory (an HTCondor of its own), frontend, relay
       │  10.70.0.0/24
    site    router with its filter and NAT, Squid, A-REX, a pool of the site's own, mapping service
       │  10.71.0.0/24
    wn1     glexec
"""

import json
import re
import subprocess

import pytest
from pilotbed_suite import CHECKOUT, ansible, ansible_environment, walk
from pilotbed_suite.reach import host, service
from pilotbed_suite.support import PILOT_PROXY, ok


@pytest.fixture(scope="module")
def walked():
    return walk.walk()


def test_jobs_walk_through_it(walked):
    assert walk.problems(walked) == []
    for trace in walked:
        assert trace.worker == "wn1.grid.test"
        assert trace.way == "relay"
        assert trace.relay.startswith("submit.grid.test:")


def test_second_deployment_changes_nothing(walked, tmp_path):
    log = tmp_path / "site.log"
    done = subprocess.run(
        [ansible("ansible-playbook"), "playbooks/site.yml"], cwd=CHECKOUT, capture_output=True, text=True, check=False,
        env=ansible_environment(PILOTBED_LOG=str(log)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    text = log.read_text()
    told = [line for line in text.splitlines() if "   changed " in line]
    assert json.loads(text.rpartition(" STATS ")[2].partition("\n")[0])["changed"] == 0, told


#: What an account or a certificate may do with the daemons of either pool, by those daemons' own answer. Who may WRITE
#: to a schedd may submit there; who may DAEMON to a collector may advertise.
MAY = {
    ("alice", "schedd"): {"READ", "WRITE"},
    ("alice", "collector"): {"READ"},
    ("alice", "factory's schedd"): {"READ"},
    ("alice", "factory's collector"): {"READ"},
    ("factory", "schedd"): {"READ"},
    ("factory", "collector"): {"READ"},
    ("factory", "factory's schedd"): {"READ", "WRITE", "DAEMON"},
    ("factory", "factory's collector"): {"READ", "WRITE", "DAEMON"},
    ("pilot", "schedd"): {"READ"},
    ("pilot", "collector"): {"READ", "WRITE", "DAEMON"},
    ("pilot", "factory's schedd"): {"READ"},
    ("pilot", "factory's collector"): {"READ"},
}


@pytest.mark.parametrize(("who", "daemon"), MAY, ids=[f"{who} to {daemon}" for who, daemon in MAY])
def test_users_and_factory_have_pools_apart(who, daemon):
    node = service("factory")
    ping = f"condor_ping -type {daemon.split()[-1]} READ WRITE DAEMON"
    if daemon.startswith("factory"):
        ping = f"pilotbed-factory-pool {ping}"
    if who == "pilot":
        proxy = f"X509_USER_PROXY={PILOT_PROXY}"
        said = node.run(f"env {proxy} _CONDOR_SEC_CLIENT_AUTHENTICATION_METHODS=SSL {ping}").stdout
    else:
        said = node.run(f"runuser -u {who} -- {ping}").stdout
    allowed = re.findall(rf"^(\w+) command using .* succeeded as {who}@", said, re.MULTILINE)
    assert set(allowed) == MAY[who, daemon], said


def test_neither_schedd_has_the_others_jobs(walked):
    node = service("factory")
    tools = ("condor_q -allusers -af Owner", "condor_history -af Owner")
    users, pilots = (
        {owner for tool in tools for owner in ok(node, f"{prefix} {tool}").split()}
        for prefix in ("", "pilotbed-factory-pool")
    )
    assert users == {trace.user for trace in walked}
    assert pilots == {"factory"}


@pytest.mark.parametrize(("port", "open_to_the_world"), [(22, True), (443, True), (3128, False), (9620, False),
                                                         (8443, False)])  # fmt: skip
def test_the_router_that_is_the_computing_element_filters_for_itself(port, open_to_the_world):
    """From outside: the computing element is reached, what is the site's own is dropped. From inside: all of it."""
    knock = f"timeout 3 bash -c ': < /dev/tcp/site.grid.test/{port}'"
    assert host("wn1").run(knock).rc == 0
    assert (host("submit").run(knock).rc == 0) == open_to_the_world
