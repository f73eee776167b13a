"""Inventories that cannot work are refused with one message each; nothing but ansible-playbook itself is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from pilotbed_suite import CHECKOUT


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


def test_the_example_is_accepted(tmp_path: Path) -> None:
    """The inventories of the labs are, or there would be none: site.yml begins with validate.yml."""
    code, screen, said = validate(CHECKOUT / "inventory/example-site", tmp_path)
    assert (code, said) == (0, []), screen
    assert re.search(r" [1-9]\d* task runs on ", screen)


def test_a_mistyped_inventory_is_refused(tmp_path: Path) -> None:
    code, screen, _ = validate(tmp_path / "inventroy", tmp_path)
    assert code != 0
    assert "inventroy" in screen


#: What is changed in inventory/lab (file, pattern, replacement), and the lines that must say so. What plugins/filter/
#: mistakes.py finds has its table in test_mistakes.py; here is shown that the playbook gives it the right facts.
BROKEN: dict[str, tuple[list[tuple[str, str, str]], list[str]]] = {
    "names, addresses and numbers": (
        [
            ("hosts.yml", r"beta-wn1: \{node_addresses: .*\}\}", "beta-wn1: {}"),
            ("hosts.yml", r"10\.71\.0\.21", "10.71.0.10"),
            ("hosts.yml", r"10\.71\.0\.22\}", "10.71.0.22}, node_public_address: here"),
            ("hosts.yml", r"10\.70\.0\.11", "10.70.0.321"),
            ("group_vars/site_beta.yml", r"gridlab\]", "gridlap]"),
            ("group_vars/all.yml", r"(?m)^grid_networks:", """\
grid_security_contact: {name: Security, email: ask bob}
grid_dn_prefix: DC=test,DC=grid
pool_accounts_mapper_uid: 500
submit_first_uid: 50
grid_users: [{account: alice b, dn_name: Alice}, {account: pilot, dn_name: Bob}]
grid_vos:
  - name: gridlab
    voms_port: 15
    members: {alice: {}}
    frontend_group: main
    pilot_service: pilot
    pilot_accounts: {prefix: pilot, count: 10, first_uid: 20001, group: glpilot, gid: 20000}
    payload_accounts: {prefix: gl, count: 20, first_uid: 21001, group: gridlab, gid: 21000}

grid_networks:
  lan: {cidr: "fd00::/64"}"""),
        ],
        [
            "grid_networks.lan.cidr is fd00::/64 (IPv6 is not supported: packet filters, relays and tests know IPv4 "
            "only): write an IPv4 network such as 10.70.0.0/24",
            "grid_security_contact.email is 'ask bob': write an address such as security@grid.test",
            "address 10.70.0.321 of host voms is no IPv4 address: correct its node_addresses",
            "node_public_address here of host alpha-wn2 is no IPv4 address: "
            "give the IPv4 address that others reach it at",
            "host beta-wn1 is in no network: give it node_addresses, such as {wan: 10.70.0.99}",
            "address 10.71.0.10 is given to alpha-ce and alpha-wn1, it can be one host's only: "
            "change node_addresses of the other",
            "grid_dn_prefix is DC=test,DC=grid: write it as OpenSSL does, such as /DC=test/DC=grid/O=Gridlab "
            r"(/ and + in a value after \, an octet beyond ASCII as \xC3)",
            "grid_host_dn_prefix is DC=test,DC=grid/OU=Hosts/CN=: write it as OpenSSL does, such as "
            r"/DC=test/DC=grid/O=Gridlab (/ and + in a value after \, an octet beyond ASCII as \xC3)",
            "grid_people_dn_prefix is DC=test,DC=grid/OU=People/CN=: write it as OpenSSL does, such as "
            r"/DC=test/DC=grid/O=Gridlab (/ and + in a value after \, an octet beyond ASCII as \xC3)",
            "grid_service_dn_prefix is DC=test,DC=grid/OU=Services/CN=: write it as OpenSSL does, such as "
            r"/DC=test/DC=grid/O=Gridlab (/ and + in a value after \, an octet beyond ASCII as \xC3)",
            "account alice b of grid_users: write at most 31 lower-case letters, digits, _ and -, a letter first",
            "account pilot of grid_users is the name of a pilot_service, too, and HTCondor knows both by it alone: "
            "call one otherwise",
            "VO gridlab: voms_port is 15: give a port from 1024 to 32767, as 15000",
            "VO gridlab: member alice is not in grid_users (alice b, pilot): add the account there, "
            "or take the member out",
            "site_vos of site beta has gridlap; grid_vos has gridlab: correct it",
            "submit_first_uid 50 of grid_users: give one from 1000 on, with all 2 outside 60000-65535: "
            "the others are the system's",
            "pool_accounts_mapper_uid 500 of glexec: give one from 1000 on, with all 1 outside 60000-65535: "
            "the others are the system's",
        ],
    ),
    "unknown flavour": (
        [("group_vars/site_alpha.yml", r"site_router_flavour: nat", "site_router_flavour: magic"),
         ("group_vars/all.yml", r"site_storage_flavour: bind", "site_storage_flavour: tape")],
        ["site_router_flavour of alpha-router, alpha-ce, alpha-wn1, alpha-wn2 is magic; there is nat, filter, sealed",
         "site_storage_flavour of ca, voms, myproxy, central, submit, factory, frontend, relay, alpha-router, "
         "alpha-ce, alpha-wn1, alpha-wn2, beta-router, beta-ce, beta-wn1 is tape; there is nfs, bind"],
    ),
    "ways that are unknown, or that the site is not made for": (
        [("group_vars/site_alpha.yml", r"site_traversal: relay", "site_traversal: relay,hole"),
         ("group_vars/site_beta.yml", r"site_traversal: ccb", "site_traversal: ccb_tunnel")],
        ["site_traversal of alpha-ce is relay,hole; there is direct, ccb, ccb_streaming, ccb_tunnel, relay",
         "site_traversal of beta-ce is ccb_tunnel, which needs a host of the site in group ccb_broker: put it there"],
    ),
    "sealed without a border": (
        [("group_vars/site_alpha.yml", r"site_router_flavour: nat", "site_router_flavour: sealed")],
        ["site_router_flavour of alpha-router is sealed, which needs the site's router in group border: put it there"],
    ),
    "relayed schedd without a relay's port": (
        [("group_vars/all.yml", r"(?m)^grid_networks:", "submit_traversal: relay\ngrid_networks:")],
        ["submit_traversal of submit is relay, which needs the submit host in group relay_agent: put it there"],
    ),
    "missing site_name": (
        [("group_vars/site_beta.yml", r"(?m)^site_name: .*\n", "")],
        ["host beta-router, beta-ce, beta-wn1: site_name is missing: set it for the site, "
         "as inventory/lab/group_vars/site_alpha.yml does"],
    ),
    "two hosts": (
        [("hosts.yml", r"certificate_authority: \{hosts: \{ca\}\}", "certificate_authority: {hosts: {ca, voms}}")],
        ["group certificate_authority has 2 hosts, it takes exactly one: put one host into it"],
    ),
    "logs in two places, and kept too shortly": (
        [("hosts.yml", r"log_collector: \{hosts: \{central\}\}", "log_collector: {hosts: {central, voms}}"),
         ("group_vars/all.yml", r"(?m)^grid_networks:", "log_collector_days: 30\ngrid_networks:")],
        ["group log_collector has 2 hosts, central, voms; it takes one, or none: leave one in it",
         "log_collector_days of central is 30; say a whole number, at least 90",
         "log_collector_days of voms is 30; say a whole number, at least 90"],
    ),
    "no worker": (
        [("hosts.yml", r"\bworker: \{hosts: .*\}", "worker: {hosts: {alpha-wn1}}")],
        ["site beta has no host in group worker: put one into it"],
    ),
    "worker outside the batch system": (
        [("hosts.yml", r"batch_slurm: \{hosts: .*\}",
          "batch_slurm: {hosts: {alpha-ce, alpha-wn1, beta-ce, beta-wn1}}")],
        ["site alpha: its hosts are in batch_slurm, and alpha-wn2 in no batch system: "
         "put all of its workers and computing elements into one flavour's group"],
    ),
    "impossible pair": (
        [("group_vars/site_beta.yml", r"site_name: beta",
          "site_name: beta\nbatch_system_for: {ce_arc: {refused: it has no back end for it}}")],
        ["beta-ce: ce_arc cannot stand in front of batch_slurm: it has no back end for it"],
    ),
    "missing networks": (
        [("group_vars/all.yml", r"(?m)^grid_networks:", "lab_networks:")],
        ["grid_networks is missing: state it in the inventory's group_vars/all (inventory/lab has an example)"],
    ),
}  # fmt: skip


def validate_broken(name: str, scratch: Path) -> tuple[int, str, list[str]]:
    inventory = scratch / "inventory"
    shutil.copytree(CHECKOUT / "inventory/lab", inventory)
    for file, pattern, replacement in BROKEN[name][0]:
        broken, changes = re.subn(pattern, lambda _, text=replacement: text, (inventory / file).read_text())
        assert changes == 1, f"inventory/lab/{file} has changed: this test must follow"
        (inventory / file).write_text(broken)
    return validate(inventory, scratch)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[tuple[int, str, list[str]]]]]:
    """The broken inventories that were asked for, two at a time: each is a second or two of ansible-playbook."""
    wanted = [item.callspec.params["broken"] for item in request.session.items
              if "broken" in getattr(getattr(item, "callspec", None), "params", {})]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(validate_broken, name, tmp_path_factory.mktemp("broken")) for name in wanted}


@pytest.mark.parametrize("broken", BROKEN)
def test_refused(broken: str, outcomes: dict[str, Future[tuple[int, str, list[str]]]]) -> None:
    code, screen, said = outcomes[broken].result()
    assert code != 0
    assert said == BROKEN[broken][1], screen


CENTRAL = ("certificate_authority", "voms_server", "myproxy_server", "central_manager", "submit", "factory", "frontend",
           "relay", "log_collector")  # fmt: skip
#: Groups that cannot share a host, and a word of the reason.
APART = [
    *(("site_router", other, "packet filter") for other in CENTRAL),
    *((one, other, "accounts or jobs") for other in CENTRAL
      for one in ("computing_element", "batch_system", "mapping_service", "site_storage", "worker")),
    *(("ccb_broker", other, "port 9618") for other in ("central_manager", "submit")),
    *(("relay_agent", other, "port of the relay") for other in ("central_manager", "ccb_broker")),
]  # fmt: skip


def test_services_that_cannot_share_a_host_are_refused_and_no_others(tmp_path: Path) -> None:
    """A host that is in every group, of flavours in the first: a line for each that others keep away from, and why."""
    shutil.copytree(CHECKOUT / "inventory/small/group_vars", tmp_path / "inventory/group_vars")
    known = yaml.safe_load((CHECKOUT / "inventory/common/groups.yml").read_text())["all"]["children"]
    leaves = {next(iter((content or {}).get("children", {group: None}))) for group, content in known.items()}
    content = {
        "hosts": {"one": {"node_addresses": {"alpha": "10.71.0.1", "wan": "10.70.0.2"}}},
        "children": {name: {"hosts": {"one": None}} for name in [*leaves, "site_alpha"]},
    }
    (tmp_path / "inventory/hosts.yml").write_text(yaml.safe_dump({"all": content}))
    code, screen, said = validate(tmp_path / "inventory", tmp_path)
    assert code != 0, screen
    lines = [re.fullmatch(r"host one is in (\w+) and in ([\w, ]+): (.*): give either a host of its own", line)
             for line in said]  # fmt: skip
    assert all(lines), said
    found = [(line[1], other, line[3]) for line in lines if line for other in line[2].split(", ")]
    assert sorted(pair[:2] for pair in found) == sorted(pair[:2] for pair in APART), screen
    reasons = {(one, other): reason for one, other, reason in APART}
    assert [why for one, other, why in found if reasons[one, other] not in why] == []
