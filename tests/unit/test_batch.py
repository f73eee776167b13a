"""Batch systems: by what glexec knows a job of theirs, and their own records."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
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
