"""What blahpd is told of a job of Grid Engine, with commands of Grid Engine's that say what they are told to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from pilotbed_suite import CHECKOUT

BLAHP = CHECKOUT / "roles/batch_gridengine/files/usr/libexec/blahp"
#: As the master of 8.1.9 has written them.
QSTAT = """job-ID  prior   name       user         state submit/start at     queue                  slots ja-task-ID
-----------------------------------------------------------------------------------------------------------------
      7 0.55500 bl_a1b2c3  pilot001     {state:<5} 11/28/2026 10:02:13 grid@wn2.grid.test                 1
     17 0.55500 bl_d4e5f6  pilot001     qw    11/28/2026 10:02:13                                    1
"""
QACCT = """==============================================================
qname        grid
jobnumber    7
start_time   Sat Nov 28 10:02:13 2026
failed       {failed}
exit_status  {code}
ru_wallclock 0s
"""


class Tools:
    """qstat and qacct in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.has("qstat", "", 1)
        self.has("qacct", "error: job id 7 not found\n", 1)

    def has(self, name: str, said: str, code: int = 0) -> None:
        (self.directory / f"{name}.said").write_text(said)
        path = self.directory / name
        path.write_text(f"#!/bin/sh\ncat '{path}.said'\nexit {code}\n")
        path.chmod(0o755)

    def status(self, *jobs: str) -> str:
        path = f"{self.directory}:{os.environ['PATH']}"
        command = [BLAHP / "gridengine_status.sh", *jobs]
        done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("qw", 1),
        ("hqw", 1),
        ("Eqw", 1),
        ("Rq", 1),
        ("r", 2),
        ("t", 2),
        ("Rr", 2),
        ("s", 2),
        ("S", 2),
        ("T", 2),
        ("dr", 2),
    ],
)
def test_a_job_that_the_master_has_is_idle_or_runs(tools: Tools, state: str, told: int) -> None:
    tools.has("qstat", QSTAT.format(state=state))
    assert tools.status("-w", "gridengine/20261128100213/7") == f'0[BatchJobId="7"; JobStatus={told};]\n'


def test_while_the_master_does_not_answer_nothing_is_over(tools: Tools) -> None:
    """blahp's own sge_status.sh said: over, with exit code 0."""
    tools.has("qstat", "error: commlib error: got select error (Connection refused)\n", 1)
    tools.has("qacct", QACCT.format(failed=0, code=0))
    assert tools.status("gridengine/20261128100213/7") == '0[BatchJobId="7"; JobStatus=2;]\n'
    (tools.directory / "qstat").unlink()
    assert tools.status("gridengine/20261128100213/7") == '0[BatchJobId="7"; JobStatus=2;]\n'


@pytest.mark.parametrize(("code", "told"), [("0", 0), ("42", 42), ("137                  (Killed)", 137)])
def test_a_job_that_is_over_has_its_exit_code(tools: Tools, code: str, told: int) -> None:
    tools.has("qstat", "")
    tools.has("qacct", QACCT.format(failed=0, code="1") + QACCT.format(failed=0, code=code))
    assert tools.status("gridengine/20261128100213/7") == f'0[BatchJobId="7"; JobStatus=4; ExitCode={told};]\n'


def test_another_job_whose_number_ends_alike_is_another(tools: Tools) -> None:
    tools.has("qstat", QSTAT.format(state="r").replace("      7 ", "     27 "))
    tools.has("qacct", QACCT.format(failed=0, code=3))
    assert tools.status("gridengine/20261128100213/7") == '0[BatchJobId="7"; JobStatus=4; ExitCode=3;]\n'


def test_a_job_without_a_record_is_over_after_a_while(tools: Tools) -> None:
    tools.has("qstat", "")
    assert tools.status("gridengine/20261128100213/7") == '0[BatchJobId="7"; JobStatus=4; ExitCode=255;]\n'


def test_each_job_has_its_line_and_what_is_none_has_one_too(tools: Tools) -> None:
    tools.has("qstat", QSTAT.format(state="r"))
    said = tools.status("gridengine/x/7", "gridengine/x/7; rm -rf", "gridengine/x/17", "\u0661").splitlines()
    assert [line[:9] for line in said] == ["0[BatchJo", "1ERROR: '", "0[BatchJo", "1ERROR: '"]


def test_a_submitted_job_is_asked_for_by_our_name(tmp_path: Path) -> None:
    for name in ("gridengine_submit.sh", "gridengine_cancel.sh"):
        (tmp_path / name).write_bytes((BLAHP / name).read_bytes())
        (tmp_path / name).chmod(0o755)
    for name, said, code in (("sge_submit.sh", "BLAHP_JOBID_PREFIXsge/20261128/7", 0), ("sge_cancel.sh", "$*", 3)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{said}"\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run([tmp_path / "gridengine_submit.sh"], capture_output=True, text=True, check=True)
    assert done.stdout == "BLAHP_JOBID_PREFIXgridengine/20261128/7\n"
    (tmp_path / "sge_submit.sh").write_text("#!/bin/sh\nexit 1\n")
    assert subprocess.run([tmp_path / "gridengine_submit.sh"], check=False).returncode == 1
    done = subprocess.run([tmp_path / "gridengine_cancel.sh", "a/b/7"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "a/b/7\n")
