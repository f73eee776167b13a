"""What a lesson does to a grid: bring it back, break it, mend it.

Only `restore` depends on how nodes are made. Local nodes go back to a snapshot; for others, Vagrant's machines or real
ones, the solution of the lesson that was begun last is run, which leaves what else a student has changed.
"""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pilotbed_lab import deploy
from pilotbed_suite import CHECKOUT, ansible, ansible_environment, inventory, lab_name, local, reach, walk
from pilotbed_suite.reach import host, service

from . import TrainingError
from .lessons import TRAINING, Lesson

#: The healthy grid's, of local nodes.
SNAPSHOT = "training"
#: What undoes what a solution rightly leaves, such as a ban, where a lesson has it.
AFTER = "after.yml"
#: Seconds until a grid that was brought back answers.
ANSWERS = 120


def restore(begun: Lesson | None, by_solution: bool = False) -> None:
    """Bring the healthy grid back.

    Args:
        begun: the lesson that the grid is in, if any.
        by_solution: mend local nodes by the lesson's solution, too.

    Raises:
        GridError: there is no grid, or it is not healthy to begin with.
    """
    if by_solution or not reach.local_nodes():
        if begun:
            _mend(begun)
    else:
        _restore_snapshot(begun)
    settle()


def _mend(lesson: Lesson) -> None:
    """Run a lesson's solution, and what undoes it where that leaves something."""
    play(lesson.path / "solution.yml")
    if (lesson.path / AFTER).exists():
        play(lesson.path / AFTER)


def _restore_snapshot(begun: Lesson | None) -> None:
    if os.geteuid() != 0:
        raise TrainingError("the lab's nodes are entered and made by root: run it as root")
    if not local.running():
        raise TrainingError(f"no node of lab {lab_name()} runs: `make lab INVENTORY=mini` makes one for lessons")
    lab = deploy.lab()
    if (local.directory() / "snapshots" / SNAPSHOT).is_dir():
        lab.restore(SNAPSHOT)
        return
    if begun:  # its fault would be part of the snapshot
        _mend(begun)
    jobs = service("submit").run("condor_q -allusers -constraint 'JobStatus != 3' -af ClusterId").stdout.split()
    if jobs:
        raise TrainingError(f"there are {len(jobs)} jobs in the queue, which no snapshot is to keep: `condor_rm -all`")
    print("  the first lesson: a walk shows that the grid is healthy, and a snapshot keeps it", flush=True)
    if wrong := walk.problems(walk.walk()):
        raise TrainingError(f"the grid is not healthy: {'; '.join(wrong)}; mend it first (`make walk`)")
    # A restored grid would count on pilots that died with the nodes: "running=3 … why=enough", and no job starts.
    play(TRAINING / "no-pilots.yml")
    lab.snapshot(SNAPSHOT)


def play(playbook: Path) -> None:
    """Run a lesson's playbook, without a word of what it does.

    Raises:
        TrainingError: it failed.
    """
    done = subprocess.run(
        [ansible("ansible-playbook"), str(playbook)], cwd=CHECKOUT, capture_output=True, text=True, check=False,
        env=ansible_environment(PILOTBED_LOG=os.devnull),
    )  # fmt: skip
    if done.returncode:
        said = f"{done.stdout}\n{done.stderr}".strip()[-3000:]
        raise TrainingError(f"{playbook.relative_to(CHECKOUT)} failed; `make reset`, then once more:\n{said}")


def settle() -> None:
    """Wait until every node has started what it starts, and the schedd answers.

    Raises:
        TrainingError: not in time.
    """
    end = time.monotonic() + ANSWERS

    def wait(name: str) -> None:
        jobs = "systemctl list-jobs --no-legend"
        while said := host(name).run(jobs).stdout.strip():
            if time.monotonic() > end:
                raise TrainingError(f"{name} has not started everything within {ANSWERS} s: {said}")
            time.sleep(0.3)

    names = inventory.load().hosts()
    with ThreadPoolExecutor() as pool:
        list(pool.map(wait, names))
    asked = {"submit": "condor_q -totals", "central_manager": "condor_status -schedd -af Name | grep -q .",
             "factory": "pilotbed-factory-pool condor_q -totals"}  # fmt: skip
    for group, command in asked.items():
        while (done := service(group).run(command)).rc:
            if time.monotonic() > end:
                raise TrainingError(f"{group}: {command}: {(done.stderr or done.stdout).strip()[-500:]}")
            time.sleep(0.3)
