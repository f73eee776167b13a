"""How long and how much: every step that a user of the grid waits for, measured in one run."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from pilotbed_lab import cgroups, deploy, image
from pilotbed_suite import CHECKOUT, local, record, walk

from ..run import conditions

#: Walks on a warm grid; their median counts.
WALKS = 3


def node_cpu() -> float:
    """Return the CPU-seconds that all nodes of the lab have used so far."""
    return cgroups.cpu_seconds(deploy.lab().key)


def measure(step: Callable[[], object]) -> dict[str, float]:
    """Run ``step``; return its wall time and the CPU that controller and nodes spent, in seconds."""
    before, nodes_before = resource.getrusage(resource.RUSAGE_CHILDREN), node_cpu()
    started = time.monotonic()
    step()
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(wall, 1),
        "controller_cpu": round(spent, 1),
        # Nodes that were taken down meanwhile take their account with them.
        "node_cpu": round(max(0.0, node_cpu() - nodes_before), 1),
    }


def memory() -> dict[str, int]:
    """Return what all processes of all nodes hold: their proportional share (PSS), in MiB, and how many they are."""
    total = count = 0
    spaces = {Path(f"/proc/{pid}/ns/pid").stat().st_ino for name in local.running() if (pid := local.leader(name))}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "ns/pid").stat().st_ino in spaces:
                found = re.search(r"^Pss:\s*(\d+)", (path / "smaps_rollup").read_text(), re.MULTILINE)
                total += int(found[1]) if found else 0
                count += 1
        except OSError:  # it ended meanwhile
            continue
    return {"pss_mib": total // 1024, "processes": count}


def task_runs(log: Path) -> dict[str, int]:
    """Return the totals of the last playbook run, as the callback logged them."""
    last = [line for line in log.read_text().splitlines() if " STATS {" in line][-1]
    totals: dict[str, int] = json.loads(last.partition("STATS ")[2])
    return totals


def build_image() -> dict[str, float]:
    """Build the image anew beside the cached one, and throw it away."""
    kept, image.CACHE = image.CACHE, Path("/var/cache/pilotbed/bench")
    try:
        return measure(lambda: image.build(CHECKOUT, CHECKOUT / "var/log/bench-image.log"))
    finally:
        shutil.rmtree(image.CACHE, ignore_errors=True)
        image.CACHE = kept


def main() -> int:
    """Measure, on a lab made anew; write var/bench.json and print it."""
    results = conditions()
    log = record("log/site.log")
    results["image_build"] = build_image()
    lab = deploy.lab()
    lab.clear()
    results["deploy"] = measure(deploy.up)
    results["deploy"]["task_runs"] = task_runs(log)["executions"]
    results["walk_without_pilot"] = measure(walk.walk)
    warm = [measure(walk.walk) for _ in range(WALKS)]
    results["walk_with_pilot"] = {key: statistics.median(run[key] for run in warm) for key in warm[0]}
    results["unchanged"] = measure(deploy.up)
    results["unchanged"]["task_runs"] = task_runs(log)["executions"]
    results["unchanged"]["changes"] = task_runs(log)["changed"]
    results["memory"] = memory()
    name = f"bench-{int(time.time())}"
    results["snapshot"] = measure(lambda: lab.snapshot(name))
    results["restore"] = measure(lambda: lab.restore(name))
    results["walk_after_restore"] = measure(walk.walk)
    results["load_at_the_end"] = os.getloadavg()[0]
    text = json.dumps(results, indent=2)
    (CHECKOUT / "var/bench.json").write_text(text + "\n")
    print(text)
    return 0
