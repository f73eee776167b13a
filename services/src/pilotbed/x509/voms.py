"""VOMS attribute certificates: found and read, NOT verified.

Neither the VOMS server's signature nor holder nor validity are looked at here, so nothing may be authorised on what
these functions return; LCMAPS verifies on the nodes, and verification of our own comes with the relay's FQAN rules.
"""

from asn1crypto import cms, core
from cryptography import x509

ACSEQ = x509.ObjectIdentifier("1.3.6.1.4.1.8005.100.100.5")  # extension of the proxy: SEQUENCE { SEQUENCE OF AC }
FQANS = "1.3.6.1.4.1.8005.100.100.4"  # attribute of the AC: IetfAttrSyntax, values are octet strings


class _Certificates(core.SequenceOf):  # type: ignore[misc]
    _child_spec = cms.AttributeCertificateV2


class _AcSeq(core.SequenceOf):  # type: ignore[misc]
    _child_spec = _Certificates


def _extension(certificate: x509.Certificate) -> bytes | None:
    for extension in certificate.extensions:
        if extension.oid == ACSEQ:
            der: bytes = extension.value.public_bytes()
            return der
    return None


def has_attributes(certificate: x509.Certificate) -> bool:
    """Whether this very certificate carries a VOMS attribute certificate."""
    return _extension(certificate) is not None


def claimed_fqans(certificate: x509.Certificate) -> tuple[str, ...]:
    """The FQANs as written in the first attribute certificate, e.g. `/gridlab/Role=pilot/Capability=NULL`; unverified.

    Raises:
        ValueError: the extension is malformed.
    Source: VOMS attribute certificate format, OGF GFD.182.
    """
    der = _extension(certificate)
    if der is None:
        return ()
    try:
        first = _AcSeq.load(der, strict=True)[0][0]
        fqans: list[str] = []
        for attribute in first["ac_info"]["attributes"]:
            if attribute["type"].dotted == FQANS:
                for syntax in attribute["values"]:
                    parsed = syntax if isinstance(syntax, cms.IetfAttrSyntax) else syntax.parse(cms.IetfAttrSyntax)
                    fqans += [value.chosen.native.decode("ascii") for value in parsed["values"]]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"malformed VOMS attribute certificate: {str(error).splitlines()[0]}") from None
    return tuple(fqans)
