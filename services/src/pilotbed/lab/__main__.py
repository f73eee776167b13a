"""``python -m pilotbed.lab``: what the Makefile's targets run."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import LabError, image, nodes, preflight, reach, status, topology, walk

CHECKOUT = Path(__file__).resolve().parents[4]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of the lab; return its exit code."""
    parser = argparse.ArgumentParser(prog="pilotbed.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lab", help="boot the nodes, deploy the grid, walk")
    commands.add_parser("up", help="boot the nodes and deploy the grid")
    commands.add_parser("walk", help="two users' jobs through the whole grid")
    commands.add_parser("status", help="nodes, services, pilots, jobs")
    commands.add_parser("shell", help="a root shell on a node").add_argument("node")
    commands.add_parser("logs", help="the logs that matter for a node").add_argument("node")
    commands.add_parser("destroy", help="remove every trace of the lab")
    commands.add_parser("snapshot", help="keep every node as it is").add_argument("name")
    commands.add_parser("restore", help="bring every node back").add_argument("name")
    commands.add_parser("bench", help="measure, into var/bench.json")
    commands.add_parser("bench-relay", help="the relay beside other ways, into var/bench-relay.json and docs/relay.md")
    commands.add_parser("bench-glexec", help="glexec, mapping service and trace, into var/bench-glexec.json and docs")
    arguments = parser.parse_args(argv)
    os.chdir(CHECKOUT)
    try:
        return _run(arguments)
    except LabError as error:
        print(f"pilotbed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npilotbed: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    command = arguments.command
    if os.geteuid() != 0 and reach.local():
        raise LabError("the lab's nodes are entered and made by root: run it as root")
    if command == "destroy":
        nodes.clear()
        print("nothing is left of the lab (the image stays, for the next one)")
        return 0
    if command in ("lab", "up"):
        up()
        return walk.main(CHECKOUT) if command == "lab" else 0
    if command == "walk":
        return walk.main(CHECKOUT)
    if command == "bench":
        from . import bench

        return bench.main(CHECKOUT)
    if command == "bench-relay":
        from . import bench_relay

        return bench_relay.main(CHECKOUT)
    if command == "bench-glexec":
        from . import bench_glexec

        return bench_glexec.main(CHECKOUT)
    grid = topology.load(CHECKOUT)
    if command == "status":
        status.show(CHECKOUT, grid)
    elif command == "shell":
        grid.node(arguments.node)
        return subprocess.run(nodes.enter(arguments.node, "/bin/bash", "--login"), check=False).returncode
    elif command == "logs":
        grid.node(arguments.node)
        return status.logs(CHECKOUT, arguments.node)
    else:
        lab = nodes.Lab(CHECKOUT, grid, image.path_of(CHECKOUT), print)
        started = time.monotonic()
        getattr(lab, command)(arguments.name)
        print(f"{command} {arguments.name}: {time.monotonic() - started:.1f} s")
        if command == "restore":
            return walk.main(CHECKOUT)
    return 0


def up() -> None:
    """Boot the nodes and deploy the grid on them, whatever of it is there already.

    Raises:
        LabError: the inventory or the host cannot work, or a step failed.
    """
    started = time.monotonic()
    grid = topology.load(CHECKOUT)
    playbook("playbooks/validate.yml")
    preflight.check()
    lab = nodes.Lab(CHECKOUT, grid, image.path_of(CHECKOUT), print)
    lab.claim()
    if not image.path_of(CHECKOUT).is_dir():
        print("  building the node image, once; var/log/image.log grows meanwhile", flush=True)
        begun = time.monotonic()
        image.build(CHECKOUT, CHECKOUT / "var/log/image.log")
        _say("node image", begun)
    begun = time.monotonic()
    booted = lab.up()
    _say(f"nodes: {len(booted)} booted, {len(grid.nodes) - len(booted)} running", begun)
    playbook("playbooks/site.yml", "--skip-tags", "validate")
    _say("the grid stands", started)


def playbook(path: str, *arguments: str) -> None:
    """Run a playbook of the checkout; its progress goes to the screen.

    Raises:
        LabError: it failed; the callback has said where and why.
    """
    # Warnings (a host and a group may share a name here: group = role) go to the log, errors to the screen.
    environment = {**os.environ, "PILOTBED_LOG": str(CHECKOUT / "var/log/site.log")}
    Path("var/log").mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        ["ansible-playbook", path, *arguments], cwd=CHECKOUT, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with open("var/log/site.log", "a") as log:
        for line in process.stderr:
            log.write(line)
            if not line.startswith("[WARNING]"):
                sys.stderr.write(line)
    if process.wait():
        raise LabError(f"{path} failed")


def _say(what: str, since: float) -> None:
    print(f"  {what:<58} {time.monotonic() - since:6.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
