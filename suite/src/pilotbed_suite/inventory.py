"""The inventory, read once: who has which part of the grid, and what is said of it."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Mapping
from typing import Any

from . import CHECKOUT, GridError, ansible, ansible_environment


class Inventory:
    """An inventory as ``ansible-inventory --list`` gives it.

    Args:
        content: what it gives.
    """

    def __init__(self, content: Mapping[str, Any]):
        self.content = content

    def hosts(self) -> list[str]:
        """Return the names of all hosts."""
        return list(self.content["_meta"]["hostvars"])

    def names(self, group: str) -> list[str]:
        """Return the hosts of a group; one that only has subgroups counts as theirs."""
        found = self.content.get(group, {})
        names = [*found.get("hosts", []), *(name for child in found.get("children", []) for name in self.names(child))]
        return list(dict.fromkeys(names))

    def first(self, group: str) -> str:
        """Return the first host of a group.

        Raises:
            GridError: it has none.
        """
        if found := self.names(group):
            return found[0]
        raise GridError(f"group {group} has no host in this inventory: put one into it")

    def groups_of(self, host: str) -> list[str]:
        """Return the groups that ``host`` is in."""
        return [group for group in self.content if group != "_meta" and host in self.names(group)]

    def variable(self, name: str, host: str | None = None) -> Any:
        """Return a variable of a host, as far as it needs no facts; of any host, if none is named."""
        known = self.content["_meta"]["hostvars"]
        return known[host or next(iter(known))].get(name)

    def logs(self, host: str, kind: str) -> list[str]:
        """Return where a host's services log, as its groups export it, sorted.

        Args:
            host: its name.
            kind: units, files (patterns of paths) or identifiers.
        """
        exports = (self.variable(f"{group}_logs", host) or {} for group in self.groups_of(host))
        return sorted({one for export in exports for one in export.get(kind, ())})


@functools.cache
def load() -> Inventory:
    """Return the inventory that the checkout's ansible.cfg names, or the variable ANSIBLE_INVENTORY.

    Raises:
        GridError: it cannot be read.
    """
    command = [ansible("ansible-inventory"), "--list"]
    done = subprocess.run(command, cwd=CHECKOUT, env=ansible_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise GridError(f"the inventory cannot be read: {done.stderr.strip()}")
    return Inventory(json.loads(done.stdout))
