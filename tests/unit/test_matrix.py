"""The table of what glexec's key tests have shown under each batch system."""

from pathlib import Path

import pytest
from pilotbed_suite import matrix

PAGE = "before\n<!-- matrix -->\n| old |\n<!-- /matrix -->\nafter\n"


def test_a_run_becomes_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(matrix, "PAGE", page)
    matrix.keep("batch_a", "ce_x", {"g10_groups_stay": "failed", "g2_deleted_job": "passed", "memory": "not tried"})
    matrix.keep("batch_b", "ce_x", {"g2_deleted_job": "passed"})
    assert matrix.main() == 0
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", "<!-- matrix -->"]
    assert lines[2:7] == [
        "|  | `batch_a`, `ce_x` | `batch_b`, `ce_x` |", "| --- | --- | --- |",
        "| G2 deleted job | passed | passed |", "| G10 groups stay | failed |  |", "| memory | not tried |  |",
    ]  # fmt: skip
    assert lines[-2:] == ["<!-- /matrix -->", "after"]


def test_without_a_run_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(matrix, "PAGE", page)
    assert matrix.main() == 1
    assert page.read_text() == PAGE
