"""Batch systems: by what glexec knows a job of theirs, and their own records."""

from __future__ import annotations

import inspect
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed import batch
from pilotbed.batch import gridengine, htcondor, slurm
from pilotbed_suite import CHECKOUT

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
        ("condor_starter\0-f\0-local-name\0slot_type_1\0-a\x002.0\0-slot-name\0slot1_1\0ce.grid.test\0", "2.0"),
        ("/usr/sbin/condor_starter\0-a\x0012.3\0ce\0", "12.3"),
        ("condor_starter\0-f\0-a\0slot1_1\0submit.grid.test\0", ""),
        ("condor_starter\0-f\0-a\x002\0ce\0", ""),
        ("condor_starter\0-f\0-a\0\u0661.0\0ce\0", ""),
        ("condor_starter\0-f\0-a", ""),
        ("condor_startd\0-a\x002.0\0ce\0", ""),
        ("/bin/sh\0condor_starter\0-a\x002.0\0", ""),
    ],
)
def test_htcondor_job_is_told_by_the_arguments_of_its_starter(title: str, job: str) -> None:
    assert htcondor.job(title) == job


HISTORY = """\
ClusterId = 2
ProcId = 0
Owner = "pilot010"
JobDescription = "x *** Owner = root"
JobStatus = 4
JobCurrentStartDate = 86400
EnteredCurrentStatus = 86500
LastRemoteHost = "slot1_1@wn2.grid.test"
RemoteUserCpu = 9.0
RemoteSysCpu = 0.5
*** Offset = 0 ClusterId = 2 ProcId = 0 Owner = "pilot010" CompletionDate = 86500
rubbish
ClusterId = x
*** Offset = 9
"""


def test_history_is_read_and_what_a_user_has_written_is_nothing_but_text() -> None:
    (record,) = htcondor.parse(HISTORY).items()
    assert record[0] == "2.0"
    assert record[1] | {"start": "", "end": ""} == {
        "user": "pilot010", "state": "COMPLETED", "start": "", "end": "", "nodes": "wn2", "cpu": "9.5"}  # fmt: skip
    assert record[1]["start"] < record[1]["end"]
    assert htcondor.parse(HISTORY.replace("= 9.0", "= nan of it").replace("86400", "9" * 30))["2.0"]["cpu"] == ""


WRAPPER = CHECKOUT / "roles/batch_htcondor/files/usr/libexec/pilotbed/htcondor-job"


@pytest.mark.parametrize(("script", "code"), [("exit 42", 42), ("kill -KILL $$", -9), ("setsid sleep 5 & exit 3", 3)])
def test_a_job_below_htcondors_wrapper_ends_as_it_would_without(script: str, code: int) -> None:
    done = subprocess.run([WRAPPER, "/bin/sh", "-c", script], stdout=subprocess.DEVNULL, timeout=60, check=False)
    assert done.returncode == code


def test_streams_of_a_job_below_htcondors_wrapper_are_its_own() -> None:
    done = subprocess.run([WRAPPER, "/bin/cat"], input=b"in", capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"in")
    done = subprocess.run([WRAPPER, "/no/such"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (126, b"/no/such: No such file or directory\n")


def test_htcondors_wrapper_tells_a_jobs_inner_processes_and_waits_for_them() -> None:
    """The outer shell dies of the signal, as A-REX's does."""
    inner = 'trap "sleep 0.3; echo heard; exit" TERM; echo ready; while :; do sleep 0.05; done'
    job = subprocess.Popen([WRAPPER, "/bin/sh", "-c", f"/bin/sh -c '{inner}'; :"], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.terminate()
    assert job.communicate(timeout=60)[0] == "heard\n"
    assert job.returncode == -signal.SIGTERM


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
