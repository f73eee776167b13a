r"""Texts of distinguished names, judged by the installed OpenSSL (libcrypto, as LCMAPS has it) and HTCondor."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pki
import pytest
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pilotbed import dn
from pilotbed.dn import Attribute, NotADn
from pilotbed.x509 import name_hash, slash

_RFC2253 = 0x1110317  # XN_FLAG_RFC2253 (openssl/x509.h)


class OpenSsl:
    """The real functions, on the DER of a name."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcrypto.so.3")
        for name, result, *arguments in (
            ("d2i_X509_NAME", ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_long),
            ("X509_NAME_oneline", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
            ("X509_NAME_hash_ex", ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
            ("X509_NAME_print_ex", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong),
            ("X509_NAME_free", None, ctypes.c_void_p), ("CRYPTO_free", None, ctypes.c_void_p),
            ("BIO_s_mem", ctypes.c_void_p), ("BIO_new", ctypes.c_void_p, ctypes.c_void_p),
            ("BIO_read", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int),
            ("BIO_free", ctypes.c_int, ctypes.c_void_p), ("OBJ_nid2obj", ctypes.c_void_p, ctypes.c_int),
            ("OBJ_nid2sn", ctypes.c_char_p, ctypes.c_int),
            ("OBJ_obj2txt", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
        ):  # fmt: skip
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments

    def _name(self, der: bytes) -> int | None:
        start = ctypes.c_char_p(der)
        return self._lib.d2i_X509_NAME(None, ctypes.byref(start), len(der))

    def oneline(self, der: bytes) -> str | None:
        """Return X509_NAME_oneline; None where OpenSSL does not take this for a name."""
        if not (name := self._name(der)):
            return None
        text = self._lib.X509_NAME_oneline(name, None, 0)
        try:
            return ctypes.string_at(text).decode("ascii")
        finally:
            self._lib.CRYPTO_free(text)
            self._lib.X509_NAME_free(name)

    def hash(self, der: bytes) -> str:
        name = self._name(der)
        try:
            return f"{self._lib.X509_NAME_hash_ex(name, None, None, None):08x}"
        finally:
            self._lib.X509_NAME_free(name)

    def rfc2253(self, der: bytes) -> str | None:
        """Return `-nameopt RFC2253`; None where a value's octets are no characters."""
        name, out = self._name(der), self._lib.BIO_new(self._lib.BIO_s_mem())
        try:
            if self._lib.X509_NAME_print_ex(out, name, 0, _RFC2253) < 0:
                return None
            text = ctypes.create_string_buffer(1 << 16)
            size = self._lib.BIO_read(out, text, len(text))
            return text[: max(0, size)].decode("ascii")
        finally:
            self._lib.X509_NAME_free(name)
            self._lib.BIO_free(out)

    def types(self) -> Iterator[tuple[str, str]]:
        """Yield OID and short name of all that it knows."""
        for nid in range(1, 2000):
            if found := self._lib.OBJ_nid2obj(nid):
                oid = ctypes.create_string_buffer(256)
                self._lib.OBJ_obj2txt(oid, len(oid), found, 1)
                yield oid.value.decode(), self._lib.OBJ_nid2sn(nid).decode()


OPENSSL = OpenSsl()

_KEY = ec.generate_private_key(ec.SECP256R1())
_FIELDS = asn1.Certificate.load(
    pki.sign(pki.name("/CN=x"), pki.name("/CN=x"), _KEY, _KEY).public_bytes(serialization.Encoding.DER))  # fmt: skip


def certificate_name(der: bytes) -> x509.Name:
    """Return the name as cryptography reads it in a certificate. Raises whatever that raises."""
    fields = _FIELDS["tbs_certificate"]
    before = [fields[key].dump() for key in ("version", "serial_number", "signature", "issuer", "validity")]
    tbs = pki.sequence(*before, der, fields["subject_public_key_info"].dump())
    rest = _FIELDS["signature_algorithm"].dump(), _FIELDS["signature_value"].dump()
    return x509.load_der_x509_certificate(pki.sequence(tbs, *rest)).subject


def encoded(name: dn.Name) -> bytes:
    """Return the DER of a name; X.690 wants the members of a set in order."""
    return dn.encode_element(0x30, b"".join(
        dn.encode_element(0x31, b"".join(sorted(map(dn._member, rdn)))) for rdn in name))  # fmt: skip


characters = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
#: What is special in some form: separators, escapes, quotes, blanks, what looks like a type or an octet.
awkward = st.lists(st.sampled_from([
    "/", "+", "=", "\\", '"', ",", ";", "#", " ", "<", ">", "\0", "\n", "\x7f", "ü", "語", "\U0001f600", "CN=", "/O=",
    "\\xC3", "\\xc3", "\\x2F", "\\x41", "*", "?", "[", "]", "Alice", "2.5.4.3=",
]), max_size=6).map("".join)  # fmt: skip
octets = st.binary(max_size=8) | characters.map(str.encode)


def strings(tag: int) -> st.SearchStrategy[bytes]:
    if tag in {dn.BMP, dn.UNIVERSAL}:
        wide = characters.map(lambda text: "".join(c for c in text if tag == dn.UNIVERSAL or ord(c) < 0x10000))
        return wide.map(lambda text: text.encode(dn.ENCODINGS[tag]))
    if tag == dn.BIT_STRING:
        return st.binary(max_size=4).map(lambda bits: b"\0" + bits)
    if tag == dn.UTF8:
        return (characters | awkward).map(str.encode)
    return octets


oids = (
    st.sampled_from(sorted(dn._NAMES))
    | st.sampled_from(["2.5.4.3", "2.5.4.11", "1.2.3", "2.999.18446744073709551616", "0.0", "1.39.1"])
    | st.lists(st.integers(0, 2**70), max_size=5).map(lambda arcs: ".".join(map(str, (2, 40, *arcs))))
)
tags = st.sampled_from([3, 4, 12, 18, 19, 20, 21, 22, 25, 26, 27, 28, 30])
attributes = st.tuples(oids, tags).flatmap(
    lambda pair: st.builds(Attribute, st.just(pair[0]), strings(pair[1]), st.just(pair[1])))  # fmt: skip
names = st.lists(st.lists(attributes, min_size=1, max_size=3), min_size=1, max_size=4)


def one(value: str | bytes, tag: int = dn.UTF8, oid: str = "2.5.4.3") -> dn.Name:
    return [[Attribute(oid, value if isinstance(value, bytes) else value.encode(), tag)]]


# -- against OpenSSL


@given(names)
@example(one("Robot/Alice C++ Jürgen\\ \"x\""))
@example(one("Ω/".encode("utf-16-be"), dn.BMP))
@example(one("Ω/".encode("utf-32-be"), dn.UNIVERSAL))
@example(one(b"J\xfcrgen", dn.TELETEX))
@example(one(b"\x03\xff\xff", dn.BIT_STRING, "2.5.4.45"))
@example(one("x", oid="2.40." + "1234567890." * 9 + "1"))
@example([[Attribute("2.5.4.3", b"a"), Attribute("2.5.4.11", b"b")], [Attribute("2.5.4.3", b"c")]])
def test_one_line_form_is_openssls(name: dn.Name) -> None:
    der = encoded(name)
    theirs = OPENSSL.oneline(der)
    if theirs is not None:
        assert dn.write(dn.decode(der)) == theirs


@pytest.mark.filterwarnings("ignore:Attribute's length")
@given(names)
@example(one(" \tA  B\n"))
@example(one(b" A  B ", 18))
@example(one(b"\x00\xff A ", dn.BIT_STRING, "2.5.4.45"))
@example(one(b" J\xdcRGEN ", dn.TELETEX))
def test_names_of_certificates_and_their_hash_are_openssls(name: dn.Name) -> None:
    der = encoded(name)
    try:
        theirs, ours = OPENSSL.oneline(der), certificate_name(der)
    except (ValueError, TypeError, KeyError):
        return  # cryptography reads no such name: the certificate is refused
    if theirs is not None:
        assert (slash(ours), name_hash(ours)) == (theirs, OPENSSL.hash(der))


@given(names)
@example(one("#a, b+c\"d\\e<f>g;h Jürgen \U0001f600\0"))
@example(one(" "))
@example(one("  "))
@example(one("#"))
@example(one("Ω,".encode("utf-16-be"), dn.BMP))
@example(one("x", oid="1.2.3"))
@example(one(b"\x00\xff", dn.BIT_STRING, "2.5.4.45"))
def test_rfc_2253_form_is_openssls_and_is_read_again(name: dn.Name) -> None:
    der = encoded(name)
    if OPENSSL.oneline(der) is None or (theirs := OPENSSL.rfc2253(der)) is None:
        return
    ours = dn.decode(der)
    said = dn.rfc4514(ours)
    if not any(attribute.value.strip(b"\0") == b"#" for rdn in ours for attribute in rdn):  # OpenSSL forgets to escape
        assert said == theirs
    again = dn.parse_rfc4514(said)
    assert [[(a.oid, _meaning(a)) for a in rdn] for rdn in again] == [[(a.oid, _meaning(a)) for a in r] for r in ours]


def _meaning(attribute: Attribute) -> str | bytes:
    return attribute.text() if attribute.tag in dn.ENCODINGS else attribute.value


def test_types_are_openssls() -> None:
    known = dict(OPENSSL.types())
    assert {oid: known.get(oid) for oid in dn._NAMES} == dn._NAMES
    arcs = {oid.rpartition(".")[0] for oid in dn._NAMES}
    missing = {oid for oid in known if oid.rpartition(".")[0] in arcs} - dn._NAMES.keys()
    assert missing <= {"1.2.840.113549.1.9.52"}, "OpenSSL has learnt types: add them"  # of CMS only (OpenSSL 3.5)


# -- HTCondor


@pytest.fixture(scope="module")
def user_map(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, str]], Callable[[str], object]]:
    """Have HTCondor read a mapfile of these fields and names; return its look-up."""
    import classad2
    import htcondor2  # noqa: F401  # brings libcondor_utils, which has the mapfile's reader

    maps = Path("/proc/self/maps").read_text()
    library = ctypes.CDLL(re.search(r"\S*libcondor_utils\S*", maps).group())  # type: ignore[union-attr]
    add = library["_Z12add_user_mapPKcS0_P7MapFile"]  # int add_user_map(const char *name, const char *file, MapFile *)
    add.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    directory, numbers = tmp_path_factory.mktemp("map"), itertools.count()

    def read(fields: dict[str, str]) -> Callable[[str], object]:
        file = directory / f"mapfile{next(numbers)}"  # one that it knows is not read again within a second
        file.write_text("".join(f"* {field} {name}\n" for field, name in fields.items()))
        assert add(b"people", str(file).encode(), None) == 0
        return lambda name: classad2.ExprTree('userMap("people", x)').eval(classad2.ClassAd({"x": name}))

    return read


@settings(max_examples=30)
@given(st.sets(names.map(dn.write), min_size=1, max_size=5))
@example({'/CN=a "b" \\', r"/CN=Robot\/A", r"/CN=\\/", "/CN=a*.$|(", r"/CN=J\xC3\xBC", "/CN=a ", "/CN=" + "x" * 999})
def test_a_mapfile_names_each_and_no_other(user_map: Callable, texts: set[str]) -> None:  # type: ignore[type-arg]
    listed = {text: f"user{number}" for number, text in enumerate(sorted(texts))}
    found = user_map({dn.mapfile(text): name for text, name in listed.items()})
    assert {text: found(text) for text in listed} == listed
    for text in listed:
        for other in {f"{text}x", text.swapcase(), text[:-1], f" {text}"} - texts:
            assert found(other) not in listed.values()


# -- reading


@given(names)
@example(one("a\\"))
@example(one("Robot/Alice"))
@example(one("\\xc3\\xC3\\x2F\\"))
@example([[Attribute("2.5.4.3", b"a"), Attribute("2.5.4.11", b"b")], [Attribute("0.9.2342.19200300.100.1.44", b"c")]])
def test_every_one_line_form_is_read_as_it_stands(name: dn.Name) -> None:
    """Also where two names have it: either will do, as LCMAPS compares the text."""
    text = dn.write(name)
    if all(len(attribute.oid) < 80 for rdn in name for attribute in rdn):
        assert dn.write(dn.parse(text)) == text
        assert text in dn.readings(text)


values = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="/+\\\x7f"), max_size=9)


@given(st.lists(st.tuples(st.sampled_from(["cn", "CN", "O", "Email", "2.5.4.3", "1.2.3"]), values), min_size=1))
def test_what_people_write_for_a_name_is_read_as_the_name(pairs: list[tuple[str, str]]) -> None:
    """As somebody copies it from a web page: UTF-8, no escapes, types spelt anyhow."""
    meant = {"cn": "2.5.4.3", "CN": "2.5.4.3", "O": "2.5.4.10", "Email": "1.2.840.113549.1.9.1"}
    written = "".join(f"/{kind}={value}" for kind, value in pairs)
    name = [[Attribute(meant.get(kind, kind), value.encode())] for kind, value in pairs]
    assert dn.readings(written) == [dn.write(name)] == [OPENSSL.oneline(encoded(name))]


@pytest.mark.parametrize(("text", "meant"), [
    ("/CN=Robot/Alice", [r"/CN=Robot\/Alice"]),
    (r"/CN=Robot\/Alice", [r"/CN=Robot\/Alice"]),
    ("/DC=test/CN=host/ce.grid.test", [r"/DC=test/CN=host\/ce.grid.test"]),
    ("/CN=C++", [r"/CN=C\+\+"]),
    ("/CN=a+OU=b", ["/CN=a+OU=b"]),
    ("/OU=b+CN=a/CN=c", ["/OU=b+CN=a/CN=c", "/CN=a+OU=b/CN=c"]),
    (r"/CN=a\+OU=b", [r"/CN=a\+OU=b"]),
    ("/CN=Jürgen Groß", [r"/CN=J\xC3\xBCrgen Gro\xC3\x9F"]),
    (r"/CN=J\xC3\xBCrgen", [r"/CN=J\xC3\xBCrgen"]),
    (r"/CN=J\xc3\xBCrgen", [r"/CN=J\xC3\xBCrgen", r"/CN=J\xc3\xBCrgen"]),
    (r"/CN=\x41\x2F", [r"/CN=\x41\x2F"]),
    ("/cn=a/Email=a@b.org/2.5.4.10=c", ["/CN=a/emailAddress=a@b.org/O=c"]),
    ("/UID=a/uid=b", ["/UID=a/uid=b"]),
    ("/1.2.3=x/CN=", ["/1.2.3=x/CN="]),
    ("/CN=a=b", ["/CN=a=b"]),
    ("/CN=*.grid.test [1] ?", ["/CN=*.grid.test [1] ?"]),
    ('/CN="a"', ['/CN="a"']),
])  # fmt: skip
def test_what_a_text_may_mean(text: str, meant: list[str]) -> None:
    assert dn.readings(text) == meant


@pytest.mark.parametrize(("text", "remedy"), [
    ("", f"such as {dn.EXAMPLE}"),
    ("Alice", "such as"),
    ("/", "such as"),
    ("/CN", "such as"),
    ("+CN=a", "such as"),
    ("CN=Robot/Alice", r"say /CN=Robot\/Alice"),
    ("CN=Jürgen,DC=test", r"say /DC=test/CN=J\xC3\xBCrgen, or if it begins with the country or domain /CN="),
    ("/X=1", "X is no type"),
    ("/CN=a/foo=b", r"write \/foo="),
    ("/CN=a+b=c", r"write \+b="),
    ("/9.9=a", "9.9 is no type"),
    ("/DC=test/*", "there are no patterns"),
    ('/CN=a"\n"/CN=b"', r"written \x0A"),
    ("/CN=a\x7f", r"written \x7F"),
    ("/CN=\ud800", "not UTF-8"),
])  # fmt: skip
def test_what_may_mean_nobody_is_refused_with_a_remedy(text: str, remedy: str) -> None:
    with pytest.raises(NotADn, match=re.escape(remedy)):
        dn.readings(text)


@given(characters | awkward)
def test_no_text_gives_another_exception(text: str) -> None:
    for read in (dn.parse, dn.readings, dn.canonical, dn.parse_rfc4514):
        for written in (text, f"/CN={text}", f"CN={text}", f"CN=#{text}"):
            try:
                read(written)
            except NotADn as error:
                assert str(error)


@pytest.mark.parametrize(("text", "slashed"), [
    ("CN=Alice Adams,OU=People,DC=test", "/DC=test/OU=People/CN=Alice Adams"),
    (r"CN=Smith\, John + OU=b ; DC = test", r"/DC=test/OU=b+CN=Smith, John"),
    ('CN="a,b;c\\"d"', '/CN=a,b;c"d'),
    (r"CN=J\C3\BCrgen", r"/CN=J\xC3\xBCrgen"),
    ("CN=Jürgen", r"/CN=J\xC3\xBCrgen"),
    ("CN=#1E0203A9", r"/CN=\x03\xA9"),
    (r"CN=a/b\ ", r"/CN=a\/b "),
    ("CN=", "/CN="),
])  # fmt: skip
def test_rfc_4514_forms_are_read(text: str, slashed: str) -> None:
    assert dn.write(dn.parse_rfc4514(text)) == slashed


@given(st.binary(max_size=40) | names.map(encoded).flatmap(
    lambda der: st.tuples(st.just(der), st.integers(0, len(der) - 1), st.integers(0, 255)).map(
        lambda cut: cut[0][: cut[1]] + bytes([cut[2]]) + cut[0][cut[1] + 1 :])))  # fmt: skip
def test_bytes_that_are_no_name_give_no_other_exception(der: bytes) -> None:
    with contextlib.suppress(ValueError):
        dn.write(dn.decode(der))
