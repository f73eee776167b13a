"""Verification of a presented chain against a CA directory, as /etc/grid-security/certificates is laid out.

HASH.0 holds a CA's certificate (PEM), HASH.r0 its revocation list. Files are looked at on every call, so refreshed
lists count at once. Everything fails closed: a missing or expired list refuses, as LCMAPS does for an expired one.
Not looked at: signing_policy files, and lists that a certificate points to (no network).
"""

import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from pilotbed.x509.chain import (
    INHERIT_ALL,
    LIMITED,
    PROXY_CERT_INFO,
    CertificateError,
    Chain,
    extensions,
    proxy_info,
    readable,
    reason,
)
from pilotbed.x509.files import ParsedFiles
from pilotbed.x509.names import name_hash, slash

_SKEW = dt.timedelta(minutes=5)  # of the CA's clock against ours, for a list that was issued a moment ago
_DEPTH = 8  # CAs between end entity and root; nobody has more than three
_WEAK = ("md5", "sha1")
_UNDERSTOOD = {
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    ExtensionOID.CERTIFICATE_POLICIES,  # informative: no policy is required of anybody here
    PROXY_CERT_INFO,
}

_T = TypeVar("_T", x509.Certificate, x509.CertificateRevocationList)


class TrustError(CertificateError):
    """Our own trust material does not allow a decision (no or expired revocation list): refuse, and try again later."""


class TrustStore:
    """A CA directory.

    Args:
        directory: holds HASH.N and HASH.rN files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = ParsedFiles()

    def verify(
        self,
        chain: Chain,
        now: dt.datetime | None = None,
        purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
    ) -> Chain:
        """Check proxies, end entity, CAs and revocation (RFC 5280, 6.1, as far as grids need it; RFC 3820, 4.1).

        Args:
            chain: as presented; CAs in it are ignored, they are taken from the directory only.
            now: aware; the present when omitted.
            purpose: what the extended key usage, where there is one, must allow.
        Returns:
            the verified part: proxies and end entity.
        Raises:
            TrustError: a CA's revocation list is missing, expired or broken.
            CertificateError: the chain is no good; the text says why.
        """
        now = now or dt.datetime.now(dt.UTC)
        verified = Chain((*chain.proxies, chain.end_entity))
        for certificate in verified.certificates:
            _check_basics(certificate, now, purpose)
        if _is_ca(verified.end_entity):
            raise CertificateError(f"a CA certificate is no end entity: {verified.dn}")
        for depth, (proxy, issuer) in enumerate(zip(verified.proxies, verified.certificates[1:], strict=False)):
            _check_proxy(proxy, issuer, depth)
        self._check_issuers(verified.end_entity, now)
        return verified

    def _check_issuers(self, certificate: x509.Certificate, now: dt.datetime) -> None:
        """From an end-entity certificate up to a self-signed CA of the directory, revocation at each step."""
        for below in range(_DEPTH):
            ca = self._issuer(certificate)
            _check_ca(ca, below, now)
            self._check_revoked(certificate, ca, now)
            if ca.subject == ca.issuer:
                return
            certificate = ca
        raise CertificateError(f"more than {_DEPTH} CAs above {slash(certificate.subject)}")

    def _issuer(self, certificate: x509.Certificate) -> x509.Certificate:
        named = False
        for ca in self._load(certificate.issuer, "", _read_ca):
            if ca.subject == certificate.issuer:
                named = True
                if _signed_by(certificate, ca):
                    return ca
        if named:
            raise CertificateError(
                f"bad signature: {slash(certificate.subject)} was not signed by the {slash(certificate.issuer)} we know"
            )
        raise CertificateError(f"unknown CA {slash(certificate.issuer)} (issuer of {slash(certificate.subject)})")

    def _check_revoked(self, certificate: x509.Certificate, ca: x509.Certificate, now: dt.datetime) -> None:
        lists = [
            crl
            for crl in self._load(ca.subject, "r", _read_list)
            if crl.issuer == ca.subject and _list_signed_by(crl, ca)
        ]
        if not lists:
            raise TrustError(f"no valid revocation list of {slash(ca.subject)} in {self.directory}")
        crl = max(lists, key=lambda candidate: candidate.last_update_utc)
        if crl.next_update_utc is None or crl.next_update_utc <= now:
            raise TrustError(f"revocation list of {slash(ca.subject)} expired at {crl.next_update_utc}")
        if crl.last_update_utc > now + _SKEW:
            raise TrustError(f"revocation list of {slash(ca.subject)} is of the future: {crl.last_update_utc}")
        if any(extension.critical for extension in crl.extensions):
            raise TrustError(f"revocation list of {slash(ca.subject)} has a critical extension that we do not know")
        entry = crl.get_revoked_certificate_by_serial_number(certificate.serial_number)
        if entry is not None:
            raise CertificateError(
                f"certificate revoked: {slash(certificate.subject)} at {entry.revocation_date_utc:%FT%TZ}"
            )

    def _load(self, name: x509.Name, kind: str, parse: Callable[[bytes], _T]) -> Iterator[_T]:
        """HASH.0, HASH.1, … (`kind` "r": HASH.r0, …) until a number is missing; parsed again when a file changed."""
        for number in range(10):
            path = self.directory / f"{name_hash(name)}.{kind}{number}"
            try:
                parsed = self._files.load(path, parse)
            except (OSError, CertificateError) as error:
                raise TrustError(f"{path}: {error}") from None
            if parsed is None:
                return
            yield parsed


def _read_ca(pem: bytes) -> x509.Certificate:
    return readable(lambda: [x509.load_pem_x509_certificate(pem)])[0]


def _read_list(pem: bytes) -> x509.CertificateRevocationList:
    """A revocation list with everything in it read, as in `readable`."""
    try:
        crl = x509.load_pem_x509_crl(pem)
        _ = slash(crl.issuer), crl.last_update_utc, crl.next_update_utc, crl.extensions, crl.signature_algorithm_oid
        for entry in crl:
            _ = entry.serial_number, entry.revocation_date_utc
    except Exception as error:
        raise CertificateError(f"unreadable revocation list: {reason(error)}") from None
    return crl


def _check_basics(certificate: x509.Certificate, now: dt.datetime, purpose: x509.ObjectIdentifier) -> None:
    what = "proxy" if proxy_info(certificate) else "certificate"
    name = slash(certificate.subject)
    if certificate.not_valid_after_utc <= now:
        raise CertificateError(f"{what} expired at {certificate.not_valid_after_utc:%FT%TZ}: {name}")
    if certificate.not_valid_before_utc > now:
        raise CertificateError(f"{what} not valid before {certificate.not_valid_before_utc:%FT%TZ}: {name}")
    _check_form(certificate)
    for extension in extensions(certificate):
        value = extension.value
        if isinstance(value, x509.ExtendedKeyUsage) and not {purpose, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & {
            *value
        }:
            raise CertificateError(f"extended key usage does not allow this use: {name}")


def _check_form(certificate: x509.Certificate) -> None:
    name = slash(certificate.subject)
    for extension in extensions(certificate):
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise CertificateError(f"critical extension {extension.oid.dotted_string} not understood: {name}")
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        raise CertificateError(f"unknown signature algorithm: {name}") from None
    if algorithm is not None and algorithm.name in _WEAK and certificate.subject != certificate.issuer:
        raise CertificateError(f"weak signature algorithm {algorithm.name}: {name}")


def _check_proxy(proxy: x509.Certificate, issuer: x509.Certificate, depth: int) -> None:
    """RFC 3820, 4.1 for one step; `depth`: how many proxies lie below `proxy`."""
    name, info = slash(proxy.subject), proxy_info(proxy)
    if info is None or not info.critical:
        raise CertificateError(f"proxyCertInfo is not critical: {name}")
    if info.language not in (INHERIT_ALL, LIMITED):
        raise CertificateError(f"proxy policy {info.language} does not pass on the end entity's rights: {name}")
    if info.path_length is not None and depth > info.path_length:
        raise CertificateError(f"proxy path length {info.path_length} exceeded by {depth} below: {name}")
    if proxy.issuer != issuer.subject:
        raise CertificateError(f"broken chain: {name} says it was issued by {slash(proxy.issuer)}")
    *prefix, last = proxy.subject.rdns
    if prefix != list(issuer.subject.rdns) or [attribute.oid for attribute in last] != [x509.NameOID.COMMON_NAME]:
        raise CertificateError(f"forged proxy subject {name}: not {slash(issuer.subject)} and one CN")
    if not _signed_by(proxy, issuer):
        raise CertificateError(f"bad signature on proxy {name}")
    if _is_ca(proxy):
        raise CertificateError(f"a proxy cannot be a CA: {name}")
    for extension in extensions(proxy):
        if extension.oid in (ExtensionOID.SUBJECT_ALTERNATIVE_NAME, ExtensionOID.ISSUER_ALTERNATIVE_NAME):
            raise CertificateError(f"a proxy has no alternative names: {name}")
    usage = _key_usage(proxy)
    if usage is not None and usage.key_cert_sign:
        raise CertificateError(f"a proxy cannot sign as a CA: {name}")
    usage = _key_usage(issuer)
    if usage is not None and not usage.digital_signature:
        raise CertificateError(f"key usage does not allow to sign a proxy: {slash(issuer.subject)}")


def _check_ca(ca: x509.Certificate, below: int, now: dt.datetime) -> None:
    """`below`: how many CAs lie between this one and the end entity."""
    name = slash(ca.subject)
    if not ca.not_valid_before_utc <= now < ca.not_valid_after_utc:
        raise CertificateError(f"CA certificate expired or not yet valid: {name}")
    _check_form(ca)
    if not _is_ca(ca):
        raise CertificateError(f"issuer is not a CA: {name}")
    limit = next((e.value.path_length for e in extensions(ca) if isinstance(e.value, x509.BasicConstraints)), None)
    if limit is not None and below > limit:
        raise CertificateError(f"CA path length {limit} exceeded: {name}")
    usage = _key_usage(ca)
    if usage is not None and not usage.key_cert_sign:
        raise CertificateError(f"key usage does not allow to sign certificates: {name}")


def _is_ca(certificate: x509.Certificate) -> bool:
    return any(isinstance(e.value, x509.BasicConstraints) and e.value.ca for e in extensions(certificate))


def _key_usage(certificate: x509.Certificate) -> x509.KeyUsage | None:
    return next((e.value for e in extensions(certificate) if isinstance(e.value, x509.KeyUsage)), None)


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True


def _list_signed_by(crl: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    usage = _key_usage(ca)
    if usage is not None and not usage.crl_sign:
        return False
    try:
        return crl.is_signature_valid(ca.public_key())  # type: ignore[arg-type]  # TypeError for odd keys, below
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
