"""Credentials on their way: who may submit at a computing element, what a refresh does, what a revocation stops.

      alice ── proxy ──▶ schedd ══ delegated, limited ══▶ starter ── glexec ──▶ payload
      carol ── VOMS proxy without Role=pilot ──✗──▶ CE             pilot ── Role=pilot ──▶ CE ──▶ pool account
"""

import re

import pki
import pytest
from pilotbed.x509 import chain, load_pem
from pilotbed_suite.reach import host
from pilotbed_suite.support import (
    GRID,
    HOLD,
    PILOT_PROXY,
    as_user,
    explained,
    ok,
    playbook,
    running_proxies,
    until,
    write,
)

WATCH = """#!/bin/sh
seen=
for turn in $(seq 240); do
    now=$(openssl x509 -in "$X509_USER_PROXY" -noout -serial)
    [ "$now" = "$seen" ] || { echo "turn $turn $now"; [ -z "$seen" ] || exit 0; seen=$now; }
    sleep 0.5
done
exit 1
"""


def ends_tls(node, proxy, server):
    """Whether a server ends the session of whoever shows it ``proxy``: clients do not show one that has expired."""
    said = node.run(
        "timeout 20 openssl s_client -tls1_2 -CApath /etc/grid-security/certificates -connect %s "
        "-cert %s -key %s -cert_chain %s </dev/null 2>&1", server, proxy, proxy, proxy,
    ).stdout  # fmt: skip
    assert "Verification: OK" in said, said
    return "SSL alert number" in said


class Arex:
    """A-REX, asked for a delegation, which is how every submission begins."""

    #: Whether a pilot's limited proxy may start jobs, too.
    TAKES_LIMITED = True
    LOG = "/var/log/arc/ws-interface.log"

    def __init__(self, name):
        self.name, self.node = name, host(name)

    def takes(self, node, proxy):
        """Whether it lets whoever has ``proxy`` on ``node`` submit.

        A-REX 7.0 closes a connection, and then sends its goodbye (an alert) to the descriptor that it had: another
        connection may have it by then (docs/batch-systems.md). Who finds such a record in his own asks again.
        """
        for _ in range(5):
            asked = node.run(
                "curl --silent --show-error --max-time 20 --output /dev/null --write-out '%%{http_code}' "
                "--request POST --capath /etc/grid-security/certificates --cert %s --key %s --cacert %s %s",
                proxy, proxy, proxy, f"https://{GRID.fqdn(self.name)}/arex/rest/1.0/delegations?action=new",
            )  # fmt: skip
            if asked.rc == 0:
                break
            if ends_tls(node, proxy, f"{GRID.fqdn(self.name)}:443"):
                return False
        with explained((self.node, f"tail -n 20 {self.LOG}; systemctl status arc-arex-ws")):
            assert asked.stdout == "201" or int(asked.stdout) >= 400, asked.stderr
        return asked.stdout == "201"

    def sees_through(self, node, proxy):
        """Assert that a proxy with somebody else's certificate behind it is nobody's; LCMAPS would name that somebody.

        ARC's own plug-in gave out his account (tests/glexec/test_arc_mapping.py).
        """
        before = int(ok(self.node, "stat -c %%s %s", self.LOG))
        assert not self.takes(node, proxy)
        assert "not of one chain" in ok(self.node, "tail -c +%s %s", str(before + 1), self.LOG)


class HTCondorCE:
    """HTCondor's schedd, asked whether one may write there."""

    TAKES_LIMITED = True
    LOG = "/var/log/condor-ce/SchedLog"

    def __init__(self, name):
        self.name, self.node = name, host(name)

    def ping(self, node, proxy):
        """Return as whom it knows whoever has ``proxy`` on ``node``; "" if as nobody who may write."""
        fqdn = GRID.fqdn(self.name)
        done = node.run(
            "X509_USER_PROXY=%s _CONDOR_SEC_CLIENT_AUTHENTICATION_METHODS=SSL timeout 100 "
            "condor_ping -verbose -pool %s -type schedd -name %s WRITE", proxy, f"{fqdn}:9619", fqdn,
        )  # fmt: skip
        assert done.rc != 124, f"no answer is no refusal: {done.stdout}{done.stderr}"
        found = re.search(r"Remote Mapping: +(\S+)@\S+\nAuthorized: +TRUE", done.stdout)
        return found[1] if found else ""

    def takes(self, node, proxy):
        """Whether it lets whoever has ``proxy`` on ``node`` submit."""
        return self.ping(node, proxy) != ""

    def sees_through(self, node, proxy):
        """Assert that a proxy with somebody else's certificate behind it is its owner's."""
        assert self.ping(node, proxy) == self.ping(node, PILOT_PROXY) != ""


class Gram:
    """GRAM's gatekeeper, asked as whom it would start a job manager."""

    TAKES_LIMITED = False
    LOG = "/var/log/globus-gatekeeper.log"

    def __init__(self, name):
        self.name, self.node = name, host(name)

    def takes(self, node, proxy):
        """Whether it lets whoever has ``proxy`` on ``node`` submit. The factory asks: there are GRAM's clients."""
        factory, path, server = GRID.node("factory"), "/tmp/pilotbed-test-gram.pem", f"{GRID.fqdn(self.name)}:2119"
        # As root, globusrun shows the host's certificate.
        write(factory, path, ok(node, "cat %s", proxy), "nobody")
        try:
            if ends_tls(factory, path, server):
                return False
            said = factory.run(
                "runuser -u nobody -- env X509_USER_PROXY=%s globusrun -authenticate-only -resource %s 2>&1",
                path, f"{server}/jobmanager-batch",
            ).stdout  # fmt: skip
        finally:
            factory.run("rm -f %s", path)
        words = ("authentication with the remote server failed", "GRAM Authentication test successful")
        assert any(word in said for word in words), said
        return words[1] in said

    def account(self, node, proxy):
        """Return the account of whoever has ``proxy`` on ``node``."""
        before = int(ok(self.node, "stat -c %%s %s", self.LOG))
        assert self.takes(node, proxy)
        told = ok(self.node, "tail -c +%s %s", str(before + 1), self.LOG)
        return re.search(r"Authorized as local user: (\S+)", told)[1]

    def sees_through(self, node, proxy):
        """Assert that a proxy with somebody else's certificate behind it is its owner's."""
        assert self.account(node, proxy) == self.account(node, PILOT_PROXY)


COMPUTING_ELEMENTS = {"ce_arc": Arex, "ce_htcondor": HTCondorCE, "ce_gram": Gram}


@pytest.fixture(scope="module", autouse=True)
def holding(jobs, alice):
    """A job at each site, which starts while computing elements are tried: a pilot that nobody needs is removed."""
    return [jobs.submit(alice, site, f"#!/bin/sh\n{HOLD}\n") for site in GRID.sites]


ASKED = [(group, name) for group in COMPUTING_ELEMENTS for name in GRID.names(group)]


@pytest.fixture(params=ASKED, ids=[name for _, name in ASKED])
def ce(request):
    """Each computing element of these flavours."""
    group, name = request.param
    return COMPUTING_ELEMENTS[group](name)


@pytest.mark.check("P1")
@pytest.mark.ce
@pytest.mark.parametrize("who", ["plain proxy", "member without the role"])
def test_a_ce_takes_pilots_only(ce, submit, carol, who):
    uid = ok(submit, "id -u %s", carol.account).strip()
    proxy = f"/tmp/x509up_u{uid}"
    make = "grid-proxy-init -q" if who == "plain proxy" else f"voms-proxy-init --quiet --voms {carol.voms}"
    code, said = as_user(submit, carol.account, make)
    assert code == 0, said
    assert not ce.takes(submit, proxy)
    as_user(submit, carol.account, f"rm -f {proxy}")


@pytest.mark.check("P1", control=True)
@pytest.mark.ce
def test_the_same_request_by_a_pilot_is_taken(grid, ce):
    """The control: what refuses carol is her credential, not the request."""
    assert ce.takes(grid.node("frontend"), PILOT_PROXY)


LIMITED = chain._ProxyCertInfo({"policy": {"language": chain.LIMITED}}).dump()


@pytest.mark.ce
@pytest.mark.parametrize(
    ("kind", "changed"), [("full", {}), ("limited", {"info": LIMITED}), ("expired", {"days": (-1, -0.1)})]
)
def test_a_pilots_proxy_of_another_kind(grid, ce, tmp_path, kind, changed):
    """Below the pilot's own, with its attributes: the full one is the control."""
    frontend, path = grid.node("frontend"), "/run/pilotbed-test-proxy.pem"
    (tmp_path / "pilot.pem").touch(0o600)
    (tmp_path / "pilot.pem").write_text(ok(frontend, "cat %s", PILOT_PROXY))
    try:
        write(frontend, path, pki.proxy(load_pem(tmp_path / "pilot.pem"), **changed).pem().decode())
        assert ce.takes(frontend, path) == (kind == "full" or (kind == "limited" and ce.TAKES_LIMITED))
    finally:
        frontend.run("rm -f %s", path)


@pytest.mark.check("P1")
@pytest.mark.ce
def test_a_pilot_of_a_vo_that_the_site_does_not_know_is_not_taken(grid, ce):
    """What it knows of a VO's server is put aside for a moment; before and after is the control."""
    vos = {vo["name"]: vo for vo in GRID.variable("grid_vos")}
    vo = vos[(GRID.variable("site_vos", ce.name) or list(vos))[-1]]
    frontend, proxy = grid.node("frontend"), PILOT_PROXY.replace("pilot.pem", f"{vo['pilot_service']}.pem")
    # The directory is moved: files that were changed would have units restarted at the next deployment.
    known, aside = f"/etc/grid-security/vomsdir/{vo['name']}", f"/etc/grid-security/{vo['name']}.pilotbed-test"
    assert ce.takes(frontend, proxy), "control"
    ok(ce.node, "mv %s %s", known, aside)
    try:
        assert not ce.takes(frontend, proxy)
    finally:
        ok(ce.node, "mv %s %s", aside, known)
    assert ce.takes(frontend, proxy)


@pytest.mark.check("P1")
@pytest.mark.ce
def test_somebody_elses_certificate_behind_a_pilots_own_gives_nobodys_account(grid, submit, alice, ce):
    frontend, path = grid.node("frontend"), "/run/pilotbed-test-proxy.pem"
    other = ok(submit, "runuser -l %s -c %s", alice.account, "cat ~/.globus/usercert.pem")
    try:
        write(frontend, path, ok(frontend, "cat %s", PILOT_PROXY) + other)
        ce.sees_through(frontend, path)
    finally:
        frontend.run("rm -f %s", path)


@pytest.mark.check("P8")
@pytest.mark.ce
def test_a_site_that_does_not_approve_takes_no_pilot(grid, ce):
    """Said in its variables, and deployed; and taken back."""
    frontend, deploy = grid.node("frontend"), ("sites", "--limit", ce.name, "--tags", "pool_accounts_configure")
    assert ce.takes(frontend, PILOT_PROXY), "control"
    with explained((ce.node, f"tail -n 40 {ce.LOG}; uptime")):
        playbook(*deploy, site_accepts_multi_user_pilots=False)
        try:
            until("it takes no pilot", lambda: not ce.takes(frontend, PILOT_PROXY))
        finally:
            playbook(*deploy)
        until("it takes them again", lambda: ce.takes(frontend, PILOT_PROXY))


@pytest.mark.ce
def test_a_pilot_that_is_banned_is_not_taken_until_it_is_let_in(grid, ce):
    frontend = grid.node("frontend")
    dn = f"{GRID.variable('grid_dn_prefix')}/OU=Services/CN={GRID.variable('grid_vos')[0]['pilot_service']}"
    with explained((ce.node, f"tail -n 40 {ce.LOG}; uptime")):
        try:
            ok(ce.node, "pilotbed-ban dn -- %s", dn)
            until("it is kept out", lambda: not ce.takes(frontend, PILOT_PROXY))
        finally:
            ok(ce.node, "pilotbed-ban --lift dn -- %s", dn)
        until("it is let in", lambda: ce.takes(frontend, PILOT_PROXY))


@pytest.mark.check("D2.4")
@pytest.mark.ce
def test_a_renewed_proxy_reaches_the_pilot_that_runs(grid, holding):
    """By the factory and every computing element to the batch job, and from there to the pilot's own daemons."""
    for site, job in zip(GRID.sites, holding, strict=True):
        job.holds(site)
    frontend, service = grid.node("frontend"), GRID.variable("grid_vos")[0]["pilot_service"]

    def renewed(site):
        """Whether pilots that were there are there yet, and each has another proxy."""
        now = running_proxies(site)
        still = before[site.name].keys() & now.keys()
        return still and all(now[pilot] != before[site.name][pilot] for pilot in still)

    before = {site.name: running_proxies(site) for site in GRID.sites}
    ok(frontend, "systemctl restart %s", f"pilotbed-pilot-credential@{service}.service")
    for site in GRID.sites:
        until(f"every pilot of {site.name} has another proxy", lambda site=site: renewed(site), 300, every=3)
    for job in holding:
        job.remove()


@pytest.mark.check("D2.4")
def test_a_refreshed_proxy_is_delegated_to_the_running_job(jobs, alice, submit, hidden_site):
    job = jobs.submit(alice, hidden_site, WATCH)
    # "Running" comes before the proxy is delegated: one refreshed in between is the only one that the payload sees.
    until("the payload executes", lambda: "\n001 (" in job.read("log"))
    code, said = as_user(submit, alice.account, f"voms-proxy-init --quiet --voms {alice.voms}")
    assert code == 0, said
    assert job.done(120)["ExitCode"] == 0, "the payload never saw another proxy"
    assert len(set(re.findall(r"serial=(\w+)", job.read("out")))) == 2
