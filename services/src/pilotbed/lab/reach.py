"""Reaching nodes: the same few lines for the walk, the status and the tests, by nsenter or over ssh."""

from __future__ import annotations

import os
from typing import Any

import testinfra
import testinfra.backend
from testinfra.backend import base
from testinfra.host import Host

from . import nodes

#: ssh configuration that the lab writes; a real site gives its own in PILOTBED_SSH_CONFIG.
SSH_CONFIG = "/var/lib/pilotbed/lab/ssh/config"


class NsenterBackend(base.BaseBackend):  # type: ignore[misc]
    """testinfra backend: enter a local node through its init, 20 ms a command."""

    NAME = "nsenter"

    def __init__(self, name: str, *args: Any, **kwargs: Any):
        self.name = name
        super().__init__(name, *args, **kwargs)

    def run(self, command: str, *args: str, **kwargs: Any) -> Any:
        """Run a shell command on the node; see testinfra."""
        text = self.get_command(command, *args)
        entered = nodes.enter(self.name, "/bin/sh", "-c", text)
        return self.run_local(" ".join(["%s"] * len(entered)), *entered)


testinfra.backend.BACKENDS[NsenterBackend.NAME] = f"{__name__}.NsenterBackend"


def host(name: str) -> Host:
    """Return the testinfra host called ``name`` in the inventory.

    The environment variable PILOTBED_CONNECTION chooses: ``nsenter`` (default, local nodes) or ``paramiko`` (ssh).
    """
    if os.environ.get("PILOTBED_CONNECTION", "nsenter") == "nsenter":
        return testinfra.get_host(f"nsenter://{name}")
    config = os.environ.get("PILOTBED_SSH_CONFIG", SSH_CONFIG)
    return testinfra.get_host(f"paramiko://{name}", ssh_config=config)
