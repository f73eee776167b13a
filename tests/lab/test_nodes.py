"""The lab's life: boot, crash, snapshot, another checkout's lab, what a dead one leaves behind.

Two nodes in a lab of their own, beside whatever lab runs on this host: same code, other names and directories.

    checkout A ── pbtest-a 10.79.0.10 ──┐
                                        ├── bridge in network namespace pbtest
                  pbtest-b 10.79.0.11 ──┘
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pilotbed.lab import LabError, image, nodes, topology

CHECKOUT = Path(__file__).resolve().parents[2]
NAMES = ("pbtest-a", "pbtest-b")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="nodes are made by root")


@pytest.fixture(scope="session")
def built() -> Path:
    return image.build(CHECKOUT, CHECKOUT / "var/log/image.log")


@pytest.fixture
def lab(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[nodes.Lab]:
    state = Path("/var/lib/pilotbed/pbtest")
    monkeypatch.setattr(nodes, "STATE", state)
    monkeypatch.setattr(nodes, "SNAPSHOTS", state / "snapshots")
    monkeypatch.setattr(nodes, "RUN", Path("/run/pilotbed/pbtest"))
    monkeypatch.setattr(nodes, "SWITCH", "pbtest")
    nodes.clear()
    hosts = {
        name: {
            "grid_networks": {"wan": {"cidr": "10.79.0.0/24"}},
            "grid_domain": "lab.test",
            "site_name": "here",
            "node_addresses": {"wan": f"10.79.0.{10 + index}"},
        }
        for index, name in enumerate(NAMES)
    }
    grid = topology.parse({"_meta": {"hostvars": hosts}, "site_storage": {"hosts": list(NAMES)}})
    yield nodes.Lab(CHECKOUT, grid, built, said.append)
    nodes.clear()


said: list[str] = []


def run(name: str, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(nodes.enter(name, "sh", "-c", command), capture_output=True, text=True, check=False)


def wait(what: str, condition: object, seconds: float = 15) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"not within {seconds} s: {what}")


def test_nodes_boot_and_reach_each_other_and_share_a_directory(lab: nodes.Lab) -> None:
    assert sorted(lab.up()) == list(NAMES)
    assert run(NAMES[0], "systemctl is-system-running --wait").stdout.strip() == "running"
    assert run(NAMES[0], "hostname -f").stdout.strip() == f"{NAMES[0]}.lab.test"
    assert run(NAMES[0], "curl --silent --max-time 5 telnet://10.79.0.11:22 < /dev/null | head -c 3").stdout == "SSH"
    run(NAMES[0], "echo shared > /srv/site/file")
    assert run(NAMES[1], "cat /srv/site/file").stdout == "shared\n"
    assert lab.up() == [], "what runs is left alone"


def test_the_hosts_network_does_not_change(lab: nodes.Lab) -> None:
    def seen() -> str:
        shown = [subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout
                 for what in (["-brief", "address"], ["route"], ["-brief", "link"])]
        return "".join(shown)

    before = seen()
    lab.up()
    assert seen() == before


@pytest.mark.parametrize("victim", ["init", "nspawn"])
def test_a_killed_node_boots_again_with_its_disk(lab: nodes.Lab, victim: str) -> None:
    lab.up()
    run(NAMES[0], "echo kept > /root/file; sync")
    leader = nodes.leader(NAMES[0])
    assert leader is not None
    status = Path(f"/proc/{leader}/status").read_text()
    parent = int(next(line for line in status.splitlines() if line.startswith("PPid")).split()[1])
    os.kill(leader if victim == "init" else parent, signal.SIGKILL)
    if victim == "init":
        wait("the node is down", lambda: nodes.leader(NAMES[0]) is None)
        assert lab.up() == [NAMES[0]]
    else:
        lab.stop(kill=True)
        assert sorted(lab.up()) == list(NAMES)
    assert run(NAMES[0], "cat /root/file").stdout == "kept\n"


def test_restore_brings_back_what_the_snapshot_kept(lab: nodes.Lab) -> None:
    lab.up()
    run(NAMES[0], "echo before > /root/file; echo before > /srv/site/file; sync")
    lab.snapshot("lesson")
    run(NAMES[0], "echo after > /root/file; rm /srv/site/file; echo more > /root/more; sync")
    lab.restore("lesson")
    assert run(NAMES[0], "cat /root/file /srv/site/file; ls /root/more").stdout == "before\nbefore\n"
    lab.restore("lesson")
    assert run(NAMES[1], "cat /srv/site/file").stdout == "before\n", "a snapshot can be restored twice"


def test_snapshots_refuse_bad_names(lab: nodes.Lab) -> None:
    lab.up()
    for name in ("", "../x", ".hidden"):
        with pytest.raises(LabError, match="no name for a snapshot"):
            lab.snapshot(name)
    with pytest.raises(LabError, match="there is no snapshot 'never'"):
        lab.restore("never")
    lab.snapshot("one")
    with pytest.raises(LabError, match="another name"):
        lab.snapshot("one")


def test_another_checkouts_living_lab_is_not_touched(lab: nodes.Lab, tmp_path: Path) -> None:
    lab.up()
    other = nodes.Lab(tmp_path, lab.topology, lab.image, said.append)
    with pytest.raises(LabError, match=f"{CHECKOUT}.*make -C {CHECKOUT} destroy"):
        other.up()
    assert all(nodes.leader(name) for name in NAMES)


def test_another_checkouts_dead_lab_is_cleared(lab: nodes.Lab, tmp_path: Path) -> None:
    lab.up()
    run(NAMES[0], "echo theirs > /root/file; sync")
    for name in NAMES:
        leader = nodes.leader(name)
        assert leader is not None
        os.kill(leader, signal.SIGKILL)
    wait("the nodes are down", lambda: not nodes.running())
    other = nodes.Lab(tmp_path, lab.topology, lab.image, said.append)
    assert sorted(other.up()) == list(NAMES)
    assert run(NAMES[0], "ls /root/file").returncode != 0, "a disk of the dead lab"


def test_after_a_reboot_the_nodes_boot_again_from_disk(lab: nodes.Lab) -> None:
    lab.up()
    run(NAMES[0], "echo kept > /root/file; sync")
    record = json.loads((nodes.STATE / "lab.json").read_text())
    lab.stop(kill=True)
    (nodes.STATE / "lab.json").write_text(json.dumps(record | {"boot_id": "another"}))
    assert sorted(lab.up()) == list(NAMES)
    assert run(NAMES[0], "cat /root/file").stdout == "kept\n"


def test_a_boot_that_was_cut_off_is_made_good(lab: nodes.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(nodes, "_start_process", _fail)
        broken.setattr(nodes, "_start_unit", _fail)
        with pytest.raises(LabError, match="cut off"):
            lab.up()
    assert sorted(lab.up()) == list(NAMES)
    assert run(NAMES[1], "true").returncode == 0


def _fail(*_: object) -> int:
    raise LabError("cut off")


def test_destroy_leaves_nothing(lab: nodes.Lab) -> None:
    lab.up()
    run(NAMES[0], "setsid sleep 1000 > /dev/null 2>&1 &")
    nodes.clear()
    assert nodes.leftovers() == []
    mounts = Path("/proc/self/mounts").read_text()
    assert "pbtest" not in mounts
    processes = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout
    alive = [line for line in processes.splitlines() if "pbtest" in line and not line.startswith("Z")]
    assert alive == []
    assert not list(Path("/run/netns").glob("pbtest*"))
    for hierarchy in nodes.hierarchies():
        assert not (hierarchy / "pbtest").exists()
