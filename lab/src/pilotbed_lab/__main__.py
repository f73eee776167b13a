"""``python -m pilotbed_lab``: what the Makefile's targets run. The environment's LAB names the lab that is meant."""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Sequence

from pilotbed import tool
from pilotbed_suite import CHECKOUT, lab_name, local, reach, run

from . import LabError, deploy, nodes, status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of the lab; return its exit code."""
    parser = argparse.ArgumentParser(prog="pilotbed_lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("boot", help="boot the nodes, and leave them as they are")
    commands.add_parser("up", help="boot the nodes and deploy the grid")
    commands.add_parser("status", help="nodes, services, pilots, jobs")
    commands.add_parser("shell", help="a root shell on a node").add_argument("node")
    commands.add_parser("logs", help="the logs that matter for a node").add_argument("node")
    commands.add_parser("list", help="the labs of this host")
    commands.add_parser("destroy", help="remove every trace of the lab").add_argument(
        "--all", action="store_true", help="of all labs of this checkout"
    )
    commands.add_parser("snapshot", help="keep every node as it is").add_argument("name")
    commands.add_parser("restore", help="bring every node back").add_argument("name")
    arguments = parser.parse_args(argv)
    return run(lambda: _run(arguments), "the same command goes on from here")


def _run(arguments: argparse.Namespace) -> int:
    command = arguments.command
    if os.geteuid() != 0 and reach.local_nodes():
        raise LabError("the lab's nodes are entered and made by root: run it as root")
    if command == "destroy":
        _destroy(every=arguments.all)
    elif command == "list":
        _list()
    elif command in ("boot", "up"):
        getattr(deploy, command)()
    elif command == "status":
        status.show()
    elif command == "shell":
        return subprocess.run(local.enter(arguments.node, "/bin/bash", "--login"), check=False).returncode
    elif command == "logs":
        status.logs(arguments.node)
    else:
        started = time.monotonic()
        getattr(deploy.lab(), command)(arguments.name)
        print(f"{command} {arguments.name}: {time.monotonic() - started:.1f} s")
    return 0


def _destroy(every: bool) -> None:
    names = [lab_name()]
    if every:
        records = (lab.record() for lab in nodes.all_labs())
        names = [record["name"] for record in records if record and record["checkout"] == str(CHECKOUT)]
    for name in names:
        nodes.Lab(CHECKOUT, name=name).clear()
    print(f"nothing is left of the lab {', '.join(names) or 'of this checkout'} (the image stays, for the next one)")


def _list() -> None:
    for lab in nodes.all_labs():
        record = lab.record() or {"name": lab.key, "checkout": "nobody knows whose", "nodes": []}
        print(f"{record['name']:<12} {len(lab.running()):>3} of {len(record['nodes'])} nodes run  {record['checkout']}")


if __name__ == "__main__":
    tool.run(main)
