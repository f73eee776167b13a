"""The end of ``make test`` says which tests failed, and why: it may be all that somebody has kept of it."""

from pilotbed_suite.parts import TOLD, failures

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="0" tests="3">
<testcase classname="tests.grid.test_batch" name="test_g1[slurm]"/>
<testcase classname="tests.grid.test_batch" name="test_g2[slurm]"><failure message="Failed: not within 60 s: it runs">
a long trace</failure></testcase>
<testcase classname="tests.grid.test_batch" name="test_g3[slurm]"><error message="{0}">trace</error></testcase>
</testsuite></testsuites>
"""


def test_each_failed_test_is_named_with_its_reason(tmp_path):
    report = tmp_path / "test.xml"
    report.write_text(REPORT.format("x" * 5000))
    first, second = failures(report, tmp_path / "test.log")
    assert first == "test_batch::test_g2[slurm]: Failed: not within 60 s: it runs"
    assert second == f"test_batch::test_g3[slurm]: {'x' * TOLD[1]}"


def test_where_no_test_failed_the_log_says_why(tmp_path):
    report, log = tmp_path / "test.xml", tmp_path / "test.log"
    log.write_text(f"{'begins ' * 1000}\nmolecule: converge failed\n")
    report.write_text(REPORT.partition("<testcase")[0] + "</testsuite></testsuites>")
    for told in (failures(report, log), failures(tmp_path / "none.xml", log)):
        assert len(told) == 1
        assert len(told[0]) <= TOLD[0]
        assert told[0].endswith("converge failed")
