"""From nothing to a grid: boot the nodes of a lab, and run the playbooks on them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

from pilotbed_suite import CHECKOUT, GridError, ansible, ansible_environment, lab_name, record

from . import LabError, image, nodes, preflight, topology


def lab() -> nodes.Lab:
    """Return the lab that is meant, with what the inventory says of it.

    Raises:
        LabError: the inventory cannot be read or contradicts itself.
    """
    return nodes.Lab(CHECKOUT, topology.load(), image.path_of(CHECKOUT), name=lab_name())


def boot() -> list[str]:
    """Boot every node that does not run, on an image that is built if there is none; return their names.

    The inventory is validated where there is something to boot.

    Raises:
        LabError: the inventory or the host cannot work, the image cannot be built, or a node does not boot.
    """
    begun = time.monotonic()
    with contextlib.suppress(GridError):  # of an inventory that is none the playbook says why
        if (found := lab()).stands():
            _say(f"nodes: 0 booted, {len(found.topology.nodes)} running", begun)
            return []
    playbook("playbooks/validate.yml")
    found = lab()
    preflight.check()
    if not image.path_of(CHECKOUT).is_dir():
        print("  building the node image, once; var/log/image.log grows meanwhile", flush=True)
        begun = time.monotonic()
        image.build(CHECKOUT, CHECKOUT / "var/log/image.log")
        _say("node image", begun)
    begun = time.monotonic()
    booted = found.up()
    _say(f"nodes: {len(booted)} booted, {len(found.topology.nodes) - len(booted)} running", begun)
    return booted


def up() -> None:
    """Boot the nodes and deploy the grid on them, whatever of it is there already.

    Raises:
        LabError: as for `boot`, or a step failed.
    """
    started = time.monotonic()
    booted = boot()
    playbook("playbooks/site.yml", *(["--skip-tags", "validate"] if booted else []))
    _say("the grid stands", started)


def playbook(path: str, *arguments: str) -> None:
    """Run a playbook of the checkout; its progress goes to the screen.

    Raises:
        LabError: it failed; the callback has said where and why.
    """
    site_log = record("log/site.log")
    site_log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [ansible("ansible-playbook"), path, *arguments], cwd=CHECKOUT, stderr=subprocess.PIPE, text=True,
        env=ansible_environment(PILOTBED_LOG=str(site_log)),
    )  # fmt: skip
    assert process.stderr is not None
    with open(site_log, "a") as log:
        for line in process.stderr:
            log.write(line)
            # Warnings (a host and a group may share a name here: group = role) go to the log, errors to the screen.
            if not line.startswith("[WARNING]"):
                sys.stderr.write(line)
    if process.wait():
        raise LabError(f"{path} failed")


def _say(what: str, since: float) -> None:
    print(f"  {what:<58} {time.monotonic() - since:6.1f} s", flush=True)
