"""Local nodes, for those who enter them: by the PID, on this host, of each node's init.

``var/labs/NAME`` of a checkout leads to the directory of its lab NAME; the lab's ``leaders`` has a file for each node.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import CHECKOUT, GridError, lab_name

#: What the network namespaces of all labs are called by: ``PREFIX-LAB-NODE``.
PREFIX = "pilotbed"


def directory(name: str = "") -> Path:
    """Return this checkout's way to the directory of its lab ``name`` (default: the one that is meant)."""
    return CHECKOUT / "var/labs" / (name or lab_name())


def leader(name: str, lab: Path | None = None) -> int | None:
    """Return the PID, on the host, of the init of node ``name``, or None if the node does not run.

    Args:
        name: the node's name in the inventory.
        lab: the lab's directory; by default that of the lab that is meant.
    """
    here = (lab or directory()).resolve()
    try:
        pid = int((here / "leaders" / f"{name}.leader").read_text())
        # PIDs come again: only a process that lives in the node's network namespace is its init.
        if Path(f"/proc/{pid}/ns/net").stat().st_ino == Path(f"/run/netns/{PREFIX}-{here.name}-{name}").stat().st_ino:
            return pid
    except (OSError, ValueError):
        pass
    return None


def running(lab: Path | None = None) -> list[str]:
    """Return the names of the nodes that run."""
    leaders = ((lab or directory()) / "leaders").glob("*.leader")
    return sorted(path.stem for path in leaders if leader(path.stem, lab))


def enter(name: str, *argv: str, lab: Path | None = None) -> list[str]:
    """Return the command that runs ``argv`` as root inside node ``name``.

    Raises:
        GridError: the node does not run.
    """
    pid = leader(name, lab)
    if pid is None:
        raise GridError(f"node {name} does not run: `make lab` boots it")
    return [
        "nsenter", "--target", str(pid), "--all", "--", "/usr/bin/env", "-i", "HOME=/root", "USER=root",
        "LANG=C.UTF-8", f"TERM={os.environ.get('TERM', 'dumb')}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *argv,
    ]  # fmt: skip
