"""Batch systems: by what glexec knows a job of theirs, and their own records."""

from __future__ import annotations

import inspect
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed import batch
from pilotbed.batch import gridengine, slurm

SYSTEMS = sorted(path.stem for path in Path(inspect.getfile(batch)).parent.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_batch_system_has_what_glexec_and_trace_ask_of_it(name: str) -> None:
    found = batch.load(name)
    assert found.job("/sbin/init") == ""
    assert found.parse("") == {}
    assert found.parse("rubbish\n\0\n= = =\n") == {}
    assert callable(found.recorded)


@pytest.mark.parametrize("name", ["", "nosuch", "../slurm", "os", "slurm.x", "__init__.x", "slürm"])
def test_an_unknown_batch_system_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="has no module"):
        batch.load(name)


@pytest.mark.parametrize(
    ("title", "job"),
    [
        ("slurmstepd: [6.batch]\0\0", "6"),
        ("slurmstepd: [6_4.0]", ""),
        ("slurmstepd: [123.extern]", "123"),
        ("slurmstepd: [\u0661.batch]", ""),
        ("slurmstepd\0[6.batch]", ""),
        ("/bin/sh\0slurmstepd: [6.batch]", ""),
    ],
)
def test_slurm_job_is_told_by_the_title_of_its_step(title: str, job: str) -> None:
    assert slurm.job(title) == job


JOBCOMP = (
    "JobId=6 UserId=pilot009(20009) GroupId=glpilot(20000) Name=x JobId=7 UserId=root(0) EndTime=never "
    "JobState=COMPLETED Partition=grid TimeLimit=1440 StartTime=2026-11-21T02:43:17 EndTime=2026-11-21T02:50:00 "
    "NodeList=wn1 NodeCnt=1 ProcCnt=1 WorkDir=/srv\n\nrubbish\n"
)
JOB = {"user": "pilot009", "state": "COMPLETED", "start": "2026-11-21T02:43:17", "end": "2026-11-21T02:50:00",
       "nodes": "wn1"}  # fmt: skip


def test_completion_file_is_read_and_a_jobs_name_is_nothing_but_a_name() -> None:
    assert slurm.parse(JOBCOMP) == {"6": JOB}


def test_sacct_is_read() -> None:
    text = "6|pilot009|COMPLETED|2026-11-21T02:43:17|2026-11-21T02:50:00|wn1|00:09.500\nrubbish\n"
    assert slurm.parse_sacct(text) == {"6": JOB | {"cpu": "00:09.500"}}


@pytest.mark.parametrize(
    ("title", "job"),
    [
        ("sge_shepherd-6 -bg", "6"),
        ("sge_shepherd-6\0-bg\0", "6"),
        ("sge_shepherd-6.1 -bg", ""),
        ("sge_shepherd-", ""),
        ("sge_shepherd-\u0661 -bg", ""),
        ("sge_shepherd-99999999999 -bg", ""),
        ("/bin/sh\0sge_shepherd-6", ""),
        ("sge_execd-6", ""),
    ],
)
def test_gridengine_job_is_told_by_the_title_of_its_shepherd(title: str, job: str) -> None:
    assert gridengine.job(title) == job


# A line as the master of 8.1.9 has written it.
ACCOUNTING = (
    "# Version: 8.1.9\n#\n"
    "grid:wn2.grid.test:glpilot:pilot002:pilotbed:16:sge:0:1795860132:1795860133:1795860134:0:7:2:0.901380:0.329965:"
    "23544.000000:0:0:0:0:48823:3:0:120.000000:64:0:0:0:163:1488:NONE:defaultdepartment:NONE:1:0:1.231345:0.000822:"
    "0.014109:-q *@wn2.grid.test:0.000000:NONE:41660416.000000:0:0\n"
)


def test_gridengines_accounting_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    record = {"user": "pilot002", "state": "exit 7", "start": "2026-11-28T10:02:13", "end": "2026-11-28T10:02:14",
              "nodes": "wn2", "cpu": "1.231345"}  # fmt: skip
    assert gridengine.parse(ACCOUNTING) == {"16": record}
    assert gridengine.parse(ACCOUNTING.replace(":0:7:2:", ":37 : a reason:137:2:", 1)) == {}, "another number of fields"
    assert gridengine.parse(ACCOUNTING.replace(":0:7:2:", ":37:137:2:")) == {"16": record | {"state": "failed 37"}}


@pytest.mark.parametrize("moment", ["0", "", "x", "-1", "9" * 30, "\u0661x"])
def test_a_job_that_never_started_has_no_times(moment: str) -> None:
    record = gridengine.parse(ACCOUNTING.replace(":1795860133:1795860134:", f":{moment}:{moment}:"))["16"]
    assert (record["start"], record["end"]) == ("", "")


@given(
    st.lists(st.text()),
    st.lists(st.tuples(st.integers(0, 44), st.text(st.characters(exclude_characters=":"))), max_size=9),
)
def test_no_accounting_file_raises(lines: list[str], changes: list[tuple[int, str]]) -> None:
    fields = ACCOUNTING.splitlines()[2].split(":")
    for at, text in changes:
        fields[at] = text
    for record in gridengine.parse("\n".join([*lines, ":".join(fields)])).values():
        assert set(record) == {"user", "state", "start", "end", "nodes", "cpu"}
