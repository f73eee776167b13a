"""A control group for each node, in whatever hierarchies the host has mounted: v1, v2 or both."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
#: Above all labs' groups.
TOP = "pilotbed"
#: nspawn shows a node its cgroups of v1 read-only: no job in it could have one. Batch systems look for cpu and cpuacct
#: in one directory of both names, as distributions mount them; where the host has them apart, it is cpuacct.
_GRANT = """cd /sys/fs/cgroup && ! test -e cgroup.procs || exit 0
mount -o remount,rw,nosuid,nodev,noexec . || exit
for one in */cgroup.procs; do mount -o remount,bind,rw "${one%/*}" || exit; done
test -e cpu,cpuacct || ! test -e cpuacct || { mkdir cpu,cpuacct && mount --bind cpuacct cpu,cpuacct; } || exit
mount -o remount,ro,nosuid,nodev,noexec ."""


def hierarchies() -> list[Path]:
    """Return the mounted cgroup hierarchies: one on a pure v2 host, many on a hybrid one."""
    if (ROOT / "cgroup.procs").exists():
        return [ROOT]
    return [path for path in ROOT.iterdir() if not path.is_symlink() and (path / "cgroup.procs").exists()]


def make(group: str) -> list[Path]:
    """Make and return the cgroups of ``group`` (LAB/NODE), one in each hierarchy.

    A node has its own: with one tree for all, each systemd would believe that it owns it.
    """
    made = []
    for hierarchy in hierarchies():
        path = hierarchy / TOP / group
        path.mkdir(parents=True, exist_ok=True)
        above = [hierarchy / part for part in Path(TOP, group).parents]
        steps = list(zip(reversed(above), [*reversed(above[:-1]), path], strict=True))
        if (hierarchy / "cpuset.cpus").exists():
            for parent, child in steps:
                for knob in ("cpuset.cpus", "cpuset.mems"):
                    (child / knob).write_text((parent / knob).read_text())
        elif hierarchy == ROOT:
            controllers = (hierarchy / "cgroup.controllers").read_text().split()
            for parent, _child in steps:
                with contextlib.suppress(OSError):
                    (parent / "cgroup.subtree_control").write_text(" ".join(f"+{x}" for x in controllers))
        made.append(path)
    return made


def grant(init: int) -> None:
    """Let a node make groups below its own in every hierarchy, as a machine can.

    Args:
        init: PID of the node's first process, on the host.

    Raises:
        subprocess.CalledProcessError: a mount in the node fails.
    """
    subprocess.run(["nsenter", f"--target={init}", "--mount", "/bin/sh", "-c", _GRANT], check=True)


def left(group: str) -> list[Path]:
    """Return the cgroups of ``group`` (LAB or LAB/NODE) that are there."""
    return [path for hierarchy in hierarchies() if (path := hierarchy / TOP / group).is_dir()]


def remove(group: str) -> None:
    """Kill what is left in the cgroups of ``group`` (LAB or LAB/NODE) and below them, and remove them."""
    for _ in range(50):
        for top in left(group):
            if (top / "cgroup.kill").exists() and _populated(top):
                (top / "cgroup.kill").write_text("1")
            for directory, _names, _files in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):  # what is frozen does not die
                    if (freezer := Path(directory, "freezer.state")).exists():
                        freezer.write_text("THAWED")
                with contextlib.suppress(OSError):
                    for pid in Path(directory, "cgroup.procs").read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()
        if not left(group):
            break
        time.sleep(0.1)
    for hierarchy in hierarchies():
        with contextlib.suppress(OSError):  # another lab's groups are in it
            (hierarchy / TOP).rmdir()


def cpu_seconds(group: str) -> float:
    """Return the CPU-seconds that ``group`` has used so far; 0 where the host does not count them."""
    for top in left(group):
        if (top / "cpuacct.usage").exists():
            return int((top / "cpuacct.usage").read_text()) / 1e9
        if (top / "cpu.stat").exists() and (ROOT / "cgroup.procs").exists():
            found = re.search(r"usage_usec (\d+)", (top / "cpu.stat").read_text())
            return int(found[1]) / 1e6 if found else 0.0
    return 0.0


def _populated(cgroup: Path) -> bool:
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except OSError:
        return False
