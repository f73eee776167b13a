"""From the inventory to nodes and networks: what the lab has to stand up. No I/O but reading the inventory."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pilotbed_suite import inventory

from . import LabError

#: Hardly more than a host name's rule; the length keeps interface names within the kernel's 15 characters.
NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")


@dataclass(frozen=True)
class Network:
    """A bridge of the lab.

    Attributes:
        name: the network's name in the inventory.
        cidr: its address range.
        routes: destination (CIDR or ``default``) to gateway, for every node in it.
    """

    name: str
    cidr: ipaddress.IPv4Network
    routes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Node:
    """A node of the lab.

    Attributes:
        name: the inventory's name of the host.
        addresses: (network, address) of each interface, the primary one first.
        routes: (destination, gateway) pairs.
        site: name of the site whose shared directory is bound into the node, or "".
    """

    name: str
    addresses: tuple[tuple[str, str], ...]
    routes: tuple[tuple[str, str], ...]
    site: str


@dataclass(frozen=True)
class Topology:
    """Everything the lab has to stand up."""

    domain: str
    networks: tuple[Network, ...]
    nodes: tuple[Node, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of sites that share a directory between nodes."""
        return tuple(sorted({node.site for node in self.nodes if node.site}))

    def node(self, name: str) -> Node:
        """Return the node called ``name``.

        Raises:
            LabError: there is no such node.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(f"there is no node {name!r}; the inventory has {', '.join(n.name for n in self.nodes)}")


def load() -> Topology:
    """Return the topology of the inventory that the checkout's ansible.cfg names, or the variable ANSIBLE_INVENTORY.

    Raises:
        GridError: the inventory cannot be read, or contradicts itself.
    """
    return parse(inventory.load().content)


def parse(listed: Mapping[str, Any]) -> Topology:
    """Return the topology that an inventory (the JSON of ``ansible-inventory --list``) describes.

    What is wrong with an inventory as such, playbooks/validate.yml says, which comes before every boot.

    Raises:
        LabError: a name that no node of a lab can have, or an inventory that is no topology.
    """
    hosts: Mapping[str, Mapping[str, Any]] = listed["_meta"]["hostvars"]
    if not hosts:
        raise LabError("the inventory has no hosts")
    if wrong := [name for name in hosts if not NAME.fullmatch(name)]:
        raise LabError(f"{wrong[0]!r} is no name for a node: lower case letters, digits and -, at most 31 characters")
    storage = set(inventory.Inventory(listed).names("site_storage"))
    first = next(iter(hosts.values()))
    try:
        networks = {
            name: Network(name, ipaddress.IPv4Network(value["cidr"]), tuple(sorted(value.get("routes", {}).items())))
            for name, value in first["grid_networks"].items()
        }
        nodes = [_node(name, host, networks, name in storage) for name, host in hosts.items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LabError(f"no lab can be made of the inventory ({error!r}): playbooks/validate.yml says why") from error
    return Topology(str(first.get("grid_domain", "")), tuple(networks.values()), tuple(nodes))


def _node(name: str, host: Mapping[str, Any], networks: Mapping[str, Network], shares: bool) -> Node:
    addresses: Mapping[str, str] = host["node_addresses"]
    routes = [
        route
        for network in addresses
        for route in networks[network].routes
        # A router is its own network's gateway, and reaches the others' through their routers.
        if route[1] not in addresses.values() and not (route[0] == "default" and len(addresses) > 1)
    ]
    reached = {str(networks[network].cidr) for network in addresses}
    return Node(
        name,
        tuple(addresses.items()),
        tuple(sorted(route for route in set(routes) if route[0] not in reached)),
        host.get("site_name", "") if shares else "",
    )
