"""Credentials on their way: who may submit at a computing element, what a refresh does, what a revocation stops.

      alice ── proxy ──▶ schedd ══ delegated, limited ══▶ starter ── glexec ──▶ payload
      carol ── VOMS proxy without Role=pilot ──✗──▶ A-REX          pilot ── Role=pilot ──▶ A-REX ──▶ pool account
"""

import re

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, as_user, ok, until, write

#: The proxy that the frontend sends to the factory.
PILOT_PROXY = "/var/lib/pilotbed/pilot-credential/pilot.pem"

WATCH = """#!/bin/sh
seen=
for turn in $(seq 240); do
    now=$(openssl x509 -in "$X509_USER_PROXY" -noout -serial)
    [ "$now" = "$seen" ] || { echo "turn $turn $now"; [ -z "$seen" ] || exit 0; seen=$now; }
    sleep 0.5
done
exit 1
"""


def ask_ce(node, ce, proxy):
    """Ask A-REX for a delegation, which is how every submission begins; return the HTTP status."""
    answer = node.run(
        "curl --silent --max-time 20 --output /dev/null --write-out '%%{http_code}' --request POST "
        "--capath /etc/grid-security/certificates --cert %s --key %s --cacert %s %s",
        proxy, proxy, proxy, f"https://{GRID.fqdn(ce)}/arex/rest/1.0/delegations?action=new",
    )  # fmt: skip
    return int(answer.stdout or 0)


@pytest.mark.parametrize("who", ["plain proxy", "member without the role"])
def test_a_ce_takes_pilots_only(grid, submit, carol, who):
    uid = ok(submit, "id -u %s", carol.account).strip()
    proxy = f"/tmp/x509up_u{uid}"
    make = "grid-proxy-init -q" if who == "plain proxy" else f"voms-proxy-init --quiet --voms {carol.voms}"
    code, said = as_user(submit, carol.account, make)
    assert code == 0, said
    for site in grid.sites:
        before = ok(host(site.ce), "squeue --noheader --states=all --format=%i")
        assert ask_ce(submit, site.ce, proxy) >= 400
        assert ok(host(site.ce), "squeue --noheader --states=all --format=%i") == before, "something was queued"
    as_user(submit, carol.account, f"rm -f {proxy}")


def test_the_same_request_by_a_pilot_is_taken(grid):
    """The control: what refuses carol is her credential, not the request."""
    for site in grid.sites:
        assert ask_ce(grid.node("frontend"), site.ce, PILOT_PROXY) == 201


def test_a_pilot_that_shows_somebody_elses_certificate_behind_its_own_is_refused(grid, submit, alice):
    """LCMAPS would name that somebody; ARC's own plug-in gave out his account (tests/glexec/test_arc_mapping.py)."""
    frontend, path = grid.node("frontend"), "/run/pilotbed-test-proxy.pem"
    other = ok(submit, "runuser -l %s -c %s", alice.account, "cat ~/.globus/usercert.pem")
    try:
        write(frontend, path, ok(frontend, "cat %s", PILOT_PROXY) + other)
        for site in grid.sites:
            ce, log = host(site.ce), "/var/log/arc/ws-interface.log"
            before = int(ok(ce, "stat -c %%s %s", log))
            assert ask_ce(frontend, site.ce, path) >= 400
            assert "not of one chain" in ok(ce, "tail -c +%s %s", str(before + 1), log)
    finally:
        frontend.run("rm -f %s", path)


def test_a_refreshed_proxy_is_delegated_to_the_running_job(jobs, alice, submit, hidden_site):
    job = jobs.submit(alice, hidden_site, WATCH)
    # "Running" comes before the proxy is delegated: one refreshed in between is the only one that the payload sees.
    until("the payload executes", lambda: "\n001 (" in job.read("log"), 120)
    code, said = as_user(submit, alice.account, f"voms-proxy-init --quiet --voms {alice.voms}")
    assert code == 0, said
    assert job.done(120)["ExitCode"] == 0, "the payload never saw another proxy"
    assert len(set(re.findall(r"serial=(\w+)", job.read("out")))) == 2
