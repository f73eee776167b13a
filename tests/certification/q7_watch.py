"""Question 7: what an intruder does is told, within five minutes, in one file and in the journal.

It is done first, and looked for when the others of stage 2 have been tried: a watch looks once a minute or so.
"""

import datetime as dt
import re
from dataclasses import dataclass

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, edited, ok, until

#: A worker: it has everything that is watched.
VICTIM = GRID.names("worker")[0]
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
LISTENS = "import socket, time; s = socket.create_server(('', 4343)); time.sleep(1800)"
REFUSED = r"refused: sshd: (\d+) times within five minutes from \S+"


@pytest.fixture(scope="session")
def victim():
    return host(VICTIM)


def now(node):
    """Seconds, Unix, by a node's own clock, with which its alerts are told."""
    return int(ok(node, "date +%s"))


def told(node, pattern, since=0):
    """Match and time (seconds, Unix) of what both the file and the journal tell of a node since then."""
    asked = "journalctl --identifier pilotbed-watch --priority alert --since @%s --output cat"
    journal = set(ok(node, asked, str(since)).splitlines())
    lines = (line.partition(" ") for line in node.run("tail --lines 1000 %s", ALERTS).stdout.splitlines())
    times = ((dt.datetime.fromisoformat(time).timestamp(), line) for time, _, line in lines if line in journal)
    return [(found, time) for time, line in times if time >= since and (found := re.fullmatch(pattern, line))]


@dataclass(frozen=True)
class Tampered:
    """What is told of each thing that was planted, what was told of it before, and since when all of it is there."""

    plants: dict[str, str]
    before: dict[str, list]
    begun: int


@pytest.fixture(scope="session")
def tampered(victim):
    """A node with six things planted at once; all is put back."""
    trust = ok(victim, "ls /etc/grid-security/certificates/*.signing_policy").split()[0]
    plants = PLANTS | {"trust": rf"file: {re.escape(trust)} was changed"}
    before = {plant: told(victim, f"(over: )?{pattern}") for plant, pattern in plants.items()}
    begun = now(victim)
    try:
        with edited(victim, "/etc/glexec.conf", "echo '# x' >> $f"), edited(victim, trust, "echo '# x' >> $f"):
            ok(victim, "systemd-run --quiet --unit helpful-miner python3 -c %s", LISTENS)
            ok(victim, "cp /usr/bin/true /usr/local/bin/helper; chmod 4755 /usr/local/bin/helper")
            ok(victim, "echo '# x' > /etc/sudoers.d/zz-pilotbed-test; chmod 0440 /etc/sudoers.d/zz-pilotbed-test")
            yield Tampered(plants, before, begun)
    finally:
        victim.run("systemctl stop helpful-miner; rm -f /usr/local/bin/helper /etc/sudoers.d/zz-pilotbed-test")
        # The next deployment restarts what is older than a file of its role.
        victim.run("systemctl restart pilotbed-fetch-crl.timer")
        # What is planted again before the next look would not be told again.
        victim.run("systemctl start pilotbed-watch.service")


@pytest.mark.check("D7.7", control=True)
@pytest.mark.parametrize("plant", ["socket", "unit"])
def test_nothing_of_it_was_told_before(tampered, plant):
    """Or it is told that it was over, if a certificate of before has tried it."""
    before = tampered.before[plant]
    assert not before or before[-1][0][0].startswith("over: ")


@pytest.fixture(scope="session")
def refused(victim):
    """Since when a few logins of nobody were refused by the victim, since when many, and what was told before those."""
    attacker = host(next(site.ce for site in GRID.sites if VICTIM in site.workers))

    def refuse(number):
        begun, name = now(victim), GRID.fqdn(VICTIM)
        ssh = "ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null nobody-here@%s true"
        # Not all at once: sshd drops some of what comes then (MaxStartups in sshd_config(5)).
        attacker.run(f"for n in $(seq {number}); do {ssh} & [ $((n %% 5)) != 0 ] || wait; done; wait", name)
        return begun

    # Whom it has told of, a certificate of just before, say, it does not tell of again within five minutes.
    ok(victim, "fail2ban-client unban --all")
    few = refuse(3)
    seen = "journalctl --unit ssh --since @%s --grep 'Invalid user nobody-here' --output cat | wc -l"
    until("they are in its journal", lambda: int(ok(victim, seen, str(few))) >= 3)
    before = told(victim, REFUSED, few)
    return few, before, refuse(10)


@pytest.mark.check("D7.7", control=True)
def test_a_few_refused_logins_are_not_told(refused):
    _, before, _ = refused
    assert before == []


# -- looked for when others have been tried


@pytest.mark.check("D7.7")
@pytest.mark.stage(2)
def test_a_burst_of_refused_logins_is_told(victim, refused):
    few, _, many = refused
    (found, time), *_ = until("it is told", lambda: told(victim, REFUSED, few), WITHIN)
    assert int(found[1]) >= 10
    assert time - many < WITHIN


@pytest.mark.check("D7.7")
@pytest.mark.stage(2)
@pytest.mark.parametrize("plant", [*PLANTS, "trust"])
def test_what_an_intruder_does_is_told_within_five_minutes(victim, tampered, plant):
    pattern = tampered.plants[plant]
    left = max(tampered.begun + WITHIN + 30 - now(victim), 1)
    found = until("it is told", lambda: told(victim, pattern, tampered.begun), left)
    assert found[0][1] - tampered.begun < WITHIN


@pytest.mark.check("D7.7")
@pytest.mark.stage(2)
def test_its_end_is_told_too(victim, tampered):
    """By the next look, which need not be waited for: the timer's have been seen."""
    end = now(victim)
    ok(victim, "systemctl stop helpful-miner")
    ok(victim, "systemctl start pilotbed-watch.service")
    until("it is over", lambda: told(victim, f"over: {PLANTS['unit']}", end), WITHIN)
