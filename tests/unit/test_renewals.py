"""Newer proxies for pilots that run: A-REX played by a server of HTTPS, and what the factory makes of its answers."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.server
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pki
import pytest
import test_absurd as absurd
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.factory import arex, gridtypes, renewals
from pilotbed.factory.arex import Arex, ArexError
from pilotbed.factory.decisions import Pilot
from pilotbed.factory.renewals import Renewals, outdated
from pilotbed.factory.states import State
from pilotbed.factory.trust import CredentialName
from pilotbed.proxy import Proxy
from pilotbed.x509 import CertificateError, Chain, Credential, TrustStore, delegate, make_proxy

HOUR = dt.timedelta(hours=1)
PERSON = "/DC=test/DC=grid/O=Gridlab/OU=Services/CN=pilot"
CREDENTIAL = CredentialName("vo", "pilot", "vo.main", "K6X3URBI")


class Server(http.server.ThreadingHTTPServer):
    """As much of A-REX as is asked; ``answers`` has other answers than its own: by method and end of the path."""

    daemon_threads = True

    def __init__(self, directory: Path, host: Credential) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_ALLOW_PROXY_CERTS
        context.load_verify_locations(capath=str(directory))
        host.save(directory / "host.pem")
        context.load_cert_chain(directory / "host.pem")
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.jobs: dict[str, Any] = {"j1": "d1"}
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.proxies: dict[str, Chain] = {}
        self.answers: dict[tuple[str, str], Callable[[], tuple[int, bytes]]] = {}
        self.asked: list[str] = []
        self.done = threading.Event()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.server_address[1]}/arex/rest/1.0"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client went away: that is the test."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"{self.command} {self.path}")
        for (method, end), other in self.server.answers.items():
            if method == self.command and self.path.endswith(end):
                code, said = other()
                break
        else:
            code, said = self.own(self.path.removeprefix("/arex/rest/1.0/"), content)
        self.send_response(code)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_POST = do_PUT = answer

    def own(self, path: str, content: bytes) -> tuple[int, bytes]:
        server = self.server
        if (self.command, path) == ("POST", "jobs?action=delegations"):
            assert self.headers["Content-Type"] == "application/json"
            assert self.headers["Accept"] == "application/json"
            found = []
            for job in json.loads(content)["job"]:
                if job["id"] in server.jobs:
                    known = {"delegation_id": server.jobs[job["id"]]} if server.jobs[job["id"]] else {}
                    found.append({"status-code": "200", "reason": "OK", "id": job["id"], **known})
                else:
                    found.append({"status-code": "404", "reason": "Job not found", "id": job["id"]})
            return 201, json.dumps({"job": found if len(found) > 1 else found[0]}).encode()
        name = path.removeprefix("delegations/").partition("?")[0]
        if self.command == "POST":
            server.keys[name] = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            return 201, asked(server.keys[name])
        server.proxies[name] = Chain.from_pem(content)
        assert server.proxies[name].leaf.public_key() == server.keys[name].public_key()
        return 200, b""


def asked(key: Any, algorithm: Any = hashes.SHA256()) -> bytes:  # noqa: B008
    """A certificate request."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "whoever")])
    made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, algorithm)
    return made.public_bytes(serialization.Encoding.PEM)


def forged() -> bytes:
    """A request with a signature that is not its own."""
    der = x509.load_pem_x509_csr(asked(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())).public_bytes(
        serialization.Encoding.DER
    )
    spoilt = der.replace(b"whoever", b"whoEver")
    return x509.load_der_x509_csr(spoilt).public_bytes(serialization.Encoding.PEM)


class Bed:
    """A CA directory, the pilot's proxy, and a computing element."""

    def __init__(self, directory: Path) -> None:
        self.certificates = directory
        self.ca = pki.Authority(directory)
        self.host = self.ca.issue("/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=localhost", host="localhost")
        self.person = self.ca.issue(PERSON)
        self.proxy = directory / "proxy.pem"
        self.issuer = make_proxy(self.person, HOUR)
        self.issuer.save(self.proxy)

    @contextlib.contextmanager
    def served(self, host: Credential | None = None) -> Iterator[Server]:
        with Server(self.certificates, host or self.host) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            try:
                yield server
            finally:
                server.shutdown()

    def renew(self, url: str, *jobs: str) -> dict[str, str]:
        return arex.renew(url, jobs, self.proxy, self.certificates)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def server(bed: Bed) -> Iterator[Server]:
    with bed.served() as server:
        yield server


def test_a_job_has_a_full_proxy_of_the_pilots_for_a_key_that_stays_there(bed: Bed, server: Server) -> None:
    server.jobs = {"j1": "d1", "j2": ["d2", "d3"], "j3": "d4"}
    assert bed.renew(server.url, "j1", "j2") == {"j1": "", "j2": ""}
    assert server.proxies.keys() == {"d1", "d2", "d3"}
    for chain in server.proxies.values():
        TrustStore(bed.certificates).verify(chain)
        assert (chain.dn, chain.limited, len(chain.proxies)) == (PERSON, False, 2)
        assert chain.not_after == bed.issuer.chain.not_after


def test_one_job_is_written_like_a_list_or_without(bed: Bed, server: Server) -> None:
    record = {"status-code": "200", "reason": "OK", "id": "j1", "delegation_id": ["d1"]}
    for said in ([record], record):
        server.answers = {("POST", "action=delegations"): lambda said=said: (200, json.dumps({"job": said}).encode())}  # type: ignore[misc]
        assert bed.renew(server.url, "j1") == {"j1": ""}


def test_what_fails_of_one_job_is_its_own_affair(bed: Bed, server: Server) -> None:
    server.jobs = {"j1": "d1", "none": "", "odd": "../../jobs", "refused": "d5", "number": 7}
    server.answers = {("POST", "d5?action=renew"): lambda: (403, b"Operation is not allowed")}
    said = bed.renew(server.url, "gone", "none", "odd", "refused", "number", "j1")
    assert said == {
        "gone": "404 Job not found",
        "none": "the job has no delegation",
        "odd": "this is no delegation's id: ../../jobs",
        "refused": "POST delegations/d5?action=renew: 403 Forbidden Operation is not allowed",
        "number": "this is no delegation's id: 7",
        "j1": "",
    }


def test_many_jobs_are_asked_for_a_few_at_a_time(bed: Bed, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arex, "BATCH", 2)
    server.jobs = {f"j{number}": f"d{number}" for number in range(5)}
    assert bed.renew(server.url, *server.jobs) == dict.fromkeys(server.jobs, "")
    assert sum("action=delegations" in line for line in server.asked) == 3


MALFORMED = [
    b"", b"\xff\xfe\x00", b"<html>busy</html>", b"null", b"[]", b"{}", b'{"job": null}', b'{"job": [1]}',
    b'{"job": "x"}', b'{"job": [{"id": []}]}', b'{"job": [{"id": {}}]}', b'{"job": [{}]}',
    b"[" * 100_000, b'{"job": [[["id"]]]}',
]  # fmt: skip


@pytest.mark.parametrize("said", MALFORMED, ids=lambda said: repr(said[:20]))
def test_malformed_lists_of_jobs_are_failures_that_say_so(bed: Bed, server: Server, said: bytes) -> None:
    server.answers = {("POST", "action=delegations"): lambda: (201, said)}
    answer = bed.renew(server.url, "j1")
    assert answer["j1"].startswith("this is no list of jobs")
    assert server.proxies == {}


@pytest.mark.parametrize(
    "record",
    [{}, {"status-code": 200}, {"status-code": {"a": 1}}, {"status-code": "200", "delegation_id": {"a": "d1"}},
     {"status-code": "200", "delegation_id": None}, {"status-code": "200", "delegation_id": ["d1\r\nX: y"]},
     {"status-code": "200", "delegation_id": "x" * 300}, {"status-code": "404", "reason": ["\x1b[31m"]}],
)  # fmt: skip
def test_malformed_jobs_are_failures(bed: Bed, server: Server, record: Mapping[str, Any]) -> None:
    answer = json.dumps({"job": [{**record, "id": "j1"}]}).encode()
    server.answers = {("POST", "action=delegations"): lambda: (201, answer)}
    said = bed.renew(server.url, "j1")["j1"]
    assert said
    assert said.isprintable()
    assert server.proxies == {}


@given(st.binary(max_size=200))
def test_no_octets_of_a_request_get_a_proxy(bed: Bed, said: bytes) -> None:
    with pytest.raises(CertificateError):
        delegate(bed.issuer, said)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (lambda: b"", "unreadable certificate request"),
        (lambda: asked(rsa.generate_private_key(public_exponent=65537, key_size=1024)), "1024 bits, fewer than 2048"),
        (lambda: asked(ed25519.Ed25519PrivateKey.generate(), None), "neither RSA nor EC"),
        (forged, "not signed by its own key"),
    ],
)
def test_a_bad_certificate_request_is_not_signed(
    bed: Bed, server: Server, request_: Callable[[], bytes], why: str
) -> None:
    server.answers = {("POST", "action=renew"): lambda: (201, request_())}
    assert why in bed.renew(server.url, "j1")["j1"]
    assert server.proxies == {}
    assert not [line for line in server.asked if line.startswith("PUT")]


def test_a_proxy_is_signed_for_an_elliptic_key_too(bed: Bed) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    chain = delegate(bed.issuer, asked(key))
    TrustStore(bed.certificates).verify(chain)
    assert chain.leaf.public_key() == key.public_key()


def test_below_a_limited_proxy_all_is_limited(bed: Bed) -> None:
    limited = make_proxy(bed.person, HOUR, "limited")
    assert delegate(limited, asked(pki.rsa_key())).limited


@pytest.mark.parametrize("code", [204, 301, 403, 404, 500, 501])
def test_another_code_than_done_is_none(bed: Bed, server: Server, code: int) -> None:
    server.answers = {("PUT", "delegations/d1"): lambda: (code, b"why\x1bnot")}
    said = bed.renew(server.url, "j1")["j1"]
    assert said.startswith(f"PUT delegations/d1: {code} ")
    assert said.isprintable()


def test_an_answer_without_end_is_not_read_to_it(bed: Bed, server: Server) -> None:
    server.answers = {("POST", "action=delegations"): lambda: (201, b"x" * (arex.LARGEST + 1))}
    assert "more than" in bed.renew(server.url, "j1")["j1"]


def test_one_that_does_not_answer_is_asked_once_for_all(
    bed: Bed, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arex, "DEADLINE", 3)  # a busy machine needs more than a second for j0
    server.jobs = {f"j{number}": f"d{number}" for number in range(9)}
    server.answers = {("POST", "d1?action=renew"): lambda: (200, str(server.done.wait(60)).encode())}
    said = bed.renew(server.url, *server.jobs)
    server.done.set()
    assert said["j0"] == ""
    assert [line for line in server.asked if "renew" in line][2:] == [], "j2 to j8 were asked for, too"
    assert all("timed out" in said[f"j{number}"] for number in range(1, 9)), said


def test_one_that_is_not_there_is_a_failure(bed: Bed) -> None:
    with bed.served() as server:
        url = server.url
    server.server_close()
    assert "refused" in bed.renew(url, "j1")["j1"]


@pytest.mark.parametrize("url", ["https://localhost:nonsense/x", "https://[::1/x", "https://localhost:99999/x"])
def test_an_address_that_is_none_is_a_failure(bed: Bed, url: str) -> None:
    assert bed.renew(url, "j1")["j1"]


def test_a_proxy_that_is_none_is_a_failure(bed: Bed, server: Server, tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no proxy")
    for path in (tmp_path / "x.pem", tmp_path / "missing.pem"):
        assert path.name in arex.renew(server.url, ["j1"], path, bed.certificates)["j1"]
    assert server.asked == []


def test_who_is_not_the_computing_element_is_asked_nothing(bed: Bed, tmp_path: Path) -> None:
    """And so gets no proxy signed: another CA, another name, a revoked certificate; the control is every other test."""
    stranger = pki.Authority(tmp_path, "/DC=test/DC=grid/O=Gridlab/CN=Other CA")
    revoked = bed.ca.issue("/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=revoked", host="localhost")
    bed.ca.revoke(revoked)
    for host, why in (
        (stranger.issue("/DC=test/DC=grid/O=Gridlab/CN=localhost", host="localhost"), "unable to get local issuer"),
        (bed.ca.issue("/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=other", host="other.grid.test"), "Hostname mismatch"),
        (revoked, "certificate revoked"),
    ):  # fmt: skip
        with bed.served(host) as server:
            assert why in bed.renew(server.url, "j1")["j1"]
            assert server.asked == []


def test_nothing_is_known_of_a_job_that_is_not_named(bed: Bed, server: Server) -> None:
    server.answers = {("POST", "action=delegations"): lambda: (201, b'{"job": [{"id": "other"}]}')}
    assert bed.renew(server.url, "j1") == {"j1": "it says nothing of this job"}


def test_a_connection_is_used_again_after_a_refusal(bed: Bed, server: Server) -> None:
    one = Arex(server.url, bed.proxy, bed.certificates)
    server.answers = {("POST", "d9?action=renew"): lambda: (404, b"none")}
    with pytest.raises(ArexError, match="404"):
        one.renew("d9")
    one.renew("d1")
    one.close()
    assert server.proxies.keys() == {"d1"}


# -- which pilots, and when


def pilot(job: str = "7.0", grid_id: str = "arc https://ce:443/arex/rest/1.0 0a1b", **changes: Any) -> Pilot:
    given = {"state": State.RUNNING, "proxy_ends": 1000} | changes
    return Pilot(job, "alpha", "vo.main", "vo:pilot", "K6X3URBI", since=0, grid_id=grid_id, **given)


PROXIES = {CREDENTIAL: Proxy(PERSON, 2000)}


def test_pilots_with_an_older_proxy_are_found_by_computing_element() -> None:
    queue = [pilot("7.0"), pilot("7.1", "arc https://ce:443/arex/rest/1.0 2c3d"), pilot("7.2", "arc https://b/rest 4e")]
    rounds = outdated(queue, PROXIES, {})
    assert [(one.gatekeeper, one.ends, one.names) for one in rounds] == [
        ("https://ce:443/arex/rest/1.0", 2000, {"7.0": "0a1b", "7.1": "2c3d"}),
        ("https://b/rest", 2000, {"7.2": "4e"}),
    ]


@pytest.mark.parametrize("state", [State.PENDING, State.STAGE_IN, State.OTHER])
def test_one_that_waits_at_its_computing_element_is_renewed_too(state: State) -> None:
    assert outdated([pilot(state=state)], PROXIES, {})


@pytest.mark.parametrize(
    "one",
    [
        pilot(proxy_ends=2000),
        pilot(state=State.HELD),
        pilot(state=State.STAGE_OUT),
        pilot(state=State.UNSUBMITTED, grid_id="arc https://ce/rest"),
        pilot(grid_id="arc https://ce/rest"),
        pilot(grid_id="condor ce ce:9619 7.0"),
        pilot(grid_id="batch gram 0a1b"),
        pilot(grid_id=""),
        pilot(grid_id="../arc https://ce/rest x"),
    ],
)
def test_what_has_it_or_is_not_ours_is_left_alone(one: Pilot) -> None:
    assert outdated([one], PROXIES, {}) == []


def test_a_pilot_of_another_credential_gets_no_proxy_of_this_one() -> None:
    assert outdated([pilot()], {CredentialName("vo", "pilot", "vo.main", "OTHER"): Proxy(PERSON, 2000)}, {}) == []


class Element:
    """A grid type's renewal that the test steers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: Callable[[str], str] = lambda name: ""
        self.asked: list[list[str]] = []
        self.go = threading.Semaphore(1000)
        kind = replace(gridtypes.load("arc"), renew=self.renew)
        monkeypatch.setattr(gridtypes, "of", lambda grid_id: kind if grid_id else None)

    def renew(self, gatekeeper: str, names: Sequence[str], proxy: Path, certificates: Path) -> dict[str, str]:
        self.go.acquire()
        self.asked.append(list(names))
        return {name: self.said(name) for name in names}


@pytest.fixture
def element(monkeypatch: pytest.MonkeyPatch) -> Element:
    return Element(monkeypatch)


def turn(one: Renewals, *queue: Pilot, proxies: Mapping[CredentialName, Proxy] = PROXIES) -> None:
    """One turn of the factory, and all that it has started."""
    one.turn(queue, proxies, lambda name: Path(name.filename))
    ended(one)


def ended(one: Renewals) -> None:
    until = time.monotonic() + 60
    while len(one._running) > one._results.qsize() and time.monotonic() < until:
        time.sleep(0.005)


def test_a_proxy_is_brought_once(element: Element) -> None:
    one = Renewals(Path("/certificates"))
    for _ in range(3):
        turn(one, pilot())
    assert (element.asked, one.done, one.failed, one.waiting) == ([["0a1b"]], 1, 0, 0)
    turn(one, pilot(), proxies={CREDENTIAL: Proxy(PERSON, 3000)})
    turn(one, pilot(), proxies={CREDENTIAL: Proxy(PERSON, 3000)})
    assert (len(element.asked), one.done, one.waiting) == (2, 2, 0)


def test_after_a_failure_it_is_tried_again_later(element: Element, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Renewals(Path("/certificates"))
    element.said = lambda name: "away" if name == "bad" else ""
    queue = [pilot(), pilot("7.1", "arc https://ce:443/arex/rest/1.0 bad")]
    for _ in range(4):
        turn(one, *queue)
    assert element.asked == [["0a1b", "bad"]]
    assert (one.failures, one.done, one.failed, one.waiting) == ({"7.1": "away"}, 1, 1, 1)
    monkeypatch.setattr(renewals, "AGAIN", 0)
    one._again.clear()
    element.said = lambda name: ""
    turn(one, *queue)
    turn(one, *queue)
    assert element.asked == [["0a1b", "bad"], ["bad"]]
    assert (one.failures, one.done, one.failed, one.waiting) == ({}, 2, 1, 0)


def test_a_failure_is_forgotten_with_its_pilot(element: Element) -> None:
    one = Renewals(Path("/certificates"))
    element.said = lambda name: "away"
    turn(one, pilot())
    turn(one, pilot())
    assert one.failures
    turn(one)
    assert (one.failures, one.waiting, one._renewed) == ({}, 0, {})


def test_whatever_it_raises_is_a_failure_of_its_pilots(element: Element, caplog: pytest.LogCaptureFixture) -> None:
    def said(name: str) -> str:
        raise ZeroDivisionError("a defect")

    one = Renewals(Path("/certificates"))
    element.said = said
    turn(one, pilot())
    turn(one, pilot())
    assert "ZeroDivisionError" in one.failures["7.0"]
    assert caplog.text.count("Traceback") == 1


def test_one_that_hangs_keeps_nobody_else_waiting(element: Element, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Renewals(Path("/certificates"))
    element.go = threading.Semaphore(0)
    for _ in range(3):  # these would not end
        one.turn([pilot()], PROXIES, lambda name: Path(name.filename))
    assert (one.waiting, one.failures) == (1, {})
    monkeypatch.setattr(renewals, "OVERDUE", 0)
    one.turn([pilot()], PROXIES, lambda name: Path(name.filename))
    assert one.failures == {"7.0": "no end after 0 s"}
    element.go.release()
    turn(one, pilot())
    turn(one, pilot())
    assert (element.asked, one.done, one.failures) == ([["0a1b"]], 1, {})


def test_failures_let_the_others_go_first(element: Element, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewals, "MOST", 1)
    monkeypatch.setattr(renewals, "AGAIN", 0)
    one = Renewals(Path("/certificates"))
    element.said = lambda name: "away" if name == "bad" else ""
    for _ in range(3):
        turn(one, pilot("7.0", "arc https://ce/rest bad"), pilot("7.1", "arc https://ce/rest good"))
    assert element.asked == [["bad"], ["good"], ["bad"]]


def test_the_factory_says_a_failure_once_and_goes_on(caplog: pytest.LogCaptureFixture, element: Element) -> None:
    caplog.set_level(logging.INFO)
    element.said = lambda name: "A-REX is away"
    job = absurd.PILOT | {"GlideinEntryName": "alpha", "GridJobStatus": "RUNNING", "GlideinProxyEnds": 1}
    pool = absurd.Pool([absurd.credentials(absurd.pilot_proxy()), absurd.request("alpha", 1)], [job])
    with absurd.factory(pool) as daemon:
        for _ in range(4):
            daemon.turn()
            ended(daemon.renewals)
        metrics = daemon.status_file.with_name("metrics.prom").read_text()
    assert daemon.errors == 0, daemon.said
    assert caplog.text.count("renewal-failed") == 1
    assert "pilotbed_factory_renewals_failed_total 1\n" in metrics
    assert "pilotbed_factory_renewals_waiting 1\n" in metrics
