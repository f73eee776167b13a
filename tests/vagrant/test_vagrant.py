"""The grid on virtual machines, for real: `make test-vagrant`. Each test is the next step of one story.

    host: Vagrant, libvirt ── submit, site, wn1: inventory/mini, each a machine with a kernel and a clock of its own

Where the processor does not help, QEMU computes everything: a machine boots in minutes, and a task of Ansible takes
many seconds. All deadlines are for that. With BOX=plain the machines have none of the roles' packages at first: all
comes by apt.
"""

import os
import re
import subprocess
import sys
import time

import pytest
from pilotbed_lab import image
from pilotbed_suite import CHECKOUT

#: Of the Makefile: whether packages are inside.
PLAIN = os.environ.get("BOX") == "plain"
MACHINES = ["submit", "site", "wn1"]
WAY = {
    "LAB": "vagrant",
    "ANSIBLE_INVENTORY": "inventory/common,inventory/mini,inventory/vagrant",
    "PILOTBED_CONNECTION": "paramiko",
    "PILOTBED_SSH_CONFIG": str(CHECKOUT / "var/vagrant/ssh_config"),
    "PILOTBED_PATIENCE": "6",
    "PILOTBED_INVENTORY": "mini",
    "VAGRANT_DEFAULT_PROVIDER": "libvirt",
    "VAGRANT_CHECKPOINT_DISABLE": "1",
    "VAGRANT_NO_COLOR": "1",
}
if PLAIN:
    WAY |= {"PILOTBED_BOX": "pilotbed/plain", "PILOTBED_APT_SOURCE": image.next_source()}
#: What of the tests on a grid of three machines is tried on virtual ones, too.
THERE = [
    "tests/mini/test_mini.py::test_users_and_factory_have_pools_apart",
    "tests/mini/test_mini.py::test_neither_schedd_has_the_others_jobs",
]

pytestmark = [pytest.mark.timeout(7000)]


def run(*command, deadline, where=CHECKOUT, good=0):
    """Run a command, its output on the screen, too, with its seconds; return what it said."""
    begun = time.monotonic()
    done = subprocess.run(
        command, cwd=where, env={**os.environ, **WAY}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=deadline, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    print(f"{' '.join(map(str, command))}: {time.monotonic() - begun:.0f} s\n{said}", flush=True)
    assert done.returncode == good, said[-4000:]
    return said


def vagrant(*words, deadline=600):
    return run("vagrant", *words, deadline=deadline, where=CHECKOUT / "vagrant")


def ssh(machine, command, deadline=120):
    return run("ssh", "-F", WAY["PILOTBED_SSH_CONFIG"], machine, command, deadline=deadline)


def walk():
    said = run(sys.executable, "-m", "pilotbed_suite.walk", deadline=1500)
    assert "the walk is done in" in said
    return said


@pytest.fixture(scope="module", autouse=True)
def machines():
    """No machine is left, whatever happens."""
    vagrant("destroy", "--force")
    yield
    vagrant("destroy", "--force")
    said = vagrant("status", "--machine-readable")
    assert dict(re.findall(r",(\w+),state,(\w+)", said)) == dict.fromkeys(MACHINES, "not_created")


@pytest.fixture(scope="module")
def up():
    vagrant("up", "--no-provision", "--parallel", deadline=1500)
    run(str(CHECKOUT / "vagrant/ssh-config"), deadline=120)


@pytest.fixture(scope="module")
def deployed(up):
    vagrant("provision", deadline=5400)


def test_packages_are_inside_or_not_at_all(up):
    for name in MACHINES:
        there = vagrant("ssh", name, "--command", "dpkg-query --show --showformat '${Package} '").split()
        assert [package in there for package in ("condor", "mariadb-server", "nginx", "nfs-kernel-server")] == (
            [not PLAIN] * 4
        )


def test_machines_have_their_addresses_and_their_ways(deployed):
    assert "10.70.0.2" in ssh("site", "ip -br address show eth2")
    assert "via 10.71.0.1 dev eth1" in ssh("wn1", "ip route get 10.70.0.10")


def mounted():
    return ssh("wn1", "findmnt -no SOURCE,FSTYPE /srv/site").split()


def test_the_sites_nat_is_real(deployed):
    """The far side sees the router's address; there is no way in."""
    ssh("wn1", "curl --silent --show-error --output /dev/null http://submit.grid.test/seen-from-wn1 --max-time 60")
    seen = ssh("submit", "grep -h seen-from-wn1 /var/log/nginx/*access.log")
    assert {line.split()[0] for line in seen.splitlines()} == {"10.70.0.2"}
    run("ssh", "-F", WAY["PILOTBED_SSH_CONFIG"], "submit", "timeout 20 bash -c '</dev/tcp/10.71.0.21/22'",
        deadline=120, good=1)  # fmt: skip


def test_the_worker_mounts_what_the_computing_element_serves(deployed):
    assert mounted() == ["site.grid.test:/srv/site", "nfs4"]
    run("ssh", "-F", WAY["PILOTBED_SSH_CONFIG"], "submit", "findmnt /srv/site", deadline=120, good=1)


def test_daemons_tell_others_of_their_address_in_the_grid(deployed):
    """A machine's first interface is Vagrant's, in a network where all reach each other, round the site's firewall."""
    said = ssh("submit", "runuser -u alice -- condor_status -any -af MyType MyAddress")
    assert re.search(r"^Scheduler <10\.70\.0\.10:", said, re.MULTILINE), said
    assert "192.168.121." not in said


def test_nothing_listens_that_no_role_declares(deployed):
    """As the certificate asks, by ssh."""
    said = run(sys.executable, "-m", "pilotbed_suite.certify", "--checks", "D1.1", deadline=900)
    assert re.search(r"D1\.1 +pass", said)


def test_names_are_those_of_the_grid_for_systemds_resolver_too(deployed):
    for name in MACHINES:
        assert "10.70.0.10" in ssh(name, "resolvectl query submit.grid.test")


def test_jobs_walk_through_it(deployed):
    said = walk()
    # A local node's own name is its full one, a machine's of Vagrant's is not.
    assert re.search(r"worker +\| wn1(\.grid\.test)? +\| wn1(\.grid\.test)?\s", said)
    assert re.search(r"way +\| relay +\| relay", said)


@pytest.mark.parametrize("tests", THERE)
def test_what_holds_on_three_local_nodes_holds_here(deployed, tests):
    run(sys.executable, "-m", "pytest", tests, deadline=900)


def test_after_a_reboot_of_all_everything_is_up_again(deployed):
    before = {name: ssh(name, "cat /proc/sys/kernel/random/boot_id") for name in MACHINES}
    vagrant("reload", deadline=1500)
    run(str(CHECKOUT / "vagrant/ssh-config"), deadline=120)
    for name, boot in before.items():
        assert ssh(name, "cat /proc/sys/kernel/random/boot_id") != boot
        assert ssh(name, "systemctl --failed --no-legend --plain") == ""
    assert mounted() == ["site.grid.test:/srv/site", "nfs4"]
    walk()
