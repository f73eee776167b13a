"""A pilot whose frontend is glideinWMS's: its stage area, its grid map file, its silence about glexec; and a job in it.

The frontend itself is not there: the area is as it publishes it, and the pilot is started by hand with what the factory
would tell it.
"""

import base64
import io
import tarfile
import tomllib

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.stock import File, write_area
from pilotbed_suite.support import GRID, HandPilot, arguments, ok, until, with_parameters, write

#: For such a pilot only; no other takes it, and this one takes no other.
WANTED = 'requirements = TARGET.VO_Name =?= "stock"\n+WantsStock = True'
#: While it is there, a script of the stage fails.
FLAG = "/tmp/pilotbed-test-flag"


@pytest.fixture(scope="module")
def site(any_site, pilots):
    pilots(any_site)
    return any_site


@pytest.fixture(scope="module")
def stage(grid, site, tmp_path_factory):
    """Publishes a stock frontend's two areas beside ours: ``stage(blacklist)`` returns the pilot's options."""
    frontend, here = grid.node("frontend"), tmp_path_factory.mktemp("stock")
    root = "/var/lib/pilotbed/frontend/stage/stock"
    config = tomllib.loads(ok(frontend, "cat /etc/pilotbed/frontend-stage.toml"))
    web, (central, *_) = config["web"], config["pool"]["central"].values()
    seen = File("seen.sh", "#!/bin/bash\ngrep -H . \"$(sed -n 's/^GLIDECLIENT_BLACKLIST_FILE //p' \"$1\")\"\n", "exec")
    flag = File("flag.sh", f"#!/bin/sh\n[ ! -e {FLAG} ]\n", "exec", period=2)

    def publish(blacklist=()):
        constants = {"GLIDECLIENT_Start": "True", "VO_Name": "stock"}
        main = write_area(here, constants, [seen, flag], blacklist, f'"{central}" collector1\n')
        group = write_area(here / "group_main", {"GLIDECLIENT_Group_Start": 'TARGET.WantsStock =?= True'})
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            tar.add(here, ".")
        ok(frontend, "rm -rf %s && mkdir -p %s && printf %%s %s | base64 -d | tar -xz -C %s --no-same-owner && "
           "chmod -R a+rX %s", root, root, base64.b64encode(packed.getvalue()).decode(), root, root)  # fmt: skip
        options = {
            "-clientweb": f"{web}/stock", "-clientdescript": main[0], "-clientsign": main[1], "-clientsigntype": "sha1",
            "-clientwebgroup": f"{web}/stock/group_main", "-clientdescriptgroup": group[0],
            "-clientsigngroup": group[1],
        }  # fmt: skip
        told = {name: value for name, value in arguments(site).items() if name != "-param_GLIDEIN_Glexec_Use"}
        return with_parameters({**told, **options}, GLIDEIN_Max_Idle="120")

    yield publish
    frontend.run("rm -rf %s", root)


@pytest.fixture(scope="module")
def pilot(site, stage):
    """Such a pilot, in the pool."""
    options = with_parameters(stage(), UPDATE_INTERVAL="5", GLIDEIN_BLACKHOLE_NUMJOBS="2")
    with HandPilot(host(site.workers[0]), options) as started:
        until("the pilot is in the pool", lambda: started.slots() or started.check())
        yield started
    started.worker.run("rm -f %s", FLAG)


def test_a_users_job_runs_in_a_pilot_with_a_stock_stage(pilot, site, jobs, alice, bob):
    """Each under an account of its own: the entry has glexec, and the frontend does not ask for it."""
    waiting = [jobs.submit(who, site, "#!/bin/sh\nid -un\n", WANTED) for who in (alice, bob)]
    (slot,) = pilot.slots()
    assert (slot["VO_Name"], slot["GLEXEC_JOB"]) == ("stock", True)
    accounts = []
    for job in waiting:
        assert job.done()["ExitCode"] == 0
        accounts.append(job.read("out").strip())
    assert len({*accounts, pilot.account}) == 3
    assert "nodes that take no pilot" in pilot.said()


def test_a_periodic_script_that_fails_keeps_jobs_away(pilot):
    def passes(expected):
        return [slot for slot in pilot.slots() if slot.get("GLIDEIN_PS_OK") is expected] or pilot.check()

    until("it passes", lambda: passes(True))
    ok(pilot.worker, "touch %s", FLAG)
    (slot,) = until("it has failed", lambda: passes(False))
    assert slot["GLIDEIN_PS_FAILED_LIST"] == "flag.sh"
    ok(pilot.worker, "rm %s", FLAG)
    until("it passes again", lambda: passes(True))


def test_a_node_that_eats_jobs_is_known_by_its_starters_logs(pilot, site, jobs, alice):
    """The script is run here, which the startd does once a minute."""
    found = "find /tmp /var/tmp -maxdepth 2 -name glidein_config -user %s -newer %s"
    config = ok(pilot.worker, found, pilot.account, f"{pilot.directory}/proxy.pem").strip()
    script = f"{config.rpartition('/')[0]}/main/black_hole.sh"
    look = f"cd /tmp && runuser -u {pilot.account} -- {script} {config} main 2>&1; rm -f /tmp/otrb_output.xml"
    assert "eats jobs" not in pilot.worker.run(look).stdout
    for job in [jobs.submit(alice, site, "#!/bin/sh\nexit 1\n", WANTED) for _ in range(2)]:
        assert job.done()["ExitCode"] == 1
    assert "this node eats jobs: 2 jobs failed within 20 s of their start" in pilot.worker.run(look).stdout


def test_its_list_of_nodes_is_heeded(site, stage):
    worker = host(site.workers[0])
    name = ok(worker, "uname -n").strip()
    with HandPilot(worker, stage(["elsewhere.test", name])) as pilot:
        assert f"This node '{name}' is in the blacklist." in pilot.refusal()


#: A collector beside the pool's that takes startds by token alone.
TOKENS = "/run/pilotbed-test-tokens"
PORT = 9655
COLLECTOR = f"""include : /etc/condor/required-security.conf
RELEASE_DIR = /usr
LIB = /usr/lib/condor
LIBEXEC = /usr/libexec/condor
LOCAL_DIR = {TOKENS}
LOG = {TOKENS}
SPOOL = {TOKENS}
EXECUTE = {TOKENS}
LOCK = {TOKENS}
RUN = {TOKENS}
SEC_PASSWORD_DIRECTORY = {TOKENS}/keys
USE_SHARED_PORT = false
COLLECTOR_HOST = %s:{PORT}
UID_DOMAIN = grid.test
TRUST_DOMAIN = tokens.grid.test
SEC_DEFAULT_AUTHENTICATION_METHODS = IDTOKENS
SEC_READ_AUTHENTICATION_METHODS = FS
SEC_CLIENT_AUTHENTICATION_METHODS = FS
ALLOW_READ = condor@grid.test
ALLOW_ADVERTISE_STARTD = holder@grid.test
ALLOW_ADVERTISE_MASTER = holder@grid.test
ALLOW_DAEMON = holder@grid.test
"""


@pytest.fixture(scope="module")
def tokens(grid):
    """That collector: what makes a token of an identity's."""
    central = grid.node("central_manager")
    address = f"{GRID.fqdn(GRID.names('central_manager')[0])}"
    ok(central, "install -d -o condor %s && install -d -m 0700 %s && head -c 64 /dev/urandom > %s && chmod 0600 %s",
       TOKENS, f"{TOKENS}/keys", f"{TOKENS}/keys/POOL", f"{TOKENS}/keys/POOL")  # fmt: skip
    write(central, f"{TOKENS}/condor_config", COLLECTOR % address, mode="0644")
    ok(central, "systemd-run --quiet --unit pilotbed-test-tokens --setenv CONDOR_CONFIG=%s condor_collector -f -p %s",
       f"{TOKENS}/condor_config", str(PORT))  # fmt: skip

    def made(identity):
        return ok(central, "CONDOR_CONFIG=%s condor_token_create -identity %s -key POOL",
                  f"{TOKENS}/condor_config", identity)  # fmt: skip

    yield made
    central.run("systemctl stop pilotbed-test-tokens; rm -rf %s", TOKENS)


@pytest.mark.parametrize("holder", ["holder", "somebody"])
def test_a_frontends_token_is_used_where_a_pool_asks_for_one(grid, site, stage, tokens, holder):
    """It came with the pilot's job, as a file; the pilot's proxy is nothing to that collector."""
    central, address = grid.node("central_manager"), f"{GRID.fqdn(GRID.names('central_manager')[0])}:{PORT}"
    options = with_parameters(stage(), GLIDEIN_Collector=address, UPDATE_INTERVAL="5")
    files = {"pilot.idtoken": tokens(f"{holder}@grid.test")}

    def known():
        return str(central.run("CONDOR_CONFIG=%s condor_status -af Name AuthenticatedIdentity AuthenticationMethod",
                               f"{TOKENS}/condor_config").stdout)  # fmt: skip

    def refused():
        return int(central.run("grep -c %s %s", f"PERMISSION DENIED to {holder}@grid.test ",
                               f"{TOKENS}/CollectorLog").stdout)  # fmt: skip

    with HandPilot(host(site.workers[0]), options, files=files) as pilot:
        name = pilot.name
        if holder == "holder":
            until("the pilot is known", lambda: name in known() or pilot.check())
            (line,) = (one for one in known().splitlines() if name in one)
            assert line.split()[1:] == ["holder@grid.test", "IDTOKENS"]
            assert pilot.worker.run("test -e %s", f"{pilot.directory}/pilot.idtoken").rc == 1, "the copy is gone"
            assert not refused()
        else:
            until("the pilot is refused", lambda: refused() or pilot.check())
            assert name not in known()
