"""Certificate chains and credentials, and the making of RFC 3820 proxies."""

import datetime as dt
import re
import secrets
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from asn1crypto import core
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from pilotbed.files import replace_file
from pilotbed.x509.names import slash

PROXY_CERT_INFO = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.14")
INHERIT_ALL = "1.3.6.1.5.5.7.21.1"
LIMITED = "1.3.6.1.4.1.3536.1.1.1.9"
BACKDATE = dt.timedelta(minutes=5)  # as Globus and VOMS do, for clocks that lag
LEAST_BITS = 2048  # of an RSA key that somebody else has made

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class CertificateError(Exception):
    """A certificate or a chain that cannot be used; the text is the reason, fit for a log and for the user."""


class _ProxyPolicy(core.Sequence):  # type: ignore[misc]
    _fields = [("language", core.ObjectIdentifier), ("policy", core.OctetString, {"optional": True})]  # noqa: RUF012  # asn1crypto completes the list


class _ProxyCertInfo(core.Sequence):  # type: ignore[misc]
    _fields = [("path_length", core.Integer, {"optional": True}), ("policy", _ProxyPolicy)]  # noqa: RUF012  # asn1crypto completes the list


@dataclass(frozen=True)
class ProxyInfo:
    """The proxyCertInfo extension (RFC 3820, 3.8).

    Attributes:
        path_length: how many more proxies may follow below this one; None: any number.
        language: dotted OID of the policy language (`INHERIT_ALL`, `LIMITED`, …).
        critical: whether the extension is marked critical, as it must be.
    """

    path_length: int | None
    language: str
    critical: bool

    @property
    def limited(self) -> bool:
        return self.language == LIMITED


def extensions(certificate: x509.Certificate) -> x509.Extensions:
    """The extensions, or CertificateError where they cannot be parsed."""
    try:
        return certificate.extensions
    except Exception as error:  # see `readable`
        raise CertificateError(f"malformed extensions in {slash(certificate.subject)}: {reason(error)}") from None


def readable(
    load: Callable[[], Iterable[x509.Certificate]], failed: str = "unreadable certificate"
) -> tuple[x509.Certificate, ...]:
    """What `load` gives, with all that is looked at later already read: cryptography reads most of it when asked.

    So every error of somebody else's bytes is one here. What cryptography raises depends on the place and its version:
    ValueError, TypeError, KeyError, InvalidVersion, DuplicateExtension, UnsupportedGeneralNameType, …

    Raises:
        CertificateError: `failed`, and why.
    """
    try:
        certificates = tuple(load())
        for certificate in certificates:
            _ = certificate.subject, certificate.issuer, certificate.serial_number, certificate.version
            _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.signature_algorithm_oid
            _ = slash(certificate.subject), slash(certificate.issuer)
    except Exception as error:
        raise CertificateError(f"{failed}: {reason(error)}") from None
    for certificate in certificates:
        extensions(certificate)
    return certificates


def reason(error: Exception) -> str:
    """What an error of a library says, on one line; its name where it says nothing or only a number."""
    said = str(error).partition("\n")[0]
    return said if any(sign.isalpha() for sign in said) else f"{type(error).__name__} {said}".rstrip()


def proxy_info(certificate: x509.Certificate) -> ProxyInfo | None:
    """What the certificate says about being a proxy; None for an end-entity or CA certificate.

    Raises:
        CertificateError: the extension is malformed.
    """
    for extension in extensions(certificate):
        if extension.oid == PROXY_CERT_INFO:
            try:
                info = _ProxyCertInfo.load(extension.value.public_bytes(), strict=True)
                length, language = info["path_length"].native, info["policy"]["language"].dotted
            except Exception as error:  # of asn1crypto, for somebody else's bytes
                name = slash(certificate.subject)
                raise CertificateError(f"malformed proxyCertInfo in {name}: {reason(error)}") from None
            if length is not None and length < 0:
                raise CertificateError(f"malformed proxyCertInfo in {slash(certificate.subject)}: path length {length}")
            return ProxyInfo(length, language, extension.critical)
    return None


def is_proxy(certificate: x509.Certificate) -> bool:
    """Whether it is an RFC 3820 proxy (has proxyCertInfo). Older kinds (CN=proxy without it) are not proxies here."""
    return proxy_info(certificate) is not None


@dataclass(frozen=True)
class Chain:
    """Certificates as presented, leaf first: proxies, then the end-entity certificate, then perhaps CAs.

    Everything read from it is a claim until `TrustStore.verify` has returned the chain.

    Raises:
        CertificateError: empty, or proxies without the end-entity certificate that made them.
    """

    certificates: tuple[x509.Certificate, ...]

    def __post_init__(self) -> None:
        if not self.certificates:
            raise CertificateError("no certificate presented")
        if len(self.proxies) == len(self.certificates):
            raise CertificateError("the chain ends before the end-entity certificate of its proxy")

    @classmethod
    def from_pem(cls, pem: bytes) -> "Chain":
        """Every CERTIFICATE block in order; other blocks (a key) are passed over.

        Raises:
            CertificateError: no certificate, or one that cannot be parsed.
        """
        return cls(readable(lambda: x509.load_pem_x509_certificates(pem), "no readable certificate in PEM"))

    @classmethod
    def from_der(cls, certificates: Iterable[bytes]) -> "Chain":
        """From single DER certificates, leaf first.

        Raises:
            CertificateError: one cannot be parsed.
        """
        return cls(readable(lambda: map(x509.load_der_x509_certificate, certificates)))

    @property
    def leaf(self) -> x509.Certificate:
        return self.certificates[0]

    @cached_property
    def proxies(self) -> tuple[x509.Certificate, ...]:
        """The leading proxies, newest first; empty for a chain that starts at its end entity."""
        found = []
        for certificate in self.certificates:
            if not is_proxy(certificate):
                break
            found.append(certificate)
        return tuple(found)

    @property
    def end_entity(self) -> x509.Certificate:
        """The certificate that a CA gave to a person, host or service."""
        return self.certificates[len(self.proxies)]

    @cached_property
    def dn(self) -> str:
        """The end-entity DN in slash form: the identity that every proxy below it stands for."""
        return slash(self.end_entity.subject)

    @cached_property
    def limited(self) -> bool:
        """Whether any proxy of the chain is limited; what follows a limited proxy is limited too."""
        return any(info.limited for info in map(proxy_info, self.proxies) if info)

    @property
    def not_after(self) -> dt.datetime:
        """When the first certificate of the chain expires (aware, UTC)."""
        return min(certificate.not_valid_after_utc for certificate in self.certificates)

    def seconds_left(self, now: dt.datetime | None = None) -> float:
        """Seconds until `not_after`, negative once expired. `now`: aware, the present when omitted."""
        return (self.not_after - (now or dt.datetime.now(dt.UTC))).total_seconds()

    def pem(self) -> bytes:
        return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in self.certificates)


@dataclass(frozen=True)
class Credential:
    """A chain and the private key of its leaf."""

    chain: Chain
    key: Key

    def pem(self) -> bytes:
        """A grid proxy file: leaf, key (unencrypted, traditional form), rest of the chain."""
        leaf, *rest = (c.public_bytes(serialization.Encoding.PEM) for c in self.chain.certificates)
        key = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        return leaf + key + b"".join(rest)

    def save(self, path: Path) -> None:
        """Write `pem()` at `path` with mode 0600; readers see the old file or the whole new one."""
        replace_file(path, self.pem(), 0o600, durable=True)


_KEY_BLOCK = re.compile(rb"-----BEGIN ((?:RSA |EC )?PRIVATE KEY)-----.*?-----END \1-----", re.DOTALL)


def load_pem(path: Path | str, key: Path | str | None = None) -> Credential:
    """Read a credential.

    Args:
        path: a proxy file, or a file with a certificate (and perhaps its chain and key).
        key: the file of the key when it is not in `path`.
    Raises:
        CertificateError: no certificate, no unencrypted key, a key that others may read, or one of another certificate.
        OSError: a file cannot be read.
    """
    chain = Chain.from_pem(Path(path).read_bytes())
    holder = Path(key or path)
    blocks = _KEY_BLOCK.search(holder.read_bytes())
    if not blocks:
        raise CertificateError(f"{holder}: no unencrypted private key in it")
    mode = stat.S_IMODE(holder.stat().st_mode)
    if mode & 0o007:
        raise CertificateError(f"{holder}: mode {mode:04o} lets everybody use the private key; chmod 600 {holder}")
    try:
        private = serialization.load_pem_private_key(blocks.group(), None)
        if not isinstance(private, Key):
            raise CertificateError(f"{holder}: private key is neither RSA nor EC")
        belongs = _public(private) == _public(chain.leaf)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"{holder}: unreadable key: {reason(error)}") from None
    if not belongs:
        raise CertificateError(f"{holder}: private key does not belong to {slash(chain.leaf.subject)}")
    return Credential(chain, private)


def make_proxy(
    issuer: Credential,
    lifetime: dt.timedelta,
    kind: Literal["full", "limited"] = "full",
    path_length: int | None = None,
) -> Credential:
    """A new RFC 3820 proxy below `issuer`, with a new RSA 2048 key.

    Args:
        issuer: the end-entity credential or proxy that signs.
        lifetime: cut to what is left of the issuer's chain.
        kind: `limited` proxies may move files but must not start jobs; below a limited proxy all are limited.
        path_length: how many proxies may follow; None for any number.
    Raises:
        CertificateError: the issuer has expired.
    """
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return Credential(_signed(issuer, key.public_key(), lifetime, kind, path_length), key)


def delegate(issuer: Credential, request: bytes) -> Chain:
    """A new full RFC 3820 proxy for a key that somebody else has made and keeps; it lives as long as `issuer`.

    Args:
        issuer: the proxy that signs.
        request: the other's certificate request (PEM, PKCS #10); only its key counts.
    Raises:
        CertificateError: the request is none, is not signed by its own key, or has a weak key; the issuer has expired.
    """
    try:
        asked = x509.load_pem_x509_csr(request)
        key, proven = asked.public_key(), asked.is_signature_valid
    except Exception as error:  # of cryptography, for somebody else's bytes; see `readable`
        raise CertificateError(f"unreadable certificate request: {reason(error)}") from None
    if not proven:
        raise CertificateError("the certificate request is not signed by its own key")
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise CertificateError("the certificate request's key is neither RSA nor EC")
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < LEAST_BITS:
        raise CertificateError(f"the certificate request's key has {key.key_size} bits, fewer than {LEAST_BITS}")
    return _signed(issuer, key, dt.timedelta.max, "full", None)


def _signed(
    issuer: Credential,
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    lifetime: dt.timedelta,
    kind: Literal["full", "limited"],
    path_length: int | None,
) -> Chain:
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    left = issuer.chain.not_after - now
    if left <= dt.timedelta(0):
        raise CertificateError(f"cannot make a proxy: {issuer.chain.dn} expired at {issuer.chain.not_after:%FT%TZ}")
    parent = issuer.chain.leaf
    serial = secrets.randbelow(2**31 - 1) + 1
    common_name = x509.RelativeDistinguishedName([x509.NameAttribute(NameOID.COMMON_NAME, str(serial))])
    limited = kind == "limited" or issuer.chain.limited
    info = _ProxyCertInfo({"policy": {"language": LIMITED if limited else INHERIT_ALL}})
    if path_length is not None:
        info["path_length"] = path_length
    usage = x509.KeyUsage(
        digital_signature=True, key_encipherment=True, content_commitment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([*parent.subject.rdns, common_name]))
        .issuer_name(parent.subject)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(max(now - BACKDATE, parent.not_valid_before_utc))
        .not_valid_after(now + min(lifetime, left))
        .add_extension(usage, critical=True)
        .add_extension(x509.UnrecognizedExtension(PROXY_CERT_INFO, info.dump()), critical=True)
        .sign(issuer.key, hashes.SHA256())
    )
    return Chain((certificate, *issuer.chain.certificates))


def _public(holder: Key | x509.Certificate) -> bytes:
    return holder.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
