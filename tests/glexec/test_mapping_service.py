"""The mapping service by itself: real nginx, gunicorn and LCMAPS; who may ask, what is answered, what is logged."""

import contextlib
import re

import pki
import pytest
from glexecbed import GRIDMAPDIR, PEOPLE, TRUST, until
from mappingbed import HOSTS, WORKER, Service, query

BANS = "/etc/grid-security/ban_users.db"
ALICE = f"{PEOPLE}Alice"


@pytest.fixture
def service(bed):
    made = Service(bed)
    yield made
    made.close()


def account(reply):
    assert reply.status == 200, reply
    return reply.json["account"]["name"] if reply.json["decision"] == "permit" else None


def banned(bed, dn=ALICE):
    return bed.changed(BANS, lambda text: f'{text}"{dn}"\n')


# -- answers -------------------------------------------------------------------------------------------------------


def test_a_user_gets_an_account_and_keeps_it(service):
    first = service.map(ALICE, "/gridlab")
    found = first.json["account"]
    assert re.fullmatch(r"gl0\d\d", found["name"])
    assert (found["uid"], found["gid"]) == service.bed.ids(found["name"])
    assert service.map(ALICE, "/gridlab").body == first.body
    assert account(service.map(f"{PEOPLE}Bob", "/gridlab")) != found["name"]


def test_the_primary_fqan_decides(service):
    assert account(service.map(ALICE, "/gridlab", "/gridlab/Role=pilot")).startswith("gl0")
    assert account(service.map(ALICE, "/gridlab/Role=pilot", "/gridlab")).startswith("pilot")
    assert account(service.map(ALICE, "/gridlab/Role=pilot/Capability=NULL")).startswith("pilot")


@pytest.mark.parametrize("fqans", [(), ("/othervo",), ("/gridlabx",)])
def test_who_is_in_no_vo_of_the_site_gets_none(service, fqans):
    reply = service.map(ALICE, *fqans)
    assert (reply.status, reply.json["decision"]) == (200, "deny")
    assert ALICE in reply.json["reason"]


def test_a_ban_takes_effect_at_the_next_call_and_so_does_its_end(service):
    before = account(service.map(ALICE, "/gridlab"))
    with banned(service.bed):
        assert account(service.map(ALICE, "/gridlab")) is None
        assert account(service.map(f"{PEOPLE}Bob", "/gridlab"))
    assert account(service.map(ALICE, "/gridlab")) == before


def test_an_exhausted_pool_is_a_refusal_and_no_fault(service):
    service.bed.root(f"cd {GRIDMAPDIR}; for a in gl0*; do ln $a %2fcn%3dsomebody-$a:gridlab; done")
    assert account(service.map(ALICE, "/gridlab")) is None


def test_a_mapfile_to_root_is_not_followed(service):
    """A pool of system accounts in the mapfile: LCMAPS would give them."""
    bed = service.bed
    bed.root(f"touch {GRIDMAPDIR}/daemon1; chown glexec {GRIDMAPDIR}/daemon1; useradd --system daemon1")
    try:
        with bed.changed("/etc/grid-security/grid-mapfile", lambda text: f'"/gridlab" .daemon\n{text}'):
            reply = service.map(ALICE, "/gridlab")
    finally:
        bed.root(f"userdel daemon1; rm {GRIDMAPDIR}/daemon1")
    assert reply.json["decision"] == "deny"
    assert "system account" in reply.json["reason"]


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "options", "body", "status", "word"), [
    ("/map", (), "{", 400, "not JSON"),
    ("/map", (), '{"dn": "Alice"}', 400, "DN"),
    ("/map", (), '{"dn": "/CN=a", "fqans": ["x"]}', 400, "FQAN"),
    ("/map", (), '{"dn": "/CN=a"}' + " " * 70000, 413, "too large"),
    ("/map", ("--request", "GET"), "", 405, "method"),
    ("/other", (), "{}", 404, "not found"),
    ("/xacml", (), "<a/>", 500, "envelope"),
    ("/xacml", (), "<!DOCTYPE a []><a/>", 500, "DTD"),
])  # fmt: skip
def test_bad_input_gets_a_clear_error(service, path, options, body, status, word):
    reply = service.curl(path, *options, body=body)
    assert reply.status == status, reply
    assert word.lower() in reply.body.lower()
    assert account(service.map(ALICE, "/gridlab")), "and the service goes on"


def test_xacml_says_the_same_as_json(service):
    found = service.map(ALICE, "/gridlab/Role=pilot", "/gridlab").json["account"]
    reply = service.curl("/xacml", body=query(ALICE, "/gridlab/Role=pilot", "/gridlab"))
    assert reply.status == 200
    assert "Decision>Permit<" in reply.body
    for value in (found["name"], found["uid"], found["gid"]):
        assert f">{value}<" in reply.body
    with banned(service.bed):
        assert "Decision>Deny<" in service.curl("/xacml", body=query(ALICE, "/gridlab")).body


# -- who may ask ---------------------------------------------------------------------------------------------------


def hold(service, name, dn, **options):
    credential = service.bed.ca.issue(dn, **options)
    service.hold(f"/srv/hosts/{name}-%s.pem", credential, "root")
    return credential


def test_without_a_certificate_nobody_is_answered(service):
    reply = service.map(ALICE, "/gridlab", who="")
    assert reply.status == 400
    assert "account" not in reply.body


def test_another_host_of_the_grid_is_refused_and_logged(service):
    hold(service, "foreign", f"{HOSTS}wn.other.test", host="wn.other.test")
    for path in ("/map", "/xacml"):
        reply = service.curl(path, body="{}", who="foreign")
        assert reply.status == 403
        assert "wn.other.test may not ask" in reply.body
        assert "wn.other.test" in service.lines()[-1]
    with service.bed.changed("/etc/pilotbed/mapping.toml", lambda text: text.replace(WORKER, f"{HOSTS}wn.other.test")):
        service.stop()
        service.start("foreign")
        assert account(service.map(ALICE, "/gridlab", who="foreign")), "control: it is the list that keeps it out"


@pytest.mark.parametrize("header", ["X-Pilotbed-Asker", "X_Pilotbed_Asker", "x-pilotbed-asker"])
def test_an_asker_cannot_say_that_it_is_another_one(service, header):
    hold(service, "foreign", f"{HOSTS}wn.other.test", host="wn.other.test")
    assert service.map(ALICE, "/gridlab", who="foreign").status == 403
    reply = service.curl("/map", "--header", f"{header}: {WORKER}", who="foreign", body=f'{{"dn": "{ALICE}"}}')
    assert reply.status == 403
    control = [
        "curl", "--silent", "--unix-socket", "/run/pilotbed-mapping.sock", "--header", f"X-Pilotbed-Asker: {WORKER}",
        "--data", f'{{"dn": "{ALICE}", "fqans": ["/gridlab"]}}', "http://x/map",
    ]  # fmt: skip
    assert "permit" in service.bed.run(*control, user="root").out, "control: behind nginx the header is believed"
    for user in ("pilot001", "gl001", "nobody"):
        assert service.bed.run(*control, user=user).code == 7, "which is why nobody else reaches the socket"


def test_a_user_is_no_host(service):
    service.hold("/srv/hosts/alice-%s.pem", service.bed.people["alice"], "root")
    assert service.map(ALICE, "/gridlab", who="alice").status == 403


def test_another_authoritys_certificate_with_the_right_name_is_refused(service, tmp_path):
    other = pki.Authority(tmp_path / "ca", dn="/DC=test/DC=evil/CN=Evil CA")
    service.hold("/srv/hosts/evil-%s.pem", other.issue(WORKER), "root")
    assert service.map(ALICE, "/gridlab", who="evil").status == 400


@contextlib.contextmanager
def trust(service, change):
    """Change CA or CRL for a while; nginx learns of it as it does on a node."""
    change()
    service.reload()
    try:
        yield
    finally:
        service.bed.ca.revoked.clear()
        service.bed.ca.publish()
        service.reload()


def test_a_revoked_certificate_is_refused(service):
    ca = service.bed.ca
    with trust(service, lambda: ca.revoke(service.bed.worker)):
        assert service.map(ALICE, "/gridlab").status == 400
    assert account(service.map(ALICE, "/gridlab")), "control: it is the revocation"


def test_with_an_expired_crl_nobody_is_answered(service):
    ca = service.bed.ca
    with trust(service, lambda: ca.publish(days=(-2, -1))):
        assert service.map(ALICE, "/gridlab").status == 400


@pytest.mark.parametrize("crl", ["absent", "garbage", "good"])
def test_an_authority_without_a_crl_vouches_for_nobody(service, crl):
    second = pki.Authority(service.bed.path(TRUST), dn="/DC=test/DC=second/CN=Second CA")
    service.hold("/srv/hosts/second-%s.pem", second.issue(WORKER), "root")
    if crl == "absent":
        second.path("r0").unlink()
    elif crl == "garbage":
        second.path("r0").write_text("-----BEGIN X509 CRL-----\nMIIB\n-----END X509 CRL-----\n")
    try:
        service.reload()
        assert service.map(ALICE, "/gridlab", who="second").status == (200 if crl == "good" else 400)
        assert service.map(ALICE, "/gridlab").status == 200, "nor does it take anything from the others"
    finally:
        second.path("0").unlink()
        second.path("r0").unlink(missing_ok=True)
        service.reload()


def test_older_tls_is_not_spoken(service):
    assert service.map(ALICE, "/gridlab").status == 200
    reply = service.curl("/map", "--tls-max", "1.2", body="{}")
    assert reply.status == 0
    assert "version" in reply.words


# -- audit ---------------------------------------------------------------------------------------------------------


def test_every_answer_has_its_line(service):
    since = len(service.lines())
    name = account(service.map(ALICE, "/gridlab", "/gridlab/analysis"))
    service.map(ALICE)
    service.curl("/map", body="{")
    found = service.lines()[since:]
    assert len(found) == 3
    assert all(f'asker="{WORKER}" face=json' in line for line in found)
    assert f'dn="{ALICE}" fqans=/gridlab,/gridlab/analysis account={name}' in found[0]
    assert "why=" in found[1] and "account=" not in found[1]
    assert "not JSON" in found[2]


def test_no_line_can_be_forged(service):
    since = len(service.lines())
    service.curl("/map", body='{"dn": "x\\nmapping asker=/CN=x account=gl001"}')
    service.curl("/map", body='{"dn": "/CN=a account=gl001 why=x"}')
    service.curl("/x%0amapping", body="")
    found = service.lines()[since:]
    assert len(found) == 3, found
    assert not [line for line in found if " account=gl001" in re.sub(r'"(\\.|[^"\\])*"', "", line)]


# -- faults --------------------------------------------------------------------------------------------------------


def worker_pids(service):
    return service.bed.root("pgrep -u glexec -f '[b]in/gunicorn' || true").split()


def test_a_worker_that_dies_is_replaced(service):
    service.bed.root("pkill -SEGV -u glexec -n -f '[b]in/gunicorn'")
    until("it answers", lambda: service.map(ALICE, "/gridlab").status == 200)


def test_a_mapping_that_hangs_is_given_up_and_nobody_is_guessed(service):
    """The ban list is a pipe without a writer: LCMAPS waits for it."""
    bed = service.bed
    shorter = lambda text: re.sub("(?m)^timeout = .*", "timeout = 2", text)  # noqa: E731
    with bed.changed("/etc/pilotbed/mapping-gunicorn.py", shorter):
        service.stop()
        service.start()
        bed.root(f"mv {BANS} {BANS}.kept; mkfifo -m 644 {BANS}")
        try:
            assert service.map(ALICE, "/gridlab").status in (500, 502, 504)
        finally:
            bed.root(f"rm {BANS}; mv {BANS}.kept {BANS}")
        until("it answers again", lambda: service.map(ALICE, "/gridlab").status == 200)


def test_without_its_ban_list_nobody_is_mapped(service):
    service.bed.root(f"mv {BANS} {BANS}.kept")
    try:
        assert account(service.map(ALICE, "/gridlab")) is None
    finally:
        service.bed.root(f"mv {BANS}.kept {BANS}")


def test_it_neither_grows_nor_leaks_descriptors(service):
    """LCMAPS lives in the worker: a thousand mappings in one process, or more, however fast the machine is now."""
    def state():
        pid = worker_pids(service)[-1]
        status = service.bed.root(f"cat /proc/{pid}/status; ls /proc/{pid}/fd | wc -l")
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]), int(status.split()[-1])

    assert service.load(4, 1)["bad"] == 0
    before, asked = state(), 0
    while asked < 1000:
        found = service.load(4, 4)
        assert found["bad"] == 0, found
        asked += found["answers"]
    after = state()
    assert after[0] - before[0] < 2000, f"kB: {before[0]} to {after[0]}"
    assert after[1] <= before[1] + 1
    assert len(service.lines()) > asked, "each has its line"


def test_control_the_load_sees_a_refusal(service):
    with banned(service.bed, f"{PEOPLE}User 1"):
        found = service.load(2, 0.5)
    assert 0 < found["bad"] < found["answers"]


def test_control_the_load_sees_two_users_with_one_account(service):
    def all_alike(text):
        named = "Account(pwd.getpwuid(found.uid).pw_name, found.uid,"
        assert text.count(named) == 1, "this control has to follow the application"
        return text.replace(named, 'Account("gl001", 21001,')

    with service.bed.changed("/usr/lib/pilotbed/pilotbed/mapping/app.py", all_alike):
        service.stop()
        service.start()
        found = service.load(2, 0.5)
    assert 0 < found["bad"] < found["answers"]
