"""What the tests of a grid, its lab and its benches share: the inventory, ways to its nodes, jobs, and the walk."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

#: The project's directory: its ansible.cfg names inventory and roles.
CHECKOUT = Path(__file__).resolve().parents[3]

#: Name of the lab that commands mean when nobody says another (the variable LAB).
DEFAULT_LAB = "lab"

#: By how much longer everybody waits for a grid on slow machines, as emulated ones are.
PATIENCE = float(os.environ.get("PILOTBED_PATIENCE") or 1)


class GridError(Exception):
    """Something the user can mend; the message names the value and the remedy."""


def run(work: Callable[[], int], interrupted: str) -> int:
    """Run what a command of the checkout does, there; return its exit code.

    Args:
        work: returns the exit code; what it raises as GridError is told on standard error, and is 1.
        interrupted: what to say of going on after Ctrl-C, which is 130.
    """
    os.chdir(CHECKOUT)
    try:
        return work()
    except GridError as error:
        print(f"pilotbed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\npilotbed: interrupted; {interrupted}", file=sys.stderr)
        return 130


def lab_name() -> str:
    """Return the name of the lab that is meant: the environment variable LAB, or ``lab``."""
    return os.environ.get("LAB") or DEFAULT_LAB


def ansible(tool: str) -> str:
    """Return the path of one of Ansible's commands, those of this Python's environment first."""
    own = Path(sys.executable).with_name(tool)
    return str(own) if own.exists() else tool


def ansible_environment(**more: str) -> dict[str, str]:
    """Return the environment of an Ansible command that works on this lab.

    Facts are remembered for each lab: with those of another one a role would install what its node has.

    Args:
        more: variables that are set besides, or instead.
    """
    own = {"LAB": lab_name(), "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(record("facts"))}
    return {**os.environ, **own, **more}


def record(name: str) -> Path:
    """Return where this lab keeps what its commands say in the checkout's ``var``, such as ``log/site.log``.

    Args:
        name: path below ``var``; another lab than the default one has its own, ``log/site-NAME.log``.
    """
    path = CHECKOUT / "var" / name
    lab = lab_name()
    return path if lab == DEFAULT_LAB else path.with_name(f"{path.stem}-{lab}{path.suffix}")
