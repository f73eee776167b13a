"""Two VOs on one grid: each has its own pilots, and no pilot runs the other's payloads, forced or not.

    dave (cosmo) ── schedd ── frontend, group cosmo ──▶ copilotNNN ── glexec ──▶ coNNN    at sites that accept cosmo
    alice (gridlab) ─── " ──── group main ────────────▶ pilotNNN ─── glexec ──▶ glNNN
"""

import json
import re
from contextlib import closing

import pytest
from pilotbed_suite import walk
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, TESTS_OWN, Jobs, as_user, edited, ok, until, write

pytestmark = pytest.mark.vos


@pytest.fixture(scope="session")
def vos():
    known = GRID.variable("grid_vos")
    return known if len(known) > 1 else pytest.skip("this inventory has one VO")


@pytest.fixture(scope="session")
def other(vos):
    return vos[1]


@pytest.fixture(scope="session")
def dave(other):
    """A member of the second VO."""
    return walk.walker(next(iter(other["members"])))


@pytest.fixture(scope="session")
def shared_site(other):
    """A site that accepts both VOs."""
    return GRID.site(f"for {other['name']}", lambda site: other["name"] in (site.vos or [other["name"]]))


@pytest.fixture(scope="module")
def closed_site(other):
    """A site that does not accept the second VO."""
    return GRID.site(f"without {other['name']}", lambda site: site.vos and other["name"] not in site.vos)


@pytest.fixture(scope="session")
def visiting(submit, dave, shared_site):
    """Dave's job, submitted before the walk's: its first pilots come with theirs."""
    with closing(Jobs(submit)) as made:
        yield made.submit(dave, shared_site)


def of_pool(account, pool):
    return re.fullmatch(rf"{pool['prefix']}\d+", account)


@pytest.mark.check("P2")
@pytest.mark.stage(0)
def test_a_members_job_is_of_his_vo(visiting, other):
    assert visiting.ad()["x509UserProxyVOName"] == other["name"]


@pytest.mark.check("P2", control=True)
def test_a_job_of_the_second_vo_runs_through_pilots_of_its_own(submit, dave, visiting, other):
    trace = walk.trace(submit, dave, visiting.id, visiting.done(), visiting.name)
    assert trace.exit_code == 0
    assert of_pool(trace.pilot_account, other["pilot_accounts"])
    assert of_pool(trace.payload_account, other["payload_accounts"])
    assert trace.fqan.startswith(f"/{other['name']}/")


def test_a_site_that_does_not_accept_a_vo_is_asked_for_no_pilot(jobs, dave, other, closed_site, shared_site):
    """Until the frontend has counted a job of the VO for the other site, too: it has looked."""
    refused, accepted = jobs.submit(dave, closed_site), jobs.submit(dave, shared_site)
    accepted.done()
    path = f"/run/pilotbed/frontend/{other['frontend_group']}/state.json"
    state = json.loads(ok(GRID.node("frontend"), "cat %s", path))
    assert shared_site.name in " ".join(state["entries"])
    assert closed_site.name not in " ".join(state["entries"])
    assert refused.status() == "idle"
    refused.remove()


@pytest.mark.check("P2")
def test_no_user_can_say_of_which_vo_a_job_is(jobs, alice, dave, other, shared_site):
    """A pilot of the second VO is there, idle; alice's job says that it is for it, at submission and afterwards."""
    jobs.submit(dave, shared_site).done()
    said = f'+x509UserProxyVOName = "{other["name"]}"\nhold = true'
    job = jobs.submit(alice, shared_site, extra=said)
    assert job.ad()["x509UserProxyVOName"] == GRID.vo
    code, _ = as_user(jobs.node, "alice", f"condor_qedit {job.id} x509UserProxyVOName '\"{other['name']}\"'")
    assert code != 0
    assert job.ad()["x509UserProxyVOName"] == GRID.vo
    ok(jobs.node, "condor_release %s", job.id)
    ad = job.done()
    trace = walk.trace(jobs.node, alice, job.id, ad, job.name)
    assert not of_pool(trace.pilot_account, other["pilot_accounts"])


@pytest.fixture(scope="module")
def worker(shared_site):
    return host(shared_site.workers[0])


@pytest.fixture
def call(jobs, alice, worker, vos):
    """Call glexec with alice's proxy as an account of a VO's pilots, as a pilot that has got her job would."""
    proxy = walk.proxy_of(jobs.node, "alice")
    made = as_user(jobs.node, "alice", f"voms-proxy-init --quiet --voms {alice.voms}")
    assert made[0] == 0, made
    pem = ok(jobs.node, "cat %s", proxy)

    def run(vo):
        account = f"{vo['pilot_accounts']['prefix']}{vo['pilot_accounts']['count']:03}"
        path = f"{TESTS_OWN}-vos.pem"
        write(worker, path, pem, account)
        command = "runuser -u %s -- env GLEXEC_CLIENT_CERT=%s /usr/sbin/glexec /usr/bin/id -un"
        try:
            return worker.run(command, account, path)
        finally:
            worker.run("rm -f %s", path)

    return run


@pytest.mark.check("P2")
def test_glexec_gives_a_vos_pilot_no_account_of_another_vo(call, vos, worker):
    own, other = call(vos[0]), call(vos[1])
    assert (own.rc, bool(of_pool(own.stdout.strip(), vos[0]["payload_accounts"]))) == (0, True), own.stderr
    assert other.rc == 203
    assert "(caller_pools)" in other.stderr
    assert other.stdout == ""
    with edited(worker, "/etc/glexec.conf", "sed -i '/^caller_pools/d' \"$f\""):
        control = call(vos[1])
    assert (control.rc, control.stdout) == (0, own.stdout), "control: without caller_pools it runs"


def test_pilots_of_both_vos_are_renewed_by_their_own_credential(vos):
    """The newest line of the factory's renewal about each VO's pilots says that they are taken care of."""
    factory = GRID.node("factory")
    for vo in vos:
        until(
            f"the renewal has looked after {vo['pilot_service']}",
            lambda vo=vo: re.search(
                rf"(fresh|renewed) name=\S+,{vo['pilot_service']},",
                ok(factory, "journalctl -u pilotbed-renew --no-pager -o cat; systemctl start pilotbed-renew"),
            ),
        )
