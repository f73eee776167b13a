"""Names of certificates: their slash form (`pilotbed.dn`), and OpenSSL's hash of a name."""

import hashlib

from cryptography import x509

from pilotbed import dn


def slash(name: x509.Name) -> str:
    """The form of grid-mapfiles and VOMS: `/DC=test/DC=grid/O=Gridlab/CN=Alice Adams`, as X509_NAME_oneline(3).

    The form is ambiguous where a value holds a backslash, so certificates are compared by Name; the slash form is for
    lists that people keep.

    Args:
        name: a certificate's subject or issuer.
    """
    return dn.write(dn.decode(name.public_bytes()))


def name_hash(name: x509.Name) -> str:
    """Eight hex digits: the HASH of HASH.0 and HASH.r0 in a CA directory (`openssl x509 -subject_hash`).

    Args:
        name: a CA's subject.
    Source: x509_name_canon() in OpenSSL's crypto/x509/x_name.c: every string becomes a UTF8String, lower case (ASCII
    only), blanks trimmed and collapsed; SHA-1 over the RDNs without the outer SEQUENCE; first four bytes, reversed.
    """
    rdns = b"".join(map(_canonical_rdn, dn.decode(name.public_bytes())))
    return hashlib.sha1(rdns, usedforsecurity=False).digest()[3::-1].hex()


#: The strings that x509_name_canon() changes (ASN1_MASK_CANON); others, such as NumericString, stay as they are.
_CANONICAL = {dn.UTF8, 19, dn.TELETEX, 22, 26, dn.UNIVERSAL, dn.BMP}


def _canonical_rdn(rdn: list[dn.Attribute]) -> bytes:
    encoded = []
    for attribute in rdn:
        tag, content = attribute.tag, attribute.value
        if tag in _CANONICAL:
            tag, content = dn.UTF8, b" ".join(attribute.text().encode().lower().split())  # ASCII only, as OpenSSL
        encoded.append(dn.encode_element(0x30, dn.encode_oid(attribute.oid) + dn.encode_element(tag, content)))
    return dn.encode_element(0x31, b"".join(sorted(encoded)))
