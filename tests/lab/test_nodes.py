"""The life of a lab, and of several on one host: boot, crash, snapshot, reboot, what a dead one leaves behind.

Two nodes in a lab of their own, beside whatever labs live on this host:

    pbtest-a 10.79.0.10 ──┐
                          ├── bridge in the lab's own switch namespace
    pbtest-b 10.79.0.11 ──┘
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pilotbed_lab import LabError, cgroups, image, nodes, topology
from pilotbed_suite import CHECKOUT, local

NAMES = ("pbtest-a", "pbtest-b")
#: The second node's sshd says what it is, asked from the first.
KNOCK = "curl --silent --max-time 5 telnet://10.79.0.11:22 < /dev/null | head -c 3"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="nodes are made by root")


@pytest.fixture(scope="session")
def built() -> Path:
    return image.build(CHECKOUT, CHECKOUT / "var/log/image.log")


def grid() -> topology.Topology:
    hosts = {
        name: {
            "grid_networks": {"wan": {"cidr": "10.79.0.0/24"}},
            "grid_domain": "lab.test",
            "site_name": "here",
            "node_addresses": {"wan": f"10.79.0.{10 + index}"},
        }
        for index, name in enumerate(NAMES)
    }
    return topology.parse({"_meta": {"hostvars": hosts}, "site_storage": {"hosts": list(NAMES)}})


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that has this one's image and no lab yet."""
    (tmp_path / "checkout").mkdir()
    return tmp_path / "checkout"


@pytest.fixture
def lab(built: Path, checkout: Path) -> Iterator[nodes.Lab]:
    made = nodes.Lab(checkout, grid(), built, said.append, "one")
    yield made
    made.clear()


@pytest.fixture
def other(built: Path, checkout: Path) -> Iterator[nodes.Lab]:
    """A second lab of the same checkout."""
    made = nodes.Lab(checkout, grid(), built, said.append, "two")
    yield made
    made.clear()


said: list[str] = []


def run(lab: nodes.Lab, name: str, command: str) -> subprocess.CompletedProcess[str]:
    entered = local.enter(name, "sh", "-c", command, lab=lab.state)
    return subprocess.run(entered, capture_output=True, text=True, check=False)


def alive(lab: nodes.Lab) -> list[str]:
    """Return the nodes whose systemd answers."""
    return [name for name in lab.running() if run(lab, name, "systemctl is-system-running --wait").stdout.strip()]


def wait(what: str, condition: object, seconds: float = 90) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"not within {seconds} s: {what}")


def test_nodes_boot_and_reach_each_other_and_share_a_directory(lab: nodes.Lab) -> None:
    assert not lab.stands()
    assert sorted(lab.up()) == list(NAMES)
    assert lab.stands()
    assert run(lab, NAMES[0], "systemctl is-system-running --wait").stdout.strip() == "running"
    assert run(lab, NAMES[0], "hostname -f").stdout.strip() == f"{NAMES[0]}.lab.test"
    assert run(lab, NAMES[0], KNOCK).stdout == "SSH"
    run(lab, NAMES[0], "echo shared > /srv/site/file")
    assert run(lab, NAMES[1], "cat /srv/site/file").stdout == "shared\n"
    assert lab.up() == [], "what runs is left alone"


def test_a_node_makes_cgroups_and_they_go_with_it_though_frozen(lab: nodes.Lab) -> None:
    lab.up()
    made = run(
        lab, NAMES[0],
        "cd /sys/fs/cgroup; setsid sleep 1000 > /dev/null 2>&1 & "
        "if test -e cgroup.procs; then mkdir mine && echo $! > mine/cgroup.procs && echo 1 > mine/cgroup.freeze; "
        "else for one in */cgroup.procs; do mkdir -p ${one%/*}/mine || exit; done; "
        "test -e cpu,cpuacct/mine/cpuacct.usage && "
        "echo $! > freezer/mine/cgroup.procs && echo FROZEN > freezer/mine/freezer.state; fi",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    lab.clear()
    assert lab.left() == []


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
    run(lab, NAMES[0], "echo kept > /root/file; sync")
    leader = local.leader(NAMES[0], lab.state)
    assert leader is not None
    status = Path(f"/proc/{leader}/status").read_text()
    parent = int(next(line for line in status.splitlines() if line.startswith("PPid")).split()[1])
    os.kill(leader if victim == "init" else parent, signal.SIGKILL)
    if victim == "init":
        wait("the node is down", lambda: local.leader(NAMES[0], lab.state) is None)
        assert not lab.stands()
        assert lab.up() == [NAMES[0]]
    else:
        lab.stop(kill=True)
        assert sorted(lab.up()) == list(NAMES)
    assert run(lab, NAMES[0], "cat /root/file").stdout == "kept\n"


def test_restore_brings_back_what_the_snapshot_kept(lab: nodes.Lab) -> None:
    lab.up()
    run(lab, NAMES[0], "echo before > /root/file; echo before > /srv/site/file; sync")
    lab.snapshot("lesson")
    run(lab, NAMES[0], "echo after > /root/file; rm /srv/site/file; echo more > /root/more; sync")
    lab.restore("lesson")
    assert run(lab, NAMES[0], "cat /root/file /srv/site/file; ls /root/more").stdout == "before\nbefore\n"
    lab.restore("lesson")
    assert run(lab, NAMES[1], "cat /srv/site/file").stdout == "before\n", "a snapshot can be restored twice"


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


def test_labs_live_beside_each_other_with_the_same_addresses(lab: nodes.Lab, other: nodes.Lab) -> None:
    assert sorted(lab.up()) == sorted(other.up()) == list(NAMES)
    for here in (lab, other):
        run(here, NAMES[0], f"echo {here.key} > /root/file; echo {here.key} > /srv/site/file")
    for here in (lab, other):
        assert run(here, NAMES[0], "cat /root/file; cat /srv/site/file").stdout.split() == [here.key] * 2
        assert run(here, NAMES[1], "cat /srv/site/file").stdout.strip() == here.key
        assert run(here, NAMES[0], KNOCK).stdout == "SSH"


def test_another_checkout_has_a_lab_of_the_same_name(lab: nodes.Lab, built: Path, tmp_path: Path) -> None:
    theirs = nodes.Lab(tmp_path, grid(), built, said.append, lab.name)
    lab.up()
    try:
        assert theirs.running() == []
        theirs.up()
        assert alive(lab) == alive(theirs) == list(NAMES)
    finally:
        theirs.clear()
    assert alive(lab) == list(NAMES)


def test_destroying_one_lab_leaves_another_alone_that_is_being_booted(lab: nodes.Lab, other: nodes.Lab) -> None:
    """Three times, as the two meet at another place each time."""
    other.up()
    for _ in range(3):
        failures: list[Exception] = []

        def boot(failures: list[Exception] = failures) -> None:
            try:
                lab.up()
            except Exception as error:
                failures.append(error)

        booting = threading.Thread(target=boot)
        booting.start()
        other.clear()
        booting.join()
        assert failures == []
        assert alive(lab) == list(NAMES)
        assert other.left() == []
        booting = threading.Thread(target=other.up)
        booting.start()
        lab.clear()
        booting.join()
        assert alive(other) == list(NAMES)
        assert lab.left() == []


def test_the_lab_of_a_checkout_that_is_gone_is_cleared(
    lab: nodes.Lab, other: nodes.Lab, built: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    theirs = nodes.Lab(gone, grid(), built, said.append, "theirs")
    theirs.up()
    other.up()
    subprocess.run(["rm", "-r", gone], check=True)
    lab.up()
    assert theirs.left() == []
    assert alive(lab) == alive(other) == list(NAMES)


@pytest.mark.parametrize("name", ["", "a-b", "Lab", "1", "averylongname", "../x", "a b"])
def test_a_name_that_no_lab_can_have_is_refused(name: str, checkout: Path) -> None:
    with pytest.raises(LabError, match="is no name for a lab"):
        nodes.Lab(checkout, name=name)


def test_after_a_reboot_the_nodes_boot_again_from_disk(lab: nodes.Lab) -> None:
    lab.up()
    run(lab, NAMES[0], "echo kept > /root/file; sync")
    record = json.loads((lab.state / "lab.json").read_text())
    lab.stop(kill=True)
    (lab.state / "lab.json").write_text(json.dumps(record | {"boot_id": "another"}))
    assert sorted(lab.up()) == list(NAMES)
    assert run(lab, NAMES[0], "cat /root/file").stdout == "kept\n"


def test_a_boot_that_was_cut_off_is_made_good(lab: nodes.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(nodes.Lab, "_start_process", _fail)
        broken.setattr(nodes.Lab, "_start_unit", _fail)
        with pytest.raises(LabError, match="cut off"):
            lab.up()
    assert sorted(lab.up()) == list(NAMES)
    assert run(lab, NAMES[1], "true").returncode == 0


def _fail(*_: object) -> int:
    raise LabError("cut off")


def test_destroy_leaves_nothing(lab: nodes.Lab) -> None:
    lab.up()
    assert (lab.checkout / "var/labs" / lab.name).resolve() == lab.state
    run(lab, NAMES[0], "setsid sleep 1000 > /dev/null 2>&1 &")
    lab.clear()
    assert lab.left() == []
    assert not list((lab.checkout / "var/labs").iterdir())
    assert lab.key not in Path("/proc/self/mounts").read_text()
    processes = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout
    assert [line for line in processes.splitlines() if lab.key in line and not line.startswith("Z")] == []
    assert not list(Path("/run/netns").glob(f"*{lab.key}*"))
    assert not list(Path("/run/systemd/nspawn").glob(f"*{lab.key}*"))
    for hierarchy in cgroups.hierarchies():
        assert not (hierarchy / cgroups.TOP / lab.key).exists()
