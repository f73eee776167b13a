"""VOMS attribute certificates (AC), found in a proxy and verified.

Sources: the format is OGF GFD.182, a profile of RFC 3281 (now RFC 5755); `.lsc` files, the place in the chain and what
counts as the holder are as VOMS 2.1 has them (src/api/ccapi/api_util.cc, src/ac/validate.cc), as LCMAPS uses it.
Stricter than VOMS: an AC ends with its notAfter (VOMS: 5 minutes later), the holder is always given by issuer and
serial, an AC for certain targets is refused, weak signatures are refused, and there are no certificates in vomsdir.
"""

import datetime as dt
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from asn1crypto import cms, core
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from pilotbed.x509.chain import CertificateError, Chain, extensions, is_proxy, readable, reason
from pilotbed.x509.files import ParsedFiles
from pilotbed.x509.names import slash
from pilotbed.x509.trust import TrustError, TrustStore

ACSEQ = x509.ObjectIdentifier("1.3.6.1.4.1.8005.100.100.5")  # extension of the proxy: SEQUENCE { SEQUENCE OF AC }
FQANS = "1.3.6.1.4.1.8005.100.100.4"  # attribute of the AC: IetfAttrSyntax, values are octet strings
CERTIFICATES = "1.3.6.1.4.1.8005.100.100.10"  # extension of the AC: SEQUENCE { SEQUENCE OF Certificate }, signer first
NO_REVOCATION, AUTHORITY_KEY, TARGETS = "2.5.29.56", "2.5.29.35", "2.5.29.55"

_SKEW = dt.timedelta(minutes=5)  # of the VOMS server's clock against ours, for an AC that was issued a moment ago
_HASHES = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}
_AUTHORITY = re.compile(r"(?P<vo>[A-Za-z0-9][\w.-]*)://(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*):[0-9]{1,5}", re.ASCII)
_FQAN = re.compile(r"(?P<group>(?:/[\w.-]+)+?)(?:/Role=(?P<role>[\w.-]+))?(?:/Capability=(?P<capability>[\w.-]+))?",
                   re.ASCII)  # fmt: skip
_NEXT_CHAIN = re.compile(r"-+\s*NEXT CHAIN\s*-+")
# What asn1crypto raises: any of these, RecursionError for deep nesting.
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, ArithmeticError)


class _Acs(core.SequenceOf):  # type: ignore[misc]
    _child_spec = cms.AttributeCertificateV2


class _AcSeq(core.SequenceOf):  # type: ignore[misc]
    _child_spec = _Acs


class _Certificates(core.SequenceOf):  # type: ignore[misc]
    _child_spec = asn1.Certificate


class _CertificatesSeq(core.SequenceOf):  # type: ignore[misc]
    _child_spec = _Certificates


class _IetfAttributes(core.SetOf):  # type: ignore[misc]
    _child_spec = cms.IetfAttrSyntax


class _Ac(NamedTuple):
    """What an attribute certificate says."""

    signed: bytes  # the ac_info as it came
    signature: bytes
    algorithms: tuple[asn1.SignedDigestAlgorithm, asn1.SignedDigestAlgorithm]  # the one within ac_info, then without
    version: str
    holder: cms.Holder
    issuer: cms.AttCertIssuer
    not_before: dt.datetime
    not_after: dt.datetime
    signers: tuple[x509.Certificate, ...]
    extensions: dict[str, tuple[bool, bytes]]  # by OID: critical, value
    key_identifier: bytes | None
    authority: str
    values: tuple[str, ...]


class Attributes(NamedTuple):
    """What the verified attribute certificates of a chain say.

    Attributes:
        fqans: primary first, without /Role=NULL and /Capability=NULL.
        not_after: when the first of them ends, aware; None if there are none.
        servers: the certificates of the VOMS servers that signed them.
    """

    fqans: tuple[str, ...]
    not_after: dt.datetime | None
    servers: tuple[x509.Certificate, ...]


def has_attributes(certificate: x509.Certificate) -> bool:
    """Whether this very certificate carries VOMS attribute certificates; they may still be no good."""
    return _carried(certificate) is not None


def ends(chain: Chain) -> list[dt.datetime]:
    """When the ACs end that a chain carries (aware), as far as these say; nothing of it is verified.

    Raises:
        CertificateError: they cannot be read.
    """
    carried = next((der for der in map(_carried, chain.certificates) if der is not None), None)
    return [ac.not_after for ac in _parse(carried)] if carried is not None else []


class VomsStore:
    """A vomsdir: which VOMS servers may speak for which VO.

    VO/HOST.lsc holds, one a line, the DNs of the server's certificate and of its issuer in slash form, then subject and
    issuer of each further certificate that the server sends along; `------ NEXT CHAIN ------` separates alternatives.
    The files are looked at on every call.

    Args:
        directory: as /etc/grid-security/vomsdir.
        trust: verifies the servers' certificates.
    """

    def __init__(self, directory: Path, trust: TrustStore) -> None:
        self.directory = directory
        self.trust = trust
        self._files = ParsedFiles()

    def fqans(self, chain: Chain, now: dt.datetime | None = None) -> tuple[str, ...]:
        """The verified FQANs of a chain; see `attributes`."""
        return self.attributes(chain, now).fqans

    def attributes(self, chain: Chain, now: dt.datetime | None = None) -> Attributes:
        """What the ACs of a chain say, verified.

        As in VOMS, the newest certificate that carries ACs counts; all of these must be good, and their FQANs follow
        one another.

        Args:
            chain: as `TrustStore.verify` returned it.
            now: aware; the present when omitted.
        Raises:
            TrustError: our own trust material does not allow a decision.
            CertificateError: an AC is no good; the text says why.
        """
        now = now or dt.datetime.now(dt.UTC)
        for certificate in chain.certificates:
            carried = _carried(certificate)
            if carried is not None:
                acs = _parse(carried)
                found = [fqan for ac in acs for fqan in self._verified(ac, chain.end_entity, now)]
                servers = tuple(ac.signers[0] for ac in acs)
                return Attributes(tuple(dict.fromkeys(found)), min(ac.not_after for ac in acs), servers)
        return Attributes((), None, ())

    def _verified(self, ac: _Ac, holder: x509.Certificate, now: dt.datetime) -> list[str]:
        """RFC 5755, 5, and the rules of VOMS."""
        authority = _AUTHORITY.fullmatch(ac.authority)  # also keeps paths out of the file's name
        if not authority:
            raise CertificateError(f"VOMS: policy authority {ac.authority!r} is not VO://host:port")
        if ac.version != "v2":
            raise CertificateError(f"VOMS: version of the attribute certificate is {ac.version}, not v2")
        _check_extensions(ac)
        self._check_server(ac, authority["vo"], authority["host"], now)
        _check_signature(ac)
        _check_holder(ac.holder, holder)
        if ac.not_before > now + _SKEW:
            raise CertificateError(f"VOMS: attribute certificate not valid before {ac.not_before:%FT%TZ}")
        if ac.not_after <= now:
            raise CertificateError(f"VOMS: attribute certificate expired at {ac.not_after:%FT%TZ}")
        if not ac.values:
            raise CertificateError("VOMS: attribute certificate without FQAN")
        return [_normalised(value, authority["vo"]) for value in ac.values]

    def _check_server(self, ac: _Ac, vo: str, host: str, now: dt.datetime) -> None:
        """Whether these are certificates of a server that may speak for the VO, and good."""
        if not ac.signers:
            raise CertificateError("VOMS: attribute certificate does not bring its server's certificate")
        server = ac.signers[0]
        names = [slash(name) for signer in ac.signers for name in (signer.subject, signer.issuer)]
        if not any(lines[: len(names)] == names for lines in self._chains(vo, host)):
            raise CertificateError(f"VOMS: {names[0]} (issuer {names[1]}) is not who may speak for VO {vo} from {host}")
        if any(lower.issuer != upper.subject for lower, upper in pairwise(ac.signers)):
            raise CertificateError(f"VOMS: broken chain of server {names[0]}")
        if is_proxy(server):
            raise CertificateError(f"VOMS: server {names[0]} signs with a proxy")
        try:
            self.trust.verify(Chain((server,)), now, ExtendedKeyUsageOID.SERVER_AUTH)
        except CertificateError as error:
            raise type(error)(f"VOMS server: {error}") from None
        usage = next((e.value for e in extensions(server) if isinstance(e.value, x509.KeyUsage)), None)
        if usage is not None and not usage.digital_signature:
            raise CertificateError(f"VOMS: key usage does not allow to sign attributes: {names[0]}")
        if not _is_directory_name(ac.issuer, server.subject):
            raise CertificateError(f"VOMS: issuer of the attribute certificate is not {names[0]}, who brings it")
        if ac.key_identifier is not None and ac.key_identifier not in _key_identifiers(server):
            raise CertificateError(f"VOMS: authority key identifier is not the key of {names[0]}")

    def _chains(self, vo: str, host: str) -> list[list[str]]:
        path = self.directory / vo / f"{host}.lsc"
        try:
            chains = self._files.load(path, _parse_lsc)
            if chains is None and not self.directory.is_dir():
                raise NotADirectoryError("no such directory of VOMS servers")
        except (OSError, ValueError) as error:
            raise TrustError(f"{path}: {error}") from None
        if chains is None:
            raise CertificateError(f"VOMS: unknown server {host} of VO {vo}: no {path}")
        return chains


def _carried(certificate: x509.Certificate) -> bytes | None:
    for extension in extensions(certificate):
        if extension.oid == ACSEQ:
            der: bytes = extension.value.public_bytes()
            return der
    return None


def _parse_lsc(content: bytes) -> list[list[str]]:
    chains: list[list[str]] = [[]]
    for line in map(str.strip, content.decode().splitlines()):
        if _NEXT_CHAIN.fullmatch(line):
            chains.append([])
        elif line:
            chains[-1].append(line[1:-1] if line[:1] == line[-1:] == '"' else line)
    for chain in chains:
        if len(chain) < 2 or any(not line.startswith("/") for line in chain):
            raise ValueError("not a list of DNs in slash form, at least server and issuer a chain")
    return chains


def _parse(der: bytes) -> list[_Ac]:
    try:
        (acs,) = _AcSeq.load(der, strict=True)
        found = [_read(ac) for ac in acs]
    except _MALFORMED as error:
        raise CertificateError(f"VOMS: malformed attribute certificate: {reason(error)}") from None
    if not found:
        raise CertificateError("VOMS: malformed attribute certificate: none in the extension")
    return found


def _read(ac: cms.AttributeCertificateV2) -> _Ac:
    """The fields; whatever asn1crypto raises is malformed."""
    info = ac["ac_info"]
    (attribute,) = [attribute for attribute in info["attributes"] if attribute["type"].dotted == FQANS]
    (syntax,) = _IetfAttributes.load(attribute["values"].dump(), strict=True)
    (authority,) = syntax["policy_authority"]
    if authority.name != "uniform_resource_identifier":
        raise ValueError(f"the policy authority is {authority.name}, not a URI")
    values = []
    for value in syntax["values"]:
        if value.name != "octets":
            raise ValueError(f"an FQAN is {value.name}, not octets")
        values.append(value.chosen.native.decode("ascii"))
    found: dict[str, tuple[bool, bytes]] = {}
    for extension in info["extensions"]:
        oid = extension["extn_id"].dotted
        if oid in found:
            raise ValueError(f"extension {oid} twice")
        found[oid] = (extension["critical"].native, extension["extn_value"].contents)
    signers: Iterable[asn1.Certificate] = ()
    if CERTIFICATES in found:
        (signers,) = _CertificatesSeq.load(found[CERTIFICATES][1], strict=True)
    key_identifier = None
    if AUTHORITY_KEY in found:
        key_identifier = asn1.AuthorityKeyIdentifier.load(found[AUTHORITY_KEY][1], strict=True)["key_identifier"].native
    if NO_REVOCATION in found:
        core.Null.load(found[NO_REVOCATION][1], strict=True)
    validity = info["att_cert_validity_period"]
    if ac["signature"].unused_bits:
        raise ValueError("the signature is no whole number of octets")
    return _Ac(
        signed=info.dump(),
        signature=ac["signature"].native,
        algorithms=(info["signature"], ac["signature_algorithm"]),
        version=info["version"].native,
        holder=info["holder"],
        issuer=info["issuer"],
        not_before=_moment(validity["not_before_time"].native),
        not_after=_moment(validity["not_after_time"].native),
        signers=readable(
            lambda: (x509.load_der_x509_certificate(signer.dump()) for signer in signers),
            "VOMS: malformed attribute certificate: malformed certificate of its server",
        ),
        extensions=found,
        key_identifier=key_identifier,
        # As it came: asn1crypto's URIs are normalised, a newline for one would be dropped.
        authority=authority.chosen.contents.decode("ascii"),
        values=tuple(values),
    )


def _moment(native: object) -> dt.datetime:
    """What asn1crypto makes of a GeneralizedTime; of the year 0 or without a time zone it is no moment."""
    if not isinstance(native, dt.datetime) or native.tzinfo is None:
        raise ValueError(f"{native} is no time in UTC")
    return native


def _check_extensions(ac: _Ac) -> None:
    """RFC 5755, 4.3; VOMS wants noRevAvail and the authority's key identifier to be there."""
    if TARGETS in ac.extensions:
        raise CertificateError("VOMS: attribute certificate is for certain targets only, of which we know nothing")
    for oid, (critical, _) in ac.extensions.items():
        if critical and oid not in (CERTIFICATES, NO_REVOCATION, AUTHORITY_KEY):
            raise CertificateError(f"VOMS: critical extension {oid} not understood")
    for oid, what in ((NO_REVOCATION, "noRevAvail"), (AUTHORITY_KEY, "authorityKeyIdentifier")):
        if oid not in ac.extensions:
            raise CertificateError(f"VOMS: attribute certificate without {what}")


def _check_signature(ac: _Ac) -> None:
    """Over the octets as they came (RFC 5755, 4.1); both places must name the same algorithm."""
    inner, outer = ac.algorithms
    try:
        if inner.dump() != outer.dump():
            raise CertificateError("VOMS: signature algorithms within and without the signed part differ")
        kind, digest = inner.signature_algo, inner.hash_algo
    except _MALFORMED:
        raise CertificateError("VOMS: unknown signature algorithm") from None
    server = ac.signers[0]
    key, algorithm = server.public_key(), _HASHES.get(digest)
    if algorithm is None:
        raise CertificateError(f"VOMS: weak signature algorithm {digest}")
    try:
        if kind == "rsassa_pkcs1v15" and isinstance(key, rsa.RSAPublicKey):
            key.verify(ac.signature, ac.signed, padding.PKCS1v15(), algorithm)
        elif kind == "ecdsa" and isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(ac.signature, ac.signed, ec.ECDSA(algorithm))
        else:
            raise CertificateError(f"VOMS: signature algorithm {kind} does not fit the key of {slash(server.subject)}")
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"VOMS: bad signature: not made by {slash(server.subject)}") from None


def _check_holder(claimed: cms.Holder, holder: x509.Certificate) -> None:
    """Whether the AC was made for this end entity (RFC 5755, 4.2.2: its issuer and serial).

    As VOMS does: vomsd without `--newformat` writes the holder's own subject in the place of its issuer.
    """
    foreign = CertificateError(f"VOMS: attributes of somebody else, not of {slash(holder.subject)}")
    try:
        base, entity = claimed["base_certificate_id"], claimed["entity_name"]
        if isinstance(claimed["object_digest_info"], cms.ObjectDigestInfo):
            raise CertificateError("VOMS: holder given by a digest")
        if not isinstance(base, cms.IssuerSerial):
            raise CertificateError("VOMS: holder not given by issuer and serial")
        if base["serial"].native != holder.serial_number:
            raise foreign
        if not any(_is_directory_name(base["issuer"], name) for name in (holder.issuer, holder.subject)):
            raise foreign
        if isinstance(entity, asn1.GeneralNames) and not _is_directory_name(entity, holder.subject):
            raise foreign
    except _MALFORMED as error:
        raise CertificateError(f"VOMS: malformed holder: {reason(error)}") from None


def _is_directory_name(names: Any, wanted: x509.Name) -> bool:
    """Whether GeneralNames, or an AttCertIssuer's, are this one directory name (compared as RFC 5280, 7.1)."""
    try:
        if isinstance(names, cms.AttCertIssuer):
            if names.name != "v2_form":
                return False
            form = names.chosen
            if any(not isinstance(form[field], core.Void) for field in ("base_certificate_id", "object_digest_info")):
                return False
            names = form["issuer_name"]
        (name,) = names
        return bool(name.name == "directory_name" and name.chosen == asn1.Name.load(wanted.public_bytes()))
    except _MALFORMED:
        return False


def _key_identifiers(certificate: x509.Certificate) -> set[bytes]:
    """RFC 5280, 4.2.1.2 (1), which vomsd writes, and the certificate's own."""
    own = {e.value.digest for e in extensions(certificate) if isinstance(e.value, x509.SubjectKeyIdentifier)}
    return own | {x509.SubjectKeyIdentifier.from_public_key(certificate.public_key()).digest}


def _normalised(value: str, vo: str) -> str:
    """GFD.182, 3.4: /VO/group/Role=role/Capability=capability; the first group is the VO's name."""
    fqan = _FQAN.fullmatch(value)
    if not fqan:
        raise CertificateError(f"VOMS: malformed FQAN {value!r}")
    group, role, capability = fqan.group("group", "role", "capability")
    if group.split("/")[1] != vo:
        raise CertificateError(f"VOMS: FQAN {value!r} is not of VO {vo}")
    return group + "".join(f"/{name}={given}" for name, given in (("Role", role), ("Capability", capability))
                           if given not in (None, "NULL"))  # fmt: skip
