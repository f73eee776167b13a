"""Chains, proxies and their verification; OpenSSL is asked for a second opinion where it has one."""

import copy
import datetime as dt
import shutil
import subprocess

import pki
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pilotbed.x509 import (
    CertificateError,
    Chain,
    Credential,
    TrustError,
    TrustStore,
    load_pem,
    make_proxy,
    name_hash,
    slash,
)
from pilotbed.x509 import chain as chains

ALICE = "/DC=test/DC=grid/O=Gridlab/OU=People/CN=Alice Adams"
HOUR = dt.timedelta(hours=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An authority and alice: their keys take longer than most tests."""
    ca = pki.Authority(tmp_path_factory.mktemp("made") / "certificates")
    return ca, ca.issue(ALICE)


@pytest.fixture
def ca(made, tmp_path):
    """Each test's own directory of it."""
    own = copy.copy(made[0])
    own.directory, own.revoked = tmp_path / "certificates", []
    shutil.copytree(made[0].directory, own.directory)
    return own


@pytest.fixture
def alice(made):
    return made[1]


@pytest.fixture
def store(ca):
    return TrustStore(ca.directory)


def openssl_accepts(ca, credential, tmp_path, *options):
    leaf, rest = tmp_path / "leaf.pem", tmp_path / "rest.pem"
    leaf.write_bytes(credential.chain.leaf.public_bytes(serialization.Encoding.PEM))
    rest.write_bytes(credential.chain.pem())
    command = ["openssl", "verify", "-allow_proxy_certs", "-purpose", "sslclient", "-CApath", ca.directory,
               "-untrusted", rest, *options, leaf]  # fmt: skip
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# -- names

@pytest.mark.parametrize("dn", [ALICE, "/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=relay.grid.test",
                                "/O=Zürich  Grid /CN=a=b\\c",
                                "/O=" + "x" * 60 + "/OU=" + "Y" * 64 + "/CN=z"])  # fmt: skip
def test_slash_form_and_hash_are_openssls(ca, tmp_path, dn):
    file = tmp_path / "cert.pem"
    file.write_bytes(ca.issue(dn).chain.pem())
    command = ["openssl", "x509", "-noout", "-subject", "-nameopt", "compat", "-subject_hash", "-in", file]
    subject, hashed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    parsed = load_chain(file).leaf.subject
    assert subject.removeprefix("subject=").removeprefix(" ") == slash(parsed)
    assert hashed == name_hash(parsed)


def load_chain(path):
    return Chain.from_pem(path.read_bytes())


# -- making and reading

def test_proxy_file_round_trip(alice, tmp_path):
    proxy = make_proxy(alice, 12 * HOUR)
    proxy.save(tmp_path / "proxy")
    assert (tmp_path / "proxy").stat().st_mode & 0o777 == 0o600
    read = load_pem(tmp_path / "proxy")
    assert read.chain == proxy.chain
    assert read.chain.dn == ALICE
    assert len(read.chain.proxies) == 1
    assert not read.chain.limited
    assert 11 * 3600 < read.chain.seconds_left() <= 12 * 3600
    assert [line for line in (tmp_path / "proxy").read_text().splitlines() if "BEGIN" in line] == [
        "-----BEGIN CERTIFICATE-----", "-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN CERTIFICATE-----"]  # fmt: skip


def test_lifetime_ends_with_the_issuer(alice):
    short = make_proxy(alice, HOUR)
    assert make_proxy(short, 5 * HOUR).chain.not_after == short.chain.not_after
    assert make_proxy(alice, 365 * pki.DAY).chain.not_after == alice.chain.not_after


def test_below_a_limited_proxy_all_are_limited(alice):
    limited = make_proxy(alice, HOUR, "limited")
    assert limited.chain.limited
    assert chains.proxy_info(make_proxy(limited, HOUR).chain.leaf).limited


def test_expired_issuer_makes_no_proxy(ca):
    with pytest.raises(CertificateError, match="expired"):
        make_proxy(ca.issue(ALICE, days=(-2, -1)), HOUR)


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda path, _: path.chmod(0o604), "mode 0604"),
    (lambda path, alice: path.write_bytes(alice.chain.pem()), "no unencrypted private key"),
    (lambda path, _: path.write_bytes(b"nothing"), "no readable certificate"),
    (lambda path, alice: path.write_bytes(Credential(alice.chain, pki.rsa_key()).pem()), "does not belong"),
])  # fmt: skip
def test_unusable_credential_files(alice, tmp_path, spoil, reason):
    path = tmp_path / "cred"
    alice.save(path)
    load_pem(path)
    spoil(path, alice)
    with pytest.raises(CertificateError, match=reason):
        load_pem(path)


def test_chain_without_its_end_entity(alice):
    with pytest.raises(CertificateError, match="ends before"):
        Chain(make_proxy(alice, HOUR).chain.certificates[:1])


# -- what is accepted

@pytest.mark.parametrize("kinds", [(), ("full",), ("limited",), ("full", "full", "limited")])
def test_genuine_chains_verify_as_openssl_has_it(ca, alice, store, tmp_path, kinds):
    credential = alice
    for kind in kinds:
        credential = make_proxy(credential, HOUR, kind)
    verified = store.verify(credential.chain)
    assert (verified.dn, verified.limited) == (ALICE, "limited" in kinds)
    assert openssl_accepts(ca, credential, tmp_path)


def test_presented_cas_are_dropped(ca, alice, store):
    proxy = make_proxy(alice, HOUR)
    assert store.verify(Chain((*proxy.chain.certificates, ca.certificate))) == proxy.chain


def test_path_length_that_suffices(alice, store):
    store.verify(make_proxy(make_proxy(alice, HOUR, path_length=1), HOUR).chain)


def test_intermediate_ca_of_the_directory(ca, store):
    below = pki.Authority(ca.directory, "/DC=test/DC=grid/O=Gridlab/CN=Issuing CA", issuer=ca)
    bob = below.issue("/DC=test/CN=Bob")
    assert store.verify(make_proxy(bob, HOUR).chain).dn == "/DC=test/CN=Bob"
    ca.revoked.append(below.certificate.serial_number)
    ca.publish()
    with pytest.raises(CertificateError, match="certificate revoked: /DC=test/DC=grid/O=Gridlab/CN=Issuing CA"):
        store.verify(bob.chain)


# -- what is refused

def test_expired_and_not_yet_valid(ca, alice, store):
    with pytest.raises(CertificateError, match=r"^certificate expired"):
        store.verify(ca.issue(ALICE, days=(-2, -1)).chain)
    with pytest.raises(CertificateError, match=r"^certificate not valid before"):
        store.verify(ca.issue(ALICE, days=(1, 2)).chain)
    with pytest.raises(CertificateError, match=r"^proxy expired"):
        store.verify(make_proxy(alice, HOUR).chain, now=pki.now() + 2 * HOUR)


def test_revoked_is_noticed_without_a_restart(ca, alice, store):
    proxy = make_proxy(alice, HOUR)
    store.verify(proxy.chain)
    ca.revoke(alice)
    with pytest.raises(CertificateError, match=r"^certificate revoked: .*Alice"):
        store.verify(proxy.chain)


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda ca: ca.path("r0").unlink(), "no valid revocation list"),
    (lambda ca: ca.publish(days=(-2, -1)), "expired"),
    (lambda ca: ca.publish(days=(1, 2)), "of the future"),
    (lambda ca: ca.publish(signer=pki.rsa_key()), "no valid revocation list"),
    (lambda ca: ca.path("r0").write_text("garbage"), "r0"),
])  # fmt: skip
def test_bad_revocation_list_refuses(ca, alice, store, spoil, reason):
    store.verify(alice.chain)
    spoil(ca)
    with pytest.raises(TrustError, match=reason):
        store.verify(alice.chain)


def test_a_chain_of_another_ca_is_refused(ca, store, tmp_path):
    stranger = pki.Authority(tmp_path / "other", "/O=Other/CN=CA").issue(ALICE)
    with pytest.raises(CertificateError, match="unknown CA /O=Other/CN=CA"):
        store.verify(stranger.chain)


def test_wrong_ca_of_the_same_name(store, tmp_path):
    impostor = pki.Authority(tmp_path / "other").issue(ALICE)
    with pytest.raises(CertificateError, match=r"^bad signature"):
        store.verify(impostor.chain)


def test_end_entity_is_no_ca(alice, store):
    key = pki.rsa_key()
    mallory = pki.sign(pki.name("/CN=Mallory"), alice.chain.leaf.subject, key, alice.key)
    with pytest.raises(CertificateError, match="unknown CA"):
        store.verify(Chain((mallory, alice.chain.leaf)))


def test_end_entity_in_the_directory_is_no_ca(ca, alice, store):
    """Even when somebody puts an end-entity certificate where CAs are."""
    (ca.directory / f"{name_hash(alice.chain.leaf.subject)}.0").write_bytes(alice.chain.pem())
    mallory = pki.sign(pki.name("/CN=Mallory"), alice.chain.leaf.subject, pki.rsa_key(), alice.key)
    with pytest.raises(CertificateError, match="issuer is not a CA"):
        store.verify(Chain((mallory,)))


def test_ca_is_no_end_entity(ca, store):
    with pytest.raises(CertificateError, match="no end entity"):
        store.verify(make_proxy(Credential(Chain((ca.certificate,)), ca.key), HOUR).chain)


def test_path_length_exceeded(ca, alice, store, tmp_path):
    proxy = make_proxy(make_proxy(alice, HOUR, path_length=0), HOUR)
    assert not openssl_accepts(ca, proxy, tmp_path)
    with pytest.raises(CertificateError, match="path length 0 exceeded"):
        store.verify(proxy.chain)


def test_ca_path_length_exceeded(tmp_path):
    root = pki.Authority(tmp_path / "c", "/CN=Root", path_length=0)
    issuing = pki.Authority(tmp_path / "c", "/CN=Issuing", issuer=pki.Authority(tmp_path / "c", "/CN=Mid", issuer=root))
    with pytest.raises(CertificateError, match="CA path length 0 exceeded: /CN=Root"):
        TrustStore(tmp_path / "c").verify(issuing.issue("/CN=x").chain)


def test_a_forged_subject_is_refused(alice, store):
    bob = pki.name("/DC=test/DC=grid/O=Gridlab/OU=People/CN=Bob Brown/CN=1")
    with pytest.raises(CertificateError, match=r"^forged proxy subject"):
        store.verify(pki.proxy(alice, subject=bob).chain)
    two = x509.Name([*alice.chain.leaf.subject, *pki.name("/CN=1/CN=2")])
    with pytest.raises(CertificateError, match=r"^forged proxy subject"):
        store.verify(pki.proxy(alice, subject=two).chain)
    organisation = x509.Name([*alice.chain.leaf.subject, *pki.name("/O=1")])
    with pytest.raises(CertificateError, match=r"^forged proxy subject"):
        store.verify(pki.proxy(alice, subject=organisation).chain)


def test_proxy_signed_by_somebody_else(ca, alice, store, tmp_path):
    forged = pki.proxy(alice, signer=pki.rsa_key())
    assert not openssl_accepts(ca, forged, tmp_path)
    with pytest.raises(CertificateError, match=r"^bad signature on proxy"):
        store.verify(forged.chain)


def test_proxy_beside_a_foreign_end_entity(ca, alice, store):
    bob = ca.issue("/DC=test/CN=Bob")
    with pytest.raises(CertificateError, match=r"^broken chain"):
        store.verify(Chain((make_proxy(bob, HOUR).chain.leaf, alice.chain.leaf)))


LANGUAGE = {"independent": "1.3.6.1.5.5.7.21.2", "any": "1.3.6.1.5.5.7.21.0", "own": "1.2.3.4"}


@pytest.mark.parametrize("language", LANGUAGE.values(), ids=LANGUAGE)
def test_policies_that_pass_on_no_rights(alice, store, language):
    info = chains._ProxyCertInfo({"policy": {"language": language}}).dump()
    with pytest.raises(CertificateError, match="does not pass on"):
        store.verify(pki.proxy(alice, info=info).chain)


def test_more_forged_proxies(alice, store):
    store.verify(pki.proxy(alice).chain)  # the forger itself makes good ones
    with pytest.raises(CertificateError, match="not critical"):
        store.verify(pki.proxy(alice, critical=False).chain)
    with pytest.raises(CertificateError, match="malformed proxyCertInfo"):
        pki.proxy(alice, info=b"\x30\x03\x02\x01").chain.proxies  # noqa: B018
    with pytest.raises(CertificateError, match="cannot be a CA"):
        authority = (x509.BasicConstraints(ca=True, path_length=None), True)
        store.verify(pki.proxy(alice, extensions=[authority]).chain)
    with pytest.raises(CertificateError, match="cannot sign as a CA"):
        store.verify(pki.proxy(alice, extensions=[(pki.usage(key_cert_sign=True), True)]).chain)
    with pytest.raises(CertificateError, match="no alternative names"):
        other = x509.SubjectAlternativeName([x509.DNSName("central.grid.test")])
        store.verify(pki.proxy(alice, extensions=[(other, False)]).chain)
    with pytest.raises(CertificateError, match=r"critical extension 1\.2\.3 not understood"):
        odd = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\x05\x00")
        store.verify(pki.proxy(alice, extensions=[(odd, True)]).chain)


def test_key_usage_of_the_issuer(ca, store):
    encipher = [(pki.usage(key_encipherment=True), True)]
    with pytest.raises(CertificateError, match="does not allow to sign a proxy"):
        store.verify(make_proxy(ca.issue(ALICE, extensions=encipher), HOUR).chain)


def test_extended_key_usage(ca, store):
    server = [(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)]
    credential = ca.issue("/CN=web.grid.test", extensions=server)
    with pytest.raises(CertificateError, match="extended key usage"):
        store.verify(credential.chain)
    store.verify(credential.chain, purpose=ExtendedKeyUsageOID.SERVER_AUTH)


def test_a_weak_signature_is_refused(ca, store, tmp_path):
    (tmp_path / "ca").write_bytes(Credential(Chain((ca.certificate,)), ca.key).pem())
    for command in (
        ["req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-subj", "/CN=weak", "-out", "request"],
        ["x509", "-req", "-in", "request", "-CA", "ca", "-CAkey", "ca", "-sha1", "-set_serial", "9", "-out", "weak"],
    ):
        subprocess.run(["openssl", *command], cwd=tmp_path, check=True, capture_output=True)
    with pytest.raises(CertificateError, match="weak signature algorithm sha1"):
        store.verify(load_chain(tmp_path / "weak"))


# -- bytes

@pytest.fixture(scope="module")
def presented(tmp_path_factory):
    """A good chain as it comes over the wire, and the identity that is verified in a chain; None: refused."""
    ca = pki.Authority(tmp_path_factory.mktemp("ca"))
    store = TrustStore(ca.directory)
    chain = make_proxy(ca.issue(ALICE), HOUR).chain

    def verdict(ders):
        try:
            return store.verify(Chain.from_der(ders)).dn
        except CertificateError:
            return None

    ders = [certificate.public_bytes(serialization.Encoding.DER) for certificate in chain.certificates]
    assert verdict(ders) == ALICE
    return ders, verdict


@pytest.mark.filterwarnings("ignore")  # cryptography warns of what it reads: negative serial number, long country
@settings(max_examples=500)
@given(which=st.integers(0, 1), place=st.integers(0, 10**6), flip=st.integers(1, 255))
@example(which=1, place=12, flip=1)  # the version: another exception of cryptography's
def test_any_byte_changed(presented, which, place, flip):
    ders, verdict = presented
    changed = bytearray(ders[which])
    changed[place % len(changed)] ^= flip
    assert verdict([*ders[:which], bytes(changed), *ders[which + 1 :]]) in (None, ALICE)
