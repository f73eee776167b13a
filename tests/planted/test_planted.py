"""The certificate can fail: a fault is planted, the checks that must find it fail and no others, and it goes again.

`make test` plants a handful on inventory/mini, `make test-certification` all of them in the lab, to which every check
applies.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from pilotbed_suite import CHECKOUT
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, ok, until

#: Checks that take a moment: all of them are asked with each fault, and those pass that need not fail.
QUICK = frozenset({"D1.1", "D1.2", "D1.5", "D7.1", "D7.2", "D7.3", "D7.5"})
#: A program that does as if.
NOTHING = "printf '#!/bin/sh\\n'"
WEAK = "/etc/condor/config.d/99-planted.conf"

pytestmark = pytest.mark.timeout(1200)


@dataclass(frozen=True)
class Fault:
    """What is planted, where (on every host of a group), how it goes again, and which checks must fail."""

    group: str
    plant: str
    undo: str
    fails: frozenset[str]
    quick: bool = True
    #: Of HTCondor: when the daemon has read it.
    settled: str = "true"


def instead(path, command, group, fails):
    """Something else, as a command makes it, is there instead of a file."""
    return Fault(
        group, f"f=$(ls {path} | tail -n 1); {command} > /run/planted; chmod --reference $f /run/planted; "
        "chown --reference $f /run/planted; mount --bind /run/planted $f; echo $f > /run/planted.at",
        "umount $(cat /run/planted.at); rm -f /run/planted /run/planted.at", frozenset(fails), quick=False,
    )  # fmt: skip


def condor(settings, fails, **more):
    """Settings that are read after all others."""
    return Fault(
        "central_manager", f"printf '%s\\n' '{settings}' > {WEAK}; condor_reconfig", f"rm -f {WEAK}; condor_reconfig",
        frozenset(fails), **more,
    )  # fmt: skip


FAULTS = {
    "Q1: an open port": Fault(
        "submit", "systemd-run --quiet --unit planted python3 -m http.server 4444", "systemctl stop planted",
        frozenset({"D1.1", "D7.5"}), settled="ss -Hltn | grep -q :4444",
    ),
    "Q1: a daemon that does without encryption": condor(
        "SEC_DEFAULT_ENCRYPTION = OPTIONAL\nSEC_READ_ENCRYPTION = OPTIONAL", {"D1.2", "P6"},
        settled="condor_config_val -collector SEC_READ_ENCRYPTION 2>/dev/null | grep -q OPTIONAL || sleep 5",
    ),
    "Q1: a pilot that starts what was changed on its way": instead(
        "/usr/lib/pilotbed/pilotbed/glidein/glidein_startup.sh", "sed 's/refuse \\(.*digest mismatch\\)/: \\1/' $f",
        "worker", {"D1.4"},
    ),
    "Q2: a private key that is left behind": Fault(
        "worker", "openssl genrsa -out /var/tmp/planted 2>/dev/null", "rm -f /var/tmp/planted",
        frozenset({"D2.6", "D5.3"}), quick=False,
    ),
    "Q2: a key that everybody may read": Fault(
        "submit", "install --mode 0644 /tmp/x509up_u$(id -u alice) /tmp/x509up_planted", "rm -f /tmp/x509up_planted",
        frozenset({"D2.1"}), quick=False,
    ),
    "Q3, Q5: a payload that runs as its pilot": instead(
        "/usr/sbin/glexec", "printf '%s\\n' '#!/bin/sh' 'exec \"$@\"'", "worker", {"D3.3", "D5.1"},
    ),
    "Q4: batch records that are lost": Fault(
        "computing_element", "mount --bind /dev/null /var/log/slurm/jobcomp.log", "umount /var/log/slurm/jobcomp.log",
        frozenset({"D4.1", "D4.2"}), quick=False,
    ),
    "Q6: a downtime that nobody enters": instead("/usr/bin/pilotbed-entry", NOTHING, "factory", {"D6.1"}),
    "Q6: a ban that bans nobody": instead("/usr/bin/pilotbed-ban", NOTHING, "worker", {"D6.3"}),
    "Q7: an account that nobody declared": Fault(
        "worker", "useradd --no-create-home --shell /bin/bash planted", "userdel planted", frozenset({"D7.1"}),
    ),
    "Q7: ssh that takes passwords": Fault(
        "worker", "mv /etc/ssh/sshd_config.d/00-pilotbed.conf /run/planted",
        "mv /run/planted /etc/ssh/sshd_config.d/00-pilotbed.conf", frozenset({"D7.1"}),
    ),
    "Q7: no security contact": Fault(
        "worker", "mv /etc/grid-security/security-contact /run/planted",
        "mv /run/planted /etc/grid-security/security-contact", frozenset({"D7.3"}),
    ),
    "Q7: a log with a gap": instead(
        "/var/lib/pilotbed-log/*.chain", "sed 2d $f", "log_collector", {"D7.6"},
    ),
    "Q8: a job on somebody else's account": Fault(
        "submit", f"printf '%s\\n' 'SUBMIT_REQUIREMENT_NAMES = Universe' > {WEAK}; "
        "condor_reconfig; sleep 3", f"rm -f {WEAK}; condor_reconfig; sleep 3", frozenset({"D8.3"}), quick=False,
    ),
}  # fmt: skip
#: In every run of the suite.
OFTEN = ("Q1: an open port", "Q1: a daemon that does without encryption", "Q7: an account that nobody declared")
CHOSEN = [name for name in FAULTS if os.environ.get("PLANTED") == "all" or name in OFTEN]


def failing(tmp_path, ids):
    """Run these checks; return those that do not pass, with the reason."""
    asked = ["--checks", " ".join(sorted(ids)), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "pilotbed_suite.certify", *asked]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=900)
    assert (tmp_path / "report.json").exists(), done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert "D1.1" not in ids or report["sockets"], "what listens is shown"
    checks = report["checks"]
    assert {check["id"] for check in checks} == set(ids)
    return {check["id"]: check["reason"] for check in checks if check["verdict"] not in ("pass", "not applicable")}


def test_nothing_fails_before(tmp_path):
    """The control of all others."""
    assert failing(tmp_path, QUICK.union(*(FAULTS[name].fails for name in CHOSEN))) == {}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_planted_fault_is_found_by_its_checks_alone(tmp_path, name):
    fault = FAULTS[name]
    nodes = [host(name) for name in GRID.names(fault.group)]
    with ExitStack() as planted:
        for node in nodes:
            planted.callback(ok, node, "sh -c %s", fault.undo)
            ok(node, "sh -c %s", fault.plant)
        for node in nodes:
            until("it is there", lambda node=node: node.run("sh -c %s", fault.settled).rc == 0)
        found = failing(tmp_path, QUICK | fault.fails)
    assert set(found) == fault.fails, found
    until("it is gone", lambda: not failing(tmp_path, fault.fails) if fault.quick else True)
