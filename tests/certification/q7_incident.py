"""Question 7: who did this, and how long does it take to stop it? The drill of docs/incident.md.

    alice runs a payload, bob another one ── freeze ──▶ alice is blocked everywhere, bob is not ── thaw ──▶ as before
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from pilotbed_suite import CHECKOUT, PATIENCE, record
from pilotbed_suite.incident import archive, blocks
from pilotbed_suite.reach import host, witnesses
from pilotbed_suite.support import GRID, HOLD, as_user, edited, ok, until

pytestmark = pytest.mark.stage(2)

CONTACT = "/etc/grid-security/security-contact"
LOOT = "what she has taken"
#: Waits with a file of its own in its directory.
TAKES = f"#!/bin/sh\nprintf %s '{LOOT}' > loot.txt\n{HOLD}\n"
VOMS = "/usr/libexec/pilotbed/voms-database"
SECONDS = 300


# -- whom one calls ------------------------------------------------------------------------------------------------


def without_contact():
    """Nodes that do not name the inventory's security contact."""
    wanted = {f"{key}: {value}" for key, value in GRID.variable("grid_security_contact").items()}
    return [name for name in GRID.names("all") if not wanted <= set(ok(host(name), "cat %s", CONTACT).splitlines())]


@pytest.mark.check("D7.3")
def test_every_node_names_the_security_contact():
    assert without_contact() == []
    assert all(ok(host(name), "stat -c '%%U %%a' %s", CONTACT) == "root 644\n" for name in GRID.names("all"))


@pytest.mark.check("D7.3", control=True)
def test_a_node_that_names_another_one_is_found(any_site):
    with edited(host(any_site.ce), CONTACT, "sed -i 's/^email: .*/email: nobody@grid.test/' $f"):
        assert without_contact() == [any_site.ce]
    # The next deployment restarts what is older than a file of its role.
    ok(host(any_site.ce), "systemctl restart pilotbed-fetch-crl.timer")


# -- the drill -----------------------------------------------------------------------------------------------------


def incident(*words):
    """Run pilotbed-incident on this host; what it said is evidence."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "pilotbed_suite.incident.cli", *words]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    took = time.monotonic() - begun
    for witness in witnesses:
        said = SimpleNamespace(stdout=done.stdout, stderr=done.stderr, rc=done.returncode)
        witness("control host", f"pilotbed-incident {' '.join(words)}", said, took)
    return done, took


def blocks_of(dn):
    """What of a user is blocked where, on every host that could."""
    mappers = {name for group in blocks.MAPPERS for name in GRID.names(group)}
    found = {name: ok(host(name), "cat /etc/grid-security/ban_users.db") for name in sorted(mappers)}
    for vo in GRID.variable("grid_vos"):
        found[vo["name"]] = ok(GRID.node("voms_server"), f"{VOMS} %s state %s", vo["name"], dn)
    for name in GRID.names("submit"):
        found[f"config of {name}"] = ok(host(name), "ls /etc/condor/config.d")
    return found


@dataclass
class Drill:
    """What was there before, and what freeze came to."""

    running: object
    bobs: object
    queued: object
    held: object
    worker: object
    process: object
    known: dict
    before: dict
    begun: float
    said: str
    code: int
    seconds: float
    directory: Path
    found: dict


@pytest.fixture(scope="module")
def drill(grid, submit, any_site, pilots, jobs, alice, bob):
    """Alice and bob each run a payload; she has a queued job and one that is held; her computing element bans her."""
    pilots(any_site, 2)
    bobs = jobs.submit(bob, any_site, f"#!/bin/sh\n{HOLD}\n")
    running = jobs.submit(alice, any_site, TAKES)
    bobs.holds(any_site)
    worker, process = running.holds(any_site)
    queued = jobs.submit(alice, any_site, extra='requirements = TARGET.Name == "nowhere"')
    held = jobs.submit(alice, any_site, extra="hold = true")
    ad = running.ad()
    dn, element = ad["x509userproxysubject"], host(any_site.ce)
    env = ok(worker, "tr '\\0' '\\n' < /proc/%s/environ", str(process.pid))
    proxy = re.search("^X509_USER_PROXY=(.*)$", env, re.MULTILINE)[1]
    print_of = ok(worker, "openssl x509 -noout -fingerprint -sha256 -in %s", proxy)
    known = {"dn": dn, "fingerprint": print_of.strip().partition("=")[2].replace(":", "").lower(), "ad": ad,
             "directory": ok(worker, "readlink /proc/%s/cwd", str(process.pid)).strip()}  # fmt: skip
    ok(element, "pilotbed-ban dn -- %s", dn)
    before, begun = blocks_of(dn), time.time()
    name = ""
    try:
        done, seconds = incident("freeze", running.id, "--reason", "the drill's $(touch /run/pilotbed-test-incident)")
        name = (re.match(r"incident (\S+):", done.stdout) or [done.stderr, ""])[1]
        directory = record("incidents") / name
        found = json.loads((directory / archive.EVIDENCE / "found.json").read_text())
        yield Drill(running, bobs, queued, held, worker, process, known, before, begun, done.stdout + done.stderr,
                    done.returncode, seconds, directory, found)  # fmt: skip
    finally:
        if name:
            incident("thaw", name)
            shutil.rmtree(record("incidents") / name)
        ok(element, "pilotbed-ban dn --lift -- %s", dn)


@pytest.mark.check("D7.4")
def test_from_a_payload_to_its_user_pilot_site_node_and_files(drill, any_site, alice, grid):
    assert drill.code == 0, drill.said
    assert drill.seconds < SECONDS * PATIENCE
    found, ad, pilot = drill.found, drill.known["ad"], drill.found["pilot"]
    assert found["user"] == {"account": alice.account, "user": f"{alice.account}@{GRID.variable('grid_domain')}",
                             "dns": [drill.known["dn"]], "fqan": f"{alice.fqan}/Role=NULL/Capability=NULL"}  # fmt: skip
    assert (found["site"], found["node"]) == (any_site.name, grid.fqdn(drill.worker.backend.hostname))
    assert found["payload account"] == drill.process.user
    assert pilot["account"] == ad["MachineAttrGLIDEIN_Pilot_Account0"]
    assert pilot["factory job"] == f"{ad['MachineAttrGLIDEIN_ClusterId0']}.{ad['MachineAttrGLIDEIN_ProcId0']}"
    asked = "pilotbed-factory-pool condor_q -allusers %s -af GridJobId"
    assert pilot["computing element job"] == ok(GRID.node("factory"), asked, pilot["factory job"]).strip()
    assert pilot["batch job"].split()[0] == GRID.variable("batch_system_name", any_site.ce)
    assert found["contact"] == GRID.variable("grid_security_contact")
    assert found["contact"]["email"] in drill.said
    files = {one["path"]: one for look in found["looks"] for each in look["payloads"] for one in each["files"]}
    loot = files[f"{drill.known['directory']}/loot.txt"]
    assert loot["sha256"] == hashlib.sha256(LOOT.encode()).hexdigest()
    assert drill.known["fingerprint"] in {digest for one in files.values() for digest in one.get("certificates", [])}
    assert "done" in drill.said


@pytest.mark.check("D7.4")
def test_her_payload_is_gone_and_she_gets_in_nowhere(drill, submit, alice):
    assert drill.worker.run("ps --no-headers -o args -U %s", drill.process.user).stdout == ""
    assert drill.running.status() == drill.queued.status() == "held"
    for job in (drill.running, drill.queued):
        assert f"incident {drill.directory.name}: the drill's $(touch" in job.ad()["HoldReason"]
    code, said = as_user(submit, alice.account, "echo queue | condor_submit executable=/bin/true hold=true -")
    assert code != 0, said
    assert "DENIED" in said
    code, said = as_user(submit, alice.account, f"condor_release {drill.queued.id}")
    assert code != 0, said
    code, said = as_user(submit, alice.account, f"voms-proxy-init --quiet --voms {alice.voms} --out other.pem")
    assert code != 0, said
    assert "suspended" in said
    mappers = {name for group in blocks.MAPPERS for name in GRID.names(group)}
    assert [name for name in sorted(mappers)
            if ok(host(name), "pilotbed-ban dn --state -- %s", drill.known["dn"]) != "banned\n"] == []  # fmt: skip
    assert ok(submit, "test ! -e /run/pilotbed-test-incident && echo none") == "none\n"


@pytest.mark.check("D7.4", control=True)
def test_another_users_payload_runs_on(drill, submit, any_site, bob):
    assert drill.bobs.status() == "running"
    drill.bobs.holds(any_site)
    code, said = as_user(submit, bob.account, f"voms-proxy-init --quiet --voms {bob.voms}")
    assert code == 0, said


@pytest.mark.check("D7.4")
def test_her_jobs_payload_ended_within_a_minute(drill):
    ends = [one["end"] for one in traced(drill) if one["id"] == drill.known["ad"]["GlobalJobId"]]
    assert ends
    assert None not in ends
    assert max(ends) < drill.begun + 60 * PATIENCE


def traced(drill):
    """Glexec's records of her payloads on the worker."""
    return json.loads(ok(drill.worker, "pilotbed-trace --json --dn %s", drill.known["dn"]))


def good(directory):
    """What docs/incident.md has one run to verify the archive, with a CA's certificate of one's own."""
    command = (
        f"openssl cms -verify -in {archive.SIGNED} -inform PEM -CAfile {archive.AUTHORITY} -purpose any "
        "-out archive.sha256 && sha256sum --check archive.sha256"
    )
    return subprocess.run(["/bin/sh", "-c", command], cwd=directory, capture_output=True, text=True, check=False)


@pytest.fixture
def copied(drill, tmp_path):
    """The incident's directory, to spoil."""
    return Path(shutil.copytree(drill.directory, tmp_path / "incident"))


@pytest.mark.check("D7.4")
def test_the_archive_is_signed_and_has_every_nodes_logs(drill, copied):
    assert (copied / archive.AUTHORITY).read_text() == ok(
        GRID.node("certificate_authority"), "cat /etc/grid-security/certificates/*.0"
    )
    done = good(copied)
    assert done.returncode == 0, done.stderr
    subprocess.run(["tar", "xf", archive.ARCHIVE], cwd=copied, check=True)
    inside = copied / drill.directory.name
    subprocess.run(["sha256sum", "--quiet", "--check", archive.MANIFEST], cwd=inside, check=True)
    assert {path.parent.name for path in inside.glob("*/journal.json")} == set(GRID.names("all"))
    worker = drill.worker.backend.hostname
    assert drill.known["ad"]["GlobalJobId"] in (inside / worker / "journal.json").read_text()
    assert (inside / GRID.names("submit")[0] / "files/var/log/condor/SchedLog").is_file()
    assert oct(drill.directory.stat().st_mode & 0o777) == "0o700"
    assert [path for path in drill.directory.rglob("*") if path.stat().st_mode & 0o077] == []


@pytest.mark.check("D7.4", control=True)
@pytest.mark.parametrize("name", [archive.ARCHIVE, archive.SIGNED])
def test_a_changed_byte_is_found(copied, name):
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert good(copied).returncode != 0


def with_a_key(directory):
    """Files in which somebody who looks for private keys finds one."""
    subprocess.run(["tar", "xf", archive.ARCHIVE], cwd=directory, check=True)
    return [path for path in directory.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]


@pytest.mark.check("D7.4")
def test_no_private_key_is_in_the_archive(copied):
    assert with_a_key(copied) == []


@pytest.mark.check("D7.4", control=True)
def test_a_planted_key_is_found(copied, submit, alice):
    key = ok(submit, "cat %s", f"/home/{alice.account}/.globus/userkey.pem")
    planted = copied / archive.EVIDENCE / "planted.pem"
    planted.write_text(key)
    archive.pack(copied, "unpacked")
    assert {path.name for path in with_a_key(copied)} == {"planted.pem"}


@pytest.mark.check("D7.4")
def test_from_an_address_and_a_time_to_the_payload(drill, any_site):
    """Bob's is among those at his own worker, his own relay's port, and behind the router."""
    ad, bobs, worker = drill.known["ad"], drill.bobs.ad(), drill.worker.backend.hostname
    relays = [one.get("MachineAttrGLIDEIN_Relay_Address0") or "" for one in (ad, bobs)]
    same = GRID.fqdn(worker) == bobs["MachineAttrGLIDEIN_Worker0"]
    expected = {**dict.fromkeys(GRID.addresses(worker).values(), same), any_site.router_address: True,
                any_site.router: True, relays[0]: relays[0] == relays[1]}  # fmt: skip
    expected.pop("", None)
    for address, with_bobs in expected.items():
        done, took = incident("who", "--address", address, "--time", f"@{drill.begun}", "--json")
        assert done.returncode == 0, done.stderr
        found = {one["job"]: one for one in json.loads(done.stdout)["payloads"]}
        mine = found[ad["GlobalJobId"]]
        assert (mine["dn"], mine["account"]) == (drill.known["dn"], drill.process.user)
        assert (bobs["GlobalJobId"] in found) == with_bobs, address
        assert took < SECONDS * PATIENCE


@pytest.mark.check("D7.4", control=True)
def test_at_another_time_it_was_not_there(drill):
    address = next(iter(GRID.addresses(drill.worker.backend.hostname).values()))
    begun = min(one["start"] for one in traced(drill) if one["id"] == drill.known["ad"]["GlobalJobId"])
    done, _ = incident("who", "--address", address, "--time", f"@{begun - 1}", "--json")
    assert drill.known["ad"]["GlobalJobId"] not in {one["job"] for one in json.loads(done.stdout)["payloads"]}


@pytest.mark.check("D7.4")
def test_the_same_command_again_goes_on_with_the_incident(drill):
    done, _ = incident("freeze", drill.running.id)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"incident {drill.directory.name}:")
    assert good(drill.directory).returncode == 0


@pytest.mark.check("D7.4")
def test_a_jobs_name_in_the_records_is_not_its_users_to_change(jobs, any_site, bob, submit):
    job = jobs.submit(bob, any_site, extra="hold = true")
    as_user(submit, bob.account, f"condor_qedit {job.id} GlobalJobId '\"other\"'; condor_qedit {job.id} Other 1")
    assert ok(submit, "condor_q %s -af Other", job.id) == "1\n", "control: others are"
    assert job.ad()["GlobalJobId"].startswith(f"{GRID.fqdn(GRID.names('submit')[0])}#{job.id}#")


@pytest.mark.check("D7.4")
@pytest.mark.parametrize("words", [
    ("freeze", "$(id)"), ("freeze", "999999.0"), ("freeze", "nowhere#1.0"), ("thaw", "../incidents"),
    ("who", "--address", "192.0.2.1", "--time", "@1"), ("who", "--address", "a'b", "--time", "@1"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused_before_anything_changes(words):
    done, _ = incident(*words)
    assert done.returncode == 2
    assert re.match("pilotbed-incident: .*(write|inventory|condor_history|list|neither)", done.stderr), done.stderr


@pytest.mark.check("D7.4")
def test_thaw_takes_back_what_freeze_did_and_no_more(drill, submit, any_site, jobs, alice):
    """She was banned at the computing element before, and one of her jobs was held: both stay."""
    done, took = incident("thaw", drill.directory.name)
    assert done.returncode == 0, done.stderr
    assert took + drill.seconds < SECONDS * PATIENCE
    assert blocks_of(drill.known["dn"]) == drill.before
    assert drill.held.status() == "held"
    assert (drill.directory / archive.ARCHIVE).is_file()
    until("her other jobs are released", lambda: drill.queued.status() == "idle" and drill.running.status() != "held")
    ok(host(any_site.ce), "pilotbed-ban dn --lift -- %s", drill.known["dn"])
    drill.running.remove()
    assert jobs.submit(alice, any_site).done()["ExitCode"] == 0
