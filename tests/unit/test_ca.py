"""The grid's authority, judged by the openssl command, which is what the middleware's libraries do."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from pilotbed.ca.authority import Authority, AuthorityError, parse_dn

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


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "ca")
    assert made.create(CA_DN)
    return made


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


@pytest.mark.parametrize("dn", ["", "CN=Alice", "/", "/CN", "/CN=", "/CN=Alice/X=1", "/DC=test//CN=Alice"])
def test_what_is_no_dn_is_refused(dn: str) -> None:
    with pytest.raises(AuthorityError):
        parse_dn(dn)
