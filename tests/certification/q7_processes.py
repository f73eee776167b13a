"""Question 7: how the hosts are kept: who may log in, which services run, whether updates are there."""

import datetime
import re

import pytest
from pilotbed_suite import declared
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, ok, until

EVERY_NODE = GRID.names("all")
#: How a fact of a node is asked for, by its key in grid_declared.
ASKED = {"units": declared.units, "logins": declared.logins, "sudo": declared.rights}


def strangers(what):
    return {name: found for name in EVERY_NODE if (found := declared.strange(name, what, ASKED[what](host(name))))}


@pytest.mark.check("D7.1")
@pytest.mark.parametrize("what", ["logins", "sudo"])
def test_nobody_may_log_in_or_become_another_but_who_is_declared(what):
    assert strangers(what) == {}


@pytest.mark.check("D7.1")
def test_no_account_has_a_password():
    """Users, pool accounts and root alike: ssh takes keys, and batch systems start jobs as root."""
    for name in EVERY_NODE:
        assert ok(host(name), "awk -F: '$2 !~ /^[!*]/ {print $1}' /etc/shadow") == "", name


@pytest.mark.check("D7.1")
def test_ssh_takes_keys_alone():
    for name in EVERY_NODE:
        said = dict(line.split(" ", 1) for line in ok(host(name), "sshd -T").splitlines() if " " in line)
        assert said["passwordauthentication"] == said["kbdinteractiveauthentication"] == "no", name
        assert said["permitrootlogin"] in ("no", "without-password", "forced-commands-only"), name
        assert said["permitemptypasswords"] == "no", name


@pytest.mark.check("D7.1")
def test_a_login_that_fails_is_in_the_journal(submit):
    who = f"intruder{datetime.datetime.now():%H%M%S}"
    done = submit.run(
        "ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null %s@localhost true", who
    )
    assert done.rc == 255, done
    until("it is there", lambda: f"Invalid user {who}" in submit.run("journalctl -u ssh -g %s -o cat", who).stdout)


@pytest.mark.check("D7.1", control=True)
def test_an_account_and_a_right_that_nobody_declared_are_found(submit):
    name, rule = GRID.names("submit")[0], "/etc/sudoers.d/pilotbed-test"
    try:
        ok(submit, "useradd --no-create-home --shell /bin/bash backdoor")
        ok(submit, "echo 'backdoor ALL=(ALL) NOPASSWD: ALL' > %s; chmod 0440 %s", rule, rule)
        assert declared.strange(name, "logins", declared.logins(submit)) == ["backdoor"]
        assert declared.strange(name, "sudo", declared.rights(submit)) == ["backdoor ALL = (ALL) NOPASSWD: ALL"]
    finally:
        submit.run("rm -f %s; userdel backdoor", rule)


@pytest.mark.check("D7.2")
@pytest.mark.parametrize("name", EVERY_NODE)
def test_no_security_update_is_outstanding(name):
    node = host(name)
    sources = ok(node, "apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages'").split()
    if not any(part.startswith("http") for part in sources):
        built = ok(node, "stat --format %y /var/lib/dpkg/info/base-files.list").split(".")[0]
        pytest.skip(
            f"{name} has no apt source but what came with its image, made at {built}: it has the updates of that day, "
            "and gets others by a new image"
        )
    ok(node, "apt-get update --quiet=2")
    outstanding = re.findall(r"^Inst (\S+) .*-[Ss]ecurity", ok(node, "apt-get --simulate dist-upgrade"), re.MULTILINE)
    assert outstanding == []
    wanted = GRID.variable("hardening_automatic_updates", name)
    there = node.run("apt-config dump APT::Periodic::Unattended-Upgrade").stdout
    assert ('"1"' in there) == bool(wanted)


@pytest.mark.check("D7.5")
def test_no_service_runs_that_no_role_declares():
    assert strangers("units") == {}


@pytest.mark.check("D7.5")
def test_no_service_has_failed():
    failed = {name: ok(host(name), "systemctl --failed --no-legend --plain") for name in EVERY_NODE}
    assert failed == dict.fromkeys(EVERY_NODE, "")


@pytest.mark.check("D7.5", control=True)
def test_a_service_that_nobody_declared_is_found(submit):
    unit = "helpful-miner"
    ok(submit, "systemd-run --quiet --unit %s sleep 60", unit)
    try:
        assert declared.strange(GRID.names("submit")[0], "units", declared.units(submit)) == [unit]
    finally:
        ok(submit, "systemctl stop %s", unit)
