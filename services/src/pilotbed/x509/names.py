"""Distinguished names: the slash form of the grid, and OpenSSL's hash of a name."""

import hashlib

from asn1crypto import core
from cryptography import x509
from cryptography.x509.oid import NameOID

# Short names as OpenSSL prints them (crypto/objects); any other type is printed as its dotted OID.
_SHORT = {
    NameOID.COMMON_NAME: "CN",
    NameOID.SURNAME: "SN",
    NameOID.SERIAL_NUMBER: "serialNumber",
    NameOID.COUNTRY_NAME: "C",
    NameOID.LOCALITY_NAME: "L",
    NameOID.STATE_OR_PROVINCE_NAME: "ST",
    NameOID.STREET_ADDRESS: "street",
    NameOID.ORGANIZATION_NAME: "O",
    NameOID.ORGANIZATIONAL_UNIT_NAME: "OU",
    NameOID.TITLE: "title",
    NameOID.GIVEN_NAME: "GN",
    NameOID.EMAIL_ADDRESS: "emailAddress",
    NameOID.USER_ID: "UID",
    NameOID.DOMAIN_COMPONENT: "DC",
}


def slash(name: x509.Name) -> str:
    """The form of grid-mapfiles and VOMS: `/DC=test/DC=grid/O=Gridlab/CN=Alice Adams`.

    As X509_NAME_oneline(3): printable ASCII as it is, every other byte as \\xHH. The form is ambiguous when a value
    holds a slash (`CN=host/x`), so certificates are compared by Name; the slash form is for lists that people keep.

    Args:
        name: a certificate's subject or issuer.
    """
    parts = []
    for attribute in name:
        value = attribute.value
        raw = value if isinstance(value, bytes) else value.encode()
        text = "".join(chr(byte) if 0x20 <= byte <= 0x7E else f"\\x{byte:02X}" for byte in raw)
        parts.append(f"/{_SHORT.get(attribute.oid, attribute.oid.dotted_string)}={text}")
    return "".join(parts)


def name_hash(name: x509.Name) -> str:
    """Eight hex digits: the HASH of HASH.0 and HASH.r0 in a CA directory (`openssl x509 -subject_hash`).

    Args:
        name: a CA's subject.
    Source: x509_name_canon() in OpenSSL's crypto/x509/x_name.c: every string becomes a UTF8String, lower case (ASCII
    only), blanks trimmed and collapsed; SHA-1 over the RDNs without the outer SEQUENCE; first four bytes, reversed.
    """
    return hashlib.sha1(b"".join(map(_canonical_rdn, name.rdns)), usedforsecurity=False).digest()[3::-1].hex()


def _canonical_rdn(rdn: x509.RelativeDistinguishedName) -> bytes:
    encoded = []
    for attribute in rdn:
        value = attribute.value
        text = (
            value if isinstance(value, bytes) else b" ".join(value.encode().lower().split())
        )  # ASCII only, as OpenSSL
        oid: bytes = core.ObjectIdentifier(attribute.oid.dotted_string).dump()
        encoded.append(_tlv(0x30, oid + _tlv(0x0C, text)))
    return _tlv(0x31, b"".join(sorted(encoded)))


def _tlv(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(digits)]) + digits + content
