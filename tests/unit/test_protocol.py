"""The glideinWMS 3.10 protocol, checked against values made by openssl(1), not by the code under test."""

from __future__ import annotations

import json
import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.pool.text import any_of, equals, quote
from pilotbed.protocol import ProtocolError
from pilotbed.protocol.ads import (
    Client,
    ClientStage,
    Credentials,
    FactoryName,
    GlobalOffer,
    Kind,
    Offer,
    Removal,
    Request,
    Sealed,
    check_name,
)
from pilotbed.protocol.crypto import FactoryKey, SessionKey, key_id
from pilotbed.protocol.manifest import Signed, parse_manifest

# Primes of a throw-away key that guards nothing (openssl genrsa 2048).
P = int(
    "edffdb6d38040fb3ffb8345852f70cfd26d788847973eb4cf4a254eb49ad7a18207a17e3d70138287f6a67dbbafcf397672e"
    "294de253b841df3cd5ee419c11dd55c8b4ff53b8a23fe9f27f207c9117ab95231957f8e03dad228d88c612934853f1b0dc9d"
    "99dc69afba9790e5c71fbc4fa4cd549172b6222ed79273e42db0e8a3",
    16,
)
Q = int(
    "c2044eb04dd0f2c32841cfb51fe7fe152fd13bf4a420c1676e0329188d12b4ce272ff46d37582914e59360c8d92c81bf0c28"
    "7838816c196da0c7bf2db51eba8f43744529281703e0236606ffaa0ecc4eb5798c3614c710581dc0b3fb49c98d9b3affd42d"
    "03ea2a1dc0a244f846a2131f40057ac8f1bee4e9e1d82394ab6e6f99",
    16,
)
PUBLIC = """\
-----BEGIN PUBLIC KEY-----
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAtF/lcA9CTLHVgoK7JGqu
niZtWApccLrVf0IYPmrmVz1zIKUWvbJ7djUI6R8OR2DYx+Y2b7mbRtLKIHmzNx/F
ParONEP0dlNOw8WYxcd/JpTn7kEb9550logatPPGhjJPtsSLrH9pqBKyEKLwMRkH
4y7SJNO6WjpYK4NYxdkBSzVxGkr5/usm5KUVXrCBPhy+KWBjWgqOZ+t40neUSj37
O5NyFJBI4FLwduqdYmnjq3uks6Gl9Q46i+j0NcRCc30fE8QvGXBS+54ce0tXhjTx
KQYLRGtdwKcb6aXgmZn2bCDbfqMpytCb+xpeJMt5BA4UAZnpwr4tVg6z9MfT2qO2
awIDAQAB
-----END PUBLIC KEY-----
"""
# (printf 'RSA '; cat public.pem) | md5sum
KEY_ID = "00b94cc11cc1bcda9d80be1d500cffca"
KEY, IV = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf"
# printf 'cypher:aes_256_cbc,key:KEY,iv:IV' | openssl pkeyutl -encrypt -pubin -pkeyopt rsa_padding_mode:oaep
KEY_CODE = (
    "6136c4378e1113c2128afdaf5c834c146b50bec50634d0ca63563356cc25cd91217650278eef4761a48451e1751be5d6d90d"
    "d3f53bc53759141eecf14bd122c71f20a457b7ed54f17e6c297c65e0c4e874556c7f639614647108d8ac7edd28edcbac9b37"
    "6f43a519affe2704d3dd185d7da8f333e91e83b13c3a638ee6545025840167bb598b49a59c942af6097ce2c0a93a0d1c8652"
    "30dca4b9553ef55484d2cc6c464d5cbad615fe01323b33ddbcafba303505447ef8100b5580c7a8638dd0822e6bb050176153"
    "89da57f5ffb7e69f6e94724091ac398c41c514849522e1a048bdf889532710a6dd3d5e12b75c60d7040aa862e294db4c7f76"
    "5965cd797ac7"
)
# The same with 'cypher:des_cbc,key:0011223344556677,iv:0011223344556677'.
DES_CODE = (
    "28160dd943b5cb0ca20171b6a85beb34a5bf1d55161b4f997081db963abb6ceb958512bb2b297438042e1d9b7a2c85f481e8"
    "1898baac08a17a62707b94186839dc648f45a430a2d54e8c789e796d9c3995a5cf56dbc9b8ce6dfd170138ecec11d74b7440"
    "5a98cf89ca58a5e0977265b9d1df9efc96ce828b72ab5fe8270ba5454e75e81d94e4b7c0ae954496d94c785242bddf97d312"
    "5d96d08c1b7591bef88dad7ffc34ee14ba8e2a1b355c50e630889ece50f26e9049beda1930054cdaf51401ad682589b9fb8d"
    "68bbff195a84909c9fa4dff759c4e6267ff718cb99d95bfc92b10ce43986fd88930b10207b52ebd6125ddb96d07c3a69a42d"
    "16a3b6c36ae6"
)
# printf frontend@grid.test | openssl enc -aes-256-cbc -K KEY -iv IV
IDENTITY_CODE = "3e50579b9bd8f7fb5e938f84fcc1def4b5b5592582a228fbf1c6a87c2d6071dd"

SIGNED = Signed("description.cfg", "ab" * 32)
STAGE = ClientStage("http://frontend.test/stage", "sha256", SIGNED, SIGNED, "http://frontend.test/stage/group_main")
FACTORY = FactoryName("v1", "factory")
CLIENT = Client("vo", "main")


def throw_away_key() -> FactoryKey:
    """The key of the primes above."""
    public = rsa.RSAPublicNumbers(65537, P * Q)
    d = pow(65537, -1, (P - 1) * (Q - 1))
    private = rsa.RSAPrivateNumbers(P, Q, d, d % (P - 1), d % (Q - 1), pow(Q, -1, P), public).private_key()
    return FactoryKey(private)


@pytest.fixture(scope="module")
def key() -> FactoryKey:
    return throw_away_key()


@pytest.fixture
def session() -> SessionKey:
    return SessionKey(bytes.fromhex(KEY), bytes.fromhex(IV))


# -- encryption


def test_key_id_is_the_md5_of_type_and_pem(key: FactoryKey) -> None:
    assert key.public_pem == PUBLIC
    assert key_id(PUBLIC) == key.key_id == KEY_ID


def test_unwraps_a_key_that_openssl_wrapped(key: FactoryKey, session: SessionKey) -> None:
    assert key.unwrap(KEY_CODE) == session


def test_encrypts_as_openssl_does(session: SessionKey) -> None:
    assert session.encrypt("frontend@grid.test") == IDENTITY_CODE
    assert session.decrypt(IDENTITY_CODE) == "frontend@grid.test"


def test_a_key_wrapped_for_this_factory_opens_for_no_other(key: FactoryKey) -> None:
    code = SessionKey.new().wrapped(PUBLIC)
    assert len(key.unwrap(code).key) == 32
    with pytest.raises(ProtocolError, match="cannot be decrypted with this factory's key"):
        FactoryKey.generate().unwrap(code)


def test_only_aes_256_is_taken(key: FactoryKey) -> None:
    with pytest.raises(ProtocolError, match="no aes_256_cbc key"):
        key.unwrap(DES_CODE)


@pytest.mark.parametrize("code", ["xyz", "", "00" * 16, IDENTITY_CODE[:-2], IDENTITY_CODE[:32]])
def test_what_cannot_be_decrypted_is_refused(session: SessionKey, code: str) -> None:
    with pytest.raises(ProtocolError):
        session.decrypt(code)


def test_keys_do_not_show_in_a_repr(session: SessionKey) -> None:
    assert KEY not in repr(session) and "key" not in repr(session).lower().replace("sessionkey", "")


def test_a_pickle_stays_text(key: FactoryKey, session: SessionKey) -> None:
    """glideinWMS 3.11 unpickles decrypted values; here a value is a string whatever it looks like."""
    bomb = pickle.dumps({"SecurityClass": "root"}, protocol=0).decode()
    sealed = Sealed.seal(session, KEY_CODE, KEY_ID, "me", {"SubmitProxy": bomb})
    assert sealed.open(key) == ("me", {"SubmitProxy": bomb})


@given(st.text())
def test_any_text_survives_encryption(value: str) -> None:
    session = SessionKey(bytes(32), bytes(16))
    try:
        code = session.encrypt(value)
    except UnicodeEncodeError:
        return
    assert session.decrypt(code) == value


# -- ads


def request(**changes: object) -> Request:
    session = SessionKey(bytes.fromhex(KEY), bytes.fromhex(IV))
    values: dict[str, object] = {
        "entry": "alpha@v1@factory",
        "client": CLIENT,
        "credential": "K6X3URBI",
        "idle": 2,
        "maximum": 3,
        "removal": Removal.WAIT,
        "margin": 0,
        "idle_lifetime": 3600,
        "stage": STAGE,
        "parameters": {"GLIDEIN_Collector": "central:9618"},
        "sealed": Sealed.seal(session, KEY_CODE, KEY_ID, "frontend@grid.test", {"SecurityName": "vo"}),
    }
    return Request(**(values | changes))  # type: ignore[arg-type]


def test_a_request_has_glideinwms_names() -> None:
    ad = request().to_ad()
    assert ad["Name"] == "K6X3URBI_alpha@v1@factory@vo.main"
    assert ad["MyType"] == ad["GlideinMyType"] == "glideclient"
    assert (ad["ReqIdleGlideins"], ad["ReqMaxGlideins"], ad["ReqIdleLifetime"]) == (2, 3, "3600")
    assert ad["ReqRemoveExcess"] == "WAIT"
    assert ad["ReqName"] == ad["ReqGlidein"] == "alpha@v1@factory"
    assert ad["ClientName"] == "vo.main"
    assert ad["ReqEncIdentity"] == IDENTITY_CODE
    assert ad["GlideinParamGLIDEIN_Collector"] == "central:9618"
    assert "GlideinEncParamSecurityName" in ad
    assert all(isinstance(value, str | int) for value in ad.values())


def test_a_request_comes_back_as_it_was() -> None:
    assert Request.from_ad(request().to_ad()) == request()


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("ReqGlidein", "alpha@v1@factory; rm", "ReqGlidein"),
        ("FrontendName", "../vo", "FrontendName"),
        ("FrontendName", ".vo", "FrontendName"),
        ("GroupName", "", "GroupName"),
        ("ClientName", "other.main", "ClientName"),
        ("Name", "K6X3URBI_alpha@v1@factory@other.main", "Name"),
        ("Name", 7, "Name is 7, not a string"),
        ("ReqIdleGlideins", -1, "ReqIdleGlideins is -1, below 0"),
        ("ReqIdleGlideins", "many", "not a number"),
        ("ReqMaxGlideins", None, "missing"),
        ("ReqRemoveExcess", "EVERYTHING", "ReqRemoveExcess"),
        ("WebURL", 'http://x/" -param_A B', "WebURL"),
        ("WebURL", "file:///etc/passwd", "WebURL"),
        ("WebGroupURL", "http://x/$(Cluster)", "WebGroupURL"),
        ("WebDescriptFile", "../x", "WebDescriptFile"),
        ("WebDescriptSign", "zz", "WebDescriptSign"),
        ("WebSignType", None, "WebSignType is missing"),
        ("ReqEncKeyCode", None, "ReqEncKeyCode is missing"),
    ],
)
def test_a_broken_request_is_refused(attribute: str, value: str | int | None, message: str) -> None:
    ad = request().to_ad()
    del ad[attribute]
    if value is not None:
        ad[attribute] = value
    with pytest.raises(ProtocolError, match=message):
        Request.from_ad(ad)


def test_an_offer_writes_booleans_as_glideinwms_does() -> None:
    offer = Offer(
        FACTORY, "alpha", {"GLIDEIN_Site": "alpha", "GLIDEIN_REQUIRE_VOMS": True}, {"X": ""}, True, PUBLIC, KEY_ID
    )
    ad = offer.to_ad()
    assert ad["Name"] == "alpha@v1@factory"
    assert ad["GLIDEIN_In_Downtime"] == ad["GLIDEIN_REQUIRE_VOMS"] == "True"
    assert "sha1" in str(ad["SupportedSignTypes"]).split(",")
    assert ad["PubKeyValue"] == PUBLIC.replace("\n", "\\n")
    back = Offer.from_ad(ad | {"AuthenticatedIdentity": "factory@grid.test"})
    assert (back.full_name, back.public_pem, back.in_downtime) == (offer.full_name, PUBLIC, True)
    assert (back.attributes["GLIDEIN_Site"], back.parameters, back.identity) == (
        "alpha",
        {"X": ""},
        "factory@grid.test",
    )


def test_a_line_end_may_have_been_escaped_more_than_once() -> None:
    ad = GlobalOffer(FACTORY, PUBLIC, KEY_ID).to_ad()
    ad["PubKeyValue"] = str(ad["PubKeyValue"]).replace("\\n", "\\\\n")
    assert GlobalOffer.from_ad(ad).public_pem == PUBLIC


def test_only_rsa_keys_are_taken() -> None:
    ad = GlobalOffer(FACTORY, PUBLIC, KEY_ID).to_ad() | {"PubKeyType": "None"}
    with pytest.raises(ProtocolError, match="RSA"):
        GlobalOffer.from_ad(ad)


def test_credentials_carry_class_and_content_for_each() -> None:
    values = Credentials.values("vo", {"K6X3URBI": ("pilot", "PEM")})
    assert values == {
        "SecurityName": "vo", "NumberOfCredentials": "1", "K6X3URBI": "PEM", "SecurityClassK6X3URBI": "pilot"
    }  # fmt: skip
    assert Credentials.split(values) == ("vo", {"K6X3URBI": ("pilot", "PEM")})
    with pytest.raises(ProtocolError, match="SecurityClassK6X3URBI"):
        Credentials.split({"SecurityName": "vo", "K6X3URBI": "PEM"})
    with pytest.raises(ProtocolError, match="credential id"):
        Credentials.split({"SecurityName": "vo", "../x": "PEM", "SecurityClass../x": "pilot"})


def test_requests_need_other_rights_than_offers() -> None:
    assert Kind.REQUEST.update == Kind.CREDENTIALS.update == "UPDATE_MASTER_AD"
    assert Kind.OFFER.update == Kind.GLOBAL_OFFER.update == "UPDATE_AD_GENERIC"
    assert Kind.ANSWER.update == "UPDATE_LICENSE_AD"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a\nb", "a,b", 'a"b', "ä"])
def test_a_name_cannot_leave_its_place(name: str) -> None:
    with pytest.raises(ProtocolError):
        check_name(name, "name")


def test_an_at_sign_is_for_joined_names_only() -> None:
    assert check_name("a@b", "name") == "a@b"
    with pytest.raises(ProtocolError):
        check_name("a@b", "name", at=False)


# -- the manifest of a stage area


def test_a_manifest_is_read() -> None:
    text = json.dumps({
        "web": "http://f/stage", "signtype": "sha256", "main": {"descript": "d", "sign": "s"},
        "entries": {"alpha": {"descript": "de", "sign": "se"}},
    })  # fmt: skip
    stage = parse_manifest(text, "entries")
    assert stage.part("alpha") == Signed("de", "se")
    with pytest.raises(ProtocolError, match="no part for beta"):
        stage.part("beta")
    for broken in ("", "[]", "{}", text.replace("entries", "groups")):
        with pytest.raises(ProtocolError, match="manifest"):
            parse_manifest(broken, "entries")


# -- ClassAd text


def test_quoting_leaves_no_way_out_of_a_string() -> None:
    assert quote('a"b\\c\nd') == r'"a\"b\\c\nd"'
    assert equals(Name='x" || true || "') == r'Name =?= "x\" || true || \""'
    assert any_of("Name", []) == "false"
    with pytest.raises(ValueError, match="NUL"):
        quote("a\0b")
