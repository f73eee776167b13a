"""The lab's networks: bridges in a network namespace that stands for the switch, and a namespace for each node.

Every lab has a switch of its own, so that the same addresses may be in use in any number of labs, and nothing of the
host's network changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from pathlib import Path

from . import LabError
from .topology import Node, Topology

NAMESPACES = Path("/run/netns")


class Switch:
    """The networks of one lab.

    Args:
        name: of the switch's namespace; a node's is ``NAME-NODE``.
    """

    def __init__(self, name: str):
        self.name = name

    def namespace(self, node: str) -> str:
        """Return the name of a node's namespace."""
        return f"{self.name}-{node}"

    def nodes(self) -> set[str]:
        """Return the nodes that have a namespace."""
        found = NAMESPACES.glob(f"{self.name}-*") if NAMESPACES.is_dir() else ()
        return {path.name.removeprefix(f"{self.name}-") for path in found}

    def left(self) -> list[str]:
        """Return the namespaces that are there."""
        own = [self.name] if (NAMESPACES / self.name).exists() else []
        return own + sorted(map(self.namespace, self.nodes()))

    def make(self, topology: Topology) -> None:
        """Make a bridge for each network, as far as it is not there."""
        if not (NAMESPACES / self.name).exists():
            _ip(f"netns add {self.name}")
            _ip("link set lo up", namespace=self.name)
        have = _links(self.name)
        for network in topology.networks:
            bridge = _bridge(network.name)
            if bridge not in have:
                _ip(f"link add {bridge} type bridge", f"link set {bridge} up", namespace=self.name)

    def plug(self, node: Node, topology: Topology) -> None:
        """Make a node's namespace, its interfaces and routes."""
        namespace = self.namespace(node.name)
        _ip(f"netns add {namespace}")
        lines = ["link set lo up"]
        for index, (network, address) in enumerate(node.addresses):
            outer = "v" + hashlib.sha256(f"{node.name}/{index}".encode()).hexdigest()[:10]
            _ip(f"link add {outer} type veth peer name eth{index} netns {namespace}",
                f"link set {outer} master {_bridge(network)} up", namespace=self.name)  # fmt: skip
            length = next(n.cidr.prefixlen for n in topology.networks if n.name == network)
            lines += [f"address add {address}/{length} dev eth{index}", f"link set eth{index} up"]
        lines += [f"route add {to} via {via}" for to, via in node.routes]
        _ip(*lines, namespace=namespace)

    def unplug(self, node: str) -> None:
        """Remove a node's namespace with its interfaces, if it is there."""
        namespace = self.namespace(node)
        if not (NAMESPACES / namespace).exists():
            return
        # Interfaces live until the last process of the namespace is gone: delete them by name, from inside.
        with contextlib.suppress(LabError, subprocess.CalledProcessError):
            if ours := sorted(link for link in _links(namespace) if link.startswith("eth")):
                _ip(*(f"link del {link}" for link in ours), namespace=namespace)
        with contextlib.suppress(LabError):
            _ip(f"netns del {namespace}")

    def remove(self) -> None:
        """Remove the bridges, if they are there."""
        if (NAMESPACES / self.name).exists():
            _ip(f"netns del {self.name}")


def _ip(*lines: str, namespace: str | None = None) -> None:
    """Run lines of iproute2 in one process."""
    where = ["-n", namespace] if namespace else []
    done = subprocess.run(
        ["ip", *where, "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LabError(f"network set-up failed: {done.stderr.strip()}")


def _links(namespace: str) -> set[str]:
    """Return the names of the interfaces in a network namespace."""
    shown = subprocess.run(["ip", "-n", namespace, "-j", "link"], capture_output=True, text=True, check=True).stdout
    return {link["ifname"] for link in json.loads(shown or "[]")}


def _bridge(network: str) -> str:
    return f"br-{network}"[:15]
