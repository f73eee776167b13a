"""What Vagrant would make is what the inventory says: vagrant/Vagrantfile, evaluated without a hypervisor."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import struct
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from pilotbed_lab import box, topology
from pilotbed_suite import CHECKOUT, ansible


def told(name: str, **environment: str) -> dict[str, Any]:
    """Return what the Vagrantfile says for inventory ``name``: tests/unit/vagrantfile.rb."""
    done = subprocess.run(
        ["ruby", "tests/unit/vagrantfile.rb", "vagrant/Vagrantfile"], cwd=CHECKOUT, text=True, capture_output=True,
        env={**os.environ, "PILOTBED_INVENTORY": name, **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def machines(name: str, **environment: str) -> dict[str, dict[str, Any]]:
    """Return what is told of each machine, by its name."""
    defined = told(name, **environment)["vm"]["define()"]
    return {machine["arguments"][0]: machine["told"]["vm"] for machine in defined}


def listed(name: str) -> dict[str, Any]:
    """Return inventory ``name`` as Ansible reads it."""
    command = [ansible("ansible-inventory"), "--list"]
    for part in ("common", name, "vagrant"):
        command += ["--inventory", f"inventory/{part}"]
    found: dict[str, Any] = json.loads(subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True).stdout)
    return found


def networks(machine: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [network["options"] for network in machine["network()"] if network["arguments"] == [kind]]


@pytest.mark.parametrize("name", ["mini", "lab"])
def test_machines_networks_memory_and_ports_are_the_inventorys(name: str) -> None:
    made, inventory = machines(name), listed(name)
    hosts = inventory["_meta"]["hostvars"]
    grounds = {network.name: network for network in topology.parse(inventory).networks}
    assert sorted(made) == sorted(hosts)
    for host, machine in made.items():
        said = hosts[host]
        assert machine["hostname"] == f"{host}.{said['grid_domain']}"
        cards = networks(machine, "private_network")
        assert {card["virtualbox__intnet"]: card["ip"] for card in cards} == {
            f"pilotbed-{network}": address for network, address in said["node_addresses"].items()
        }
        for card, network in zip(cards, said["node_addresses"], strict=True):
            assert card["libvirt__network_name"] == card["virtualbox__intnet"]
            assert card["netmask"] == str(grounds[network].cidr.netmask)
            assert ipaddress.ip_address(card["libvirt__host_ip"]) in grounds[network].cidr
            assert card["libvirt__host_ip"] not in [a for h in hosts.values() for a in h["node_addresses"].values()]
        assert {port["guest"]: port["host"] for port in networks(machine, "forwarded_port")} == {
            int(guest): at for guest, at in said.get("vm_ports", {}).items()
        }
        for provider in machine["provider()"]:
            assert provider["told"]["memory"] == said.get("vm_memory", 512)


def test_the_three_machines_fit_a_laptop() -> None:
    memory = [machine["provider()"][0]["told"]["memory"] for machine in machines("mini").values()]
    assert sum(memory) <= 2500


@pytest.mark.parametrize("name", ["mini", "lab"])
def test_each_machine_has_ways_to_the_others_and_no_way_round_a_router(name: str) -> None:
    """As local nodes have them, but for the default route: that one is Vagrant's own."""
    inventory = listed(name)
    grounds = topology.parse(inventory)
    used = {network for node in grounds.nodes for network, _ in node.addresses}
    for host, machine in machines(name).items():
        node = grounds.node(host)
        script = machine["provision()"][0]["options"]["inline"]
        ways = dict(re.findall(r"ip route replace (\S+) via (\S+)", script))
        here = {network for network, _ in node.addresses}
        wanted = dict(node.routes)
        if gateway := wanted.pop("default", None):
            wanted |= {str(other.cidr): gateway for other in grounds.networks if other.name not in here}
        assert {to: ways[to] for to in ways if to in wanted} == wanted
        # The NAT of a site stays real: nobody outside has a way to its inner addresses.
        hidden = {str(other.cidr) for other in grounds.networks if other.name == "alpha"} & set(ways)
        assert not hidden or "wan" not in here
    assert used >= {"wan", "alpha"}


def test_routers_filter_between_the_interfaces_that_vagrant_gives_them() -> None:
    """eth0 is Vagrant's own; the next ones come in the order of node_addresses."""
    for name in ("mini", "lab"):
        for router in listed(name)["site_router"]["hosts"]:
            command = [ansible("ansible"), router, "--module-name", "debug", "--args",
                       "msg={{ site_router_inside }},{{ site_router_outside }}"]  # fmt: skip
            for part in ("common", name, "vagrant"):
                command += ["--inventory", f"inventory/{part}"]
            said = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
            cards = networks(machines(name)[router], "private_network")
            inside = next(n for n, card in enumerate(cards, 1) if card["virtualbox__intnet"] != "pilotbed-wan")
            assert f"eth{inside},eth{3 - inside}" in said


def provisioners(machine: dict[str, Any]) -> list[str]:
    return [provisioner["arguments"][0] for provisioner in machine["provision()"]]


def test_ansible_runs_once_when_all_machines_are_there() -> None:
    made = machines("mini")
    assert [provisioners(machine) for machine in made.values()] == [["shell"], ["shell"], ["shell", "ansible"]]
    run = made["wn1"]["provision()"][1]["told"]
    assert run["limit"] == "all"
    assert run["raw_arguments"] == [f"--inventory={CHECKOUT}/inventory/{n}" for n in ("common", "mini", "vagrant")]
    assert Path(run["playbook"]).is_file()
    assert "extra_vars" not in run


def test_on_windows_a_machine_more_runs_it() -> None:
    (CHECKOUT / "var").mkdir(exist_ok=True)
    made = machines("mini", TEST_WINDOWS="1")
    assert list(made) == ["submit", "site", "wn1", "controller"]
    assert [provisioners(machine) for machine in made.values()][:3] == [["shell"]] * 3
    controller = made["controller"]
    assert provisioners(controller)[-1] == "ansible_local"
    # It is in every network: no router lets it in.
    assert {card["virtualbox__intnet"] for card in networks(controller, "private_network")} == {
        "pilotbed-wan", "pilotbed-alpha"
    }  # fmt: skip
    key = CHECKOUT / "var/vagrant/controller_key"
    assert key.stat().st_mode & 0o077 == 0
    public = subprocess.run(["ssh-keygen", "-y", "-f", key], check=True, capture_output=True, text=True).stdout.strip()
    for host in ("submit", "site", "wn1"):
        assert public in made[host]["provision()"][0]["options"]["inline"]
    assert public not in machines("mini")["submit"]["provision()"][0]["options"]["inline"]


def test_another_box_gets_htcondor_from_the_next_release() -> None:
    assert told("mini")["vm"]["box_url"].endswith("/pilotbed-node.json")
    fetched = told("mini", PILOTBED_BOX_SERVER="http://192.0.2.1:8000")["vm"]
    assert fetched["box_url"] == "http://192.0.2.1:8000/pilotbed-node.json"
    assert "box_version" not in fetched, "of those that are made here"
    source = "http://mirror.example.org/debian forky main"
    stock = {"PILOTBED_BOX": "debian/trixie64", "PILOTBED_APT_SOURCE": source}
    other = told("mini", **stock)["vm"]
    assert (other["box"], other.get("box_url")) == ("debian/trixie64", None)
    assert told("mini", **{**stock, "PILOTBED_BOX": "pilotbed/plain"})["vm"]["box_url"].endswith("/pilotbed-plain.json")
    script = machines("mini", **stock, PILOTBED_APT_PROXY="http://192.0.2.1:3142")["wn1"]["provision()"][0]
    assert 'Acquire::http::Proxy "http://192.0.2.1:3142";' in script["options"]["inline"]
    assert "apt.conf.d" not in machines("mini", **stock)["wn1"]["provision()"][0]["options"]["inline"]
    run = machines("mini", **stock)["wn1"]["provision()"][1]["told"]
    assert run["extra_vars"]["htcondor_package_apt_source"] == source


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"PILOTBED_INVENTORY": "maxi"}, "PILOTBED_INVENTORY=maxi: there is no inventory/maxi/hosts.yml"),
        ({"PILOTBED_BOX": "debian/trixie64"}, "PILOTBED_BOX=debian/trixie64: HTCondor is not in it; name an apt"),
    ],
)
def test_what_cannot_be_made_is_named(environment: dict[str, str], says: str) -> None:
    done = subprocess.run(
        ["ruby", "tests/unit/vagrantfile.rb", "vagrant/Vagrantfile"], cwd=CHECKOUT, text=True, capture_output=True,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert says in done.stderr


@pytest.mark.parametrize("environment", [{}, {"PILOTBED_INVENTORY": "lab"}, {"PILOTBED_CONTROLLER": "1"}], ids=str)
def test_vagrant_itself_finds_it_valid(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["vagrant", "validate"], cwd=CHECKOUT / "vagrant", capture_output=True, text=True, check=False,
        env={**os.environ, "VAGRANT_HOME": str(tmp_path), "VAGRANT_CHECKPOINT_DISABLE": "1",
             "VAGRANT_DEFAULT_PROVIDER": "libvirt", "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Vagrantfile validated successfully." in done.stdout


def test_a_boxs_disk_begins_with_the_boot_loader_and_a_table_of_one_partition(tmp_path: Path) -> None:
    root, disk = tmp_path / "root", tmp_path / "disk"
    (root / "boot").mkdir(parents=True)
    (root / "boot/boot.img").write_bytes(b"B" * 512)
    (root / "boot/core.img").write_bytes(b"C" * 1500)
    box._disk(root, disk)
    with disk.open("rb") as file:
        begin = file.read(512 + 1500)
    assert begin[:440] == b"B" * 440
    assert begin[510:512] == b"\x55\xaa"
    assert begin[512:] == b"C" * 1500
    active, kind, first, count = struct.unpack("<B3xB3xII", begin[446:462])
    assert (active, kind) == (0x80, 0x83)
    assert (first + count) * 512 == disk.stat().st_size == box.GIB << 30
    files = subprocess.run(
        ["/sbin/debugfs", "-R", "ls /boot", f"{disk}?offset={first * 512}"], check=True, capture_output=True, text=True
    )
    assert "core.img" in files.stdout


def test_a_kind_of_box_that_there_is_not_is_named() -> None:
    with pytest.raises(box.LabError, match="BOX=fat: there are node and plain"):
        box.build("fat", "")


@pytest.mark.parametrize(
    ("proxy", "source", "server"),
    [
        ("", "http://mirror.example.org/debian forky main", "mirror.example.org:80"),
        ("", "http://mirror.example.org:8080/debian forky main", "mirror.example.org:8080"),
        ("http://proxy.example.org:3128", "https://mirror.example.org/debian forky main", "proxy.example.org:3128"),
    ],
)
def test_apts_requests_go_where_the_hosts_own_go(
    monkeypatch: pytest.MonkeyPatch, proxy: str, source: str, server: str
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setattr(box.image, "next_source", lambda: source)
    assert box.apt_server() == server


def test_a_mirror_that_is_asked_by_https_cannot_be_relayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setattr(box.image, "next_source", lambda: "https://mirror.example.org/debian forky main")
    with pytest.raises(box.LabError, match="https: the apt source is not of http://"):
        box.apt_server()


def test_a_boot_loader_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root/boot").mkdir(parents=True)
    (tmp_path / "root/boot/boot.img").write_bytes(b"")
    (tmp_path / "root/boot/core.img").write_bytes(bytes(box.FIRST))
    with pytest.raises(box.LabError, match="GRUB's core is 1048576 bytes, and there are 1048064 before the partition"):
        box._disk(tmp_path / "root", tmp_path / "disk")


def test_the_catalogue_names_both_boxes_with_their_digests(tmp_path: Path) -> None:
    files = {provider: tmp_path / f"{provider}.box" for provider in ("libvirt", "virtualbox")}
    for provider, path in files.items():
        path.write_text(provider)
    said = box.catalogue("node", "13.20261129.45", "made of this", files, "http://192.0.2.1:8000/")
    assert said["name"] == told("mini")["vm"]["box"]
    assert said["versions"] == [{"version": "13.20261129.45", "providers": [
        {"name": provider, "url": f"http://192.0.2.1:8000/{provider}.box", "checksum_type": "sha256",
         "checksum": hashlib.sha256(provider.encode()).hexdigest()} for provider in files
    ]}]  # fmt: skip


def test_a_box_has_what_roles_need_of_a_machine_only() -> None:
    assert {"nfs-kernel-server", "nfs-common", "linux-image-amd64"} <= set(box.packages(CHECKOUT, "node"))
    assert "nfs-common" not in box.packages(CHECKOUT, "plain")
    together, _ = box.image.packages(CHECKOUT)
    assert not {"nfs-kernel-server", "linux-image-amd64"} & set(together)


def test_the_description_of_virtual_box_is_xml_and_names_the_disk() -> None:
    root = ElementTree.fromstring(box.OVF.format(bytes=1))
    names = {name for element in root.iter() for key, name in element.attrib.items() if key.endswith("href")}
    assert names == {"box.vmdk"}


def test_memory_and_ports_are_words_of_every_inventory() -> None:
    for path in CHECKOUT.glob("inventory/*/hosts.yml"):
        for name, host in yaml.safe_load(path.read_text())["all"]["hosts"].items():
            assert set(host or {}) <= {"node_addresses", "node_public_address", "node_open_ports", "vm_memory",
                                       "vm_ports"}, name  # fmt: skip
