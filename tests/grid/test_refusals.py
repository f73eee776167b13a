"""Whom the grid refuses: each with its message where the person or the operator reads it, and with nothing having run.

    who                                   is refused by        evidence
    mallory, no member                    VOMS; schedd         no proxy; no job
    bob, a group that is not his          VOMS                 no proxy
    alice, a role that is not hers        VOMS                 no proxy
    carol, banned at the site             glexec (203)         the job's log; held after some rounds; runs when unbanned
    carol, certificate revoked            VOMS; glexec         no proxy; the job's log; runs with a new certificate
    an expired proxy                      schedd; glexec (201) no job; what glexec says
    another host than the factory         MyProxy              no proxy; the factory gets one
    alice, a startd of her own            collector            not in the pool; the pilot's proxy may

Carol's revocation comes first, so that the authority's list reaches the nodes by its timers while the rest is tested.
"""

import re
from contextlib import ExitStack

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import (
    PILOT_PROXY,
    TESTS_OWN,
    as_user,
    edited,
    ok,
    playbook,
    renewed,
    until,
    work_dir,
    write,
)

pytestmark = pytest.mark.stage(2)

#: On the pool's own host root and users would be known by their accounts instead.
BY_PROXY = "_CONDOR_SEC_CLIENT_AUTHENTICATION_METHODS=SSL"


def identity(submit, account):
    """A user's end-entity DN in slash form."""
    home = ok(submit, "getent passwd %s", account).split(":")[5]
    named = "openssl x509 -noout -subject -nameopt compat -in %s"
    return ok(submit, named, f"{home}/.globus/usercert.pem").partition("=")[2].strip()


def log_of(worker, job):
    """What glexec has logged on a worker about a job."""
    wanted = f'id="{job.ad()["GlobalJobId"]}"'
    return str(worker.run("journalctl -t glexec -o cat --no-pager | grep -F %s", wanted).stdout)


def given_back(job, site):
    """Wait until glexec has refused a job and the schedd has it back; return what its user reads in its log."""
    until(f"{job.owner}'s job is refused", lambda: "glexec 203" in job.read("log"))
    records = [line for worker in map(host, site.workers) for line in log_of(worker, job).splitlines()]
    assert records and all('target="-"' in line and "exit=203" in line for line in records), "nothing ran"
    assert job.read("out") == ""
    return job.read("log")


# -- revoked -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reissue(grid, submit, carol):
    """Give carol a new key and certificate, as an operator does: remove the old ones and deploy."""

    def again():
        home = ok(submit, "getent passwd %s", carol.account).split(":")[5]
        ok(submit, "rm -f %s %s", f"{home}/.globus/usercert.pem", f"{home}/.globus/userkey.pem")
        playbook("pool", "--limit", grid.names("submit")[0])

    return again


@pytest.fixture(scope="module")
def revoked(grid, submit, jobs, carol, local_site, pilots, reissue):
    """Carol's certificate is revoked; gives her job, held since before that, and the certificate's serial number."""
    pilots(local_site)
    certificate = ok(submit, "getent passwd %s", carol.account).split(":")[5] + "/.globus/usercert.pem"

    def good():
        return submit.run("openssl verify -crl_check -CApath /etc/grid-security/certificates %s", certificate).rc == 0

    if not good():
        reissue()  # an earlier run was interrupted
    job = jobs.submit(carol, local_site, extra="hold = true")
    serial = ok(submit, "openssl x509 -noout -serial -in %s", certificate).strip().partition("=")[2]
    ok(grid.node("certificate_authority"), "pilotbed-ca revoke %s --days 7", identity(submit, carol.account))
    yield job, serial
    if not good():
        reissue()


@pytest.mark.check("D6.4")
@pytest.mark.revocation
def test_authority_publishes_the_revocation_at_once(grid, revoked):
    published = ok(grid.node("certificate_authority"), "openssl crl -noout -text -in /srv/ca/ca.r0")
    assert f"Serial Number: {revoked[1]}" in published


# -- VOMS ----------------------------------------------------------------------------------------------------------


@pytest.mark.check("D8.1")
@pytest.mark.parametrize(
    ("who", "wish", "message"),
    [
        ("mallory", "{vo}", "User unknown to this VO"),
        ("bob", "{vo}:/{vo}/analysis", "Unable to satisfy"),
        ("alice", "{vo}:/{vo}/Role=pilot", "Unable to satisfy"),
    ],
)
def test_voms_gives_no_attributes_that_are_not_ones_own(grid, submit, who, wish, message):
    made = f"voms-proxy-init --voms {wish.format(vo=grid.vo)} --out ~/refused.pem"
    code, said = as_user(submit, who, f"{made}; code=$?; ls ~/refused.pem; exit $code")
    assert code != 0
    assert message in said
    assert "cannot access" in said


@pytest.mark.check("D8.1", control=True)
def test_voms_gives_the_same_to_whom_it_belongs(grid, submit, alice):
    code, said = as_user(submit, alice.account, f"voms-proxy-init --voms {alice.voms} --out ~/given.pem")
    fqans = as_user(submit, alice.account, "voms-proxy-info --file ~/given.pem --fqan; rm ~/given.pem")[1]
    assert code == 0, said
    assert fqans.startswith(alice.fqan)


# -- the site ------------------------------------------------------------------------------------------------------


@pytest.mark.check("D8.1")
def test_schedd_takes_no_job_of_a_non_member(jobs, mallory, local_site):
    """Past the schedd, glexec would refuse: row client-cert-no-voms of docs/glexec.md."""
    with pytest.raises(AssertionError, match="is of no VO; pilots run for"):
        jobs.submit(mallory, local_site, proxy="voms-proxy-init --quiet")


@pytest.fixture(scope="module")
def banned(submit, jobs, bob, local_site):
    """Bob is banned at the site until the module's end; gives his job, and his log when it was refused."""
    dn = identity(submit, bob.account)
    with ExitStack() as bans:
        for name in local_site.workers:
            ban = "printf '\"%%s\"\\n' %s >> $f"
            bans.enter_context(edited(host(name), "/etc/grid-security/ban_users.db", ban, dn))
        job = jobs.submit(bob, local_site)
        yield job, given_back(job, local_site), bans


@pytest.mark.check("P4")
@pytest.mark.check("D3.4")
@pytest.mark.revocation
def test_banned_users_job_does_not_run(banned):
    _, told, _ = banned
    assert re.search(r"glexec 203: the site gives .* no account", told)


# -- expired -------------------------------------------------------------------------------------------------------

#: A proxy below the credential of the arguments that ends so many seconds from now, on stdout.
MAKE_PROXY = """
import datetime, sys
sys.path.insert(0, "/usr/lib/pilotbed")
from pilotbed.x509 import load_pem, make_proxy
issuer, lifetime = load_pem(*sys.argv[2:]), datetime.timedelta(seconds=int(sys.argv[1]))
sys.stdout.write(make_proxy(issuer, lifetime).pem().decode())
"""


@pytest.mark.check("D8.1")
def test_schedd_takes_no_job_with_an_expired_proxy(submit, jobs, alice, local_site):
    write(submit, "/run/pilotbed-test-proxy.py", MAKE_PROXY, mode="0644")
    voms = f"voms-proxy-init --quiet --voms {alice.voms} --out ~/test-voms.pem"
    make = f"{voms} && python3 -I /run/pilotbed-test-proxy.py {{}} ~/test-voms.pem > /tmp/x509up_u$(id -u)"
    before = ok(submit, "condor_q -allusers -totals -af ClusterId")
    with pytest.raises(AssertionError, match=r"proxy.*expired"):
        jobs.submit(alice, local_site, proxy=make.format(-60))
    assert ok(submit, "condor_q -allusers -totals -af ClusterId") == before
    jobs.submit(alice, local_site, extra="hold = true", proxy=make.format(3600)).remove()


@pytest.mark.check("D3.4")
@pytest.mark.parametrize(("seconds", "code", "message"), [(-60, 201, "expired"), (3600, 203, "not in pool_accounts")])
def test_glexec_looks_at_the_end_of_a_proxy_first(local_site, seconds, code, message):
    """Below a pilot's own proxy: in time it comes as far as the mapping, which has no payload's account for pilots."""
    worker = host(local_site.workers[0])
    (place, account), proxy = work_dir(worker), "/tmp/pilotbed-test-proxy.pem"
    try:
        ok(worker, "install -m 0600 -o %s /dev/null %s && python3 -I -c %s %s %s > %s",
           account, proxy, MAKE_PROXY, str(seconds), f"{place}/cred/pilot.pem", proxy)  # fmt: skip
        done = worker.run("runuser -u %s -- env GLEXEC_CLIENT_CERT=%s /usr/sbin/glexec /usr/bin/id", account, proxy)
        assert done.rc == code
        assert message in done.stderr
        assert "uid=" not in done.stdout, "nothing ran"
    finally:
        worker.run("rm -f %s", proxy)


@pytest.mark.check("D3.4")
def test_another_users_certificate_behind_ones_own_proxy_gives_nobodys_account(local_site, submit, alice, bob):
    """LCMAPS takes the name from the last certificate that is no CA's, though it has verified the first."""
    worker = host(local_site.workers[0])
    _, account = work_dir(worker)
    ok(submit, "runuser -l %s -c %s", alice.account, "voms-proxy-init --quiet --voms " + f"gridlab:{alice.fqan}")
    own = ok(submit, "runuser -l %s -c %s", alice.account, "cat /tmp/x509up_u$(id -u)")
    other = ok(submit, "runuser -l %s -c %s", bob.account, "cat ~/.globus/usercert.pem")
    path = f"{TESTS_OWN}-proxy.pem"

    def glexec(proxy):
        write(worker, path, proxy, account)
        return worker.run(
            "cd / && runuser -u %s -- env GLEXEC_CLIENT_CERT=%s /usr/sbin/glexec /usr/bin/id -un", account, path
        )

    try:
        assert glexec(own).rc == 0, "control: by itself the proxy is good"
        done = glexec(own + other)
        assert (done.rc, done.stdout) == (201, "")
        assert "not of one chain" in done.stderr
    finally:
        worker.run("rm -f %s", path)


# -- MyProxy -------------------------------------------------------------------------------------------------------


@pytest.mark.check("D2.4")
@pytest.mark.check("D2.5")
def test_no_other_host_renews_the_pilots_proxy(grid):
    """One that has the pilot's proxy and a good host certificate; that is not enough."""
    names = grid.names("frontend") + grid.names("computing_element")
    other = host(next(name for name in names if name not in grid.names("factory")))
    path, new = "/run/pilotbed-test-pilot.pem", "/run/pilotbed-test-renewed.pem"
    try:
        write(other, path, ok(grid.node("frontend"), "cat %s", PILOT_PROXY))
        done = other.run(
            "X509_USER_CERT=/etc/grid-security/hostcert.pem X509_USER_KEY=/etc/grid-security/hostkey.pem "
            "myproxy-logon -s %s -a %s -d -n -k pilot -t 1 -o %s; code=$?; ls %s; exit $code",
            grid.fqdn(grid.names("myproxy_server")[0]), path, new, new,
        )  # fmt: skip
    finally:
        other.run("rm -f %s %s", path, new)
    assert done.rc != 0
    assert "authentication failed" in done.stderr
    assert "cannot access" in done.stderr


@pytest.mark.check("D2.4", control=True)
@pytest.mark.check("D2.5", control=True)
def test_the_factorys_host_renews_it_with_its_attributes(grid):
    """The unit that does it, told to renew what is still fresh."""
    factory = grid.node("factory")
    said = renewed(factory)
    assert re.search(r"^INFO renewed name=\S+ ", said, re.MULTILINE), said
    for vo in grid.variable("grid_vos"):
        files = f"/var/lib/pilotbed/renewed/*,{vo['pilot_service']},*.pem"
        fqans = ok(factory, f"for f in {files}; do voms-proxy-info --file $f --fqan; done")
        assert fqans.startswith(f"/{vo['name']}/Role=pilot")


# -- the collector -------------------------------------------------------------------------------------------------

STARTD = 'MyType = "Machine"\nName = "slot1@pilotbed-test"\nMyAddress = "<127.0.0.1:9618>"\nState = "Unclaimed"\n'
FORGET = 'MyType = "Query"\nTargetType = "Machine"\nRequirements = Name == "slot1@pilotbed-test"\n'


def advertised(central):
    return ok(central, "condor_status -constraint 'Name == \"slot1@pilotbed-test\"' -af Name").split()


@pytest.mark.check("D1.5")
def test_users_startd_does_not_get_into_the_pool(submit, central, alice):
    write(submit, "/run/pilotbed-test-startd", STARTD, mode="0644")
    before = int(central.run("grep -c 'PERMISSION DENIED to alice@' /var/log/condor/CollectorLog").stdout)
    as_user(submit, alice.account, f"voms-proxy-init --quiet --voms {alice.fqan.split('/')[1]}")
    as_user(
        submit, alice.account,
        f"{BY_PROXY} X509_USER_PROXY=/tmp/x509up_u$(id -u) "
        "/usr/sbin/condor_advertise UPDATE_STARTD_AD /run/pilotbed-test-startd",
    )
    until(
        "the collector says whom it refused",
        lambda: int(central.run("grep -c 'PERMISSION DENIED to alice@' /var/log/condor/CollectorLog").stdout) > before,
    )
    assert advertised(central) == []


@pytest.mark.check("D1.5", control=True)
def test_pilots_proxy_may_advertise_the_same(grid, central):
    frontend = grid.node("frontend")
    advertise = f"{BY_PROXY} X509_USER_PROXY={PILOT_PROXY} condor_advertise"
    write(frontend, "/run/pilotbed-test-startd", STARTD)
    write(frontend, "/run/pilotbed-test-forget", FORGET)
    try:
        ok(frontend, f"{advertise} UPDATE_STARTD_AD /run/pilotbed-test-startd")
        until("the collector has it", lambda: advertised(central))
    finally:
        ok(frontend, f"{advertise} INVALIDATE_STARTD_ADS /run/pilotbed-test-forget")
        frontend.run("rm -f /run/pilotbed-test-startd /run/pilotbed-test-forget")


# -- what took its time --------------------------------------------------------------------------------------------


@pytest.mark.check("P4", control=True)
@pytest.mark.revocation
def test_banned_users_job_is_held_after_some_rounds_and_runs_when_he_is_let_in(banned):
    job, _, bans = banned
    until("the schedd gives it up", lambda: job.status() == "held")
    ad = job.ad()
    assert ad["NumJobStarts"] == 5
    assert "started 5 times and never ended" in ad["HoldReason"]
    assert job.read("out") == ""
    bans.close()
    as_user(job.node, job.owner, f"condor_release {job.id}")
    assert job.done(60)["ExitCode"] == 0


@pytest.mark.check("D6.4")
@pytest.mark.revocation
def test_revocation_reaches_every_node_by_its_timer(grid, revoked):
    def lacking():
        listed = "cd /etc/grid-security/certificates && cat *.r0 | openssl crl -noout -text | grep -cF %s"
        return [name for name in grid.names("all") if host(name).run(listed, revoked[1]).stdout.strip() != "1"]

    until("every node's list has it", lambda: not lacking(), every=2)


@pytest.mark.check("D6.4")
@pytest.mark.revocation
def test_revoked_users_job_does_not_run(submit, revoked, local_site):
    job, _ = revoked
    as_user(submit, job.owner, f"condor_release {job.id}")
    assert "no account" in given_back(job, local_site)
    log = "journalctl -t lcmaps -o cat --no-pager --since=-2min"
    assert any("certificate revoked" in ok(host(name), log) for name in local_site.workers)
    job.remove()


@pytest.mark.check("D6.4")
@pytest.mark.check("D8.1")
@pytest.mark.revocation
def test_revoked_user_gets_no_proxy_with_attributes(grid, submit, carol, revoked):
    """It is her own client that refuses: vomsd 2.1 asks no CRL, so that the sites' check is the one that counts."""
    code, said = as_user(submit, carol.account, f"voms-proxy-init --voms {grid.vo}")
    assert code != 0
    assert "revoked" in said


@pytest.mark.check("D6.4", control=True)
@pytest.mark.revocation
def test_new_certificate_opens_the_grid_again(revoked, reissue, jobs, carol, local_site):
    reissue()
    job = jobs.submit(carol, local_site)
    assert job.done(90)["ExitCode"] == 0
