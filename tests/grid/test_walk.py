"""The walk: what a user gets from the grid, and what each part of it did for that.

      alice ─┐             ┌─▶ pilot at a hidden site ────(relay)──┐
             ├─▶ schedd ───┤                                      ├─▶ glexec ─▶ payload as the user's own account
      bob   ─┘             └─▶ pilot at a filtered site ──(CCB)───┘

Two users' jobs at every site at once, then one more of alice's. The evidence is taken where it arises: the payload's
own output, the worker's log, the relay's and the broker's counters, Squid's access log.
"""

import re

import pytest
from pilotbed_suite import walk
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, ok, until, work_dirs

pytestmark = [pytest.mark.stage(0), pytest.mark.walk]

SCRIPT = walk.JOB + """
openssl x509 -in "$X509_USER_PROXY" -noout -pubkey
openssl x509 -in "$X509_USER_PROXY" -noout -text
"""

#: Policy language of a limited proxy (Globus); RFC 3820 leaves it to communities.
LIMITED = "1.3.6.1.4.1.3536.1.1.1.9"


def public_key(text):
    return re.search(r"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", text, re.DOTALL)[0]


def account(output):
    """The account that the payload says it ran under."""
    return re.search(r"^uid=\d+\((\w+)\)", output, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def walked(grid, jobs, alice, bob):
    """{(user, site): (job, its ad, its output)}."""
    made = {(who.account, site): jobs.submit(who, site, SCRIPT)
            for site in grid.sites for who in (alice, bob)}  # fmt: skip
    ads = walk.wait(jobs.node, {f"{user}'s at {site.name}": job.id for (user, site), job in made.items()})
    return {key: (job, ad, job.read("out")) for (key, job), ad in zip(made.items(), ads.values(), strict=True)}


@pytest.fixture(scope="module")
def every(walked):
    return list(walked.values())


@pytest.mark.check("D8.2")
def test_every_site_is_reached_and_every_stage_was_seen(grid, submit, alice, bob, walked):
    for site in grid.sites:
        jobs = [(who, *walked[who.account, site]) for who in (alice, bob)]
        assert walk.problems([walk.trace(submit, who, job.id, ad, job.name) for who, job, ad, _ in jobs]) == []


def test_jobs_run_where_they_asked_to(walked):
    for (_, site), (_, ad, _) in walked.items():
        assert ad["MachineAttrGLIDEIN_Site0"] == site.name
        assert ad["MachineAttrGLIDEIN_Traversal0"] == site.traversal
        assert any(ad["MachineAttrGLIDEIN_Worker0"].split(".")[0] == worker for worker in site.workers)


def test_output_is_the_payloads(every):
    for job, ad, output in every:
        greeting = f"hello from {account(output)} on {ad['MachineAttrGLIDEIN_Worker0']}"
        assert output.startswith(greeting + "\n")
        assert (ad["ExitCode"], job.read("err")) == (0, "")


@pytest.mark.check("D3.1")
def test_payload_has_the_users_account_not_the_pilots(grid, every):
    for job, ad, output in every:
        worker, pilot = grid.worker_of(ad), ad["MachineAttrGLIDEIN_Pilot_Account0"]
        assert account(output) != pilot
        # glexec's own record of the same payload
        line = until(
            f"glexec's record of {job.id}",
            lambda worker=worker, ad=ad: worker.run("journalctl -t glexec -o cat --no-pager | grep -F %s",
                                                    f'id="{ad["GlobalJobId"]}"').stdout,
        )  # fmt: skip
        assert f'caller="{pilot}" target="{account(output)}" dn="{ad["x509userproxysubject"]}"' in line
        assert "exit=0" in line


def test_fqans_are_those_of_the_users(grid, alice, bob, walked):
    for (user, _), (_, ad, _) in walked.items():
        fqan = {who.account: who.fqan for who in (alice, bob)}[user]
        log = grid.worker_of(ad).run("journalctl -t glexec -o cat --no-pager | grep -F %s", ad["GlobalJobId"]).stdout
        assert re.search(rf'fqan="{fqan}(/Role=NULL)?(/Capability=NULL)?"', log), log


def test_two_users_have_two_accounts(grid, walked, alice, bob):
    for site in grid.sites:
        first, second = (account(walked[who.account, site][2]) for who in (alice, bob))
        assert first != second


@pytest.mark.check("D3.1")
def test_same_user_has_the_same_account_again(jobs, alice, any_site, walked):
    again = jobs.submit(alice, any_site, SCRIPT)
    again.done()
    first = walked[alice.account, any_site]
    assert account(again.read("out")) == account(first[2])


def test_workers_of_a_site_share_its_leases(workers, walked):
    """A lease is a second name (the encoded DN) of the account's file; every worker of the site must see it."""
    for (_, site), (_, ad, output) in walked.items():
        name = ad["x509userproxysubject"].rpartition("CN=")[2].lower().replace(" ", "%20")
        for worker in (workers[name] for name in site.workers):
            told = re.search(r'-gridmapdir ([^ "]*)', ok(worker, "cat /etc/lcmaps/lcmaps-glexec.db"))[1]
            own = f"{told}/{account(output)}"
            leases = ok(worker, "find %s -samefile %s -printf '%%f\\n'", told, own).split()
            assert len(leases) == 2, leases
            assert any(name in lease.lower() for lease in leases), leases


@pytest.mark.check("D2.2")
@pytest.mark.check("D2.3")
def test_payloads_proxy_is_a_limited_delegation_with_its_own_key(submit, every):
    keys = set()
    for _, ad, output in every:
        own = ok(submit, "openssl x509 -noout -pubkey -in %s", ad["x509userproxy"])
        assert public_key(output) != public_key(own)
        assert LIMITED in output
        keys.add(public_key(output))
    assert len(keys) == len(every)


@pytest.mark.check("D2.2")
def test_pilots_proxy_was_delegated_by_the_factory(grid, every):
    services = "|".join(vo["pilot_service"] for vo in grid.variable("grid_vos"))
    each = "for file in /var/lib/pilotbed/factory/credentials/*.pem; do openssl x509 -noout -pubkey -in $file; done"
    stored = ok(grid.node("factory"), each)
    assert public_key(stored)
    for _, ad, _ in every:
        worker = grid.worker_of(ad)
        for directory in work_dirs(worker):
            have = ok(worker, "openssl x509 -noout -pubkey -issuer -in %s", f"{directory}/cred/pilot.pem")
            assert public_key(have) not in stored
            assert re.search(rf"CN ?= ?({services})\b", have)


def test_pilots_fetched_through_the_cache(grid, workers, walked):
    sites = {site.name: site for site in grid.sites if site.cache}
    jobs = [(sites[site.name], ad) for (_, site), (_, ad, _) in walked.items() if site.name in sites]
    if not jobs:
        pytest.skip("no site of this inventory has a cache")
    for site, ad in jobs:
        worker = next(name for name in site.workers if ad["MachineAttrGLIDEIN_Worker0"].startswith(name))
        started = float(ad["MachineAttrGLIDEIN_Pilot_Start0"])
        address = next(iter(grid.addresses(worker).values()))
        lines = [line.split() for line in ok(host(site.cache), "cat /var/log/squid/access.log").splitlines()]
        mine = [line for line in lines if line[2] == address and started - 2 < float(line[0]) < started + 60]
        assert len(mine) > 10, f"{len(mine)} requests of {worker} after {started}"
        # In the scenario "upgrade" a pilot may be the previous release's, which has a tarball without a number.
        assert any(re.search(r"/stage/condor(_0)?\.", line[6]) for line in mine)
        # What one pilot fetched the next one gets from the cache.
        url = mine[-1][6]
        head = ok(workers[worker], "curl --silent --show-error --fail --output /dev/null --dump-header - --proxy %s %s",
                  f"http://{site.cache}:3128", url)  # fmt: skip
        assert re.search(r"^(X-Cache: HIT|Cache-Status: .*;hit)", head, re.MULTILINE), head


def test_pilots_of_every_site_send_their_logs_while_they_run(grid, walked):
    """Whatever stands between: what there is of one that is killed."""
    factory = grid.node("factory")
    for site in GRID.sites:
        def with_logs(site=site):
            lines = factory.run("pilotbed-pilot-log %s", site.name).stdout.splitlines()
            runs = [line.split()[2] for line in lines if "has not come home; glidein_" in line]
            told = (factory.run("pilotbed-pilot-log %s --log StartLog", number) for number in runs)
            # One that has sent another of its logs first is told of, too, with a code.
            return next((done.stdout for done in told if done.rc == 0), "")

        said = until(f"a pilot at {site.name} has sent its StartLog", with_logs)
        assert "condor_startd" in said
        assert not re.search(r">#\d+#\d+#(?!\.\.\.|\[left out)", said), "a claim's secret"
