"""From an inventory to nodes and networks, and what is refused on the way."""

from __future__ import annotations

import copy
import ipaddress
from collections.abc import Callable
from typing import Any

import pytest
from pilotbed_lab import LabError
from pilotbed_lab.topology import Node, parse

NETWORKS = {
    "wan": {"cidr": "10.70.0.0/24", "routes": {"10.72.0.0/24": "10.70.0.3"}},
    "beta": {"cidr": "10.72.0.0/24", "routes": {"default": "10.72.0.1"}},
}


def host(addresses: dict[str, str], **others: str) -> dict[str, Any]:
    return {"grid_domain": "grid.test", "grid_networks": NETWORKS, "node_addresses": addresses, **others}


#: The JSON of `ansible-inventory --list`, as far as it is read.
INVENTORY: dict[str, Any] = {
    "_meta": {
        "hostvars": {
            "submit": host({"wan": "10.70.0.14"}),
            "beta-router": host({"beta": "10.72.0.1", "wan": "10.70.0.3"}, site_name="beta"),
            "beta-wn1": host({"beta": "10.72.0.21"}, site_name="beta"),
        }
    },
    "site_storage": {"hosts": ["beta-wn1"]},
}


def test_nodes_networks_and_sites() -> None:
    found = parse(INVENTORY)
    assert found.domain == "grid.test"
    assert {network.name: network.cidr for network in found.networks} == {
        "wan": ipaddress.IPv4Network("10.70.0.0/24"),
        "beta": ipaddress.IPv4Network("10.72.0.0/24"),
    }
    assert found.node("submit") == Node(
        "submit", (("wan", "10.70.0.14"),), (("10.72.0.0/24", "10.70.0.3"),), ""
    )
    assert found.node("beta-wn1") == Node("beta-wn1", (("beta", "10.72.0.21"),), (("default", "10.72.0.1"),), "beta")
    assert found.sites == ("beta",)


def test_a_router_routes_neither_to_itself_nor_to_where_it_stands() -> None:
    router = parse(INVENTORY).node("beta-router")
    assert router.addresses == (("beta", "10.72.0.1"), ("wan", "10.70.0.3"))
    assert router.routes == ()


def test_an_unknown_node_is_answered_with_those_there_are() -> None:
    with pytest.raises(LabError, match=r"no node 'sumbit'; the inventory has submit, beta-router, beta-wn1"):
        parse(INVENTORY).node("sumbit")


def without(hosts: dict[str, Any], name: str, variable: str) -> None:
    del hosts[name][variable]


REFUSED: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("no-network", lambda hosts: without(hosts, "beta-wn1", "node_addresses"), "playbooks/validate.yml says why"),
    ("unknown-network", lambda hosts: hosts["submit"].update(node_addresses={"lan": "10.70.0.14"}), "'lan'"),
    ("name", lambda hosts: hosts.update({"Submit_2": host({"wan": "10.70.0.15"})}),
     "'Submit_2' is no name for a node: "),
    ("path", lambda hosts: hosts.update({"../x": host({"wan": "10.70.0.15"})}), "'../x' is no name for a node: "),
    ("long-name", lambda hosts: hosts.update({"n" * 32: host({"wan": "10.70.0.15"})}), "is no name for a node: "),
    ("no-networks", lambda hosts: without(hosts, "submit", "grid_networks"), "KeyError('grid_networks')"),
    ("bad-cidr", lambda hosts: hosts["submit"].update(grid_networks={"wan": {"cidr": "10.70.0.1/24"}}),
     "10.70.0.1/24 has host bits set"),
    ("no-hosts", lambda hosts: hosts.clear(), "the inventory has no hosts"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_can_be_no_lab_is_refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
    inventory = copy.deepcopy(INVENTORY)
    change(inventory["_meta"]["hostvars"])
    with pytest.raises(LabError) as refusal:
        parse(inventory)
    assert message in str(refusal.value)
