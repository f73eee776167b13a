"""What runs side by side has labs of its own; the end of ``make test`` says what failed, and why."""

from pilotbed_lab.nodes import NAME
from pilotbed_suite.parts import PARTS, TOLD, every_scenario, failures

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="0" tests="3">
<testcase classname="tests.grid.test_batch" name="test_g1[slurm]"/>
<testcase classname="tests.grid.test_batch" name="test_g2[slurm]"><failure message="Failed: not within 60 s: it runs">
a long trace</failure></testcase>
<testcase classname="tests.grid.test_batch" name="test_g3[slurm]"><error message="{0}">trace</error></testcase>
<testcase classname="tests.grid.test_batch" name="test_g4[slurm]"><error message="{0}">trace</error></testcase>
</testsuite></testsuites>
"""


def test_each_failed_test_is_named_with_its_reason(tmp_path):
    report = tmp_path / "test.xml"
    report.write_text(REPORT.format("x" * 5000))
    first, second = failures(report, tmp_path / "test.log")
    assert first == "test_batch::test_g2[slurm]: Failed: not within 60 s: it runs\na long trace"
    assert second == f"test_batch::test_g3[slurm] (and 1 more, with the same words): {'x' * TOLD[1]}"


def test_where_no_test_failed_the_log_says_why(tmp_path):
    report, log = tmp_path / "test.xml", tmp_path / "test.log"
    log.write_text(f"{'begins ' * 1000}\nmolecule: converge failed\n")
    report.write_text(REPORT.partition("<testcase")[0] + "</testsuite></testsuites>")
    for told in (failures(report, log), failures(tmp_path / "none.xml", log)):
        assert len(told) == 1
        assert len(told[0]) <= TOLD[0]
        assert told[0].endswith("converge failed")


def test_scenarios_side_by_side_have_labs_of_their_own():
    lanes = every_scenario(3)
    chosen = [*(next(lane) for lane in lanes), *lanes[1], *lanes[0]]
    names = [part.name for part in chosen]
    assert sorted(names) == sorted(set(names)), "none twice"
    assert {"upgrade", "ce_gram-batch_pbs"} < set(names)
    assert "default" not in names
    chosen += [part for part in PARTS if "MOLECULE_LAB" in part.environment]
    assert all(NAME.fullmatch(part.environment["MOLECULE_LAB"]) for part in chosen)
    for own in ("MOLECULE_LAB", "MOLECULE_EPHEMERAL_DIRECTORY"):
        used = {part.environment[own]: part.lane for part in chosen}
        assert len(used) == len(set(used.values())) == 4
