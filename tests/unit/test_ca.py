"""The grid's authority, judged by the openssl command, which is what the middleware's libraries do."""

from __future__ import annotations

import base64
import datetime as dt
import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from pilotbed.ca.authority import SKEW, Authority, AuthorityError, parse_dn

CA_DN = "/DC=test/DC=grid/O=Gridlab/CN=Gridlab CA"
ALICE = "/DC=test/DC=grid/O=Gridlab/OU=People/CN=Alice Adams"
BOB = "/DC=test/DC=grid/O=Gridlab/OU=People/CN=Bob Brown"
HOST = "/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=ca.grid.test"


def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)


def request(key: CertificateIssuerPrivateKeyTypes) -> bytes:
    """Return a PEM request whose own subject is nobody's business."""
    name = x509.Name.from_rfc4514_string("CN=request")
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ca") / "ca")
    assert made.create(CA_DN)
    return made


@pytest.fixture
def authority(made: Authority, tmp_path: Path) -> Authority:
    """Each test's own, all with one key: to make one takes longer than most tests."""
    return Authority(Path(shutil.copytree(made.directory, tmp_path / "ca")))


def verify(authority: Authority, certificate: bytes, scratch: Path, *options: str) -> str:
    """Return openssl's verdict on ``certificate``: "OK", or what is wrong."""
    anchors, path = scratch / "anchors.pem", scratch / "certificate.pem"
    anchors.write_bytes(authority.certificate_path.read_bytes() + authority.crl(days=1))
    path.write_bytes(certificate)
    done = openssl("verify", "-crl_check", "-x509_strict", *options, "-CAfile", anchors, "-no-CApath", path)
    return "OK" if done.returncode == 0 else done.stderr


def text(certificate: bytes, scratch: Path) -> str:
    path = scratch / "shown.pem"
    path.write_bytes(certificate)
    return openssl("x509", "-in", path, "-noout", "-subject", "-text", "-nameopt", "compat").stdout


def crl_number(crl: bytes, scratch: Path) -> int:
    path = scratch / "crl.pem"
    path.write_bytes(crl)
    return int(openssl("crl", "-in", path, "-noout", "-crlnumber").stdout.partition("=")[2], 16)


def test_it_is_made_once(authority: Authority) -> None:
    before = authority.certificate_path.read_bytes()
    assert authority.create(CA_DN) is False
    assert authority.certificate_path.read_bytes() == before


def test_it_keeps_its_name(authority: Authority) -> None:
    before = authority.certificate_path.read_bytes()
    with pytest.raises(AuthorityError, match=r"CN=Gridlab CA.*, not /DC=test/CN=Other CA"):
        authority.create("/DC=test/CN=Other CA")
    assert authority.certificate_path.read_bytes() == before


def test_its_key_is_its_own(authority: Authority) -> None:
    assert stat.S_IMODE((authority.directory / "key.pem").stat().st_mode) == 0o400
    shown = text(authority.certificate_path.read_bytes(), authority.directory)
    assert "CA:TRUE" in shown
    assert "Certificate Sign, CRL Sign" in shown


@pytest.mark.parametrize(
    ("kind", "dn", "purposes", "refused"),
    [
        ("host", HOST, ("sslserver", "sslclient"), ()),
        ("user", ALICE, ("sslclient",), ("sslserver",)),
        ("service", "/DC=test/O=Gridlab/CN=pilot", ("sslclient",), ("sslserver",)),
    ],
)
def test_a_certificate_serves_its_kind(
    authority: Authority, key: rsa.RSAPrivateKey, tmp_path: Path, kind: str, dn: str,
    purposes: tuple[str, ...], refused: tuple[str, ...],
) -> None:
    certificate = authority.sign(request(key), dn, kind)
    for purpose in purposes:
        assert verify(authority, certificate, tmp_path, "-purpose", purpose) == "OK"
    for purpose in refused:
        assert "unsuitable certificate purpose" in verify(authority, certificate, tmp_path, "-purpose", purpose)
    shown = text(certificate, tmp_path)
    # The subject is what the authority was told, not what the request says.
    assert shown.startswith(f"subject={dn}\n")
    assert "CA:FALSE" in shown
    assert ("DNS:ca.grid.test" in shown) == (kind == "host")


def test_a_certificate_signs_no_other(authority: Authority, key: rsa.RSAPrivateKey, tmp_path: Path) -> None:
    alice = x509.load_pem_x509_certificate(authority.sign(request(key), ALICE, "user"))
    child = (
        x509.CertificateBuilder()
        .subject_name(parse_dn(BOB))
        .issuer_name(alice.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(alice.not_valid_before_utc)
        .not_valid_after(alice.not_valid_after_utc)
        .sign(key, hashes.SHA256())
    )
    chain = tmp_path / "chain.pem"
    chain.write_bytes(alice.public_bytes(serialization.Encoding.PEM))
    forged = tmp_path / "forged.pem"
    forged.write_bytes(child.public_bytes(serialization.Encoding.PEM))
    done = openssl("verify", "-CAfile", authority.certificate_path, "-no-CApath", "-untrusted", chain, forged)
    assert done.returncode != 0


def test_a_request_that_its_key_did_not_sign_is_refused(authority: Authority, key: rsa.RSAPrivateKey) -> None:
    der = bytearray(x509.load_pem_x509_csr(request(key)).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    armoured = base64.encodebytes(bytes(der)).decode()
    forged = f"-----BEGIN CERTIFICATE REQUEST-----\n{armoured}-----END CERTIFICATE REQUEST-----\n".encode()
    with pytest.raises(AuthorityError, match=f"the request for {ALICE} is not signed by its own key"):
        authority.sign(forged, ALICE, "user")


@pytest.mark.parametrize(
    "weak",
    [
        lambda: rsa.generate_private_key(public_exponent=65537, key_size=1024),
        lambda: ec.generate_private_key(ec.SECP256R1()),
    ],
    ids=["short", "elliptic"],
)
def test_a_key_that_the_middleware_does_not_take_is_refused(
    authority: Authority, weak: Callable[[], CertificateIssuerPrivateKeyTypes]
) -> None:
    with pytest.raises(AuthorityError, match="has no RSA key of at least 2048 bits"):
        authority.sign(request(weak()), ALICE, "user")


@pytest.mark.parametrize("rubbish", [b"", b"hello", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"])
def test_what_is_no_request_is_refused(authority: Authority, rubbish: bytes) -> None:
    with pytest.raises(AuthorityError, match="cannot be read"):
        authority.sign(rubbish, ALICE, "user")


def test_an_unknown_kind_is_refused(authority: Authority, key: rsa.RSAPrivateKey) -> None:
    with pytest.raises(AuthorityError, match="'robot' is no kind of certificate; there is host, user, service"):
        authority.sign(request(key), ALICE, "robot")


def test_nothing_is_recorded_of_what_was_refused(authority: Authority, key: rsa.RSAPrivateKey) -> None:
    with pytest.raises(AuthorityError):
        authority.sign(b"hello", ALICE, "user")
    with pytest.raises(AuthorityError, match="no certificate was issued to"):
        authority.revoke(ALICE)


def test_revocation_ends_every_certificate_of_a_user_and_no_other(
    authority: Authority, key: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    first, second = (authority.sign(request(key), ALICE, "user") for _ in range(2))
    bob = authority.sign(request(key), BOB, "user")
    assert verify(authority, first, tmp_path) == "OK"
    assert authority.revoke(ALICE) == 2
    for certificate in (first, second):
        assert "certificate revoked" in verify(authority, certificate, tmp_path)
    assert verify(authority, bob, tmp_path) == "OK"
    # Once more is no news; a certificate that came later is.
    assert authority.revoke(ALICE) == 0
    third = authority.sign(request(key), ALICE, "user")
    assert verify(authority, third, tmp_path) == "OK"
    assert authority.revoke(ALICE) == 1
    assert "certificate revoked" in verify(authority, first, tmp_path)


def test_every_crl_has_a_higher_number_and_is_signed(authority: Authority, tmp_path: Path) -> None:
    numbers = [crl_number(authority.crl(days=1), tmp_path) for _ in range(3)]
    assert numbers == [1, 2, 3]
    # Also after the authority was started anew.
    assert crl_number(Authority(authority.directory).crl(days=1), tmp_path) == 4
    signed = openssl("crl", "-in", tmp_path / "crl.pem", "-noout", "-CAfile", authority.certificate_path)
    assert "verify OK" in signed.stderr
    other = Authority(tmp_path / "other")
    other.create(CA_DN)  # the same name, another key
    forged = openssl("crl", "-in", tmp_path / "crl.pem", "-noout", "-CAfile", other.certificate_path)
    assert "verify OK" not in forged.stderr


def test_an_expired_crl_is_refused_by_openssl(authority: Authority, key: rsa.RSAPrivateKey, tmp_path: Path) -> None:
    """Why the timer that makes CRLs matters: with an old one nobody gets in."""
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(authority.sign(request(key), ALICE, "user"))
    anchors = tmp_path / "anchors.pem"
    anchors.write_bytes(authority.certificate_path.read_bytes() + authority.crl(days=1e-3 - 5 / 1440))
    done = openssl("verify", "-crl_check", "-CAfile", anchors, "-no-CApath", certificate)
    assert "CRL has expired" in done.stderr


def test_what_was_revoked_is_kept_in_readable_form(authority: Authority, key: rsa.RSAPrivateKey) -> None:
    certificate = x509.load_pem_x509_certificate(authority.sign(request(key), ALICE, "user"))
    authority.revoke(ALICE)
    state = json.loads((authority.directory / "state.json").read_text())
    assert list(state["revoked"]) == [f"{certificate.serial_number:x}"]


@pytest.mark.filterwarnings("ignore:Attribute's length")
@pytest.mark.parametrize(
    ("dn", "subject"),
    [
        ("/DC=test/CN=Robot/Alice", r"/DC=test/CN=Robot\/Alice"),
        ("/DC=test/CN=host/ce.grid.test", r"/DC=test/CN=host\/ce.grid.test"),
        ("/DC=test/CN=Jürgen Groß", r"/DC=test/CN=J\xC3\xBCrgen Gro\xC3\x9F"),
        ("/DC=test/CN=Alice/emailAddress=alice@grid.test", "/DC=test/CN=Alice/emailAddress=alice@grid.test"),
        ("/DC=test/CN=alice@grid.test", "/DC=test/CN=alice@grid.test"),
        ("/DC=test/CN=Alice/Email=alice@grid.test", "/DC=test/CN=Alice/emailAddress=alice@grid.test"),
        ("/C=CH/ST=GE/L=Meyrin/street=Rte 1/postalCode=1217/O=Lab/OU=IT/title=Dr/GN=A/SN=Adams/UID=aadams",
         "/C=CH/ST=GE/L=Meyrin/street=Rte 1/postalCode=1217/O=Lab/OU=IT/title=Dr/GN=A/SN=Adams/UID=aadams"),
        ("/serialNumber=7/dnQualifier=x/pseudonym=y/1.3.6.1.4.1.99999.1=z",
         "/serialNumber=7/dnQualifier=x/pseudonym=y/1.3.6.1.4.1.99999.1=z"),
        ("/DC=test/CN=Alice+UID=aadams", "/DC=test/CN=Alice+UID=aadams"),
        ("/DC=test/UID=aadams+CN=Alice", "/DC=test/CN=Alice+UID=aadams"),
        ("/CN=" + "x" * 64, "/CN=" + "x" * 64),
        ("/CN=" + "語" * 64, "/CN=" + r"\xE8\xAA\x9E" * 64),
    ],
)  # fmt: skip
def test_names_of_all_kinds_are_issued_and_revoked(
    authority: Authority, key: rsa.RSAPrivateKey, tmp_path: Path, dn: str, subject: str
) -> None:
    certificate = authority.sign(request(key), dn, "user")
    assert verify(authority, certificate, tmp_path) == "OK"
    assert text(certificate, tmp_path).startswith(f"subject={subject}\n")
    assert authority.revoke(subject) == 1
    assert "certificate revoked" in verify(authority, certificate, tmp_path)


@pytest.mark.parametrize(
    ("dn", "words"),
    [
        ("/CN=" + "x" * 65, "CN has 65 characters, and may have 64 at most"),
        ("/O=" + "x" * 65 + "/CN=a", "O has 65 characters"),
        ("/emailAddress=" + "x" * 128 + "@b", "emailAddress has 130 characters, and may have 128"),
        ("/C=Switzerland/CN=a", "not a country in two capitals"),
        ("/C=ch/CN=a", "not a country in two capitals"),
        ("/DC=grid.test/CN=a", "not one label of a domain"),
        ("/DC=test//CN=Alice", "not one label of a domain"),
        ("/CN=a/emailAddress=ü@grid.test", "not an e-mail address in ASCII"),
        ("/CN=a/emailAddress=alice", "not an e-mail address"),
        ("/serialNumber=a_b", "not a PrintableString"),
        ("/CN=", "not a text"),
        ("/CN=a\n", "is written"),
        (r"/CN=a\x0Ab", "not a text without control characters"),
        (r"/CN=a\xFF", "not a text"),
        ("/CN=a+CN=a", "duplicate"),
        ("/CN=Alice/X=1", "X is no type that OpenSSL knows"),
        ("CN=Alice,DC=test", "say /DC=test/CN=Alice"),
    ],
)
def test_a_name_that_cannot_be_is_refused_with_the_reason(
    authority: Authority, key: rsa.RSAPrivateKey, dn: str, words: str
) -> None:
    for refused in (lambda: authority.sign(request(key), dn, "user"), lambda: authority.create(dn),
                    lambda: authority.revoke(dn)):  # fmt: skip
        with pytest.raises(AuthorityError, match=re.escape(words)):
            refused()


@pytest.mark.parametrize(
    ("dn", "host"),
    [("/CN=host/ce.grid.test", "ce.grid.test"), ("/CN=*.grid.test", "*.grid.test"),
     ("/CN=ce.grid.test/emailAddress=root@grid.test", "ce.grid.test"), ("/CN=ce", "ce")],
)  # fmt: skip
def test_a_host_is_named_by_its_cn(authority: Authority, key: rsa.RSAPrivateKey, dn: str, host: str) -> None:
    certificate = x509.load_pem_x509_certificate(authority.sign(request(key), dn, "host"))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [host]


@pytest.mark.parametrize("dn", ["/CN=Alice Adams", "/CN=cé.grid.test", "/O=Gridlab", "/CN=-x", "/CN=a..b"])
def test_a_host_without_a_host_name_is_refused(authority: Authority, key: rsa.RSAPrivateKey, dn: str) -> None:
    with pytest.raises(AuthorityError, match="the CN of a host must be its name"):
        authority.sign(request(key), dn, "host")


@pytest.mark.parametrize(
    ("days", "not_before", "verdict"),
    [
        (1, "", "OK"),
        (None, "-30d", "OK"),
        (2, "-1d", "OK"),
        (30, "-31d", "certificate has expired"),
        (1, "2020-02-29T12:00:00", "certificate has expired"),
        (1, "+1h", "certificate is not yet valid"),
        (1, "2030-01-01", "certificate is not yet valid"),
    ],
)
def test_a_life_can_be_chosen(
    authority: Authority, key: rsa.RSAPrivateKey, tmp_path: Path, days: float | None, not_before: str, verdict: str
) -> None:
    pem = authority.sign(request(key), ALICE, "user", days, not_before)
    assert verdict in verify(authority, pem, tmp_path)
    certificate = x509.load_pem_x509_certificate(pem)
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert abs(life - dt.timedelta(days=days or 395)) <= SKEW


def test_a_certificate_ends_in_seconds_where_that_is_wanted(
    authority: Authority, key: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    pem = authority.sign(request(key), ALICE, "user", days=3 / 86400)
    ends = x509.load_pem_x509_certificate(pem).not_valid_after_utc
    assert verify(authority, pem, tmp_path, "-attime", str(int(ends.timestamp()) - 1)) == "OK"
    assert "has expired" in verify(authority, pem, tmp_path, "-attime", str(int(ends.timestamp()) + 1))


@pytest.mark.parametrize(
    ("days", "not_before", "words"),
    [
        (0, "", "0 days is no life"), (-1, "", "-1 days is no life"), (float("nan"), "", "nan days"),
        (float("inf"), "", "inf days"), (1e9, "", "1000000000.0 days"), (5000, "", "would outlive the authority"),
        (1, "tomorrow", "'tomorrow' is no time such as"), (1, "-1w", "is no time"), (1, "-99999999d", "is no time"),
        (1, "1066-10-14", "1950"), (1, "2400-01-01", "would outlive the authority"),
        (None, "2400-01-01", "would outlive the authority"),
    ],
)  # fmt: skip
def test_a_life_that_cannot_be_is_refused(
    authority: Authority, key: rsa.RSAPrivateKey, days: float | None, not_before: str, words: str
) -> None:
    with pytest.raises(AuthorityError, match=re.escape(words)):
        authority.sign(request(key), ALICE, "user", days, not_before)


def test_by_default_none_outlives_the_authority(tmp_path: Path, key: rsa.RSAPrivateKey) -> None:
    short = Authority(tmp_path / "short")
    assert short.create(CA_DN, days=3)
    certificate = x509.load_pem_x509_certificate(short.sign(request(key), ALICE, "user"))
    ends = x509.load_pem_x509_certificate(short.pem()).not_valid_after_utc
    assert certificate.not_valid_after_utc == ends


def run(directory: Path, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command over an authority in ``directory``."""
    program = "import sys, pathlib; from pilotbed.ca import cli; cli.STORE = pathlib.Path(sys.argv.pop(1)); "
    program += "cli.PUBLISHED = cli.STORE; sys.exit(cli.ca())"
    return subprocess.run(
        [sys.executable, "-c", program, directory, *arguments], input=stdin, capture_output=True, check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip


def test_the_command_issues_for_a_human(authority: Authority, key: rsa.RSAPrivateKey, tmp_path: Path) -> None:
    done = run(authority.directory, "issue", "user", "/DC=test/CN=Robot/Alice", "--days", "1", "--not-before=-2d",
               stdin=request(key))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "certificate has expired" in verify(authority, done.stdout, tmp_path)
    revoked = run(authority.directory, "revoke", "/DC=test/CN=Robot/Alice", "--days", "1")
    assert revoked.stdout.decode() == "revoked 1 certificates of /DC=test/CN=Robot\\/Alice\n"


def test_the_command_signs_for_the_deployment(authority: Authority, key: rsa.RSAPrivateKey, tmp_path: Path) -> None:
    asked = {"a": {"csr": request(key).decode(), "dn": ALICE, "kind": "user", "days": 1, "not_before": "-2d"},
             "b": {"csr": request(key).decode(), "dn": HOST, "kind": "host"}}  # fmt: skip
    done = run(authority.directory, "sign", stdin=json.dumps(asked).encode())
    signed = json.loads(done.stdout)
    assert "certificate has expired" in verify(authority, signed["a"].encode(), tmp_path)
    assert verify(authority, signed["b"].encode(), tmp_path) == "OK"
    shown = json.loads(run(authority.directory, "show").stdout)
    hashed = openssl("x509", "-noout", "-subject_hash", "-in", authority.certificate_path).stdout.strip()
    assert shown == {"certificate": authority.certificate_path.read_text(), "hash": hashed}


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (("issue", "user", "/CN=" + "x" * 65), b"", "CN has 65 characters"),
        (("issue", "user", "/CN=x"), b"\xff", "cannot be read"),
        (("issue", "robot", "/CN=x"), b"", "invalid choice: 'robot'"),
        (("issue", "user", "/CN=x", "--days", "soon"), b"", "invalid float value: 'soon'"),
        (("sign",), b"nonsense", "in JSON"),
        (("sign",), b"\xff", "in JSON"),
        (("sign",), b"[]", "in JSON"),
        (("sign",), b'{"a": {}}', 'a: not {"csr", "dn", "kind"}'),
        (("sign",), b'{"a": {"csr": 1, "dn": 2, "kind": 3}}', "in JSON"),
        (("sign",), b'{"a": {"csr": "", "dn": 2, "kind": "user"}}', "in JSON"),
        (("sign",), b'{"a": {"csr": "", "dn": "/CN=a", "kind": "user", "days": "x"}}', "in JSON"),
        (("create", "/CN=Other"), b"", "keep the name, or move it away"),
        (("revoke", "/CN=nobody", "--days", "1"), b"", "no certificate was issued to"),
        (("publish", "--days", "-1"), b"", "-1.0 days is no life"),
    ],
)
def test_the_command_refuses_without_a_traceback(
    authority: Authority, arguments: tuple[str, ...], stdin: bytes, words: str
) -> None:
    done = run(authority.directory, *arguments, stdin=stdin)
    assert done.returncode in {1, 2}
    assert words in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("arguments", [("show",), ("issue", "user", "/CN=x"), ("revoke", "/CN=x", "--days", "1")])
def test_without_an_authority_the_command_says_how_to_make_one(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 1
    assert "pilotbed-ca create" in done.stderr.decode() or "cannot be read" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("dn", ["", "CN=Alice", "/", "/CN", "/CN=", "/CN=Alice/X=1", "/DC=test//CN=Alice"])
def test_what_is_no_dn_is_refused(dn: str) -> None:
    with pytest.raises(AuthorityError):
        parse_dn(dn)
