"""What the bench makes of marks; and that glexec's start stays as lean as it was measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pilotbed.lab import LabError, bench_glexec

CHECKOUT = Path(__file__).resolve().parents[2]
MS = 1_000_000


def test_parts_of_a_call_add_up_to_it() -> None:
    marks = {name: 100 * MS + 2 * MS * at for at, name in enumerate(bench_glexec.PARTS) if name != "end"}
    split = bench_glexec.parts((99 * MS, 130 * MS), marks)
    assert split["front"] == 1
    assert set(split.values()) == {1, 2, 10}
    assert sum(split.values()) == 31


def test_samples_take_the_marks_of_their_own_round() -> None:
    names = [name for name in bench_glexec.PARTS if name != "end"]
    marks = [(name, start * MS + at * MS) for start in (100, 200) for at, name in enumerate(names)]
    rounds = [{"glexec": (99 * MS, 150 * MS), "x": (0, MS)}, {"glexec": (190 * MS, 250 * MS), "x": (0, 2 * MS)}]
    first, second = bench_glexec.samples(rounds, marks)
    assert (first["to exec"], second["to exec"]) == (9, 18)
    assert (first["without mapping"], first["x"], second["x"]) == (8, 1, 2)
    assert bench_glexec.ratio([first, second], "to exec", "x") == 9


def test_entry_scripts_are_as_the_bench_knows_them() -> None:
    for path in ("usr/sbin/glexec", "usr/libexec/pilotbed/glexec-root"):
        text = (CHECKOUT / "roles/worker/files" / path).read_text()
        marked = bench_glexec.marked(text, "a", "b")
        compile(marked, path, "exec")
        assert marked.startswith(text.partition("\n")[0])
    with pytest.raises(LabError):
        bench_glexec.marked("main()\n", "a", "b")


@pytest.mark.parametrize("module", ["glexec.front", "glexec.root", "lcmaps"])
def test_start_imports_nothing_slow(module: str) -> None:
    """Each of these took 2 to 20 ms of a call that has 40."""
    program = f"import sys; sys.path.insert(0, 'services/src'); import pilotbed.{module}; print(*sys.modules)"
    shown = subprocess.check_output([sys.executable, "-IS", "-c", program], cwd=CHECKOUT, text=True)
    slow = "argparse collections contextlib dataclasses enum functools json pathlib re shutil signal socket typing"
    assert set(slow.split()).isdisjoint(shown.split())
