"""A pilot whose frontend is glideinWMS's: its stage area, its grid map file, its silence about glexec; and a job in it.

The frontend itself is not there: the area is as it publishes it, and the pilot is started by hand with what the factory
would tell it.
"""

import base64
import io
import tarfile

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.stock import File, write_area
from pilotbed_suite.support import HandPilot, arguments, ok, until, with_parameters

WANTED = "requirements = TARGET.VO_Name =?= \"stock\""


@pytest.fixture(scope="module")
def site(any_site, pilots):
    pilots(any_site)
    return any_site


@pytest.fixture(scope="module")
def stage(grid, site, tmp_path_factory):
    """Publishes a stock frontend's two areas beside ours: ``stage(blacklist)`` returns the pilot's options."""
    frontend, here = grid.node("frontend"), tmp_path_factory.mktemp("stock")
    root = "/var/lib/pilotbed/frontend/stage/stock"
    config = ok(frontend, "cat /etc/pilotbed/frontend-stage.toml")
    (web,) = (line.split('"')[1] for line in config.splitlines() if line.startswith("web = "))
    central = config.partition("[pool.central]")[2].splitlines()[1].split('"')[1]
    seen = File("seen.sh", "#!/bin/bash\ngrep -H . \"$(sed -n 's/^GLIDECLIENT_BLACKLIST_FILE //p' \"$1\")\"\n", "exec")

    def publish(blacklist=()):
        constants = {"GLIDECLIENT_Start": "True", "VO_Name": "stock"}
        main = write_area(here, constants, [seen], blacklist, f'"{central}" collector1\n')
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


def test_a_users_job_runs_in_a_pilot_with_a_stock_stage(site, stage, jobs, alice, bob):
    """Each under an account of its own: the entry has glexec, and the frontend does not ask for it."""
    with HandPilot(host(site.workers[0]), stage()) as pilot:
        extra = f"{WANTED}\n+WantsStock = True"
        waiting = [jobs.submit(who, site, "#!/bin/sh\nid -un\n", extra) for who in (alice, bob)]
        (slot,) = until("the pilot is in the pool", lambda: pilot.slots() or pilot.check())
        assert (slot["VO_Name"], slot["GLEXEC_JOB"]) == ("stock", True)
        accounts = []
        for job in waiting:
            assert job.done()["ExitCode"] == 0
            accounts.append(job.read("out").strip())
        assert len({*accounts, pilot.account}) == 3
        assert "nodes that take no pilot" in pilot.said()


def test_its_list_of_nodes_is_heeded(site, stage):
    worker = host(site.workers[0])
    name = ok(worker, "uname -n").strip()
    with HandPilot(worker, stage(["elsewhere.test", name])) as pilot:
        assert f"This node '{name}' is in the blacklist." in pilot.refusal()
