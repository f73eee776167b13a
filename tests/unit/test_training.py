"""Every lesson is whole, and the commands around lessons refuse what cannot be meant, without a grid."""

import re
import subprocess
import sys

import pytest
import yaml
from pilotbed_suite import CHECKOUT
from pilotbed_training import TrainingError, fingerprint, lessons, stage
from pilotbed_training import __main__ as command

LESSONS = lessons.every()
TARGETS = set(re.findall(r"^([a-z-]+)(?:[a-z -]*):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
TARGETS |= {
    name for line in re.findall(r"^([a-z -]+): ready", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    for name in line.split()
}  # fmt: skip
#: Of every inventory.
GROUPS = set(re.findall(r"^ +(\w+):", (CHECKOUT / "inventory/common/groups.yml").read_text(), re.MULTILINE))
each = pytest.mark.parametrize("lesson", LESSONS, ids=[lesson.path.name for lesson in LESSONS])


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No lesson has been begun."""
    monkeypatch.setattr(stage.State, "path", staticmethod(lambda: tmp_path / "lesson.json"))
    return tmp_path / "lesson.json"


def test_every_lesson_has_a_number_of_its_own():
    assert len({lesson.number for lesson in LESSONS}) == len(LESSONS) > 0


@each
def test_lesson_has_every_file(lesson):
    assert [name for name in lessons.FILES if not (lesson.path / name).read_text().strip()] == []


@each
def test_its_pages_are_one_page_each_and_have_their_parts(lesson):
    trainer = (lesson.path / "trainer.md").read_text()
    for part in ("**Broken:**", "**A good student finds it so:**", "**Solution:**", "**To discuss:**"):
        assert part in trainer
    assert len(lesson.story.splitlines()) <= 45
    assert "To read:" in lesson.story
    for page in re.findall(r"\]\(([^)#]+)\)", lesson.story + trainer):
        assert (lesson.path / page).exists(), page


@each
def test_its_hints_are_graded(lesson):
    titles = [hint.partition("\n")[0] for hint in lesson.hints]
    assert len(titles) >= 3
    assert titles[-1] == "The remedy"
    assert all(hint.partition("\n")[2].strip() for hint in lesson.hints)


@each
def test_its_checks_say_what_is_so(lesson):
    assert lesson.checks
    statements = [lessons.statement(check) for check in (*lesson.checks, *lesson.jobs)]
    assert all(statements)
    assert len(set(statements)) == len(statements)


@each
def test_its_playbooks_parse(lesson):
    for path in lesson.path.glob("*.yml"):
        plays = yaml.safe_load(path.read_text())
        for play in plays:
            if "ansible.builtin.import_playbook" not in play:
                assert play["gather_facts"] is False, "facts cost more than all the rest"
                named = {name.lstrip("&!") for name in play["hosts"].split(":")}
                assert named <= {"all", *GROUPS}, "groups, so that any inventory will do"


@each
def test_its_pages_name_commands_that_there_are(lesson):
    text = "".join((lesson.path / name).read_text() for name in ("student.md", "trainer.md", "hints.md"))
    assert {name for name in re.findall(r"`make ([a-z-]+)", text) if name not in TARGETS} == set()
    ours = set(re.findall(r"\bpilotbed-[a-z]+(?:-[a-z]+)*", text))
    there = {path.name.removesuffix(".j2") for path in CHECKOUT.glob("roles/*/files/usr/bin/*")}
    units = {path.name.split(".")[0].split("@")[0] for path in CHECKOUT.glob("roles/*/*/etc/systemd/system/*")}
    assert {name for name in ours if name not in there | units} == set()


@pytest.mark.parametrize("number", ["77", "abc", "0", "-1", "3.0"])
def test_a_number_that_is_none_is_named(number, nowhere, capsys):
    for what in ("lesson", "hint", "check"):
        assert command.main([what, "--", number]) == 1
        told = capsys.readouterr().err
        assert f"N={number}: there is no such lesson" in told
        assert LESSONS[0].title in told


def test_one_digit_will_do():
    assert lessons.find(LESSONS[0].number.lstrip("0")) == LESSONS[0]


def test_without_a_lesson_there_is_nothing_to_hint_at_or_check(nowhere, capsys):
    for what in ("hint", "check"):
        assert command.main([what]) == 1
        assert "no lesson has been begun: `make lesson N=01` first" in capsys.readouterr().err


def test_another_lesson_than_the_one_begun_is_told(nowhere):
    stage.State(LESSONS[0].number).keep()
    with pytest.raises(TrainingError, match=f"lesson {LESSONS[0].number} has been begun"):
        stage.current(LESSONS[1].number)


def test_hints_come_one_by_one_and_then_all_of_them(nowhere, capsys):
    lesson = LESSONS[0]
    stage.State(lesson.number).keep()
    for number, hint in enumerate(lesson.hints):
        assert command.main(["hint"]) == 0
        assert capsys.readouterr().out == f"hint {number + 1} of {len(lesson.hints)}: {hint}\n"
    command.main(["hint", lesson.number])
    assert "no more than these" in capsys.readouterr().out


def test_without_a_lab_a_lesson_says_what_makes_one(nowhere):
    done = subprocess.run(
        [sys.executable, "-m", "pilotbed_training", "lesson", LESSONS[0].number], cwd=CHECKOUT,
        env={"PATH": "/usr/bin:/bin", "LAB": "nosuchlab", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no node of lab nosuchlab runs: `make lab INVENTORY=mini`" in done.stderr or "as root" in done.stderr


BEFORE = {"site": {"file /etc/a": "1", "file /etc/b": "1", "unit x.service": "runs", "enabled x.service": "enabled",
                   "packet filter": "drop", "routes -4": "a", "kernel net/loose": "1"}}  # fmt: skip


def test_a_difference_is_told_in_a_sentence():
    after = {"site": {"file /etc/b": "2", "file /etc/c": "1", "unit x.service": "failed", "enabled x.service": "masked",
                      "packet filter": "", "routes -4": "b", "kernel net/loose": "0"}}  # fmt: skip
    assert list(fingerprint.differences(BEFORE, after).values()) == [
        "site: x.service is masked; before it was enabled",
        "site: /etc/a is gone",
        "site: /etc/b is changed",
        "site: /etc/c is new",
        "site: net.loose is 0; before it was 1",
        "site: its packet filter is another (nft list ruleset)",
        "site: its routes are others (ip -4 route)",
        "site: x.service: failed; before: runs",
    ]
    assert fingerprint.differences(BEFORE, BEFORE) == {}


def test_a_unit_that_runs_again_is_no_difference():
    failed = {"site": BEFORE["site"] | {"unit x.service": "failed", "unit y.service": "failed"}}
    assert fingerprint.differences(failed, BEFORE) == {}
    assert len(fingerprint.differences(BEFORE, failed)) == 2


def test_what_a_lesson_allows_is_no_difference():
    after = {"site": BEFORE["site"] | {"file /etc/a": "2", "file /etc/b": "2"}}
    allowed = [("site", "file /etc/a"), ("other", "file /etc/b")]
    assert fingerprint.differences(BEFORE, after, allowed) == {("site", "file /etc/b"): "site: /etc/b is changed"}


def test_what_the_fault_has_changed_is_no_hint_and_must_be_gone_in_the_end(monkeypatch):
    """Nor is it called broken besides; what somebody has made of it is."""
    class Mended:
        checks, jobs, allowed = (), (), ()

    class Faulty(Mended):
        @staticmethod
        def wrong():
            """It runs."""
            yield "it does not run"

        checks = (wrong,)

    healthy, faulty = {"site": {"file /etc/a": "1"}}, {"site": {"file /etc/a": "2"}}
    state = stage.State("01", healthy=healthy, faulty=faulty)
    monkeypatch.setattr(stage.inventory, "load", lambda: None)
    monkeypatch.setattr(stage.fingerprint, "take", lambda: faulty)
    assert stage.examine(Faulty, state).lines() == ["  NOT MENDED  It runs: it does not run"]
    assert stage.examine(Mended, state).missing == ["Nothing is left of the fault: site: /etc/a is changed"]
    monkeypatch.setattr(stage.fingerprint, "take", lambda: {"site": {"file /etc/a": "3"}})
    assert stage.examine(Mended, state).besides == ["site: /etc/a is changed"]
