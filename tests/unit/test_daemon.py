"""The daemons' loop: what ends a turn, what ends nothing, and what is said how often."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pilotbed.daemon import NAMED, Daemon, NotReady
from pilotbed.pool import PoolError
from pilotbed.service import first_line, read_file, run_loop, write_metrics


class Worker(Daemon):
    """A daemon whose turns do what the test gives it."""

    def __init__(self, directory: Path, *turns: Callable[[Worker], None]) -> None:
        super().__init__("worker", directory / "state.json", 0.01)
        self.plan = iter(turns)

    def work(self) -> None:
        next(self.plan, lambda _: os.kill(os.getpid(), signal.SIGTERM))(self)

    def withdraw(self) -> None:
        pass

    def status(self, now: float) -> Mapping[str, Any]:
        return {}


def fails(error: Exception) -> Callable[[Worker], None]:
    def turn(_: Worker) -> None:
        raise error

    return turn


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def run(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the loop until the plan is at its end."""
    monkeypatch.setattr("pilotbed.service.LONGEST_PAUSE", 0.01)
    run_loop(worker.turn, worker.loop_delay, (PoolError, NotReady))


def test_no_exception_of_a_turn_ends_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    defect = [fails(ZeroDivisionError("a defect"))] * 3
    worker = Worker(tmp_path, *defect, fails(PoolError("down")), fails(KeyError("x")), *defect, lambda _: None)
    run(worker, monkeypatch)
    assert (worker.turns, worker.failed) == (10, 8)
    assert caplog.text.count("turn-failed") == 7
    assert caplog.text.count("no-decision") == 1
    # With its traceback when it is new: in turn 1, in turn 5, and in turn 6 after that one.
    assert caplog.text.count("Traceback") == 3


def test_the_error_of_a_turn_is_in_the_status(tmp_path: Path) -> None:
    worker = Worker(tmp_path, fails(ZeroDivisionError("a defect")))
    with pytest.raises(ZeroDivisionError):
        worker.turn()
    assert "ZeroDivisionError(\'a defect\')" in (tmp_path / "state.json").read_text()
    assert "pilotbed_worker_turns_failed_total 1\n" in (tmp_path / "metrics.prom").read_text()


def test_what_goes_wrong_apart_is_logged_when_it_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def turn(worker: Worker) -> None:
        for name in ("alpha", "beta"):
            with worker.apart(f"entry {name}"):
                if name == "alpha":
                    raise ZeroDivisionError
                done.append(name)

    done: list[str] = []
    worker = Worker(tmp_path, turn, turn, lambda _: None, turn)
    for _ in range(2):
        worker.turn()
    assert (worker.errors, done, caplog.text.count("Traceback")) == (2, ["beta"] * 2, 1)
    worker.turn()  # it is well again
    worker.turn()
    assert caplog.text.count("Traceback") == 2


@pytest.mark.parametrize("error", [PoolError("down"), NotReady("no stage")])
def test_what_everybody_needs_is_not_kept_apart(tmp_path: Path, error: Exception) -> None:
    worker = Worker(tmp_path)
    with pytest.raises(type(error)), worker.apart("entry alpha"):
        raise error
    assert worker.errors == 0


def test_a_line_is_said_when_it_changes_or_comes_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    says = [lambda worker, n=n: worker.say("entry", "decision", ask=n) for n in (1, 1, 2)]
    keeps = [lambda worker, n=n: worker.once("jobs", "left-out", jobs=n) for n in (5, 6)]
    worker = Worker(tmp_path, *says, lambda _: None, says[-1], *keeps, lambda _: None, keeps[-1])
    for _ in range(9):
        worker.turn()
    assert [record.getMessage() for record in caplog.records] == [
        "decision ask=1", "decision ask=2", "decision ask=2", "left-out jobs=5", "left-out jobs=6",
    ]  # fmt: skip


def test_a_failed_turn_forgets_nothing_that_was_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def say(worker: Worker) -> None:
        worker.say("entry", "decision", ask=1)

    worker = Worker(tmp_path, say, fails(PoolError("down")), say)
    worker.turn()
    with pytest.raises(PoolError):
        worker.turn()
    worker.turn()
    assert caplog.text.count("decision") == 1


def test_absurd_ads_are_counted_by_turn(tmp_path: Path) -> None:
    def odd(worker: Worker) -> None:
        worker.leave_out("jobs", "1.0", "no")
        worker.odd("slots", "slot1", ["Cpus is 3", "Memory is x"])

    worker = Worker(tmp_path, odd, lambda _: None)
    worker.turn()
    assert "pilotbed_worker_slots_values_replaced 2\n" in (tmp_path / "metrics.prom").read_text()
    worker.turn()
    assert worker.absurd == {}


def test_ten_thousand_absurd_ads_do_not_fill_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def many(worker: Worker) -> None:
        for number in range(10_000):
            worker.leave_out("jobs", number, "no")
            worker.odd("slots", number, ["Cpus is 3"])

    worker = Worker(tmp_path, many, many)
    worker.turn()
    worker.turn()
    assert worker.absurd == {"jobs_left_out": 10_000, "slots_values_replaced": 10_000}
    assert len(caplog.records) == 2 * NAMED


def test_metrics_are_in_prometheus_format(tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    write_metrics(tmp_path / "metrics.prom", "pilotbed_x", {"turns_total": 3, "jobs_left_out": 12345678, "share": 0.5})
    found = {
        sample.name: (family.type, sample.value)
        for family in text_string_to_metric_families((tmp_path / "metrics.prom").read_text())
        for sample in family.samples
    }
    assert found == {
        "pilotbed_x_turns_total": ("counter", 3), "pilotbed_x_jobs_left_out": ("gauge", 12345678),
        "pilotbed_x_share": ("gauge", 0.5),
    }  # fmt: skip


def test_files_that_are_none_say_why(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xff")
    with pytest.raises(OSError, match="is not UTF-8 text"):
        read_file(path)
    assert first_line(path) == f"no reason can be read: {path}: is not UTF-8 text"
    assert first_line(tmp_path).endswith("Is a directory")
    path.write_text("\n\n  power cut \nsince noon\n")
    assert first_line(path) == "power cut "
