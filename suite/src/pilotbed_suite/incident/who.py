"""From an address and a time to the payloads that ran there then."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pilotbed.pool.text import any_of
from pilotbed.trace.records import Payload

from .. import GridError
from ..inventory import Inventory
from . import found, hunt, nodes
from .nodes import NodeError, ok, side_by_side

_EVENT = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')


@dataclass(frozen=True)
class Place:
    """Where an address leads: the workers that may be behind it, and at a relay the port.

    Args:
        what: the address in words.
        workers: by name.
        relay: the relay's node; "" if it is none.
        port: of the relay's; 0: any.
    """

    what: str
    workers: tuple[str, ...]
    relay: str = ""
    port: int = 0


def place(known: Inventory, text: str) -> Place:
    """Return what is behind ``ADDRESS``, ``NAME``, or either with ``:PORT``.

    Raises:
        GridError: it is no address of this grid, or of a node where no payload runs.
    """
    address, _, port = text.partition(":")
    if not address or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise GridError(f"{text[:80]!r} is no address: write 10.71.0.21, a node's name, or a relay's with its port, "
                        "such as 10.70.0.17:41005")  # fmt: skip
    node = _node(known, address)
    groups = known.groups_of(node)
    here = f"{address}, {node}"
    site = known.variable("site_name", node)
    behind = tuple(name for name in known.names("worker") if site and known.variable("site_name", name) == site)
    if "relay" in groups and (port or not behind):
        return Place(f"{here}: relay", tuple(known.names("worker")), node, int(port or 0))
    if "worker" in groups:
        return Place(f"{here}: worker of site {site}", (node,))
    if "site_router" in groups:
        hidden = known.variable("site_router_flavour", node) == "nat"
        return Place(f"{here}: router of site {site}"
                     + (", behind whose address any of its workers may be" if hidden else ""), behind)  # fmt: skip
    raise GridError(f"{text}: {node} runs no payloads: it is {', '.join(name for name in groups if name != 'all')}")


def _node(known: Inventory, address: str) -> str:
    """Return the node of an address or a name; of two with one public address the router, which stands before both."""
    found_here = []
    for node in known.hosts():
        theirs = {node, f"{node}.{known.variable('grid_domain')}", known.variable("node_public_address", node)}
        theirs.update((known.variable("node_addresses", node) or {}).values())
        if address in theirs:
            found_here.append(node)
    if found_here:
        routers = [node for node in found_here if node in known.names("site_router")]
        return (routers or found_here)[0]
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise GridError(f"{address[:80]!r} is neither an address nor a node's name") from None
    raise GridError(f"{address} is no node's address in this inventory: ask the site whose network it is of")


def leases(lines: Iterable[str], port: int, at: float) -> list[dict[str, str]]:
    """Return who had a relay's port at a time, from its journal (``short-unix``).

    Args:
        lines: of the journal.
        port: 0 for any.
        at: seconds, Unix.
    """
    had: dict[str, dict[str, str]] = {}
    for line in lines:
        stamp, _, rest = line.partition(" ")
        if "event=lease_" not in rest:
            continue
        try:
            when = float(stamp)
            said = {key: json.loads(value) if value.startswith('"') else value for key, value in _EVENT.findall(rest)}
        except ValueError:
            continue
        if when > at or (port and said.get("port") != str(port)) or not said.get("lease"):
            continue
        if said["event"] in ("lease_opened", "lease_renewed"):
            had[said["lease"]] = said
        elif said["event"] == "lease_ended":
            had.pop(said["lease"], None)
    return list(had.values())


def ran(known: Inventory, workers: Sequence[str], at: float) -> tuple[list[Payload], list[str]]:
    """Return the payloads that ran on workers at a time, and who did not answer."""
    answers = side_by_side(workers, lambda node: hunt.traced(node, "--node", node, "--at", f"@{at}"))
    return hunt.gathered(answers.values())


def slots(known: Inventory, runs: Sequence[Payload]) -> dict[str, str]:
    """Return the slot, which names the pilot, of each payload's job, by GlobalJobId, as far as a schedd knows it."""
    result: dict[str, str] = {}
    attributes = "GlobalJobId,RemoteHost,LastRemoteHost"
    wanted = any_of("GlobalJobId", sorted({one.id for one in runs}))
    for node in known.names("submit") if runs else []:
        for tool in ("condor_history", "condor_q -allusers"):
            asked = f"{tool} -json -attributes %s -constraint %s"
            for ad in nodes.listed(node, ok(node, asked, attributes, wanted)):
                slot = found.text_of(ad, "RemoteHost") or found.text_of(ad, "LastRemoteHost")
                result[str(ad.get("GlobalJobId"))] = slot
    return result


def through(runs: Iterable[Payload], had: Sequence[Mapping[str, str]], slot: Mapping[str, str]) -> list[Payload]:
    """Return the payloads whose pilot had one of the leases; one whose slot nobody knows may have."""
    pilots = {one.get("pilot", "") for one in had}  # a slot is slot1_1@PILOT@WORKER
    return [one for one in runs if not slot.get(one.id) or slot[one.id].partition("@")[2].partition("@")[0] in pilots]


def who(known: Inventory, address: str, at: float) -> dict[str, Any]:
    """Return who ran behind an address at a time (1970 s): place, leases, payloads, and who did not answer.

    Raises:
        GridError: the address leads nowhere, or the relay does not answer.
    """
    there = place(known, address)
    had: list[dict[str, str]] = []
    if there.relay:
        asked = "journalctl --quiet --no-pager --unit pilotbed-relay --output short-unix --until %s"
        said = ok(there.relay, asked, f"@{int(at) + 1}").text
        had = leases(said.splitlines(), there.port, at)
    runs, silent = ran(known, there.workers, at) if had or not there.relay else ([], [])
    if there.relay and runs:
        try:
            runs = through(runs, had, slots(known, runs))
        except NodeError as error:
            silent.append(f"which of these had the port is not known: {error}")
    return {"address": address, "time": at, "place": there.what, "leases": had,
            "payloads": [found.payload(one) for one in runs], "silent": silent}  # fmt: skip
