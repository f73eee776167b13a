"""pilotbed-why on the running grid: what stops a job is told to its owner, who has no login anywhere but at the schedd.

    alice@submit ── pilotbed-why ──▶ schedd, collector ◀── frontend ◀── factory ◀── a pilot's last words
"""

import json
import re

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import HOLD, as_user, ok, processes, until, until_none, write

# Pilots that fail are seen where none runs: a site is left without pilots for a while.
pytestmark = pytest.mark.stage(2)

STAGE = "/etc/pilotbed/frontend-stage.toml"
#: A script of the VO's that no worker passes, and the configuration of a stage area with it.
BROKEN, CHANGED = "/run/pilotbed-test-broken.sh", "/run/pilotbed-test-broken.toml"
SCRIPT = """#!/bin/bash
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$1")"
glidein_config=$1
script_error VO_Data "/opt/astro is missing" directory /opt/astro
"""


def why(submit, who, question):
    """What pilotbed-why tells a user: lines without the commands that it names."""
    code, said = as_user(submit, who.account, f"pilotbed-why --json {question}")
    assert code == 0, said
    answers = json.loads(said)
    assert all(answer["command"] for answer in answers)
    return [(answer["entry"], answer["text"]) for answer in answers]


def tells(submit, who, question, expected, entry=""):
    """Wait until that is the first answer, or one of an entry's."""
    until(
        f"pilotbed-why {question} says {expected!r}",
        lambda: [text for where, text in why(submit, who, question)[: None if question.startswith("--entry") else 1]
                 if where.startswith(entry) and re.search(expected, text)], every=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def job(jobs, alice, any_site):
    found = jobs.submit(alice, any_site, f"#!/bin/sh\n{HOLD}\n")
    yield found
    found.remove()


@pytest.fixture(scope="module")
def closed(grid, any_site):
    """The site is in downtime, and has no pilot left that the job could run in; returns what ends that."""
    factory = grid.node("factory")

    def reopened():
        ok(factory, "pilotbed-entry up %s", any_site.name)

    ok(factory, "pilotbed-entry downtime %s --now --reason 'new disks'", any_site.name)
    until_none("its pilots are gone", lambda: [one for worker in any_site.workers for one in processes(host(worker))
                                               if "glidein_startup" in one.args])  # fmt: skip
    yield reopened
    reopened()


@pytest.fixture
def broken_stage(grid):
    """The VO's own check fails on every worker."""
    frontend = grid.node("frontend")
    build = "pilotbed-stage --config %s --out /var/lib/pilotbed/frontend/stage"
    listed = f'\n[[files]]\nname = "astro.sh"\nsource = "{BROKEN}"\ntype = "exec"\n'
    write(frontend, BROKEN, SCRIPT)
    # Not the file itself: whatever is put back is newer than the units that it is for.
    write(frontend, CHANGED, ok(frontend, "cat %s", STAGE) + listed)
    try:
        ok(frontend, build, CHANGED)
        yield
    finally:
        ok(frontend, build, STAGE)
        frontend.run("rm -f %s %s", BROKEN, CHANGED)


def test_a_downtime_is_told(submit, alice, any_site, closed, job):
    tells(submit, alice, job.id, rf"^the entry is in downtime \(downtime of {any_site.name}: new disks", any_site.name)


def test_pilots_that_fail_say_why(submit, alice, any_site, closed, broken_stage, job):
    closed()
    tells(submit, alice, job.id, r"^\d+ pilots? failed within an hour, the last \d+ s ago: astro\.sh: "
          "/opt/astro is missing$", any_site.name)  # fmt: skip
    tells(submit, alice, f"--entry {any_site.name}", "/opt/astro is missing", any_site.name)


def test_it_runs_where_that_is_mended(submit, alice, any_site, closed, job):
    closed()
    job.holds(any_site)
    tells(submit, alice, job.id, rf"^the job runs, at {any_site.name}")


def test_a_job_that_matches_nothing_is_told_so(submit, alice, any_site, jobs):
    lost = jobs.submit(alice, any_site, extra='+DESIRED_Sites = "nowhere"')
    tells(submit, alice, lost.id, r'^(\d+) of \1 entr(y does|ies do) not match: .*DESIRED_Sites = "nowhere"')
    large = jobs.submit(alice, any_site, extra="request_memory = 900000")
    tells(submit, alice, large.id, r"^(\d+) of \1 entr(y does|ies do) not match: .*RequestMemory 900000 > \d+ MB")
    for job in (lost, large):
        job.remove()
    tells(submit, alice, lost.id, "^the job was removed")


def test_a_question_that_is_none_is_refused(submit, alice):
    assert as_user(submit, alice.account, "pilotbed-why")[0] == 2
    assert as_user(submit, alice.account, "pilotbed-why '1 || true'")[0] == 2
    assert why(submit, alice, "999999")[0][1].startswith("there is no job 999999.0")
    assert "no frontend sees an entry nowhere" in why(submit, alice, "--entry nowhere")[0][1]
