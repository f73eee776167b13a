"""Downtimes: what a file says, whom it removes, and the operator's command."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pilotbed.factory import downtime
from pilotbed.factory.decisions import Pilot
from pilotbed.factory.downtime import Downtime
from pilotbed.factory.states import State
from test_absurd import PILOT, Pool, credentials, factory, pilot_proxy, queued, request

TOML = """
factory = "factory"
glidein = "v1"
collector = "factory:9618"
directory = "HERE"
[stage]
web = "http://factory.grid.test/stage"
[frontends.vo]
identity = "frontend@grid.test"
classes = ["pilot"]
[entries.alpha]
gridtype = "arc"
gatekeeper = "https://ce:443/arex/rest/1.0"
queue = "grid"
[entries.beta]
gridtype = "arc"
gatekeeper = "https://ce:443/arex/rest/1.0"
queue = "grid"
"""


@pytest.mark.parametrize(
    ("text", "expected", "noted"),
    [
        ("disk\n", Downtime("disk"), 0),
        ("", Downtime("no reason given"), 0),
        ("disk\nuntil: 2027-01-31T18:00+00:00\nremove: waiting\n", Downtime("disk", 1801418400, "waiting"), 0),
        ("disk\n\n remove :all \n", Downtime("disk", None, "all"), 0),
        ("until: 2027-01-31T18:00+00:00\nwe see\n", Downtime("we see", 1801418400), 0),
        ("disk\nuntil: tomorrow\nremove: everything\nask Bob\n", Downtime("disk"), 2),
        ("disk\nuntil: 9999-12-31T23:59:59.9-23:59\n", Downtime("disk"), 1),
        ("disk\nuntil:\nremove:\n", Downtime("disk"), 1),
    ],
)
def test_a_file_says_how_long_and_who_goes(tmp_path: Path, text: str, expected: Downtime, noted: int) -> None:
    path, notes = tmp_path / "alpha", list[str]()
    path.write_text(text)
    found = downtime.read(path, notes)
    assert found == expected
    assert len(notes) == noted, notes
    path.write_text(found.text())
    assert downtime.read(path, []) == found


@pytest.mark.parametrize(
    ("name", "remove", "gone"),
    [
        ("alpha", "", ""),
        ("alpha", "waiting", "wsh"),
        ("alpha", "all", "wshr"),
        ("beta", "all", ""),
        ("ALL", "all", "wshr"),
        ("vo:pilot", "waiting", "wsh"),
        ("vo:other", "all", ""),
    ],
)
def test_who_goes(name: str, remove: str, gone: str) -> None:
    states = {"w": State.PENDING, "s": State.UNSUBMITTED, "h": State.HELD, "r": State.RUNNING}
    pilots = [Pilot(job, "alpha", "vo.main", "vo:pilot", "c", state, 0) for job, state in states.items()]
    assert "".join(pilot.job for pilot in downtime.leaving(pilots, {name: Downtime("x", None, remove)})) == gone
    both = {name: Downtime("x", None, remove), "alpha": Downtime("y", None, "all")}
    assert len(downtime.leaving(pilots, both)) == 4, "the one that removes more counts"


def test_the_factory_removes_whom_a_downtime_removes_and_forgets_it_when_it_is_over() -> None:
    jobs = [PILOT, PILOT | {"ClusterId": 8, "JobStatus": 2}, PILOT | {"ClusterId": 9, "GlideinEntryName": "alpha"}]
    pool = Pool([credentials(pilot_proxy()), request("alpha")], jobs)

    def gone() -> tuple[str, ...]:
        return tuple(job for action, jobs in pool.acted if action == "remove" for job in jobs)

    with factory(pool) as daemon:
        path = daemon.config.directory / "downtime/beta"
        for remove, removed in (("", ()), ("waiting", ("7.0",)), ("all", ("7.0", "8.0"))):
            pool.acted.clear()
            path.write_text(Downtime("disk", None, remove).text())
            daemon.turn()
            assert gone() == removed
            assert daemon.entries["beta"]["downtime"] == "disk"
        path.write_text(Downtime("disk", time.time() - 1, "all").text())
        pool.acted.clear()
        daemon.turn()
        assert gone() == ()
        assert daemon.entries["beta"]["downtime"] == ""
        assert queued(pool) > 0, "control: the other entry went on"
        assert daemon.errors == 0


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    config = tmp_path / "factory.toml"
    config.write_text(TOML.replace("HERE", str(tmp_path)))
    (tmp_path / "downtime").mkdir()

    def run(*words: str) -> tuple[int, str]:
        code = downtime.main(["--config", str(config), *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_an_operator_makes_and_ends_a_downtime(command: Command, tmp_path: Path) -> None:
    assert command("list") == (0, "no downtime\n")
    until = time.time() + 3600
    when = time.strftime("%FT%T", time.localtime(until))
    code, said = command("downtime", "alpha", "--until", when, "--reason", "new disks")
    assert code == 0
    assert said.startswith("alpha: new disks; until ") and said.endswith("; waiting pilots are removed\n")
    found = downtime.read(tmp_path / "downtime/alpha", [])
    assert replace(found, until=None) == Downtime("new disks", None, "waiting")
    assert found.until == int(until)
    assert command("list") == (0, said)
    code, said = command("downtime", "alpha", "--now", "--reason", "two\nlines")
    assert (code, said) == (0, "alpha: two lines; until it is taken away; all pilots are removed\n")
    assert command("up", "alpha")[0] == command("up", "alpha")[0] == 0
    assert command("list") == (0, "no downtime\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("downtime", "alhpa"), "'alhpa' is none of ALL, alpha, beta, vo:pilot"),
        (("downtime", "../alpha"), "'../alpha' is none of"),
        (("up", "gamma"), "'gamma' is none of"),
        (("downtime", "alpha", "--until", "soon"), "'soon' is no time such as 2027-01-31T18:00"),
        (("downtime", "alpha", "--until", "2001-01-01T00:00"), "--until 2001-01-01T00:00 is over"),
    ],
)
def test_what_an_operator_mistypes_changes_nothing(
    command: Command, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    code, said = command(*words)
    assert code == 1 and told in said
    assert list((tmp_path / "downtime").iterdir()) == []
