"""pilotbed-watch: what a host says of itself, whatever that is, and what is told of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pilotbed.watch import cli, facts
from pilotbed.watch.cli import Finding, Watch
from pilotbed_suite import CHECKOUT

SS = """\
tcp   LISTEN 0      128                   0.0.0.0:22         0.0.0.0:*    users:(("sshd",pid=63,fd=6))
tcp   LISTEN 0      128             127.0.0.53%lo:53         0.0.0.0:*    users:(("systemd-resolve",pid=34,fd=20))
tcp   LISTEN 0      128                      [::]:2049          [::]:*
udp   UNCONN 0      0                     0.0.0.0:4242       0.0.0.0:*    users:(("python3",pid=1),("sh",pid=2))
"""
UNITS = """\
ssh.service loaded active running OpenBSD Secure Shell server
pilotbed-fetch-crl.timer loaded active waiting Fetch
voms@cosmo.service loaded active running VOMS
x\\x2dy.socket loaded active listening odd
"""
DECLARED: dict[str, Any] = {
    "sockets": [
        {"program": "sshd", "port": 22, "proto": "tcp", "from": "grid", "protected": "keys"},
        {"program": "systemd-resolve", "port": 53, "proto": "tcp", "from": "host", "protected": "loopback"},
        {"program": "-", "port": "2000-2100,9", "proto": "tcp", "from": "site", "protected": "NFS"},
    ],
    "units": ["ssh", "pilotbed-fetch-crl.timer", "voms@*"],
}
AIDE = json.dumps({"changed": {"/etc/glexec.conf": "f <.... .H. "}, "added": {"/etc/sudoers.d/x\ny": "f+++"}})


def test_every_listener_is_read_once() -> None:
    found = facts.listeners(SS)
    assert [(one.protocol, one.port, one.program) for one in found] == [
        ("tcp", 22, "sshd"), ("tcp", 53, "systemd-resolve"), ("tcp", 2049, "-"), ("udp", 4242, "python3"),
    ]  # fmt: skip
    assert [bool(facts.protection(one, DECLARED["sockets"])) for one in found] == [True, True, True, False]


@pytest.mark.parametrize(
    ("address", "port", "program", "expected"),
    [
        ("0.0.0.0", 443, "arched", "TLS"),
        ("[::]", 20050, "arched", "range"),
        ("0.0.0.0", 20100, "arched", ""),
        ("0.0.0.0", 443, "nc", ""),
        ("127.0.0.1", 9701, "relay", "loopback"),
        ("0.0.0.0", 9701, "relay", ""),
        ("*", 51234, "squid", "dynamic"),
    ],
)
def test_a_socket_is_as_protected_as_its_declaration_says(address: str, port: int, program: str, expected: str) -> None:
    declarations: list[dict[str, Any]] = [
        {"program": "arched", "proto": "tcp", "port": 443, "from": "any", "protected": "TLS"},
        {"program": "arched", "proto": "tcp", "port": "20000-20099,30000", "from": "any", "protected": "range"},
        {"program": "relay", "proto": "tcp", "port": 9701, "from": "host", "protected": "loopback"},
        {"program": "squid", "proto": "tcp", "port": "dynamic", "from": "nobody", "protected": "dynamic"},
    ]
    assert facts.protection(facts.Listener("tcp", port, address, program), declarations) == expected


#: What a machine's own address and time need; seen on Debian 13 half a lease after its start.
MACHINE = """\
udp   UNCONN 0      0        192.168.121.221%eth0:68         0.0.0.0:*    users:(("systemd-network",pid=9,fd=21))
udp   UNCONN 0      0       [fe80::1%eth0]%eth0:546             [::]:*    users:(("systemd-network",pid=9,fd=22))
udp   UNCONN 0      0                   0.0.0.0:68           0.0.0.0:*    users:(("dhcpcd",pid=9,fd=7))
udp   UNCONN 0      0                   0.0.0.0:40123        0.0.0.0:*    users:(("systemd-timesyn",pid=9,fd=7))
"""


def test_a_machine_may_ask_for_its_address_and_the_time() -> None:
    known = yaml.safe_load((CHECKOUT / "inventory/common/group_vars/all/firewall.yml").read_text())["all_sockets"]
    assert all(facts.protection(one, known) for one in facts.listeners(MACHINE))
    served = facts.listeners(MACHINE.replace(":68 ", ":67 ").replace(":546 ", ":547 ").replace("timesyn", "other"))
    assert not any(facts.protection(one, known) for one in served)


def test_units_are_compared_without_their_endings() -> None:
    assert facts.units(UNITS) == ["pilotbed-fetch-crl", "ssh", "voms@cosmo", "x\\x2dy"]
    assert facts.undeclared(facts.units(UNITS), DECLARED["units"]) == ["x\\x2dy"]


class Host:
    """Says what it is told to, to each command by its first word."""

    def __init__(self, **said: tuple[int, str]) -> None:
        self.said = {"ss": (0, SS), "systemctl": (0, UNITS), "find": (1, "/usr/bin/su\0/tmp/x\ny\0"),
                     "aide": (5, AIDE), **said}  # fmt: skip
        self.asked: list[str] = []

    def __call__(self, command: str) -> tuple[int, str]:
        self.asked.append(command)
        return self.said[command.split(maxsplit=1)[0].rpartition("/")[2]]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Watch]:
    def make(**said: Any) -> Watch:
        (tmp_path / "setuid.json").write_text('["/usr/bin/su"]')
        return Watch(DECLARED, tmp_path, Host(**said))

    return make


def test_what_is_found(made: Callable[..., Watch]) -> None:
    assert {str(finding) for finding in made().look()} == {
        "socket: python3 listens at udp 0.0.0.0:4242",
        "unit: x\\\\x2dy runs",
        "setuid: /tmp/x\\ny",
        "file: /etc/glexec.conf was changed",
        "file: /etc/sudoers.d/x\\ny was added",
    }


@pytest.mark.parametrize(
    ("said", "finding"),
    [
        ({"ss": (0, "what?\n")}, "sockets could not be looked at"),
        ({"ss": (127, "")}, "sockets could not be looked at: ss"),
        ({"systemctl": (1, "Failed to connect to bus")}, "units could not be looked at"),
        ({"aide": (17, "ERROR: no database")}, "files could not be looked at: aide: exit code 17"),
        ({"aide": (4, "no JSON")}, "files could not be looked at"),
        ({"aide": (4, "[]")}, "files could not be looked at"),
    ],
)
def test_a_look_that_fails_is_told_and_the_others_go_on(
    made: Callable[..., Watch], said: dict[str, Any], finding: str
) -> None:
    found = {str(one) for one in made(**said).look()}
    assert any(one.startswith(f"watch: {finding}") for one in found), found
    assert "setuid: /tmp/x\\ny" in found


def test_nothing_is_told_twice_and_its_end_is(made: Callable[..., Watch]) -> None:
    watch, lines = made(), list[str]()
    one, other = Finding("unit", "miner runs"), Finding("setuid", "/tmp/x")
    for found in ({one}, {one}, {one, other}, {other}):
        watch.tell(found, lines.append)
    assert lines == ["unit: miner runs", "setuid: /tmp/x", "over: unit: miner runs"]


@pytest.mark.parametrize("kept", ["", "{", '["x"]', "[[1]]", "\0", "null"])
def test_what_was_told_is_told_again_if_nobody_knows(made: Callable[..., Watch], kept: str) -> None:
    watch, lines = made(), list[str]()
    (watch.state / "told.json").write_text(kept)
    watch.tell({Finding("unit", "miner runs")}, lines.append)
    assert lines == ["unit: miner runs"]


def test_a_full_disk_keeps_nothing_from_the_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell = cli._teller(Path("/dev/full"))
    tell("unit: miner runs")
    said = capsys.readouterr().out
    assert "<1>unit: miner runs\n" in said
    assert "<3>/dev/full: " in said


def test_what_is_accepted_is_named_and_not_found_again(made: Callable[..., Watch]) -> None:
    watch = made()
    (watch.state / "aide.db.new").write_text("of aide")
    watch.run.said["aide"] = (0, "")  # type: ignore[attr-defined]
    assert watch.accept() == ["setuid: /tmp/x\\ny", "file: nothing was accepted before"]
    assert (watch.state / "aide.db").read_text() == "of aide"
    assert not [finding for finding in watch.look() if finding.kind in ("setuid", "file", "watch")]
    assert watch.accept() == []


def test_a_baseline_that_cannot_be_made_is_an_error_and_the_old_one_stands(made: Callable[..., Watch]) -> None:
    watch = made(aide=(17, "no space"))
    (watch.state / "aide.db").write_text("old")
    with pytest.raises(ValueError, match="aide --init: exit code 17: no space"):
        watch.accept()
    assert (watch.state / "aide.db").read_text() == "old"
