"""Inventories that cannot work are refused with one message each; nothing but ansible-playbook itself is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def validate(inventory: Path, scratch: Path) -> tuple[int, str, list[str]]:
    """Return exit code, screen and messages of playbooks/validate.yml for ``inventory``."""
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"),
         "-i", "inventory/common", "-i", inventory, "playbooks/validate.yml"],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
        env={**os.environ, "PILOTBED_LOG": str(scratch / "log"), "ANSIBLE_CACHE_PLUGIN": "memory"},
    )  # fmt: skip
    # What the callback sets in by four columns, without where it stands and what to do next.
    said = re.findall(r"^    (?!in /|Mend)(.*)", done.stderr, re.MULTILINE)
    return done.returncode, done.stdout + done.stderr, said


@pytest.mark.parametrize("name", ["lab", "example-site"])
def test_ours_are_accepted(name: str, tmp_path: Path) -> None:
    code, screen, said = validate(CHECKOUT / "inventory" / name, tmp_path)
    assert (code, said) == (0, []), screen
    assert re.search(r" [1-9]\d* task runs on ", screen)


def test_a_mistyped_inventory_is_refused(tmp_path: Path) -> None:
    code, screen, _ = validate(tmp_path / "inventroy", tmp_path)
    assert code != 0
    assert "inventroy" in screen


#: What is changed in which file of inventory/lab, and the one line that must say so.
BROKEN = {
    "unknown flavour": (
        "group_vars/site_alpha.yml", r"site_router_flavour: nat", "site_router_flavour: magic",
        "site_router_flavour of alpha-router, alpha-ce, alpha-wn1, alpha-wn2 is magic; there is nat, filter, sealed",
    ),
    "host in no network": (
        "hosts.yml", r"beta-wn1: \{node_addresses: .*\}\}", "beta-wn1: {}",
        "host beta-wn1 is in no network: give it node_addresses, such as {wan: 10.70.0.99}",
    ),
    "address twice": (
        "hosts.yml", r"10\.72\.0\.21", "10.72.0.10",
        "address 10.72.0.10 is given to beta-ce and beta-wn1, it can be one host's only: "
        "change node_addresses of the other",
    ),
    "missing site_name": (
        "group_vars/site_beta.yml", r"(?m)^site_name: .*\n", "",
        "host beta-router, beta-ce, beta-wn1: site_name is missing: set it for the site, "
        "as inventory/lab/group_vars/site_alpha.yml does",
    ),
    "two hosts": (
        "hosts.yml", r"factory: \{hosts: \{factory\}\}", "factory: {hosts: {factory, submit}}",
        "group factory has 2 hosts, it takes exactly one: put one host into it",
    ),
    "no worker": (
        "hosts.yml", r"\bworker: \{hosts: .*\}", "worker: {hosts: {alpha-wn1}}",
        "site beta has no host in group worker: put one into it",
    ),
    "worker outside the batch system": (
        "hosts.yml", r"batch_slurm: \{hosts: .*\}", "batch_slurm: {hosts: {alpha-ce, alpha-wn1, beta-ce, beta-wn1}}",
        "site alpha: its hosts are in batch_slurm, and alpha-wn2 in no batch system: "
        "put all of its workers and computing elements into one flavour's group",
    ),
    "impossible pair": (
        "group_vars/site_beta.yml", r"site_name: beta",
        "site_name: beta\nbatch_system_for: {ce_arc: {refused: it has no back end for it}}",
        "beta-ce: ce_arc cannot stand in front of batch_slurm: it has no back end for it",
    ),
    "missing networks": (
        "group_vars/all.yml", r"(?m)^grid_networks:", "lab_networks:",
        "grid_networks is missing: state it in the inventory's group_vars/all (inventory/lab has an example)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("file", "pattern", "replacement", "message"), BROKEN.values(), ids=BROKEN)
def test_refused(tmp_path: Path, file: str, pattern: str, replacement: str, message: str) -> None:
    inventory = tmp_path / "inventory"
    shutil.copytree(CHECKOUT / "inventory/lab", inventory)
    broken, changes = re.subn(pattern, replacement, (inventory / file).read_text())
    assert changes == 1, f"inventory/lab/{file} has changed: this test must follow"
    (inventory / file).write_text(broken)
    code, screen, said = validate(inventory, tmp_path)
    assert code != 0
    assert said == [message], screen
