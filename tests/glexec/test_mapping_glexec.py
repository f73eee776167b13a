"""glexec that asks the site's mapping service: the same account; 203 and one clear line where there is no answer."""

import contextlib
import json
import re

import pki
import pytest
from cryptography.hazmat.primitives import serialization
from glexecbed import CONF, PEOPLE, PILOT, Done, until
from mappingbed import HOST, HOSTS, PORT, WORKER, Service
from test_refresh import refusals, replace, running

BANS = "/etc/grid-security/ban_users.db"
SERVICE_MODE = {
    "mapping": "service", "mapping_service": f"{HOST}:{PORT}", "lcmaps_db_file": "/etc/lcmaps/lcmaps-verify.db",
    "mapping_timeout": "3",
}  # fmt: skip
LOCAL_MODE = {"mapping": "local", "lcmaps_db_file": "/etc/lcmaps/lcmaps-glexec.db"}
PERMIT = {"decision": "permit", "account": {"name": "gl001", "uid": 21001, "gid": 21000, "groups": []}}
#: A service that answers every question with the words in argv, behind TLS with the host's certificate.
IMPOSTOR = """
import http.server, ssl, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(float(sys.argv[2]))
        self.send_response(int(sys.argv[3])); self.end_headers(); self.wfile.write(sys.argv[1].encode())
server = http.server.HTTPServer(("127.0.0.1", 8444), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[4] + "cert.pem", sys.argv[4] + "key.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
print("up", flush=True)
server.serve_forever()
"""


@pytest.fixture
def service(bed):
    made = Service(bed)
    yield made
    made.close()


@pytest.fixture
def pilot(service, pilot):
    with pilot.bed.configured(**SERVICE_MODE):
        yield pilot


def refused(done: Done, word: str, code: int = 203) -> None:
    assert (done.code, "uid=" in done.out) == (code, False), done
    assert word in done.field("reason"), done.line()
    assert re.search("^glexec: .", done.err, re.MULTILINE), done


@contextlib.contextmanager
def impostor(bed, words, *, seconds=0, status=200, certificate="/etc/grid-security/host"):
    """Something else answers, on another port."""
    text = words if isinstance(words, str) else json.dumps(words)
    process = bed.start("python3", "-c", IMPOSTOR, text, str(seconds), str(status), certificate, user="root")
    assert process.stdout.readline() == "up\n"
    try:
        with bed.changed(CONF, lambda text: text.replace(f"{HOST}:{PORT}", f"{HOST}:8444")):
            yield
    finally:
        bed.root("pkill -KILL -f '[h]ttp.server'")
        process.wait()


# -- the same account ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fqans", [
    ["/gridlab"], ["/gridlab/analysis", "/gridlab"], ["/gridlab", "/gridlab/Role=pilot"],
    ["/gridlab/analysis/Role=x", "/gridlab/analysis", "/gridlab"],
])  # fmt: skip
def test_both_modes_give_a_user_one_account(pilot, service, fqans):
    """On the same leases; and the service is told the FQANs in the order of the attribute certificate."""
    bed = pilot.bed
    bed.write(pilot.proxy, bed.proxy(fqans=fqans))
    asked = pilot.glexec("/usr/bin/id", "-un")
    line = next(line for line in service.lines()[::-1] if PEOPLE in line)
    told = re.search('fqans=("?)(.*?)\\1 account=', line)[2].split(",")
    assert told == [f"{fqan if '/Role=' in fqan else f'{fqan}/Role=NULL'}/Capability=NULL" for fqan in fqans]
    with bed.configured(**LOCAL_MODE):
        local = pilot.glexec("/usr/bin/id", "-un")
    assert (asked.code, asked.out) == (local.code, local.out) != (0, "")
    assert [asked.field(name) for name in ("dn", "fqan")] == [local.field(name) for name in ("dn", "fqan")]


def test_the_worker_needs_no_leases_of_its_own(pilot):
    """It verifies the proxy; the gridmapdir is the service's."""
    done = pilot.glexec("/usr/bin/id", "-un")
    assert done.out.startswith("gl0")
    assert pilot.glexec("/usr/bin/id", "-un").out == done.out


@pytest.mark.parametrize("mode", ["service", "local"])
def test_somebody_elses_certificate_behind_ones_own_proxy(pilot, mode):
    """LCMAPS verifies the first certificate of a file, but takes the name from the last; Bob's is public."""
    bed = pilot.bed
    public = bed.people["bob"].chain.leaf.public_bytes(serialization.Encoding.PEM)
    bed.write(pilot.proxy, bed.proxy("alice") + public)
    with bed.configured(**(LOCAL_MODE if mode == "local" else {})):
        refused(pilot.glexec(), "not of one chain", 201)
        with bed.patched("../lcmaps", "X509_get0_pubkey(issuer)) != 1", "X509_get0_pubkey(issuer)) == 7"):
            assert pilot.glexec().field("dn") == f"{PEOPLE}Bob", "control: without our check alice is bob"


# -- what the worker itself refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "code", "word"), [
    ("expired", 201, "expired"), ("garbage", 201, "no certificate"), ("revoked", 203, "not valid"),
    ("VOMS unknown", 203, "not valid"), ("no VOMS", 203, "not valid"),
])  # fmt: skip
def test_a_bad_proxy_is_refused_before_the_service_is_asked(pilot, what, code, word):
    bed = pilot.bed
    bad = {"expired": lambda: bed.proxy(hours=-1), "garbage": lambda: b"none", "no VOMS": lambda: bed.proxy(fqans=())}
    with contextlib.ExitStack() as stack:
        if what in bad:
            bed.write(pilot.proxy, bad[what]())
        elif what == "revoked":
            bed.ca.revoke(bed.people["alice"])
            stack.callback(lambda: (bed.ca.revoked.clear(), bed.ca.publish()))
        else:
            stack.callback(bed.voms.publish)
            bed.voms.publish("/CN=somebody", "/CN=else")
        refused(pilot.glexec(), word, code)
    bed.write(pilot.proxy, bed.proxy())
    assert pilot.glexec().code == 0


# -- what the site refuses -----------------------------------------------------------------------------------------


def test_a_ban_at_the_service_takes_effect_at_the_next_call(pilot):
    assert pilot.glexec().code == 0
    with pilot.bed.changed(BANS, lambda text: f'{text}"{PEOPLE}Alice"\n'):
        refused(pilot.glexec(), f"{PEOPLE}Alice no account")
    assert pilot.glexec().code == 0


# -- who asks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("who", "word"), [
    ("none", "No such file"), ("foreign host", "may not ask"), ("revoked", "400"),
])  # fmt: skip
def test_a_worker_that_may_not_ask_runs_nothing(pilot, service, who, word):
    bed, ca = pilot.bed, pilot.bed.ca
    keep = "/etc/grid-security/glexec/%s.pem"
    try:
        if who == "none":
            bed.root("rm /etc/grid-security/glexec/*.pem")
        else:
            dn = WORKER if who == "revoked" else f"{HOSTS}wn.other.test"
            credential = ca.issue(dn)
            service.hold(keep, credential, "glexec")
            if who == "revoked":
                ca.revoke(credential)
                service.reload()
        refused(pilot.glexec(), word)
    finally:
        service.hold(keep, pilot.bed.worker, "glexec")
        ca.revoked.clear()
        ca.publish()
        service.reload()
    assert pilot.glexec().code == 0, "control: it is the certificate"


def test_no_pilot_and_no_payload_can_ask_in_glexecs_name(pilot):
    for user in (PILOT, "gl001"):
        assert pilot.bed.run("cat", "/etc/grid-security/glexec/key.pem", user=user).code != 0


# -- no answer -----------------------------------------------------------------------------------------------------


def test_without_the_service_nothing_runs(pilot, service):
    service.stop()
    refused(pilot.glexec(), f"{HOST}:{PORT} says 502")
    pilot.bed.root("nginx -s stop")
    refused(pilot.glexec(), "Connection refused")


def test_a_service_that_hangs_is_given_up(pilot):
    with impostor(pilot.bed, "{}", seconds=1000):
        done = pilot.glexec()
    refused(done, "")
    assert re.search("timed out|no answer within 3 s", done.field("reason"))
    assert float(done.field("wall")) < 10


def test_name_server_hangs(pilot):
    """What bounds the whole is the clock of the root part, whatever step it is that does not end."""
    with pilot.bed.patched("mapper", "answer = client.ask(subject)", "__import__('time').sleep(1000)"):
        refused(pilot.glexec(), f"{HOST}:{PORT} gave no answer within 3 s")


def test_a_service_of_an_unknown_name_maps_nobody(pilot):
    with pilot.bed.configured(mapping_service="nowhere.grid.test:8443"):
        refused(pilot.glexec(), "nowhere.grid.test:8443")


@pytest.mark.parametrize(("words", "status", "word"), [
    ("", 200, "not JSON"), ("{}", 200, "decision"), ({"decision": "permit"}, 200, "decision"),
    ("x" * 99999, 200, "long"), (PERMIT, 500, "says 500"),
    ({"decision": "deny", "reason": "not\x1btoday"}, 200, "not?today"),
])  # fmt: skip
def test_answers_that_are_none(pilot, words, status, word):
    with impostor(pilot.bed, words, status=status):
        refused(pilot.glexec(), word)


def test_control_the_impostor_is_believed_where_it_answers_well(pilot):
    """What follows is refused for the account, then, and not for who answers."""
    with impostor(pilot.bed, PERMIT):
        assert "uid=21001(gl001)" in pilot.glexec().out


@pytest.mark.parametrize(("name", "uid", "gid", "word"), [
    ("root", 0, 0, "not in pool_accounts"), ("pilot001", 20001, 20000, "not in pool_accounts"),
    ("pilot005", 20005, 20000, "not in pool_accounts"), ("glexec", 20500, 20500, "not in pool_accounts"),
    ("gl001", 0, 21000, "has uid 21001 on this node"), ("gl001", 21002, 21000, "has uid 21001 on this node"),
    ("nosuch", 21099, 21000, "has uid None on this node"), ("gl001", 21001, 0, "gid 0"),
    ("gl001", 21001, 20000, "gid 20000"),
])  # fmt: skip
def test_an_account_outside_the_pools_is_refused_whoever_names_it(pilot, name, uid, gid, word):
    answer = {"decision": "permit", "account": {"name": name, "uid": uid, "gid": gid, "groups": []}}
    with impostor(pilot.bed, answer):
        refused(pilot.glexec(), word)


@pytest.mark.parametrize("what", ["another name", "another authority", "revoked"])
def test_only_the_sites_service_is_believed(pilot, service, tmp_path, what):
    ca = pilot.bed.ca
    issuer = pki.Authority(tmp_path / "ca", dn="/DC=test/DC=evil/CN=Evil CA") if what == "another authority" else ca
    host = "other.grid.test" if what == "another name" else HOST
    credential = issuer.issue(HOSTS + host, host=host)
    service.hold("/srv/hosts/false-%s.pem", credential, "root")
    try:
        if what == "revoked":
            ca.revoke(credential)
        with impostor(pilot.bed, PERMIT, certificate="/srv/hosts/false-"):
            refused(pilot.glexec(), "certificate")
    finally:
        ca.revoked.clear()
        ca.publish()


@pytest.mark.parametrize(("keys", "word"), [
    ({"mapping": "both"}, "mapping"), ({"mapping_service": ""}, "host:port"), ({"mapping_service": "x"}, "host:port"),
    ({"mapping_timeout": "0"}, "mapping_timeout"), ({"crl_directory": ""}, "crl_directory"),
])  # fmt: skip
def test_configuration_that_cannot_work(pilot, keys, word):
    with pilot.bed.configured(**keys):
        refused(pilot.glexec(), word, 202)


def test_mixed_up_policies_give_nobody_an_account(pilot):
    """mapping = local with the db that only verifies: all are nobody's there."""
    with pilot.bed.configured(mapping="local", lcmaps_get_account_policy="verify"):
        refused(pilot.glexec(), "not in pool_accounts")


def test_a_refreshed_proxy_is_asked_about_again(pilot):
    with running(pilot) as copy:
        since = len(pilot.bed.log())
        fresh = pilot.bed.proxy()
        replace(pilot, fresh)
        until("the payload has the new proxy", lambda: copy.read_bytes() == fresh)
        with pilot.bed.changed(BANS, lambda text: f'{text}"{PEOPLE}Alice"\n'):
            replace(pilot, pilot.bed.proxy())
            until("it is refused", lambda: refusals(pilot, since))
        assert copy.read_bytes() == fresh
