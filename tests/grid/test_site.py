"""The site's say over payloads: who names their accounts, whom it bans, and what it can tell of them afterwards.

    site with a mapping service: glexec on the worker ── TLS ──▶ mapping service on the CE ── LCMAPS, leases
    the other site:              glexec on the worker ── LCMAPS, leases
"""

import json
import re

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import (
    GRID,
    HOLD,
    TESTS_OWN,
    as_user,
    ok,
    playbook,
    running_proxies,
    slurm_cpu_time,
    until,
    work_dir,
    write,
)

#: Computes for 30 s in three processes, one of them without a parent; all have done so when it holds once more.
BURN = f"""#!/usr/bin/python3
import os, subprocess, time
burnt, say = os.pipe()
def burn():
    start = time.process_time()
    while time.process_time() - start < 10:
        pass
    os.write(say, b".")
subprocess.run("{HOLD}".split())
for orphan in (False, True):
    if os.fork() == 0:
        if orphan and os.fork():
            os._exit(0)
        burn()
        time.sleep(900)
burn()
for _ in range(3):
    os.read(burnt, 1)
subprocess.run("{HOLD}".split())
"""


@pytest.fixture(scope="module")
def served_site():
    """Its workers ask the mapping service on its computing element."""
    return GRID.site("with a mapping service", lambda site: site.ce in GRID.names("mapping_service"))


@pytest.fixture(scope="module")
def proxy_of(submit):
    """A user's proxy with attributes, as text: ``proxy_of(walker)``."""

    def made(who):
        code, said = as_user(submit, who.account, f"voms-proxy-init --quiet --voms {who.voms}")
        assert code == 0, said
        return ok(submit, "runuser --login %s --command %s", who.account, "cat /tmp/x509up_u$(id -u)")

    return made


@pytest.fixture
def glexec():
    """Call glexec as the pilot does that is on a worker: ``glexec(node, proxy, command)``."""
    path, used = f"{TESTS_OWN}-proxy.pem", []

    def call(node, proxy, command="id -un"):
        worker = host(node)
        used.append(worker)
        _, account = work_dir(worker)
        write(worker, path, proxy, account)
        return worker.run(
            f"cd / && runuser -u %s -- env GLEXEC_CLIENT_CERT=%s /usr/sbin/glexec /bin/sh -c '{command}'", account, path
        )

    yield call
    for worker in used:
        worker.run("rm -f %s", path)


@pytest.fixture(scope="module")
def pilot_at(jobs, alice):
    """Have a pilot at a site; return the worker where it is: ``pilot_at(site)``."""

    def have(site):
        job = jobs.submit(alice, site, f"#!/bin/sh\n{HOLD}\n")
        worker, _ = job.holds(site)
        job.remove()
        return next(name for name in site.workers if GRID.fqdn(name) == ok(worker, "uname -n").strip())

    return have


# -- mapping -------------------------------------------------------------------------------------------------------


def test_mapping_service_has_named_the_account(jobs, alice, served_site):
    """The service's own record: which worker asked about whom, and what it was told."""
    job = jobs.submit(alice, served_site, "#!/bin/sh\nid -un\n")
    ad = job.done()
    account, dn = job.read("out").strip(), ad["x509userproxysubject"]
    asker = rf'asker="[^"]*/CN=glexec\.{re.escape(ad["MachineAttrGLIDEIN_Worker0"])}" face=json dn="{re.escape(dn)}"'
    said = ok(host(served_site.ce), "journalctl -u pilotbed-mapping -o cat --no-pager --since -10min")
    told = re.findall(asker + r".* account=(\S+)", said)
    assert told and set(told) == {account}, said[-3000:]


@pytest.mark.check("P10")
def test_nothing_runs_while_the_service_is_away(served_site, pilot_at, alice, proxy_of, glexec):
    node, ce, proxy = pilot_at(served_site), host(served_site.ce), proxy_of(alice)
    assert glexec(node, proxy).rc == 0, "control"
    ok(ce, "systemctl stop pilotbed-mapping.socket pilotbed-mapping.service")
    try:
        away = glexec(node, proxy)
    finally:
        ok(ce, "systemctl start pilotbed-mapping.socket pilotbed-mapping.service")
    assert (away.rc, away.stdout) == (203, "")
    assert glexec(node, proxy).rc == 0


def test_only_the_sites_workers_are_answered(served_site, local_site):
    """Another site's worker has a good certificate of the grid's; the service knows it not."""
    address = f"https://{GRID.fqdn(served_site.ce)}:8443/map"
    ask = "curl --silent --output /dev/null --write-out '%%{http_code}' --capath %s --cert %s --key %s --json %s %s"
    about, authorities = '{"dn": "/DC=test/CN=nobody"}', GRID.variable("grid_certificates_dir")
    ce, stranger, place = host(served_site.ce), host(local_site.ce), "/run/pilotbed-test-stranger"
    own = "/etc/grid-security/hostcert.pem", "/etc/grid-security/hostkey.pem"
    lent = f"{place}.cert", f"{place}.key"
    try:
        for path, copy in zip(own, lent, strict=True):
            write(ce, copy, ok(stranger, "cat %s", path))
        codes = [ok(ce, ask, authorities, *pair, about, address) for pair in (own, lent)]
    finally:
        ce.run("rm -f %s %s", *lent)
    assert codes == ["200", "403"], "control, and the stranger"


# -- bans ----------------------------------------------------------------------------------------------------------


@pytest.mark.check("D6.3")
def test_ban_counts_everywhere_and_ends_what_runs(jobs, alice, bob, served_site, local_site, proxy_of, glexec):
    """One call of the playbook; bob's payloads end at both sites, alice's go on."""
    proxies = proxy_of(alice), proxy_of(bob)
    waiting = {
        (who.account, site): jobs.submit(who, site, f"#!/bin/sh\n{HOLD}\n")
        for site in (served_site, local_site) for who in (alice, bob)
    }  # fmt: skip
    there = {key: job.holds(key[1]) for key, job in waiting.items()}
    dn = waiting[bob.account, served_site].ad()["x509userproxysubject"]
    try:
        told = playbook("ban", ban_dn=dn, ban_end_payloads=True)
        assert told.count(": ended ") == 2, told
        for (who, site), (worker, process) in there.items():
            alive = worker.run("test -d /proc/%s", str(process.pid)).rc == 0
            assert alive == (who == alice.account), (who, site.name)
        for site in (served_site, local_site):
            node, _ = next(iter(running_proxies(site)))
            assert glexec(node, proxies[1]).rc == 203
            assert glexec(node, proxies[0]).rc == 0
        again = playbook("ban", ban_dn=dn)
        assert " 0 changes" in again, again
    finally:
        playbook("ban", ban_dn=dn, ban_state="absent")
        for job in waiting.values():
            job.remove()
    assert glexec(node, proxies[1]).rc == 0


# -- records -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def burnt(jobs, alice, local_site, submit):
    """A payload that has computed: its record, Slurm's sample of the same time, and its job's ad.

    Its pilot's batch job is cancelled then, as Slurm writes its own record at a job's end.
    """
    job, ce = jobs.submit(alice, local_site, BURN), host(local_site.ce)
    worker, waiting = job.holds(local_site)
    dn = job.ad()["x509userproxysubject"]

    def record():
        told = json.loads(ok(worker, "pilotbed-trace --json --dn %s", dn))
        return next(one for one in told if one["id"] == job.ad()["GlobalJobId"])

    batch = record()["batch"].removeprefix("slurm ")

    before = slurm_cpu_time(ce, batch)
    ok(worker, "kill %s", str(waiting.pid))
    until("Slurm has sampled what the payload used", lambda: slurm_cpu_time(ce, batch) - before >= 28.6, 300)
    waiting = job.holds(local_site)[1]
    used = slurm_cpu_time(ce, batch) - before  # in whole seconds, and with what the pilot itself used
    ok(worker, "kill %s", str(waiting.pid))
    ad = job.done(60)
    records = json.dumps([record()])
    ok(ce, "scancel %s", batch)
    until("Slurm's record", lambda: f"JobId={batch} " in ce.run("cat /var/log/slurm/jobcomp.log").stdout)
    join = "printf %%s %s | pilotbed-trace --json --records - --dn %s"
    records = ok(ce, f"{join} --batch /var/log/slurm/jobcomp.log", records, dn)
    records = ok(submit, f"{join} --condor", records, dn)
    (joined,) = json.loads(records)
    return joined, used, ad


@pytest.mark.check("D4.1")
def test_payloads_cpu_time_is_the_batch_systems(burnt):
    own, cpu, _ = burnt
    assert own["cpu"] >= 30, "all three processes, the orphan too"
    assert own["cpu"] == pytest.approx(cpu, rel=0.05)


@pytest.mark.check("D4.2")
def test_record_joins_glexec_slurm_and_htcondor(burnt):
    own, _, ad = burnt
    assert (own["id"], own["dn"], own["ended"]) == (ad["GlobalJobId"], ad["x509userproxysubject"], "exit 0")
    assert own["pilot_account"] == own["job"]["user"] == ad["MachineAttrGLIDEIN_Pilot_Account0"]
    assert own["job"]["state"] == "CANCELLED"
    assert (own["condor"]["Owner"], own["condor"]["ExitCode"]) == ("alice", 0)
