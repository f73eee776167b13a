"""What pilots say of their end in their output, and how much of it counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pilotbed.factory.endings import KNOWN, LOOKED_AT, MOST, RECENT, Endings, read

NOW = 1_800_000_000.0
WHOSE = "vo_vo.main"
NONE = {"Failed": 0, "Unused": 0}
SUMMARY = """=== Glidein ending ===
<OSGTestResult>
  <result>
    <status>{status}</status>
    <metric name="TestID">validate_node.sh</metric>
    <metric name="failure" ts="2026" uri="local">WN_Resource</metric>
  </result>
  <detail>
     {why}
  </detail>
</OSGTestResult>
"""


def output(
    root: Path, job: str, when: float, status: str = "ERROR", why: str = "3 MB are free", before: str = ""
) -> Path:
    path = root / "entry_alpha" / f"vo_vo.main.{job}.out"
    path.parent.mkdir(exist_ok=True)
    path.write_text(before + SUMMARY.format(status=status, why=why))
    os.utime(path, (when, when))
    return path


def test_failures_are_counted_and_the_last_is_told(tmp_path: Path) -> None:
    failures = Endings(tmp_path)
    failures.look("alpha", NOW)
    assert failures.monitor("alpha", WHOSE, NOW) == NONE
    output(tmp_path, "1.0", NOW - 100)
    output(tmp_path, "2.0", NOW - 50, status="OK")
    said = "validate_node.sh (main) failed with code 1: /opt/software &lt;is&gt;\n   missing"
    output(tmp_path, "3.0", NOW - 70, why=said)
    failures.look("alpha", NOW)
    assert failures.monitor("alpha", WHOSE, NOW) == NONE | {
        "Failed": 2, "FailedLast": NOW - 70, "FailedWhy": "validate_node.sh: /opt/software <is> missing"
    }  # fmt: skip
    # Those are known; what is written on is read again, and is one all the same.
    output(tmp_path, "3.0", NOW + 5, why="more")
    failures.look("alpha", NOW + 10)
    assert failures.monitor("alpha", WHOSE, NOW)["FailedWhy"] == "validate_node.sh: more"
    assert failures.monitor("alpha", WHOSE, NOW)["Failed"] == 2
    assert failures.monitor("beta", WHOSE, NOW) == failures.monitor("alpha", "vo_vo.other", NOW) == NONE


def test_an_hour_later_they_count_no_more(tmp_path: Path) -> None:
    failures = Endings(tmp_path)
    output(tmp_path, "1.0", NOW)
    failures.look("alpha", NOW + 1)
    assert failures.monitor("alpha", WHOSE, NOW + RECENT - 1)["Failed"] == 1
    assert failures.monitor("alpha", WHOSE, NOW + RECENT + 1) == NONE
    fresh = Endings(tmp_path)
    fresh.look("alpha", NOW + KNOWN + 1)
    assert fresh.found["alpha"] == {}


def test_pilots_that_no_job_wanted_are_counted_since_the_last_that_had_one(tmp_path: Path) -> None:
    ok = '<status>OK</status>\n<metric name="jobs" ts="x" uri="local">{}</metric>'
    known = Endings(tmp_path)
    for at, (said, unused) in enumerate(
        [(ok.format(0), 1), (ok.format(0), 2), (ok.format(3), 0), (ok.format(0), 1), ("<status>ERROR</status>", 0),
         (ok.format(0), 1), ("<status>OK</status>", 0), (ok.format("many"), 0)]
    ):  # fmt: skip
        path = output(tmp_path, f"{at}.0", NOW + at)
        path.write_text(said)
        os.utime(path, (NOW + at, NOW + at))
        known.look("alpha", NOW + at)
        told = known.monitor("alpha", WHOSE, NOW + at)
        assert told["Unused"] == unused, at
        assert told.get("UnusedLast") == (NOW + at if unused else None)


def test_so_many_are_remembered(tmp_path: Path) -> None:
    failures = Endings(tmp_path)
    for number in range(MOST + 5):
        output(tmp_path, f"{number}.0", NOW + number / 1000)
    failures.look("alpha", NOW + 60)
    assert failures.monitor("alpha", WHOSE, NOW)["Failed"] == MOST


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<status>ERROR</status>", "?: it does not say why"),
        ("<status>ERROR</status><detail>" + "x" * 900 + "</detail>", "?: " + "x" * 300),
        ("<status>ERROR</status>" + "<detail>" * 5000, "?: it does not say why"),
        ('<status>ERROR</status><metric name="TestID">\x1b[31mevil</metric>', "?[31mevil: it does not say why"),
        ("\udcff<status>ERROR</status>", "?: it does not say why"),
    ],
)
def test_what_a_pilot_says_is_one_short_line(tmp_path: Path, text: str, why: str) -> None:
    """Its account writes the file, and a payload without glexec is that account."""
    path = output(tmp_path, "1.0", NOW)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    failure = read(path, NOW)
    assert failure
    assert f"{failure.test}: {failure.why}" == why
    assert (failure.test + failure.why).isprintable()


def test_only_the_end_of_a_long_output_is_read(tmp_path: Path) -> None:
    failure = read(output(tmp_path, "1.0", NOW, before="x" * 3 * LOOKED_AT), NOW)
    assert failure is not None
    early = output(tmp_path, "2.0", NOW)
    early.write_text(early.read_text() + "x" * LOOKED_AT)
    assert read(early, NOW) is None
