"""What counts as a walk, and how it is shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import pytest
from pilotbed_suite import GridError
from pilotbed_suite import walk as module
from pilotbed_suite.walk import STAGES, Trace, problems, table


def trace(user: str, account: str) -> Trace:
    """Return the trace of a job to which everything happened that must."""
    return Trace(
        user=user,
        fqan="/gridlab",
        job="7.0",
        dn=f"/DC=test/DC=grid/O=Gridlab/OU=People/CN={user.title()}",
        entry="alpha",
        site="alpha",
        worker="alpha-wn1.grid.test",
        pilot_account="pilot003",
        payload_account=account,
        way="relay",
        relay="relay.grid.test:41000",
        relay_streams=5,
        exit_code=0,
        first_line=f"hello from {account} on alpha-wn1.grid.test",
        times={stage: 1000.0 + 2.5 * index for index, stage in enumerate(STAGES)},
    )


def walk() -> list[Trace]:
    return [trace("alice", "gl001"), trace("bob", "gl002")]


def test_a_good_walk_has_no_problems() -> None:
    assert problems(walk()) == []


WRONG: list[tuple[str, Callable[[Trace], object], str]] = [
    ("exit-code", lambda t: setattr(t, "exit_code", 1), "bob (7.0): exit code 1"),
    ("no-exit-code", lambda t: setattr(t, "exit_code", None), "bob (7.0): exit code None"),
    ("output", lambda t: setattr(t, "first_line", "hello from gl001 on alpha-wn1.grid.test"),
     "bob (7.0): the output begins with 'hello from gl001 on alpha-wn1.grid.test'"),
    ("no-payload-account", lambda t: setattr(t, "payload_account", ""), "bob (7.0): the payload ran as ''"),
    ("no-pilot-account", lambda t: setattr(t, "pilot_account", "root"),
     "bob (7.0): 'root' is no pool account of pilots"),
    ("no-relay", lambda t: setattr(t, "relay", ""), "bob (7.0): the claim did not come through the relay (no address)"),
    ("no-stream", lambda t: setattr(t, "relay_streams", 0),
     "bob (7.0): the claim did not come through the relay (relay.grid.test:41000)"),
    ("unseen", lambda t: (t.times.pop("requested"), t.times.pop("matched")),
     "bob (7.0): nobody saw it requested, matched"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_is_wrong_is_said_of_the_job(change: Callable[[Trace], object], message: str) -> None:
    alice, bob = walk()
    change(bob)
    found = problems([alice, bob])
    assert [line for line in found if line.startswith(message)], found
    assert not [line for line in found if line.startswith("alice")]


def test_a_payload_under_the_account_of_its_pilot_is_a_problem() -> None:
    alice, bob = walk()
    bob.payload_account = bob.pilot_account
    bob.first_line = f"hello from {bob.pilot_account} on {bob.worker}"
    assert problems([alice, bob]) == ["bob (7.0): the payload ran as 'pilot003', the pilot as 'pilot003'"]


def test_two_users_under_one_account_are_a_problem() -> None:
    assert problems([trace("alice", "gl001"), trace("bob", "gl001")]) == [
        "two users ran under one account: gl001, gl001"
    ]


def test_the_table_has_a_column_for_each_job_and_a_row_for_each_stage() -> None:
    lines = table(walk()).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == ["", "alice's job 7.0", "bob's job 7.0"]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in (line.split("|") for line in lines)}
    assert rows["payload account"] == ["gl001", "gl002"]
    assert rows["relay address"] == ["relay.grid.test:41000, 5 streams"] * 2
    assert rows["exit code"] == ["0", "0"]
    assert [name for name in rows if name in STAGES] == list(STAGES)
    # Times count from the job's own submission.
    assert [re.split(r"\s+", rows[stage][0], maxsplit=1)[1] for stage in ("submitted", "requested", "done")] == [
        "+0.0 s", "+2.5 s", "+17.5 s"
    ]
    assert len({line.index("|") for line in lines if "|" in line}) == 1


def test_the_table_shows_what_nobody_saw_as_a_dash() -> None:
    alice, bob = walk()
    bob.times = {"submitted": 1000.0}
    bob.exit_code = None
    rows = {line.split("|")[0].strip(): line.split("|")[-1].strip() for line in table([alice, bob]).splitlines()}
    assert (rows["matched"], rows["exit code"]) == ("-", "-")


def test_a_job_is_over_when_its_ad_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the queue it says "done" for a moment before it has all of it: a walk missed "registered" and "done"."""
    whole = {"JobStatus": 4, "CompletionDate": 1, "LastRemoteHost": "slot1@pilot"}
    seen = iter([{}, {"JobStatus": 2}, {"JobStatus": 4}, whole | {"CompletionDate": 0}, whole])
    monkeypatch.setattr(module, "job_ad", lambda _node, _job: next(seen))
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    assert module.wait(cast(Any, None), {"alice": "1.0"}) == {"alice": whole}


def test_a_node_that_does_not_run_is_said_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nodes:
        stdout = "a line\n"

        def run(self, _command: str) -> Nodes:
            return self

    def host(name: str) -> Nodes:
        if name == "alpha-ce":
            raise GridError("node alpha-ce does not run")
        return Nodes()

    monkeypatch.setattr(module, "host", host)
    said = module.explain()
    assert "/var/log/arc/arex.log" in said
    assert "\nnode alpha-ce does not run\n" in said
    assert said.count("\na line") >= 8
