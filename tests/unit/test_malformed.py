"""Malformed certificates, proxies, attribute certificates, CAs and revocation lists: an error of ours with a reason.

Every octet of real ones is changed, and they are cut at every place. What the libraries below raise for that depends on
the place and on their version, so nothing is said here of which error it would be.
"""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path

import pki
import pytest
from asn1crypto import core
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.proxy import Proxy, ProxyError
from pilotbed.x509 import CertificateError, Chain, Credential, TrustStore, VomsStore, load_pem

pytestmark = [
    pytest.mark.filterwarnings("ignore:Attribute's length"),
    pytest.mark.filterwarnings("ignore:.*:cryptography.utils.CryptographyDeprecationWarning"),
]

PEOPLE = "/DC=test/DC=grid/O=Gridlab/OU=People/CN="


class Grid:
    """A CA with a revoked certificate, and alice's proxy with attributes; keys are made once, as they take long."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = pki.Authority(directory / "certificates")
        self.ca.revoke(self.ca.issue(f"{PEOPLE}Mallory"))
        self.server = pki.VomsServer(directory / "vomsdir", self.ca.issue("/O=Gridlab/CN=voms", host="voms.grid.test"))
        self.server.publish()
        self.alice = self.ca.issue(f"{PEOPLE}Alice")
        attributes = self.server.attribute_certificate(self.alice, "/gridlab/Role=NULL/Capability=NULL")
        self.proxy = pki.with_attributes(self.alice, attributes)
        self.ders = [der(certificate) for certificate in (*self.proxy.chain.certificates, self.ca.certificate)]
        self.key = self.proxy.pem().split(b"-----END CERTIFICATE-----\n", 1)[1].split(b"-----BEGIN CERTIFICATE", 1)[0]

    def file(self, *ders: bytes) -> bytes:
        """Return a proxy file of these certificates."""
        leaf, *rest = (armoured("CERTIFICATE", each) for each in ders)
        return leaf + self.key + b"".join(rest)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(tmp_path_factory.mktemp("grid"))


def der(certificate: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def armoured(label: str, content: bytes) -> bytes:
    return f"-----BEGIN {label}-----\n{base64.encodebytes(content).decode()}-----END {label}-----\n".encode()


def changed(good: bytes, step: int = 1) -> Iterator[bytes]:
    """Each octet as another tag, length or letter, in turns; and what is left when the rest is missing."""
    others = (0x01, 0x20, 0xFF, 0x80, 0x1D, 0x0F)  # an exclusive or: a bit, a kind of tag, all, a long length, types
    for at in range(0, len(good), step):
        yield good[:at] + bytes([good[at] ^ others[at // step % len(others)]]) + good[at + 1 :]
    for at in range(0, len(good), 7 * step):
        yield good[:at]


def refused_with_a_reason(call: Callable[[], object], kind: type[Exception]) -> bool:
    try:
        call()
    except kind as error:
        said = str(error)
        assert len(said) > 20
        assert not said.endswith((":", ": "))
        assert "\n" not in said
        return True
    return False


@pytest.mark.parametrize("which", [0, 1, 2], ids=["proxy", "end entity", "CA"])
def test_a_proxy_file_with_any_octet_changed(grid: Grid, which: int) -> None:
    Proxy.read(grid.file(*grid.ders).decode())
    refused = 0
    for bad in changed(grid.ders[which]):
        pem = grid.file(*grid.ders[:which], bad, *grid.ders[which + 1 :]).decode()
        refused += refused_with_a_reason(lambda pem=pem: Proxy.read(pem), ProxyError)
    assert refused > 300


@pytest.mark.parametrize("which", [0, 1, 2], ids=["proxy", "end entity", "CA"])
def test_a_presented_chain_with_any_octet_changed_is_never_taken(grid: Grid, which: int) -> None:
    trust = TrustStore(grid.ca.directory)
    voms = VomsStore(grid.server.directory, trust)

    def judged(presented: list[bytes]) -> None:
        chain = Chain.from_der(presented)
        voms.attributes(chain)
        trust.verify(chain)

    judged(grid.ders)
    for bad in changed(grid.ders[which], step=5):
        presented = [*grid.ders[:which], bad, *grid.ders[which + 1 :]]
        refused = refused_with_a_reason(lambda presented=presented: judged(presented), CertificateError)
        assert refused or which == 2, "signatures cover every octet but a presented CA's, which is not looked at"


@pytest.mark.parametrize(("suffix", "label", "load"), [
    ("0", "CERTIFICATE", x509.load_pem_x509_certificate),
    ("r0", "X509 CRL", x509.load_pem_x509_crl),
], ids=["CA", "revocation list"])  # fmt: skip
def test_trust_material_with_any_octet_changed(grid: Grid, suffix: str, label: str, load: Callable) -> None:  # type: ignore[type-arg]
    path = grid.ca.path(suffix)
    good = path.read_bytes()
    refused = 0
    try:
        for bad in changed(der(load(good)), step=2):
            path.write_bytes(armoured(label, bad))
            trust = TrustStore(grid.ca.directory)
            refused += refused_with_a_reason(lambda trust=trust: trust.verify(grid.alice.chain), CertificateError)
    finally:
        path.write_bytes(good)
    TrustStore(grid.ca.directory).verify(grid.alice.chain)
    assert refused > 200


def test_a_credential_with_a_malformed_key_or_certificate(tmp_path: Path) -> None:
    """`load_pem` compares the key with the certificate's; an elliptic one, as it takes OpenSSL long to check others."""
    key, name = ec.generate_private_key(ec.SECP256R1()), pki.name("/CN=alice")
    certificate, secret = der(pki.sign(name, name, key, key)), key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    path = tmp_path / "credential"
    path.touch(mode=0o600)

    def load(certificate: bytes, key: bytes) -> Credential:
        path.write_bytes(armoured("CERTIFICATE", certificate) + armoured("EC PRIVATE KEY", key))
        return load_pem(path)

    load(certificate, secret)
    for bad in changed(certificate):
        refused_with_a_reason(lambda bad=bad: load(bad, secret), CertificateError)
    for bad in changed(secret):
        refused_with_a_reason(lambda bad=bad: load(certificate, bad), CertificateError)


@given(st.binary(max_size=60), st.integers(0, 4000), st.integers(0, 60))
def test_a_proxy_file_with_anything_in_it(grid: Grid, content: bytes, at: int, gone: int) -> None:
    good = grid.file(*grid.ders)
    bad = good[:at] + content + good[at + gone :]
    for pem in (bad.decode(errors="replace"), bad.decode(errors="surrogateescape"), content.decode("latin-1")):
        refused_with_a_reason(lambda pem=pem: Proxy.read(pem), ProxyError)


@pytest.mark.parametrize("content", [
    b"", b"\x30\x80", b"\x30\x84\xff\xff\xff\xff", b"\x30\x00", b"\x30\x03\x30\x01\x00", core.Null().dump(),
    pki.sequence(pki.sequence(b"\x30\x00")), b"\x30\x80" * 5000, pki.sequence(core.Integer(7).dump()),
])  # fmt: skip
def test_attributes_that_are_none(grid: Grid, content: bytes) -> None:
    proxy = pki.carrying(grid.alice, content, key=grid.proxy.key)
    assert refused_with_a_reason(lambda: Proxy.read(proxy.pem().decode()), ProxyError)


@pytest.mark.parametrize("when", [b"00000101000000Z", b"20260101000000", b"20261301000000Z", b"2026", b"", b"\xff"])
def test_attributes_that_end_at_no_time(grid: Grid, when: bytes) -> None:
    def edit(info: object) -> None:
        validity = info["att_cert_validity_period"]  # type: ignore[index]
        validity["not_after_time"] = core.GeneralizedTime.load(b"\x18" + bytes([len(when)]) + when)

    attributes = grid.server.attribute_certificate(grid.alice, "/gridlab", edit=edit)
    proxy = pki.with_attributes(grid.alice, attributes, key=grid.proxy.key)
    assert refused_with_a_reason(lambda: Proxy.read(proxy.pem().decode()), ProxyError)


def test_a_proxy_ends_with_the_first_of_chain_and_attributes(grid: Grid) -> None:
    attributes = grid.server.attribute_certificate(grid.alice, "/gridlab", hours=(0, 1))
    proxy = pki.with_attributes(grid.alice, attributes, key=grid.proxy.key)
    ends = dt.datetime.fromtimestamp(Proxy.read(proxy.pem().decode()).ends, dt.UTC)
    assert abs(ends - pki.now() - pki.DAY / 24) < dt.timedelta(minutes=1)
