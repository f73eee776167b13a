"""VOMS attributes: what is good, and each single thing that makes it not so. Every refusal has the good AC as control.

tests/grid/test_attributes.py asks VOMS's own tools and LCMAPS for a second opinion.
"""

import datetime as dt
from types import SimpleNamespace

import pki
import pytest
from asn1crypto import cms, core
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID as Eku
from hypothesis import given, settings
from hypothesis import strategies as st
from pilotbed.x509 import (
    CertificateError,
    Chain,
    Credential,
    TrustError,
    TrustStore,
    VomsStore,
    has_attributes,
    make_proxy,
    voms,
)

PEOPLE = "/DC=test/DC=grid/O=Gridlab/OU=People/CN="
SERVER = "/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=voms.grid.test"
HOUR = dt.timedelta(hours=1)
WRITTEN = ("/gridlab/Role=pilot/Capability=NULL", "/gridlab/analysis/Role=NULL/Capability=NULL", "/gridlab")
FQANS = ("/gridlab/Role=pilot", "/gridlab/analysis", "/gridlab")
OTHER = "1.3.6.1.4.1.99999.1"


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Keys take time to make: these are for all tests, none of which changes them."""
    ca = pki.Authority(tmp_path_factory.mktemp("ca") / "certificates")
    return SimpleNamespace(ca=ca, alice=ca.issue(PEOPLE + "Alice Adams"), bob=ca.issue(PEOPLE + "Bob Brown"),
                           host=ca.issue(SERVER, host="voms.grid.test"), key=pki.rsa_key())  # fmt: skip


@pytest.fixture
def server(people, tmp_path):
    made = pki.VomsServer(tmp_path / "vomsdir", people.host)
    made.publish()
    return made


@pytest.fixture
def fqans(people, server):
    """The verdict on ACs (DER) in a proxy of alice's, or of who is given."""
    trust = TrustStore(people.ca.directory)
    store = VomsStore(server.directory, trust)

    def verdict(*acs, proxy=None, now=None):
        proxy = proxy or pki.with_attributes(people.alice, *acs, key=people.key)
        return store.fqans(trust.verify(proxy.chain), now)

    return verdict


@pytest.fixture
def good(people, server, fqans):
    """An AC that is accepted: the control of whatever is refused afterwards."""
    made = server.attribute_certificate(people.alice, *WRITTEN)
    assert fqans(made) == FQANS
    return made


# -- accepted

def test_a_proxy_tells_whether_it_has_attributes(people, good):
    assert has_attributes(pki.with_attributes(people.alice, good).chain.leaf)
    assert not has_attributes(make_proxy(people.alice, HOUR).chain.leaf)


def test_none_at_all(people, fqans):
    assert fqans(proxy=make_proxy(people.alice, HOUR)) == ()


@pytest.mark.parametrize(("written", "normalised"), [
    ("/gridlab", "/gridlab"),
    ("/gridlab/Role=NULL", "/gridlab"),
    ("/gridlab/Capability=NULL", "/gridlab"),
    ("/gridlab/a/b-c_d.e/Role=x-1/Capability=NULL", "/gridlab/a/b-c_d.e/Role=x-1"),
    ("/gridlab/Role=x/Capability=y", "/gridlab/Role=x/Capability=y"),
])  # fmt: skip
def test_fqans_are_normalised(people, server, fqans, written, normalised):
    assert fqans(server.attribute_certificate(people.alice, written)) == (normalised,)


def test_older_proxys_attributes_hold_below_it(people, good, fqans):
    below = make_proxy(make_proxy(pki.with_attributes(people.alice, good), HOUR), HOUR)
    assert fqans(proxy=below) == FQANS


def test_newest_attributes_count(people, server, good, fqans):
    newer = server.attribute_certificate(people.alice, "/gridlab/analysis")
    assert fqans(proxy=pki.with_attributes(pki.with_attributes(people.alice, good), newer)) == ("/gridlab/analysis",)
    expired = server.attribute_certificate(people.alice, "/gridlab/analysis", hours=(-2, -1))
    with pytest.raises(CertificateError, match="expired"):  # nor is the older one a way out
        fqans(proxy=pki.with_attributes(pki.with_attributes(people.alice, good), expired))


def test_several_attribute_certificates(people, server, good, fqans):
    second = server.attribute_certificate(people.alice, "/gridlab/analysis", "/gridlab/late")
    assert fqans(good, second) == (*FQANS, "/gridlab/late")
    with pytest.raises(CertificateError, match="somebody else"):
        fqans(good, server.attribute_certificate(people.bob, "/gridlab/late"))


def holder(base=None, **fields):
    """Edits the holder: fields of its base certificate ID, and of itself; None leaves one out."""
    def edit(info):
        known = info["holder"]["base_certificate_id"]
        named = {"issuer": known["issuer"], "serial": known["serial"], **(base or {})}
        given = {"base_certificate_id": named, **fields}
        info["holder"] = cms.Holder({name: value for name, value in given.items() if value is not None})
    return edit


def names(dn):
    return [pki.directory_name(pki.name(dn))]


@pytest.mark.parametrize("edit", [
    holder({"issuer": names(PEOPLE + "Alice Adams")}),  # as vomsd without --newformat
    holder(entity_name=names(PEOPLE + "Alice Adams")),
    lambda info: info.__setitem__("serial_number", 2**150),
])  # fmt: skip
def test_other_good_forms(people, server, good, fqans, edit):
    assert fqans(server.attribute_certificate(people.alice, *WRITTEN, edit=edit)) == FQANS


def test_elliptic_curves_and_longer_hashes(people, server, good, fqans):
    assert fqans(server.attribute_certificate(people.alice, *WRITTEN, algorithm="sha512_rsa")) == FQANS
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = pki.sign(pki.name(SERVER), people.ca.name, key, people.ca.key)
    other = pki.VomsServer(server.directory, Credential(Chain((certificate,)), key))
    assert fqans(other.attribute_certificate(people.alice, *WRITTEN, algorithm="sha384_ecdsa")) == FQANS
    with pytest.raises(CertificateError, match="does not fit the key"):
        fqans(other.attribute_certificate(people.alice, *WRITTEN, algorithm="sha256_rsa"))


# -- refused: what the AC says

def attributes(*given):
    return lambda info: info.__setitem__("attributes", [{"type": oid, "values": list(values)} for oid, values in given])


def syntax(values=("octets", b"/gridlab"), authority="gridlab://voms.grid.test:15000"):
    kind, value = values
    policy = [] if authority is None else [pki.uri(authority)]
    return cms.IetfAttrSyntax({"policy_authority": policy, "values": [cms.IetfAttrValue({kind: value})]})


DIGEST = {"digested_object_type": "public_key", "digest_algorithm": {"algorithm": "sha256"},
          "object_digest": core.OctetBitString(bytes(32))}  # fmt: skip
FORM = {"issuer_name": names(SERVER)}


@pytest.mark.parametrize(("edit", "reason"), [
    (lambda info: info.__setitem__("version", "v1"), "version of the attribute certificate is v1"),
    (holder({"serial": 4711}), "somebody else"),
    (holder({"issuer": names("/O=Other/CN=CA")}), "somebody else"),
    (holder({"issuer": names(PEOPLE + "Alice Adams") * 2}), "somebody else"),
    (holder({"issuer": [asn1.GeneralName({"dns_name": "alice.grid.test"})]}), "somebody else"),
    (holder(entity_name=names(PEOPLE + "Bob Brown")), "somebody else"),
    (holder(object_digest_info=DIGEST), "holder given by a digest"),
    (holder(base_certificate_id=None, entity_name=names(PEOPLE + "Alice Adams")), "holder not given by issuer"),
    (lambda info: info.__setitem__("holder", cms.Holder.load(b"\x30\0")), "holder not given by issuer"),
    (lambda info: info.__setitem__("issuer", {"v2_form": {"issuer_name": names("/CN=else")}}), "issuer of the attrib"),
    (lambda info: info.__setitem__("issuer", {"v2_form": FORM | {"object_digest_info": DIGEST}}), "issuer of the attr"),
    (lambda info: info.__setitem__("issuer", cms.AttCertIssuer("v1_form", names(SERVER))), "issuer of the attribute"),
    (attributes(), "malformed"),
    (attributes((OTHER, [syntax()])), "malformed"),
    (attributes((voms.FQANS, [syntax()]), (voms.FQANS, [syntax()])), "malformed"),
    (attributes((voms.FQANS, [syntax(), syntax(("octets", b"/gridlab/x"))])), "malformed"),
    (attributes((voms.FQANS, [syntax(("string", "/gridlab"))])), "an FQAN is string, not octets"),
    (attributes((voms.FQANS, [syntax(("octets", b"/gridlab/\xff"))])), "malformed"),
    (attributes((voms.FQANS, [syntax(authority=None)])), "malformed"),
])  # fmt: skip
def test_what_it_says(people, server, good, fqans, edit, reason):
    with pytest.raises(CertificateError, match=reason):
        fqans(server.attribute_certificate(people.alice, *WRITTEN, edit=edit))


def test_other_attributes_do_not_matter(people, server, good, fqans):
    edit = attributes((OTHER, [core.Integer(1)]), (voms.FQANS, [syntax()]))
    assert fqans(server.attribute_certificate(people.alice, edit=edit)) == ("/gridlab",)


@pytest.mark.parametrize("authority", [
    "gridlab", "gridlab://voms.grid.test", "://voms.grid.test:15000", "gridlab://:15000", "gridlab:// :15000",
    "../gridlab://voms.grid.test:15000", "gridlab/../gridlab://voms.grid.test:15000",
    "gridlab://../gridlab/voms.grid.test:15000", "gridlab://voms.grid.test\0:15000", "..://voms.grid.test:15000",
    "gridlab://voms.grid.test:15000\n",
])  # fmt: skip
def test_the_policy_authority_must_be_the_vos(people, server, good, fqans, authority):
    edit = attributes((voms.FQANS, [syntax(authority=authority)]))
    with pytest.raises(CertificateError, match=r"is not VO://host:port|malformed"):
        fqans(server.attribute_certificate(people.alice, edit=edit))


@pytest.mark.parametrize(("fqan", "reason"), [
    ("/other/Role=pilot", "not of VO gridlab"), ("/gridlabs", "not of VO gridlab"), ("/grid", "not of VO gridlab"),
    ("", "malformed FQAN"), ("gridlab", "malformed FQAN"), ("/gridlab/", "malformed FQAN"), ("/", "malformed FQAN"),
    ("/gridlab//x", "malformed FQAN"), ("/gridlab/Role=", "malformed FQAN"), ("/gridlab/Role=a/b", "malformed FQAN"),
    ("/gridlab/Role=a/Role=b", "malformed FQAN"), ("/gridlab/Capability=a/Role=b", "malformed FQAN"),
    ("/gridlab/x y", "malformed FQAN"), ("/gridlab\n", "malformed FQAN"), ("/Role=pilot", "malformed FQAN"),
    ("/gridlab/Role=pilot,/gridlab", "malformed FQAN"),
])  # fmt: skip
def test_a_malformed_fqan_or_one_of_another_vo_is_refused(people, server, good, fqans, fqan, reason):
    with pytest.raises(CertificateError, match=reason):
        fqans(server.attribute_certificate(people.alice, *WRITTEN, fqan))


def test_attributes_without_fqan_are_refused(people, server, good, fqans):
    with pytest.raises(CertificateError, match="without FQAN"):
        fqans(server.attribute_certificate(people.alice))


def test_attributes_hold_within_their_time_only(people, server, good, fqans):
    later = pki.now() + 12 * HOUR - dt.timedelta(minutes=10)
    proxy = pki.with_attributes(people.alice, good, days=(-0.1, 2))
    assert fqans(proxy=proxy, now=later) == FQANS
    with pytest.raises(CertificateError, match="attribute certificate expired at"):
        fqans(proxy=proxy, now=later + HOUR)
    assert fqans(server.attribute_certificate(people.alice, *WRITTEN, hours=(4 / 60, 1))) == FQANS
    with pytest.raises(CertificateError, match="not valid before"):
        fqans(server.attribute_certificate(people.alice, *WRITTEN, hours=(6 / 60, 1)))


# -- refused: extensions

@pytest.mark.parametrize(("changed", "reason"), [
    ({"other": (OTHER, False, b"\5\0")}, None),
    ({"other": (OTHER, True, b"\5\0")}, f"critical extension {OTHER} not understood"),
    ({"targets": (voms.TARGETS, True, b"\x30\0")}, "for certain targets only"),
    ({"targets": (voms.TARGETS, False, b"\x30\0")}, "for certain targets only"),
    ({"twice": (voms.NO_REVOCATION, False, b"\5\0")}, "malformed.*twice"),
    ({"no_revocation": None}, "without noRevAvail"),
    ({"no_revocation": (voms.NO_REVOCATION, True, b"\5\0")}, None),
    ({"no_revocation": (voms.NO_REVOCATION, False, b"\2\1\0")}, "malformed"),
    ({"authority_key": None}, "without authorityKeyIdentifier"),
    ({"authority_key": (voms.AUTHORITY_KEY, False, b"\x30\x04\x80\x02no")}, "is not the key of"),
    ({"authority_key": (voms.AUTHORITY_KEY, False, b"\x30\0\0")}, "malformed"),
    ({"signers": None}, "does not bring its server's certificate"),
    ({"signers": (voms.CERTIFICATES, False, b"\x30\x02\x30\0")}, "does not bring its server's certificate"),
    ({"signers": (voms.CERTIFICATES, False, b"\x30\0")}, "malformed"),
    ({"signers": (voms.CERTIFICATES, False, b"\x30\x04\x30\x02\x30\0")}, "malformed"),
])  # fmt: skip
def test_extensions_are_read_or_refused(people, server, good, fqans, changed, reason):
    def edit(info):
        info["extensions"] = server.extensions(**changed)

    made = server.attribute_certificate(people.alice, *WRITTEN, edit=edit)
    if reason is None:
        assert fqans(made) == FQANS
    else:
        with pytest.raises(CertificateError, match=reason):
            fqans(made)


# -- refused: the signature

def test_a_forged_signature_is_refused(good, fqans):
    with pytest.raises(CertificateError, match="bad signature"):
        fqans(good[:-1] + bytes([good[-1] ^ 1]))


def test_a_forged_role_is_refused(good, fqans):
    """The role is another one, of the same length."""
    with pytest.raises(CertificateError, match="bad signature"):
        fqans(good.replace(b"Role=pilot", b"Role=admin"))


def test_a_signature_by_another_key_is_refused(people, server, good, fqans):
    """Anybody can send the server's certificate along."""
    with pytest.raises(CertificateError, match="bad signature"):
        fqans(server.attribute_certificate(people.alice, *WRITTEN, key=people.alice.key))


@pytest.mark.parametrize(("algorithm", "outer", "reason"), [
    ("sha1_rsa", None, "weak signature algorithm sha1"),
    ("md5_rsa", None, "weak signature algorithm md5"),
    ("sha256_rsa", "sha512_rsa", "within and without the signed part differ"),
    ("sha256_rsa", "sha1_rsa", "within and without the signed part differ"),
    ("sha256_dsa", None, "does not fit the key"),
    ("sha256_ecdsa", None, "does not fit the key"),
])  # fmt: skip
def test_weak_or_unfitting_algorithms_are_refused(people, server, good, fqans, algorithm, outer, reason):
    with pytest.raises(CertificateError, match=reason):
        fqans(server.attribute_certificate(people.alice, *WRITTEN, algorithm=algorithm, outer=outer))


def test_somebody_elses_attributes_are_refused(people, server, good, fqans):
    """Alice's attributes in bob's proxy."""
    stolen = pki.with_attributes(people.bob, good)
    with pytest.raises(CertificateError, match=r"attributes of somebody else, not of .*Bob Brown"):
        fqans(proxy=stolen)
    own = server.attribute_certificate(people.bob, *WRITTEN)
    assert fqans(proxy=pki.with_attributes(people.bob, own)) == FQANS


# -- refused: the server

def issued(people, fqans, directory, dn=SERVER, **options):
    """The verdict on what a server with a certificate of its own signs; its DN is in the .lsc."""
    host = people.ca.issue(dn, **options)
    other = pki.VomsServer(directory, host)
    other.publish()
    return fqans(other.attribute_certificate(people.alice, *WRITTEN)), other


USUAL = ((x509.BasicConstraints(ca=False, path_length=None), True),)


@pytest.mark.parametrize(("options", "reason"), [
    ({"host": "voms.grid.test"}, None),
    ({"extensions": USUAL}, None),
    ({"host": "voms.grid.test", "days": (-2, -1)}, "VOMS server: certificate expired"),
    ({"extensions": [*USUAL, (pki.usage(key_encipherment=True), True)]}, "key usage does not allow to sign attributes"),
    ({"extensions": [*USUAL, (x509.ExtendedKeyUsage([Eku.CLIENT_AUTH]), False)]}, "VOMS server: extended key usage"),
    ({"extensions": [(x509.BasicConstraints(ca=True, path_length=None), True)]}, "VOMS server: a CA certificate"),
])  # fmt: skip
def test_the_servers_certificate_must_be_good(people, server, good, fqans, options, reason):
    if reason is None:
        assert issued(people, fqans, server.directory, **options)[0] == FQANS
    else:
        with pytest.raises(CertificateError, match=reason):
            issued(people, fqans, server.directory, **options)


def test_server_is_revoked_or_its_list_missing(tmp_path):
    ca = pki.Authority(tmp_path / "certificates")
    services = pki.Authority(tmp_path / "certificates", "/O=Gridlab/CN=Services CA")
    alice, trust = ca.issue(PEOPLE + "Alice Adams"), TrustStore(ca.directory)
    server = pki.VomsServer(tmp_path / "vomsdir", services.issue(SERVER, host="voms.grid.test"))
    server.publish()
    store = VomsStore(server.directory, trust)
    chain = pki.with_attributes(alice, server.attribute_certificate(alice, *WRITTEN)).chain
    assert store.fqans(trust.verify(chain)) == FQANS
    services.path("r0").unlink()
    with pytest.raises(TrustError, match="VOMS server: no valid revocation list of /O=Gridlab/CN=Services CA"):
        store.fqans(trust.verify(chain))
    services.revoke(server.credential)
    with pytest.raises(CertificateError, match="VOMS server: certificate revoked"):
        store.fqans(trust.verify(chain))


def test_server_of_a_ca_that_we_do_not_trust(people, server, good, fqans, tmp_path):
    """The same names throughout, so that the .lsc agrees."""
    impostor = pki.Authority(tmp_path / "impostor").issue(SERVER, host="voms.grid.test")
    with pytest.raises(CertificateError, match="VOMS server: bad signature"):
        fqans(pki.VomsServer(server.directory, impostor).attribute_certificate(people.alice, *WRITTEN))


def test_server_that_signs_with_a_proxy(people, server, good, fqans):
    other = pki.VomsServer(server.directory, make_proxy(people.host, HOUR))
    other.publish()
    with pytest.raises(CertificateError, match="signs with a proxy"):
        fqans(other.attribute_certificate(people.alice, *WRITTEN))


# -- the .lsc

def test_host_certificate_that_is_not_the_vos_server(people, server, good, fqans):
    """Anybody's certificate of the right CA can sign, but not speak for the VO."""
    with pytest.raises(CertificateError, match=r"Bob Brown .* is not who may speak for VO gridlab from voms.grid.test"):
        fqans(pki.VomsServer(server.directory, people.bob).attribute_certificate(people.alice, *WRITTEN))


@pytest.mark.parametrize("other", [{"vo": "other"}, {"host": "voms2.grid.test"}])
def test_unknown_vo_or_host(people, server, good, fqans, other):
    stranger = pki.VomsServer(server.directory, people.host, **other)
    with pytest.raises(CertificateError, match="unknown server"):
        fqans(stranger.attribute_certificate(people.alice, f"/{stranger.vo}"))
    stranger.publish()
    assert fqans(stranger.attribute_certificate(people.alice, f"/{stranger.vo}")) == (f"/{stranger.vo}",)


def test_lsc_is_looked_at_each_time(server, good, fqans):
    server.publish("/CN=else", "/CN=CA")
    with pytest.raises(CertificateError, match="is not who may speak"):
        fqans(good)
    server.publish("/CN=else", "/CN=CA", "------ NEXT CHAIN ------", "", *(f' "{name}" ' for name in server.names()))
    assert fqans(good) == FQANS
    server.lsc.unlink()
    with pytest.raises(CertificateError, match=r"unknown server voms.grid.test of VO gridlab: no .*voms.grid.test.lsc"):
        fqans(good)


@pytest.mark.parametrize("lines", [["nonsense"], ["/CN=one"], ["/CN=one", "CN=two"]])
def test_a_malformed_lsc_file_trusts_nobody(server, good, fqans, lines):
    server.publish(*lines)
    with pytest.raises(TrustError, match=r"voms.grid.test.lsc: not a list of DNs"):
        fqans(good)


def test_without_vomsdir_nobody_is_trusted(server, good, fqans):
    server.lsc.unlink()
    server.lsc.parent.rmdir()
    server.directory.rmdir()
    with pytest.raises(TrustError, match="no such directory"):
        fqans(good)


def test_chain_of_the_server(people, server, good, fqans):
    """The server sends its CA along: the .lsc names both; more lines than certificates do not matter."""
    ders = [c.public_bytes(serialization.Encoding.DER) for c in (server.certificate, people.ca.certificate)]

    def verdict(*sent):
        changed = {"signers": (voms.CERTIFICATES, False, pki.sequence(pki.sequence(*sent)))}
        edit = lambda info: info.__setitem__("extensions", server.extensions(**changed))  # noqa: E731
        return fqans(server.attribute_certificate(people.alice, *WRITTEN, edit=edit))

    authority = server.names()[1]
    with pytest.raises(CertificateError, match="is not who may speak"):
        verdict(*ders)
    server.publish(*server.names(), authority, authority)
    assert verdict(*ders) == FQANS
    assert fqans(good) == FQANS
    with pytest.raises(CertificateError, match="is not who may speak"):
        verdict(*reversed(ders))
    server.publish(*server.names() * 2)
    with pytest.raises(CertificateError, match="broken chain of server"):
        verdict(ders[0], ders[0])


# -- bytes

@pytest.mark.parametrize("content", [
    b"", b"\0", b"\x30\0", b"\x30\x02\x30\0", b"\x30\x02\x30\x05", b"\x30\x04\x30\x02\x30\0",
    b"\x30\x80" * 30_000, b"\x04\x03abc", b"\x30\x02\x30\0\0",
], ids=lambda content: content[:8].hex())  # fmt: skip
def test_a_malformed_extension_is_refused(people, good, fqans, content):
    with pytest.raises(CertificateError, match="malformed attribute certificate"):
        fqans(proxy=pki.carrying(people.alice, content, key=people.key))


@pytest.fixture(scope="module")
def mutated(people, tmp_path_factory):
    """A genuine AC, and the verdict on an extension that was made of it."""
    server = pki.VomsServer(tmp_path_factory.mktemp("vomsdir"), people.host)
    server.publish()
    store = VomsStore(server.directory, TrustStore(people.ca.directory))

    def verdict(content):
        try:
            return store.fqans(pki.carrying(people.alice, content, key=people.key, signer=signer).chain)
        except CertificateError:
            return None

    signer = ec.generate_private_key(ec.SECP256R1())  # nobody looks at the proxy's own signature here; it is fast
    genuine = pki.sequence(pki.sequence(server.attribute_certificate(people.alice, *WRITTEN)))
    assert verdict(genuine) == FQANS
    return genuine, verdict


@pytest.mark.filterwarnings("ignore")  # cryptography warns of odd certificates that it reads
@settings(max_examples=500)
@given(place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_any_byte_changed(mutated, place, flip):
    genuine, verdict = mutated
    changed = bytearray(genuine)
    changed[place % len(genuine)] ^= flip
    assert verdict(bytes(changed)) in (None, FQANS)


@pytest.mark.filterwarnings("ignore")  # cryptography warns of odd certificates that it reads
@settings(max_examples=300)
@given(start=st.integers(0, 10**6), length=st.integers(0, 40), put=st.binary(max_size=40))
def test_any_piece_replaced(mutated, start, length, put):
    genuine, verdict = mutated
    start %= len(genuine)
    assert verdict(genuine[:start] + put + genuine[start + length :]) in (None, FQANS)


@settings(max_examples=100)
@given(content=st.binary(max_size=200))
def test_any_bytes_at_all(mutated, content):
    assert mutated[1](content) is None
