"""Question 7: what an intruder does is told, within five minutes, in one file and in the journal."""

import re
import time

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, ok, until

ALERTS = "/var/log/pilotbed-alerts.log"
#: Seconds.
WITHIN = 300
#: What is told of what is planted, but for a trust anchor, whose name is the grid's.
PLANTS = {
    "socket": r"socket: python3 listens at tcp \S+:4343",
    "unit": r"unit: helpful-miner runs",
    "setuid": r"setuid: /usr/local/bin/helper",
    "glexec.conf": r"file: /etc/glexec.conf was changed",
    "sudoers": r"file: /etc/sudoers.d/zz-pilotbed-test was added",
}
LISTENS = "import socket, time; s = socket.create_server(('', 4343)); time.sleep(900)"


@pytest.fixture(scope="module")
def victim():
    """A worker: it has everything that is watched."""
    return host(GRID.names("worker")[0])


def told(node, since):
    """What both the file and the journal tell of a node since then (seconds, Unix)."""
    lines = node.run("tail --lines 1000 %s", ALERTS).stdout.splitlines()
    asked = "journalctl --identifier pilotbed-watch --priority alert --since @%s --output cat"
    journal = set(ok(node, asked, str(int(since))).splitlines())
    return [line for _, _, line in (line.partition(" ") for line in lines) if line in journal]


@pytest.fixture(scope="module")
def tampered(victim):
    """What is told of a node with five things planted at once, and within how many seconds each; all is put back."""
    trust = ok(victim, "ls /etc/grid-security/certificates/*.signing_policy").split()[0]
    plants = PLANTS | {"trust": rf"file: {re.escape(trust)} was changed"}
    before, begun = told(victim, 0), time.time()
    try:
        ok(victim, "systemd-run --quiet --unit helpful-miner python3 -c %s", LISTENS)
        ok(victim, "cp /usr/bin/true /usr/local/bin/helper; chmod 4755 /usr/local/bin/helper")
        ok(victim, "cp --archive /etc/glexec.conf /run/glexec.conf.kept; echo '# x' >> /etc/glexec.conf")
        ok(victim, "echo '# x' > /etc/sudoers.d/zz-pilotbed-test; chmod 0440 /etc/sudoers.d/zz-pilotbed-test")
        ok(victim, "cp --archive %s /run/policy.kept; echo '# x' >> %s", trust, trust)
        found = {}

        def all_told():
            lines = told(victim, begun)
            for plant, pattern in plants.items():
                if plant not in found and any(re.fullmatch(pattern, line) for line in lines):
                    found[plant] = time.time() - begun
            return set(found) == set(plants)

        until("all of it is told", all_told, WITHIN + 30)
    finally:
        victim.run("systemctl stop helpful-miner; rm -f /usr/local/bin/helper /etc/sudoers.d/zz-pilotbed-test")
        victim.run("mv /run/glexec.conf.kept /etc/glexec.conf; mv /run/policy.kept %s", trust)
    return before, found


@pytest.mark.check("D7.7")
@pytest.mark.parametrize("plant", [*PLANTS, "trust"])
def test_what_an_intruder_does_is_told_within_five_minutes(tampered, plant):
    _, found = tampered
    assert found[plant] < WITHIN


def refused_logins(victim, number):
    """Have so many logins of nobody refused by the victim, from its site's computing element."""
    attacker = host(next(site.ce for site in GRID.sites if GRID.names("worker")[0] in site.workers))
    for _ in range(number):
        attacker.run(
            "ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null nobody-here@%s true",
            GRID.fqdn(GRID.names("worker")[0]),
        )


def refusals(victim, since):
    """How many refused logins are told of since then, a number a line."""
    lines = (re.search(r"refused: sshd: (\d+) times within five minutes", line) for line in told(victim, since))
    return [int(line[1]) for line in lines if line]


@pytest.mark.check("D7.7")
def test_a_burst_of_refused_logins_is_told_and_a_few_are_not(victim):
    begun = time.time()
    refused_logins(victim, 3)
    seen = "journalctl --unit ssh --since @%s --grep 'Invalid user nobody-here' --output cat"
    until("they are in its journal", lambda: victim.run(seen, str(int(begun))).stdout.count("nobody-here") >= 3)
    assert refusals(victim, begun) == [], "control"
    refused_logins(victim, 10)
    found = until("it is told", lambda: refusals(victim, begun), WITHIN)
    assert found[0] >= 10


@pytest.mark.check("D7.7", control=True)
@pytest.mark.parametrize("plant", ["socket", "unit"])
def test_nothing_of_it_was_told_before(tampered, plant):
    """Nor is it, if a certificate of before has told it."""
    before, _ = tampered
    lines = [line for line in before if re.fullmatch(f"(over: )?{PLANTS[plant]}", line)]
    assert not lines or lines[-1].startswith("over: ")


@pytest.mark.check("D7.7")
def test_its_end_is_told_too(victim, tampered):
    """By the next look, which need not be waited for: the timer's have been seen."""
    ok(victim, "systemctl start pilotbed-watch.service")
    until("it is over", lambda: any("over: unit: helpful-miner runs" in line for line in told(victim, 0)), WITHIN)
