"""What the bench makes of marks, rates and records; and that glexec's start stays as lean as it was measured."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pilotbed_bench import glexec, mapping, run, trace
from pilotbed_bench.glexec import start
from pilotbed_lab import LabError
from pilotbed_suite import CHECKOUT, document

MS = 1_000_000


def test_parts_of_a_call_add_up_to_it() -> None:
    marks = {name: 100 * MS + 2 * MS * at for at, name in enumerate(start.PARTS) if name != "end"}
    split = start.parts((99 * MS, 130 * MS), marks)
    assert split["front"] == 1
    assert set(split.values()) == {1, 2, 10}
    assert sum(split.values()) == 31


def test_samples_take_the_marks_of_their_own_round() -> None:
    names = [name for name in start.PARTS if name != "end"]
    marks = [(name, start * MS + at * MS) for start in (100, 200) for at, name in enumerate(names)]
    rounds = [{"glexec": (99 * MS, 150 * MS), "x": (0, MS)}, {"glexec": (190 * MS, 250 * MS), "x": (0, 2 * MS)}]
    first, second = start.samples(rounds, marks)
    assert (first["to exec"], second["to exec"]) == (9, 18)
    assert (first["without mapping"], first["x"], second["x"]) == (8, 1, 2)
    assert run.ratio([first, second], "to exec", "x") == 9


def test_entry_scripts_are_as_the_bench_knows_them() -> None:
    for path in ("usr/sbin/glexec", "usr/libexec/pilotbed/glexec-root"):
        text = (CHECKOUT / "roles/worker/files" / path).read_text()
        marked = start.marked(text, "a", "b")
        compile(marked, path, "exec")
        assert marked.startswith(text.partition("\n")[0])
    with pytest.raises(LabError):
        start.marked("main()\n", "a", "b")


def test_every_part_has_its_place_in_the_docs() -> None:
    for name, (_, page) in glexec.PARTS.items():
        assert f"<!-- {name} -->\nfigures\n" in document.publish((CHECKOUT / page).read_text(), name, "figures")


def rates(*mappings: float, bad: int = 0) -> dict[str, Any]:
    def way(*found: float) -> dict[str, Any]:
        figures = {"median_ms": 1.0, "p99_ms": 2.0, "answers": 10, "bad": bad}
        return {str(n): figures | {"per_second": each} for n, each in zip(mapping.CLIENTS, found, strict=True)}

    return {"mapping": way(*mappings), "bare": way(*(2000.0 for _ in mappings))}


@pytest.mark.parametrize(
    ("samples", "verdicts"),
    [
        ([rates(1100, 2000, 2100, 1050)] * 3, ("| 1050 | met", "| 0.95 | met", "| 0 | met")),
        ([rates(1100, 2000, 2100, 980)] * 3, ("| 980 | not met", "| 0.89 | not met", "| 0 | met")),
        # One bad round is no verdict on a rate, but one wrong answer is.
        ([rates(1100, 2000, 2100, 1100)] * 2 + [rates(1, 1, 1, 0.5, bad=1)],
         ("| 1100 | met", "| 1.00 | met", "| 4 | not met")),
    ],
)  # fmt: skip
def test_mapping_service_is_fast_and_flat_or_not(samples: list[dict[str, Any]], verdicts: tuple[str, ...]) -> None:
    shown = mapping.tables({"samples": samples, "seconds": 4.0})
    assert all(verdict in shown for verdict in verdicts), shown
    assert "wrong answers, of 120 |" in shown


def test_mapping_service_beside_the_bare_one_is_the_ratio_within_a_round() -> None:
    fast = {name: {n: each | {"per_second": each["per_second"] * 4} for n, each in way.items()}
            for name, way in rates(1000, 1500, 1000, 1000).items()}  # fmt: skip
    shown = mapping.tables({"samples": [rates(1000, 1500, 1000, 1000), fast], "seconds": 4.0})
    assert "| 2 | 3750 | 1.00 | 2.00 | 5000 | 1.00 | 2.00 | 0.75 |" in shown


def test_a_days_records_are_written_and_found_again() -> None:
    template = {"dn": "/CN=Alice", "target": "gl020", "started": "1.0", "wall": "0.1", "ended": "exit 0"}
    logs = trace.day(template, 1_000_000.0, 1000)
    assert (logs[0]["started"], logs[1]["started"], logs[1]["wall"]) == ("1000000.000", "1000086.400", "1382.40")
    assert {log["ended"] for log in logs} == {"exit 0"}
    assert len(set(trace.ids(logs))) == 1000
    assert len(trace.ids(logs, dn="/CN=Alice 7")) == 1000 / trace.USERS
    there = trace.ids(logs, at=float(logs[500]["started"]) + 1)
    assert there == [logs[number]["id"] for number in range(485, 501)]
    assert len({log["target"] for log in logs}) == trace.AT_ONCE


def test_slowest_answer_counts() -> None:
    found = {"samples": [{"who": 1.0}, {"who": 1.0}, {"who": 5.5}], "records": 9, "found": {"who": 3},
             "journal": {"lines": 99, "bytes": 2e6}}  # fmt: skip
    shown = trace.tables(found)
    assert "| who | 3 | 1.00 | 5.50 |" in shown
    assert "| 5.50 | not met |" in shown


@pytest.mark.parametrize("module", ["glexec.front", "glexec.root", "batch.slurm", "lcmaps"])
def test_start_imports_nothing_slow(module: str) -> None:
    """Each of these took 2 to 20 ms of a call that has 40."""
    program = f"import sys; sys.path.insert(0, 'services/src'); import pilotbed.{module}; print(*sys.modules)"
    shown = subprocess.check_output([sys.executable, "-IS", "-c", program], cwd=CHECKOUT, text=True)
    slow = "argparse collections contextlib dataclasses enum functools json pathlib re shutil signal socket typing"
    assert set(slow.split()).isdisjoint(shown.split())
