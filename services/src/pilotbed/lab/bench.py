"""How long and how much: every step that a user waits for, measured in one run, with the machine and a yardstick.

Seconds of one machine say little on another: ``yardstick`` is what a fixed piece of work took in the same run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from . import image, nodes, topology, walk

#: Walks on a warm grid; their median counts.
WALKS = 3


def yardstick() -> float:
    """Return the seconds that hashing 512 MiB takes: one core, no memory, no disk."""
    block = bytes(1 << 20)
    started = time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(512):
        digest.update(block)
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """Return what this machine is."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 1024**2, 1) if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def conditions() -> dict[str, Any]:
    """Return when and on what a run is made."""
    return {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "yardstick_seconds": round(yardstick(), 3)}


def heading(command: str, found: Mapping[str, Any]) -> str:
    """Return the line above the tables of a run under `conditions`."""
    on = found["machine"]
    return (
        f"`{command}`, {found['date']}: {on['cores']} cores of {on['cpu']}, {on['memory_gib']} GiB, Linux "
        f"{on['kernel']}, yardstick {found['yardstick_seconds']} s, load before {on['load']:.1f}."
    )


def middle(found: Iterable[Mapping[str, Any]], name: str) -> float:
    """Return the median of a figure over the samples, one a round."""
    return float(statistics.median(sample[name] for sample in found))


def ratio(found: Iterable[Mapping[str, Any]], mine: str, theirs: str) -> float:
    """Return the median of the ratios within a round."""
    return float(statistics.median(sample[mine] / sample[theirs] for sample in found))


def node_cpu() -> float:
    """Return the CPU-seconds that all nodes have used so far."""
    for hierarchy in nodes.hierarchies():
        top = hierarchy / nodes.SWITCH
        if (top / "cpuacct.usage").exists():
            return int((top / "cpuacct.usage").read_text()) / 1e9
        if (top / "cpu.stat").exists() and hierarchy == nodes.CGROUPS:
            found = re.search(r"usage_usec (\d+)", (top / "cpu.stat").read_text())
            return int(found[1]) / 1e6 if found else 0.0
    return 0.0


def memory() -> dict[str, int]:
    """Return what all processes of all nodes hold: their proportional share (PSS), in MiB, and how many they are."""
    total = count = 0
    spaces = {Path(f"/proc/{pid}/ns/pid").stat().st_ino for name in nodes.running() if (pid := nodes.leader(name))}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "ns/pid").stat().st_ino in spaces:
                found = re.search(r"^Pss:\s*(\d+)", (path / "smaps_rollup").read_text(), re.MULTILINE)
                total += int(found[1]) if found else 0
                count += 1
        except OSError:  # it ended meanwhile
            continue
    return {"pss_mib": total // 1024, "processes": count}


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


def task_runs(log: Path) -> dict[str, int]:
    """Return the totals of the last playbook run, as the callback logged them."""
    last = [line for line in log.read_text().splitlines() if " STATS {" in line][-1]
    totals: dict[str, int] = json.loads(last.partition("STATS ")[2])
    return totals


def build_image(checkout: Path) -> dict[str, float]:
    """Build the image anew beside the cached one, and throw it away."""
    kept, image.CACHE = image.CACHE, Path("/var/cache/pilotbed/bench")
    try:
        return measure(lambda: image.build(checkout, checkout / "var/log/bench-image.log"))
    finally:
        shutil.rmtree(image.CACHE, ignore_errors=True)
        image.CACHE = kept


def main(checkout: Path) -> int:
    """Measure, on a lab made anew; write var/bench.json and print it."""
    from .__main__ import up

    results = conditions()
    log = checkout / "var/log/site.log"
    results["image_build"] = build_image(checkout)
    nodes.clear()
    results["deploy"] = measure(up)
    results["deploy"]["task_runs"] = task_runs(log)["executions"]
    results["walk_without_pilot"] = measure(walk.walk)
    warm = [measure(walk.walk) for _ in range(WALKS)]
    results["walk_with_pilot"] = {key: statistics.median(run[key] for run in warm) for key in warm[0]}
    results["unchanged"] = measure(up)
    results["unchanged"]["task_runs"] = task_runs(log)["executions"]
    results["unchanged"]["changes"] = task_runs(log)["changed"]
    results["memory"] = memory()
    lab = nodes.Lab(checkout, topology.load(checkout), image.path_of(checkout), lambda line: None)
    name = f"bench-{int(time.time())}"
    results["snapshot"] = measure(lambda: lab.snapshot(name))
    results["restore"] = measure(lambda: lab.restore(name))
    results["walk_after_restore"] = measure(walk.walk)
    results["load_at_the_end"] = os.getloadavg()[0]
    text = json.dumps(results, indent=2)
    (checkout / "var/bench.json").write_text(text + "\n")
    print(text, file=sys.stdout)
    return 0
