r"""Distinguished names as texts: OpenSSL's one-line form, RFC 4514, HTCondor's mapfile. Standard library only.

The grid names people by OpenSSL's one-line form (X509_NAME_oneline(3)), here also called slash form: in grid-mapfiles,
ban lists, VOMS, LCMAPS, ARC, HTCondor's x509UserProxySubject, nginx's `$ssl_client_s_dn_legacy`. Programs compare it
byte by byte, so one text is right: `/CN=Robot\/Alice`, `/CN=C\+\+`, `/CN=J\xC3\xBCrgen`. A `\` in a value is not
escaped, so two names can have one text: where it matters who somebody is, certificates are compared and not texts.

Sources: OpenSSL 3.0's crypto/x509/x509_obj.c (one line), crypto/asn1/a_strex.c (RFC 2253); RFC 4514; HTCondor's
src/condor_utils/MapFile.cpp, ParseField. tests/unit/test_dn.py asks OpenSSL and HTCondor themselves.
"""

from __future__ import annotations

import re

#: Types by arc, as OpenSSL 3.0 abbreviates them (crypto/objects/objects.txt); any other is written as its dotted OID.
_ARCS = {
    "2.5.4": """3=CN 4=SN 5=serialNumber 6=C 7=L 8=ST 9=street 10=O 11=OU 12=title 13=description 14=searchGuide
        15=businessCategory 16=postalAddress 17=postalCode 18=postOfficeBox 19=physicalDeliveryOfficeName
        20=telephoneNumber 21=telexNumber 22=teletexTerminalIdentifier 23=facsimileTelephoneNumber
        24=x121Address 25=internationaliSDNNumber 26=registeredAddress 27=destinationIndicator
        28=preferredDeliveryMethod 29=presentationAddress 30=supportedApplicationContext 31=member 32=owner
        33=roleOccupant 34=seeAlso 35=userPassword 36=userCertificate 37=cACertificate
        38=authorityRevocationList 39=certificateRevocationList 40=crossCertificatePair 41=name 42=GN
        43=initials 44=generationQualifier 45=x500UniqueIdentifier 46=dnQualifier 47=enhancedSearchGuide
        48=protocolInformation 49=distinguishedName 50=uniqueMember 51=houseIdentifier 52=supportedAlgorithms
        53=deltaRevocationList 54=dmdName 65=pseudonym 72=role 97=organizationIdentifier 98=c3 99=n3
        100=dnsName""",
    "1.2.840.113549.1.9": """1=emailAddress 2=unstructuredName 3=contentType 4=messageDigest 5=signingTime
        6=countersignature 7=challengePassword 8=unstructuredAddress 9=extendedCertificateAttributes 14=extReq
        15=SMIME-CAPS 16=SMIME 20=friendlyName 21=localKeyID""",
    "0.9.2342.19200300.100.1": """1=UID 2=textEncodedORAddress 3=mail 4=info 5=favouriteDrink 6=roomNumber 7=photo
        8=userClass 9=host 10=manager 11=documentIdentifier 12=documentTitle 13=documentVersion 14=documentAuthor
        15=documentLocation 20=homeTelephoneNumber 21=secretary 22=otherMailbox 23=lastModifiedTime
        24=lastModifiedBy 25=DC 26=aRecord 27=pilotAttributeType27 28=mXRecord 29=nSRecord 30=sOARecord
        31=cNAMERecord 37=associatedDomain 38=associatedName 39=homePostalAddress 40=personalTitle
        41=mobileTelephoneNumber 42=pagerTelephoneNumber 43=friendlyCountryName 44=uid 45=organizationalStatus
        46=janetMailbox 47=mailPreferenceOption 48=buildingName 49=dSAQuality 50=singleLevelQuality
        51=subtreeMinimumQuality 52=subtreeMaximumQuality 53=personalSignature 54=dITRedirect 55=audio
        56=documentPublisher""",
    "1.3.6.1.5.5.7.9": """1=id-pda-dateOfBirth 2=id-pda-placeOfBirth 3=id-pda-gender 4=id-pda-countryOfCitizenship
        5=id-pda-countryOfResidence""",
    "1.3.6.1.4.1.311.60.2.1": "1=jurisdictionL 2=jurisdictionST 3=jurisdictionC",
    "1.2.643.3.131.1": "1=INN",
    "1.2.643.100": "1=OGRN 3=SNILS 5=OGRNIP 111=subjectSignTool 112=issuerSignTool 113=classSignTool",
}
_NAMES = {f"{arc}.{last}": name for arc, named in _ARCS.items() for last, _, name in
          (pair.partition("=") for pair in named.split())}  # fmt: skip
_OIDS = {name: oid for oid, name in _NAMES.items()}
#: What people and older software write for a type, in lower case: any spelling of the above, and these.
_SPOKEN = {name.lower(): oid for oid, name in _NAMES.items() if name != "uid"} | {
    "commonname": "2.5.4.3", "surname": "2.5.4.4", "countryname": "2.5.4.6", "localityname": "2.5.4.7",
    "stateorprovincename": "2.5.4.8", "s": "2.5.4.8", "streetaddress": "2.5.4.9", "organizationname": "2.5.4.10",
    "organizationalunitname": "2.5.4.11", "givenname": "2.5.4.42", "domaincomponent": "0.9.2342.19200300.100.1.25",
    "userid": "0.9.2342.19200300.100.1.1", "email": "1.2.840.113549.1.9.1", "e": "1.2.840.113549.1.9.1",
}  # fmt: skip

# ASN.1 tags (X.680) of the types that a name's values have.
BIT_STRING, UTF8, TELETEX, BMP, UNIVERSAL = 3, 12, 20, 30, 28
#: How the octets of a string make characters, as OpenSSL sees it: T61String is Latin-1, whatever X.680 says.
ENCODINGS = {UTF8: "utf-8", 18: "latin-1", 19: "latin-1", TELETEX: "latin-1", 22: "latin-1", 23: "latin-1",
             24: "latin-1", 26: "latin-1", UNIVERSAL: "utf-32-be", BMP: "utf-16-be"}  # fmt: skip

_OID = re.compile(r"(?:[01]\.[1-3]?[0-9]|2\.(?:0|[1-9][0-9]*))(?:\.(?:0|[1-9][0-9]*))*")
_TYPE = re.compile(r"([A-Za-z][A-Za-z0-9-]*|[0-9]+(?:\.[0-9]+)+)=")
_OCTET = re.compile(r"\\x([01][0-9A-F]|7F|[89A-F][0-9A-F])")
_SPOKEN_OCTET = re.compile(_OCTET.pattern, re.IGNORECASE)

EXAMPLE = "/DC=test/DC=grid/O=Gridlab/OU=People/CN=Some Body"


class NotADn(ValueError):
    """A text that is no DN, or may be several; the message says what to write."""


class Attribute:
    """One attribute of a name: its type (dotted OID), and its value's ASN.1 tag (a byte) and octets."""

    __slots__ = ("oid", "tag", "value")

    def __init__(self, oid: str, value: bytes, tag: int = UTF8) -> None:
        self.oid, self.tag, self.value = oid, tag, value

    def text(self) -> str:
        """Return the characters of a value that is a string. Raises ValueError."""
        if self.tag not in ENCODINGS:
            raise ValueError(f"the value of {short_name(self.oid)} is no string (tag {self.tag})")
        return self.value.decode(ENCODINGS[self.tag])


#: A name: its RDNs from the root on, each with one attribute or, rarely, several.
Name = list[list[Attribute]]


def short_name(oid: str) -> str:
    """Return a type as OpenSSL writes it."""
    return _NAMES.get(oid, oid)


# -- DER


def decode(der: bytes) -> Name:
    """Return the name that the DER of a Name (RFC 5280, 4.1.2.4) holds.

    Raises:
        ValueError: it is none.
    """
    outer, rest = _tlv(der, 0x30)
    if rest:
        raise ValueError("bytes after the name")
    name: Name = []
    while outer:
        members, outer = _tlv(outer, 0x31)
        rdn = []
        while members:
            pair, members = _tlv(members, 0x30)
            oid, value = _tlv(pair, 0x06)
            content, rest = _tlv(value, value[0] if value else 0)
            if rest:
                raise ValueError("bytes after an attribute's value")
            rdn.append(Attribute(_dotted(oid), content, value[0]))
        name.append(rdn)
    return name


def _tlv(der: bytes, tag: int) -> tuple[bytes, bytes]:
    """Return content of the element at the beginning, which must have this tag, and what follows it."""
    if len(der) < 2 or der[0] != tag:
        raise ValueError(f"a name has no element of tag {der[0] if der else 'none'} there")
    size, start = der[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(der[2:start], "big")
    if start + size > len(der):
        raise ValueError("a name ends within an element")
    return der[start : start + size], der[start + size :]


def _dotted(content: bytes) -> str:
    arcs, value = [], 0
    for byte in content:
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            arcs.append(value)
            value = 0
    if not content or content[-1] & 0x80:
        raise ValueError("an attribute's type is cut off")
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))


def encode_element(tag: int, content: bytes) -> bytes:
    """Return a DER element."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(digits)]) + digits + content


def encode_oid(dotted: str) -> bytes:
    """Return the DER of an OID."""
    first, second, *others = map(int, dotted.split("."))
    content = b""
    for arc in (first * 40 + second, *others):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(arc & 0x7F | 0x80)
        content += bytes(reversed(groups))
    return encode_element(0x06, content)


# -- OpenSSL's one-line form


def write(name: Name) -> str:
    r"""Return the one-line form: octets whatever the string's type, ``/`` and ``+`` after ``\``, others as ``\xHH``."""
    text = ""
    for rdn in name:
        for separator, attribute in zip(["/", *"+" * len(rdn)], rdn, strict=False):
            octets = attribute.value
            if attribute.tag == BIT_STRING and octets:  # OpenSSL keeps the number of unused bits apart
                unused, octets = octets[0], octets[1:]
                octets = octets[:-1] + bytes([octets[-1] >> unused << unused]) if octets else b""
            # OBJ_obj2txt writes into 80 bytes.
            text += f"{separator}{short_name(attribute.oid)[:79]}={''.join(map(_escaped, octets))}"
    return text


def _escaped(octet: int) -> str:
    if octet in b"/+":
        return f"\\{octet:c}"
    return chr(octet) if 0x20 <= octet <= 0x7E else f"\\x{octet:02X}"


def parse(text: str) -> Name:
    r"""Return a name that OpenSSL writes as ``text``, its values as UTF8String or, where they cannot be, T61String.

    Raises:
        NotADn: OpenSSL writes no name like that; `spoken` reads what people write.
    """
    for octet in (_SPOKEN_OCTET, _OCTET):
        if write(name := _read(text, octet)) == text:
            return name
    raise NotADn(f"{text!r} is {canonical(text)} in OpenSSL's one-line form: write that")


def spoken(text: str) -> Name:
    r"""Return the name that somebody means by ``text``, such as ``/cn=Jürgen Groß`` or ``/CN=Robot/Alice``.

    A slash or plus sign begins an attribute where a type that OpenSSL knows and ``=`` follow; elsewhere, or after
    ``\``, it is part of a value. ``\xHH`` stands for an octet that OpenSSL writes so, also in small letters.

    Raises:
        NotADn: it may mean several names, or none.
    """
    return _read(text, _SPOKEN_OCTET)


def canonical(text: str) -> str:
    """Return the one-line form of what `spoken` reads. Raises NotADn."""
    return write(spoken(text))


def readings(text: str) -> list[str]:
    r"""Return every one-line form that ``text`` may stand for, the likeliest first. Raises NotADn.

    There are several for ``\xc3``, which OpenSSL writes as ``\xC3`` unless a value holds these four characters, and for
    an RDN of several attributes, which a certificate that was made properly has in the order of their DER.
    """
    name, exact = spoken(text), _read(text, _OCTET)
    found = [write(name), write([sorted(rdn, key=_member) for rdn in name]), *([text] if write(exact) == text else [])]
    return list(dict.fromkeys(found))


def _member(attribute: Attribute) -> bytes:
    return encode_element(0x30, encode_oid(attribute.oid) + encode_element(attribute.tag, attribute.value))


def _read(text: str, octet: re.Pattern[str]) -> Name:
    name: Name = []
    at = 0
    while at < len(text):
        sign, following = text[at], text[at + 1 : at + 2]
        if sign in "/+" and (kind := _TYPE.match(text, at + 1)) and (name or sign == "/"):
            _begin(name, sign, kind[1], text)
            at = kind.end()
            continue
        if not name:
            break
        if sign == "/" and following == "*":
            raise NotADn(f"{text!r}: there are no patterns; a slash in a value is written \\/")
        taken = 1
        if sign == "\\" and following and following in "/+":
            octets, taken = following.encode(), 2
        elif found := octet.match(text, at):
            octets, taken = bytes.fromhex(found[1]), 4
        else:
            octets = _octets(sign, text)
        name[-1][-1].value += octets
        at += taken
    if not name:
        raise NotADn(f"{text!r} is no DN in slash form, such as {EXAMPLE}{_slashed(text)}")
    for attribute in (attribute for rdn in name for attribute in rdn):
        try:
            attribute.value.decode()
        except UnicodeDecodeError:
            attribute.tag = TELETEX
    return name


def _octets(sign: str, text: str) -> bytes:
    if sign < " " or sign == "\x7f":
        raise NotADn(f"{text!r}: the character {sign!r} is written \\x{ord(sign):02X}")
    try:
        return sign.encode()
    except UnicodeEncodeError:
        raise NotADn(f"{text!r} is not UTF-8") from None


def _begin(name: Name, sign: str, kind: str, text: str) -> None:
    oid = _oid(kind)
    if not oid:
        plain = f"; if it is part of a value, write \\{sign}{kind}=" if name else ""
        raise NotADn(f"{text!r}: {kind} is no type that OpenSSL knows, such as CN, nor an OID{plain}")
    if sign == "/":
        name.append([])
    name[-1].append(Attribute(oid, b""))


def _oid(kind: str) -> str:
    return _OIDS.get(kind) or _SPOKEN.get(kind.lower()) or (kind if _OID.fullmatch(kind) else "")


def _slashed(text: str) -> str:
    """Return a hint where the text is a DN of RFC 4514, or of OpenSSL 3's default, which begins at the other end."""
    try:
        name = parse_rfc4514(text)
    except NotADn:
        return ""
    if len(name) == 1:
        return f": say {write(name)}"
    return f": say {write(name)}, or if it begins with the country or domain {write(name[::-1])}"


# -- RFC 4514


def rfc4514(name: Name) -> str:
    r"""Return the form of RFC 2253 and 4514, last RDN first, as ``openssl x509 -nameopt RFC2253``: UTF-8 as ``\HH``.

    Raises:
        ValueError: a value's octets are no characters of its type.
    """
    return ",".join("+".join(map(_pair, reversed(rdn))) for rdn in reversed(name))


def _pair(attribute: Attribute) -> str:
    if attribute.oid not in _NAMES or attribute.tag not in ENCODINGS:
        return f"{short_name(attribute.oid)}=#{encode_element(attribute.tag, attribute.value).hex().upper()}"
    text = attribute.text()
    said = ""
    for at, sign in enumerate(text):
        if sign in ',+"\\<>;' or (sign == " " and at in {0, len(text) - 1}) or (sign == "#" and at == 0):
            said += f"\\{sign}"
        elif " " <= sign <= "~":
            said += sign
        else:
            said += "".join(f"\\{octet:02X}" for octet in sign.encode())
    return f"{short_name(attribute.oid)}={said}"


_PAIR = re.compile(
    r"""[ ]* ([A-Za-z][A-Za-z0-9-]* | [0-9]+(?:\.[0-9]+)+) [ ]*=[ ]*
    (?: \#([0-9A-Fa-f]+) | "((?:[^"\\]|\\.)*)" | ((?:[^,;+"\\<>]|\\.)*?) ) [ ]* ([,;+]|\Z)""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(rb"\\([0-9A-Fa-f]{2}|.)", re.DOTALL)


def parse_rfc4514(text: str) -> Name:
    """Return the name of a text by RFC 4514, or as RFC 2253, 4, allows it besides: quotes, semicolons, blanks.

    Raises:
        NotADn: it is none.
    """
    name, rdn, at = [], [], 0
    while not at or text[at - 1] in ",;+":
        found = _PAIR.match(text, at)
        if not found or not (oid := _oid(found[1])):
            raise NotADn(f"{text!r} is no DN such as CN=Some Body,OU=People,O=Gridlab,DC=grid,DC=test")
        attribute = Attribute(oid, b"")
        if found[2]:
            try:
                der = bytes.fromhex(found[2])
                content, _ = _tlv(der, der[0])
            except ValueError as error:
                raise NotADn(f"{text!r}: {found[2]!r} is no DER element: {error}") from None
            attribute.tag, attribute.value = der[0], content
        else:
            raw = (found[3] or found[4] or "").encode(errors="surrogateescape")
            attribute.value = _ESCAPE.sub(_unescaped, raw)
        rdn.append(attribute)
        if found[5] != "+":
            name.append(rdn[::-1])
            rdn = []
        at = found.end()
        if not found[5]:
            break
    return name[::-1]


def _unescaped(found: re.Match[bytes]) -> bytes:
    return bytes.fromhex(found[1].decode()) if len(found[1]) == 2 else found[1]


# -- HTCondor


def mapfile(text: str) -> str:
    r"""Return a field of HTCondor's mapfile that is this DN (one-line form, which HTCondor's own attributes have too).

    In quotes a ``\\`` stands for itself, but not before a quote or another one: such a name is a regular expression.
    """
    if not re.search(r'"|\\\\|\\$', text):
        return f'"{text}"'
    plain = "".join(sign if sign.isalnum() or sign in " =" else f"\\x{ord(sign):02X}" for sign in text)
    return f"/^{plain}$/"
