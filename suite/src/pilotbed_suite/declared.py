"""What the roles declare of each host (``grid_declared``), and what is there: for the certificate."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from pilotbed.certificate.report import Link, Socket
from pilotbed.watch import facts
from testinfra.host import Host

from . import CHECKOUT, GridError, ansible, ansible_environment
from .support import ok

#: Where a test finds the certificate that it is part of, if it is part of one. Not in `certify`, which a
#: test would import a second time: run as a program, it has another name.
RUNNING = pytest.StashKey[Any]()
#: A host's part of what Ansible's callback "minimal" prints.
_HOST = re.compile(r"^(\S+) \| SUCCESS => (\{.*?^\})", re.DOTALL | re.MULTILINE)


@functools.cache
def declared() -> dict[str, dict[str, Any]]:
    """Return what is declared of every host, by its name.

    Raises:
        GridError: Ansible does not say.
    """
    command = [ansible("ansible"), "all", "-m", "ansible.builtin.debug", "-a", "msg={{ grid_declared | to_json }}"]
    environment = ansible_environment(ANSIBLE_STDOUT_CALLBACK="ansible.builtin.minimal")
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GridError(f"what the roles declare cannot be read: {(done.stderr or done.stdout).strip()[-800:]}")
    return {name: json.loads(json.loads(said)["msg"]) for name, said in _HOST.findall(done.stdout)}


def sockets(name: str, node: Host) -> list[Socket]:
    """Return every socket that listens on a node, with what is declared of it, one a program and address."""
    known = declared()[name]["sockets"]
    return [
        Socket(name, one.protocol, one.address, one.port, one.program, facts.protection(one, known))
        for one in facts.listeners(ok(node, facts.SOCKETS))
    ]


def missing(name: str, there: Sequence[Socket]) -> list[str]:
    """Return what is declared of a node and does not listen. Of several ports, and of dynamic ones, none has to."""
    found = {(one.program, one.protocol, str(one.port)) for one in there}
    return [
        f"{entry['program']} {entry['proto']} {entry['port']}"
        for entry in declared()[name]["sockets"]
        if str(entry["port"]).isdigit() and not entry.get("optional")
        and (entry["program"], entry["proto"], str(entry["port"])) not in found
    ]  # fmt: skip


def units(node: Host) -> list[str]:
    """Return what runs on a node, or is waited for: services, timers, sockets and paths, without the ends of names."""
    return facts.units(ok(node, facts.UNITS))


def logins(node: Host) -> list[str]:
    """Return the accounts of a node that have a shell."""
    accounts = (line.split(":") for line in ok(node, "getent passwd").splitlines())
    return [account[0] for account in accounts if account[6].rpartition("/")[2] not in ("nologin", "false")]


def rights(node: Host) -> list[str]:
    """Return the rules of a node's sudo policy, as cvtsudoers writes them, without its settings."""
    lines = ok(node, "cvtsudoers -f sudoers /etc/sudoers").replace("\\\n", " ").splitlines()
    words = (" ".join(line.split()) for line in lines)
    return [line for line in words if line and not line.startswith(("#", "Defaults"))]


def strange(name: str, what: str, there: Sequence[str]) -> list[str]:
    """Return what there is on a node and is not declared of it.

    Args:
        name: of the node.
        what: key of ``grid_declared``, a list of shell patterns; of ``sudo`` a list of rules.
        there: what there is.
    """
    known = declared()[name][what]
    if what == "sudo":
        return sorted(set(there) - set(known))
    return facts.undeclared(there, known)


def links(name: str, node: Host, addresses: Mapping[str, str]) -> list[Link]:
    """Return which other nodes are connected to which port of this one; ``addresses`` has their names."""
    listening = {one.port for one in sockets(name, node)}
    found = set()
    for line in ok(node, "ss -H -n -t state established").splitlines():
        _, _, local, peer, *_ = line.split()
        port, client = int(local.rpartition(":")[2]), peer.rpartition(":")[0].strip("[]").removeprefix("::ffff:")
        if port in listening and client in addresses:
            found.add(Link(addresses[client], name, port))
    return sorted(found, key=lambda link: (link.client, link.port))
