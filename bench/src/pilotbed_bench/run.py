"""What all benches share: the machine, a yardstick, and medians of samples.

Seconds of one machine say little on another: ``yardstick`` is what a fixed piece of work took in the same run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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
