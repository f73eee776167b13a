"""Reaching nodes: the same few lines for the walk, the status and the tests, by nsenter or over ssh."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
import testinfra
import testinfra.backend
from testinfra.backend import base
from testinfra.backend import paramiko as paramiko_backend
from testinfra.host import Host

from . import inventory, local

#: Called with each command that was run: node, text, what came of it (testinfra's result), seconds.
witnesses: list[Callable[[str, str, Any, float], None]] = []


def _witnessed(node: str, text: str, run: Callable[[], Any]) -> Any:
    begun = time.monotonic()
    result = run()
    for witness in witnesses:
        witness(node, text, result, time.monotonic() - begun)
    return result


class NsenterBackend(base.BaseBackend):  # type: ignore[misc]
    """testinfra backend: enter a local node through its init, 20 ms a command."""

    NAME = "nsenter"

    def __init__(self, name: str, *args: Any, **kwargs: Any):
        self.name = name
        super().__init__(name, *args, **kwargs)

    def run(self, command: str, *args: str, **kwargs: Any) -> Any:
        """Run a shell command on the node; see testinfra."""
        text = self.get_command(command, *args)
        entered = local.enter(self.name, "/bin/sh", "-c", text)
        return _witnessed(self.name, text, lambda: self.run_local(" ".join(["%s"] * len(entered)), *entered))


class SshBackend(paramiko_backend.ParamikoBackend):  # type: ignore[misc]
    """testinfra's paramiko backend, but a host with an unknown key is refused where theirs only warns."""

    NAME = "paramiko"

    def run(self, command: str, *args: str, **kwargs: Any) -> Any:
        """Run a shell command on the host; see testinfra."""
        text = self.get_command(command, *args)
        return _witnessed(self.host.name, text, lambda: super(SshBackend, self).run(command, *args, **kwargs))

    def _load_ssh_config(
        self, client: paramiko.SSHClient, cfg: dict[str, Any], ssh_config: paramiko.SSHConfig, *args: Any
    ) -> None:
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        super()._load_ssh_config(client, cfg, ssh_config, *args)
        for path in ssh_config.lookup(self.host.name).get("userknownhostsfile", "~/.ssh/known_hosts").split():
            if (known := Path(path).expanduser()).is_file():
                client.load_host_keys(str(known))


for backend in (NsenterBackend, SshBackend):
    testinfra.backend.BACKENDS[backend.NAME] = f"{__name__}.{backend.__name__}"


def local_nodes() -> bool:
    """Return whether nodes are local ones, entered by nsenter; else they are reached over ssh."""
    return os.environ.get("PILOTBED_CONNECTION", "nsenter") == "nsenter"


def ansible_connection() -> list[str]:
    """Return the arguments by which Ansible reaches nodes as the tests do: the lab's inventory says nsenter."""
    return [] if local_nodes() else ["--extra-vars", "ansible_connection=ssh"]


def host(name: str) -> Host:
    """Return the testinfra host called ``name`` in the inventory.

    The environment variable PILOTBED_CONNECTION chooses: ``nsenter`` (default, local nodes) or ``paramiko`` (ssh).
    """
    if local_nodes():
        return testinfra.get_host(f"nsenter://{name}")
    # The lab writes one; a real site gives its own.
    config = os.environ.get("PILOTBED_SSH_CONFIG") or str(local.directory() / "ssh/config")
    return testinfra.get_host(f"paramiko://{name}", ssh_config=config)


def service(group: str) -> Host:
    """Return the first host of a group of the inventory.

    Raises:
        GridError: the group has none.
    """
    return host(inventory.load().first(group))
