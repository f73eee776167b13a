"""What the roles declare of each host (``grid_declared``), and what is there: for the certificate."""

from __future__ import annotations

import fnmatch
import functools
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from pilotbed.certificate.report import Link, Socket
from testinfra.host import Host

from . import CHECKOUT, GridError, ansible, ansible_environment
from .support import ok

#: A host's part of what Ansible's callback "minimal" prints.
_HOST = re.compile(r"^(\S+) \| SUCCESS => (\{.*?^\})", re.DOTALL | re.MULTILINE)
_PROGRAM = re.compile(r'\("([^"]+)"')


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


def _covers(ports: object, port: int) -> bool:
    """Tell whether a declaration's ports hold a port; ``dynamic`` ones are what the kernel gives."""
    if ports == "dynamic":
        return True
    for part in str(ports).split(","):
        first, _, last = part.partition("-")
        if int(first) <= port <= int(last or first):
            return True
    return False


def protection(one: Socket, declarations: Sequence[Mapping[str, Any]]) -> str:
    """Return how a socket is protected, as it is declared; "" if it is not.

    What is declared for loopback must listen there only.
    """
    loopback = one.address.strip("[]").partition("%")[0].startswith(("127.", "::1"))
    for entry in declarations:
        if (
            entry["program"] == one.program
            and entry["proto"] == one.protocol
            and _covers(entry["port"], one.port)
            and (loopback or entry["from"] != "host")
        ):
            return str(entry["protected"])
    return ""


def sockets(name: str, node: Host) -> list[Socket]:
    """Return every socket that listens on a node, with what is declared of it, one a program and address."""
    found = {}
    for line in ok(node, "ss -H -l -n -t -u -p").splitlines():
        protocol, _, _, _, local, _, *rest = line.split(maxsplit=6)
        address, _, port = local.rpartition(":")
        program = _PROGRAM.search(rest[0] if rest else "")
        one = Socket(name, protocol, address, int(port), program[1] if program else "-")
        found[one] = Socket(**{**vars(one), "declared": protection(one, declared()[name]["sockets"])})
    return sorted(found.values(), key=lambda one: (one.protocol, one.port, one.address, one.program))


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
    listed = ok(
        node, "systemctl list-units --state=active --type=service,timer,socket,path --no-legend --plain --full"
    )
    return sorted({line.split()[0].rpartition(".")[0] for line in listed.splitlines()})


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
    known = [re.sub(r"\.(service|timer|socket|path)$", "", pattern) for pattern in known]
    return [one for one in there if not any(fnmatch.fnmatchcase(one, pattern) for pattern in known)]


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
