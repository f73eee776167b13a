"""Every lesson on a grid: its fault is noticed, nothing but its solution mends it, and what is broken besides is told.

`make test-training` deploys inventory/mini first. From one lesson to the next the grid goes by their solutions, as on
Vagrant's machines, so that pilots stay warm; the last test goes back to the snapshot.
"""

import contextlib

import pytest
from pilotbed_suite.reach import local_nodes, service
from pilotbed_training import TrainingError, ground, lessons, stage
from pilotbed_training import __main__ as command

LESSONS = lessons.every()
#: Of each lesson: what its checker says while the fault is in, a part of it.
SAYS = {
    "01": "it wishes for site omega, which no entry of the factory's is",
    "02": "its path length is 0: what is delegated from it is no valid chain any more",
    "03": "the CRL has expired",
    "04": "/etc/grid-security/glexec/cert.pem is not valid before",
    "05": "s is dead, and neither side was told",
    "06": "the site gives bob no account, glexec ends with 203",
    "07": "the site gives bob no account, glexec ends with 203",
    "08": ", which has not the signed digest",
    "09": "it counts none of them for any entry",
    "10": "check_software.sh ends each pilot: /opt/gridlab-software/release is missing",
    "11": "her next payload would run, as gl",
    "12": "an entry takes no more pilots than 1 (max_pilots)",
}
#: What nobody may leave behind: a daemon that does not run, a file that was changed.
BREAK = "systemctl stop squid && echo '# by hand' >> /etc/pilotbed/mapping.toml"


@pytest.mark.parametrize("lesson", LESSONS, ids=[lesson.path.name for lesson in LESSONS])
def test_lesson(lesson):
    state = stage.begin(lesson, by_solution=True)
    try:
        verdict = stage.examine(lesson, state)
        assert SAYS[lesson.number] in "\n".join(verdict.missing), verdict
        assert not verdict.well

        other = next(each for each in LESSONS[LESSONS.index(lesson) - 1 :] if each != lesson)
        with contextlib.suppress(TrainingError):  # it may find nothing to mend
            ground.play(other.path / "solution.yml")
        verdict = stage.examine(lesson, state)
        assert SAYS[lesson.number] in "\n".join(verdict.missing), f"{other.path.name} mends it: {verdict}"
        others = verdict.besides

        ground.play(lesson.path / "solution.yml")
        verdict = stage.examine(lesson, state)
        assert (verdict.missing, verdict.waiting) == ([], [])
        assert set(verdict.besides) <= set(others), "what the other solution has left may be there, and no more"
    finally:
        stage.reset(by_solution=True)


def test_what_else_is_broken_is_told_and_a_reset_heals_it(capsys):
    if not local_nodes():
        pytest.skip("there are no snapshots of these machines")
    lesson, cache = lessons.find("03"), service("web_cache")
    state = stage.begin(lesson)
    ground.play(lesson.path / "solution.yml")
    assert cache.run(BREAK).rc == 0
    besides = stage.examine(lesson, state).besides
    assert any("squid.service" in each and "does not run" in each for each in besides), besides
    assert any(each.endswith(": /etc/pilotbed/mapping.toml is changed") for each in besides), besides
    assert command.main(["check", lesson.number]) == 1
    assert "BROKEN" in capsys.readouterr().out
    assert command.main(["reset"]) == 0
    assert cache.run("systemctl is-active squid && ! grep -q 'by hand' /etc/pilotbed/mapping.toml").rc == 0
    assert stage.begun() is None
