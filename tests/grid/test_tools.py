"""A user's own tools: they take the proxy, with nothing else set, and say what is wrong where there is none.

    alice@submit ── condor_status, condor_userprio ──▶ collector, negotiator

The submit host is not the pool's: there the collector would know its users as the system does, without a proxy.
"""

import re
from contextlib import contextmanager

import pytest
from desk import Desk
from pilotbed_suite.support import ok


@contextmanager
def by_ssh(desk):
    """How to run a command over ssh, without a login shell."""
    key, mine = "/run/pilotbed-test-key", f"{desk.home}/.ssh"
    try:
        ok(desk.node, "rm -f %s*; ssh-keygen -q -t ed25519 -N '' -f %s", key, key)
        ok(desk.node, "install -d -m 0700 -o %s %s && install -m 0600 -o %s %s %s",
           desk.account, mine, desk.account, f"{key}.pub", f"{mine}/authorized_keys")  # fmt: skip
        yield (
            f"ssh -n -i {key} -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
            f"-o LogLevel=ERROR {desk.account}@localhost -- "
        )
    finally:
        desk.node.run("rm -rf %s* %s", key, mine)


@pytest.fixture(scope="module")
def desk(submit, alice, any_site, pilots):
    pilots(any_site)
    made = Desk(submit, alice, any_site)
    yield made
    made.close()


TOOLS = {
    "condor_status": r"slot1@glidein_",
    "condor_userprio -allusers": r"alice@",
    "condor_q -better-analyze {job}": r"of [1-9]\d* slots on",
    "condor_history -limit 1": r"payload.sh",
}


@pytest.fixture(scope="module")
def hopeless(desk):
    """A job that fits no slot, for the analysis."""
    return desk.submit("hopeless", 'requirements = TARGET.GLIDEIN_Site == "nowhere"')


@pytest.fixture(params=["login", "ssh", "nothing set"])
def way(request, desk):
    """How the user's command is run."""
    if request.param == "login":
        yield f"runuser --login {desk.account} --command "
    elif request.param == "nothing set":
        yield f"cd / && runuser -u {desk.account} -- env -i PATH=/usr/bin sh -c "
    else:
        with by_ssh(desk) as way:
            yield way


@pytest.fixture(scope="module")
def finished(desk):
    """A job that has run, for the history."""
    desk.wait(desk.submit("finished"))


def test_users_tools_take_the_users_proxy(desk, finished, hopeless, way):
    for tool, shown in TOOLS.items():
        said = ok(desk.node, way + "%s", tool.format(job=hopeless))
        assert re.search(shown, said, re.IGNORECASE), said


@pytest.fixture
def proxy(desk):
    """The path of the user's proxy, which is put back at the end."""
    path = f"/tmp/x509up_u{desk.uid}"
    ok(desk.node, "cp -p %s %s", path, "/run/pilotbed-test-proxy")
    yield path
    ok(desk.node, "mv %s %s", "/run/pilotbed-test-proxy", path)


@pytest.mark.parametrize("tool", ["condor_status", "condor_userprio", "condor_q -better-analyze {job}"])
def test_a_tool_without_a_proxy_says_so(desk, hopeless, proxy, tool):
    ok(desk.node, "rm %s", proxy)
    said = desk.run(tool.format(job=hopeless), fails=True)
    assert f"no proxy in {proxy}" in said
    assert "voms-proxy-init" in said


def test_a_tool_with_a_broken_proxy_says_so(desk, proxy):
    ok(desk.node, "echo nothing > %s", proxy)
    assert f"the proxy in {proxy} has expired" in desk.run("condor_status", fails=True)


def test_a_tool_that_needs_no_proxy_is_silent(desk, proxy):
    ok(desk.node, "rm %s", proxy)
    assert "proxy" not in desk.run("condor_q -totals && condor_history -limit 1")


