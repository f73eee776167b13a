"""One record a payload, in a real journal, and what pilotbed-trace makes of it."""

import json
import time

import pytest
from glexecbed import GLEXEC, OTHER_PILOT, PEOPLE, PILOT, journald, until

ALICE = f"{PEOPLE}Alice"
BURN = "import time\nwhile time.process_time() < 0.5: pass\n"


@pytest.fixture(scope="module", name="journald")
def journald_of_the_module(node):
    with journald(node) as process:
        yield process


@pytest.fixture
def trace(bed, journald):
    """Ask pilotbed-trace for what ran since this test began; its words may be added to or replaced."""
    since = time.time()

    def ask(*words, wanted=None):
        words = words or ("--account", "gl020")
        span = () if "--at" in words else ("--since", f"@{since}")

        def look():
            found = json.loads(bed.root(f"pilotbed-trace --json {' '.join((*span, *words))}"))
            return found if wanted is None or len(found) == wanted else None

        return until(f"{wanted} records", look) if wanted else look()

    return ask


def account_of(done):
    return done.out.split("(")[1].partition(")")[0]


def test_a_payload_leaves_one_record_of_all_there_is_to_know(pilot, trace):
    dn = "/DC=test/DC=grid/O=Gridlab/OU=Services/CN=pilot"
    with pilot.bed.leased(PILOT, dn):
        began = time.time()
        done = pilot.sh("id; exit 3", GLEXEC_ID="submit#22.0#1")
    (one,) = trace("--dn", ALICE, wanted=1)
    assert done.code == 3
    assert began <= one["start"] <= one["end"] <= time.time()
    others = {"node", "batch", "start", "end", "cpu", "memory", "job", "condor"}
    assert {key: one[key] for key in one.keys() - others} == {
        "account": account_of(done), "dn": ALICE, "fqan": "/gridlab/Role=NULL/Capability=NULL", "id": "submit#22.0#1",
        "pilot_account": PILOT, "pilot": dn.lower(), "exit": 3, "ended": "exit 3", "reason": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "code", "ended"),
    [("exit 203", 204, "exit 203"), ("kill -9 $$", 137, "signal 9"), ("exit 137", 137, "exit 137")],
)
def test_record_says_how_it_ended_where_the_code_cannot(script, code, ended, pilot, trace):
    pilot.sh(script)
    (one,) = trace("--dn", ALICE, wanted=1)
    assert (one["exit"], one["ended"]) == (code, ended)


@pytest.mark.parametrize("cgroups", ["writable", "absent"])
def test_cpu_time_is_that_of_all_processes_of_the_payload(cgroups, pilot, trace):
    """Those of a daemon that glexec has to kill, too; the batch system's view is within 5 % of the payload's own."""
    program = f"/usr/bin/python3 -I -c '{BURN}'"
    pilot.bed.path(pilot.work).chmod(0o777)
    burnt = f"{pilot.work}/burnt"
    daemon = pilot.bed.write(f"{pilot.work}/daemon", f"{program}; touch {burnt}; exec sleep 1000", mode=0o644)
    wait = f"until [ -e {burnt} ]; do sleep 0.05; done; rm {burnt}"
    assert pilot.sh(f"setsid sh {daemon} >/dev/null 2>&1 & {program}; {wait}", cgroups=cgroups).code == 0
    (one,) = trace("--dn", ALICE, wanted=1)
    assert 1.0 <= one["cpu"] < 1.4, "twice 0.5 s, two starts of Python, and some sleeping"
    assert one["memory"] > 1 << 20


def test_record_of_what_was_killed_with_glexec_is_written_by_the_cleaner(pilot, trace):
    bed = pilot.bed
    call = bed.start(GLEXEC, "/bin/sh", "-c", "echo up; exec sleep 1000", env=pilot.environment(GLEXEC_ID="a#1.0#2"))
    assert call.stdout.readline() == "up\n"
    (one,) = trace("--dn", ALICE)
    assert (one["id"], one["end"], one["ended"]) == ("a#1.0#2", None, ""), "it is seen while it runs"
    bed.root("pkill -9 -f ^/usr/bin/python3.*glexec-root")
    call.communicate()
    bed.root("/usr/libexec/pilotbed/glexec-clean")
    (one,) = trace("--dn", ALICE, wanted=1)
    assert (one["id"], one["pilot_account"], one["exit"], one["ended"]) == ("a#1.0#2", PILOT, 137, "killed")
    assert one["end"] is not None


def test_refused_call_is_no_payload(pilot, trace):
    assert pilot.glexec("/no/such").code == 201
    assert trace("--node", "$(hostname)") == []


def test_who_ran_at_a_time(pilot, trace):
    before = time.time()
    pilot.sh("sleep 0.3")
    (one,) = trace("--dn", ALICE, wanted=1)
    asked = {when: len(trace("--node", "$(hostname)", "--at", f"@{at}")) for when, at in
             (("before", before - 0.01), ("meanwhile", one["start"] + 0.2), ("after", one["end"] + 0.01))}  # fmt: skip
    assert asked == {"before": 0, "meanwhile": 1, "after": 0}


FORGE = """
import socket
fields = {"SYSLOG_IDENTIFIER": "glexec", "_UID": "0", "GLEXEC_DN": "%s", "GLEXEC_TARGET": "gl001", "GLEXEC_CALLER": "x",
          "GLEXEC_STARTED": "1", "GLEXEC_WALL": "9e9", "GLEXEC_CPU": "0", "GLEXEC_MEMORY": "0", "GLEXEC_EXIT": "0",
          "GLEXEC_ENDED": "exit 0", "MESSAGE": "forged"}
text = "".join(f"{key}={value}\\n" for key, value in fields.items())
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(text.encode(), "/run/systemd/journal/socket")
"""


def test_record_that_a_payload_writes_is_not_believed(pilot, trace):
    bob = f"{PEOPLE}Bob"
    pilot.bed.write(f"{pilot.work}/forge", FORGE % bob, mode=0o644)
    assert pilot.glexec("/usr/bin/python3", "-I", f"{pilot.work}/forge").code == 0
    trace("--dn", ALICE, wanted=1)
    assert trace("--dn", f"'{bob}'") == []
    shown = pilot.bed.root(f"journalctl -o cat SYSLOG_IDENTIFIER=glexec GLEXEC_DN='{bob}'")
    assert shown == "forged\n", "control: it is in the journal, and only its sender's uid tells it apart"


@pytest.mark.parametrize(("who", "batch"), [("root", "slurm 6"), (OTHER_PILOT, "")])
def test_batch_job_is_believed_of_roots_processes_only(who, batch, pilot, trace):
    uid, _ = pilot.bed.ids(PILOT)
    become = f"setpriv --reuid {uid} --regid 20000 --init-groups" if who == "root" else ""
    step = f"exec -a 'slurmstepd: [6.batch]' sh -c '{become} {GLEXEC} /usr/bin/id; :'"
    if who != "root":
        pilot.proxy = pilot.bed.write(f"{pilot.work}/other", pilot.bed.proxy(), owner=who)
    done = pilot.bed.run("/bin/bash", "-c", step, user=who, env=pilot.environment())
    assert done.code == 0, done
    (one,) = trace("--dn", ALICE, wanted=1)
    assert one["batch"] == batch
