"""The deployment, run once more over a grid that works: it changes nothing, and nothing that works is disturbed."""

import json
import os
import subprocess

import pytest
from pilotbed_suite import CHECKOUT, ansible
from pilotbed_suite.support import HOLD

pytestmark = pytest.mark.stage(3)


@pytest.fixture(scope="module")
def again(tmp_path_factory, jobs, alice, filtered_site, pilots):
    """A second run of site.yml while a payload runs: (what it says, its totals, its log, the payload)."""
    pilots(filtered_site)
    job = jobs.submit(alice, filtered_site, f"#!/bin/sh\n{HOLD}\n")
    job.holds(filtered_site)
    log = tmp_path_factory.mktemp("site") / "site.log"
    done = subprocess.run(
        [ansible("ansible-playbook"), "playbooks/site.yml"],
        cwd=CHECKOUT, env={**os.environ, "PILOTBED_LOG": str(log)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = log.read_text()
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(text.rpartition(" STATS ")[2].splitlines()[0]), text, job


def test_second_deployment_changes_nothing(again):
    totals, log, _ = again
    told, task = [], ""
    for line in log.splitlines():
        task = line.partition(" TASK ")[2] or task
        if "   changed " in line:
            told.append(f"{task}: {line}")
    assert totals["changed"] == 0, "\n".join(told)
    assert totals["failures"] == totals["dark"] == 0
    assert totals["executions"] > 100


def test_second_deployment_leaves_running_payloads_alone(again):
    _, _, job = again
    assert job.status() == "running"
    assert job.ad()["NumJobStarts"] == 1
    job.remove()


def test_grid_works_afterwards(again, jobs, alice, hidden_site):
    assert jobs.submit(alice, hidden_site).done(120)["ExitCode"] == 0
