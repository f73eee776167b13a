"""The authority: what it issues and revokes, kept in one directory on the CA's host.

Profiles follow the IGTF's classic profile as far as the middleware looks: see ``PROFILES``.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pilotbed import dn
from pilotbed.x509.names import name_hash, slash

KEY_BITS = 2048
CA_DAYS = 3650
#: Everything is dated back, since clocks of a grid's nodes differ.
SKEW = datetime.timedelta(minutes=5)

#: Longest values, in characters: the upper bounds of X.520 and RFC 5280, Appendix A.1, as OpenSSL has them.
_LIMITS = {
    "CN": 64, "O": 64, "OU": 64, "L": 128, "ST": 128, "street": 128, "title": 64, "serialNumber": 64, "postalCode": 40,
    "emailAddress": 128, "pseudonym": 128, "DC": 63, "UID": 256,
}  # fmt: skip
_ANY = 32768  # ub-name
#: What a value has to be: a country, one label of a domain, an address.
_FORMS = {
    "C": (re.compile("[A-Z]{2}"), "a country in two capitals (ISO 3166), such as CH"),
    "DC": (re.compile("[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"), "one label of a domain, such as test"),
    "emailAddress": (re.compile(r"[!-?A-~]+@[!-?A-~]+"), "an e-mail address in ASCII, such as alice@grid.test"),
    "serialNumber": (re.compile(r"[A-Za-z0-9 '()+,./:=?-]+"), "a PrintableString"),
    "dnQualifier": (re.compile(r"[A-Za-z0-9 '()+,./:=?-]+"), "a PrintableString"),
}
_HOST = re.compile(r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE)


class AuthorityError(Exception):
    """A request that the authority refuses; the message says why."""


@dataclass(frozen=True)
class Profile:
    """What a kind of end entity may do with its certificate.

    Attributes:
        days: life of the certificate, in days.
        server: whether it may authenticate a server (and carries its name as subjectAltName).
        encipher_data: whether key usage has dataEncipherment, which old Globus tools ask of users.
    """

    days: int
    server: bool
    encipher_data: bool


PROFILES = {
    "host": Profile(days=395, server=True, encipher_data=False),
    "user": Profile(days=395, server=False, encipher_data=True),
    "service": Profile(days=395, server=False, encipher_data=True),
}


def parse_dn(text: str) -> x509.Name:
    """Return the name of a DN in slash form, also as people write it: ``/DC=test/CN=Robot/Alice``.

    Any type that OpenSSL knows, or an OID; several attributes in an RDN with ``+``.

    Raises:
        AuthorityError: the text is not such a DN, or a value is none of its type.
    """
    try:
        return x509.Name([x509.RelativeDistinguishedName(map(_attribute, rdn)) for rdn in dn.spoken(text)])
    except (ValueError, TypeError) as error:
        raise AuthorityError(str(error) if isinstance(error, dn.NotADn) else f"{text!r}: {error}") from error


def canonical(text: str) -> str:
    """Return a DN's slash form as OpenSSL writes it. Raises AuthorityError."""
    return slash(parse_dn(text))


def _attribute(attribute: dn.Attribute) -> x509.NameAttribute[str]:
    kind, value = dn.short_name(attribute.oid), attribute.text()
    form, example = _FORMS.get(kind, (re.compile(r"[^\x00-\x1f\x7f]+"), "a text without control characters"))
    limit = _LIMITS.get(kind, _ANY)
    if len(value) > limit:
        raise ValueError(f"{kind} has {len(value)} characters, and may have {limit} at most")
    if attribute.tag != dn.UTF8 or not form.fullmatch(value):
        raise ValueError(f"{kind}={value} is not {example}")
    # cryptography counts the octets of UTF-8 instead: "Attribute's length must be >= 1 and <= 64, but it was 192".
    return x509.NameAttribute(x509.ObjectIdentifier(attribute.oid), value, _validate=False)


def moment(text: str, now: datetime.datetime) -> datetime.datetime:
    """Return a time that is given in ISO form (UTC, if it does not say), or from ``now``: ``-30d``, ``+2h``, ``-5m``.

    Raises:
        AuthorityError: it is neither.
    """
    try:
        if found := re.fullmatch(r"([+-]\d+(?:\.\d+)?)([dhm])", text):
            unit = {"d": "days", "h": "hours", "m": "minutes"}[found[2]]
            return now + datetime.timedelta(**{unit: float(found[1])})
        given = datetime.datetime.fromisoformat(text)
        return given if given.tzinfo else given.replace(tzinfo=datetime.UTC)
    except (ValueError, OverflowError):
        raise AuthorityError(
            f"{text!r} is no time such as 2026-11-21T02:47:38, or from now -30d, +2h, -5m"
        ) from None


def _end(start: datetime.datetime, now: datetime.datetime, days: float) -> datetime.datetime:
    """Return the time ``days`` after ``now``, for what begins at ``start``. Raises AuthorityError."""
    try:
        if (end := now + datetime.timedelta(days=days)) > start:
            return end
    except (ValueError, OverflowError):
        pass
    raise AuthorityError(f"{days} days is no life of a certificate or CRL: it ends after it begins, and before 9999")


class Authority:
    """A certificate authority in ``directory`` (private to its account).

    Args:
        directory: where key, certificate, issued certificates and revocations are kept.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.certificate_path = directory / "cert.pem"
        self._key_path = directory / "key.pem"
        self._issued = directory / "issued"
        self._state = directory / "state.json"

    def pem(self) -> bytes:
        """Return the authority's certificate (PEM). Raises AuthorityError."""
        return self._certificate().public_bytes(serialization.Encoding.PEM)

    def hash(self) -> str:
        """Return what OpenSSL names files of this authority by (`name_hash`). Raises AuthorityError."""
        return name_hash(self._certificate().subject)

    def create(self, dn: str, days: float = CA_DAYS) -> bool:
        """Make key and certificate for ``dn`` if there are none; return whether they were made.

        Args:
            dn: the authority's name (`parse_dn`).
            days: life of its certificate.

        Raises:
            AuthorityError: there is an authority with another name, or ``dn`` or ``days`` cannot be.
        """
        name = parse_dn(dn)
        if self.certificate_path.exists():
            have = slash(self._certificate().subject)
            if have != canonical(dn):
                raise AuthorityError(
                    f"{self.directory} holds the authority {have}, not {dn}: keep the name, or move it away"
                )
            return False
        now = datetime.datetime.now(datetime.UTC)
        end = _end(now, now, days)
        self._issued.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = rsa.generate_private_key(public_exponent=65537, key_size=KEY_BITS)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(sign_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write(self._key_path, pem, 0o400)
        _write(self.certificate_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        return True

    def sign(self, request: bytes, dn: str, kind: str, days: float | None = None, not_before: str = "") -> bytes:
        """Return the PEM certificate for a PEM certificate request.

        Args:
            request: the request; its signature proves that the sender has the key.
            dn: the subject that the certificate gets (`parse_dn`), whatever the request says.
            kind: a key of ``PROFILES``.
            days: its life; by default the profile's, and not longer than the authority's own.
            not_before: when it begins (`moment`), also long ago; by default now.

        Raises:
            AuthorityError: the request is no good, the kind unknown, or ``dn`` or the times cannot be.
        """
        if kind not in PROFILES:
            raise AuthorityError(f"{kind!r} is no kind of certificate; there is {', '.join(PROFILES)}")
        profile, name, public = PROFILES[kind], parse_dn(dn), _requested(request, dn)
        with self._locked():
            key, issuer = self._key(), self._certificate()
            now = datetime.datetime.now(datetime.UTC)
            start = moment(not_before, now) if not_before else now
            end = _end(start, start, profile.days if days is None else days)
            if end > issuer.not_valid_after_utc:
                if days is not None or start >= issuer.not_valid_after_utc:
                    raise AuthorityError(f"{dn} would outlive the authority, which ends {issuer.not_valid_after_utc}")
                end = issuer.not_valid_after_utc
            identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            usages = [ExtendedKeyUsageOID.SERVER_AUTH] if profile.server else []
            try:
                builder = (
                    x509.CertificateBuilder()
                    .subject_name(name)
                    .issuer_name(issuer.subject)
                    .public_key(public)
                    .serial_number(x509.random_serial_number())
                    .not_valid_before(start if not_before else start - SKEW)
                    .not_valid_after(end)
                )
            except ValueError as error:  # before 1950
                raise AuthorityError(f"{dn}: {not_before}: {error}") from error
            builder = (
                builder
                .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                .add_extension(_key_usage(encipher_data=profile.encipher_data), critical=True)
                .add_extension(x509.ExtendedKeyUsage([*usages, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
                .add_extension(
                    x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
                )
            )
            if profile.server:
                builder = builder.add_extension(_host_name(name, dn), critical=False)
            certificate = builder.sign(key, hashes.SHA256())
            pem = certificate.public_bytes(serialization.Encoding.PEM)
            _write(self._issued / f"{certificate.serial_number:x}.pem", pem, 0o644)
        return pem

    def revoke(self, dn: str) -> int:
        """Revoke every certificate that was issued to ``dn``; return how many were not revoked before.

        Raises:
            AuthorityError: nothing was issued to that DN.
        """
        name = canonical(dn)
        with self._locked():
            state = self._read_state()
            revoked: dict[str, str] = state["revoked"]
            serials = [
                path.stem
                for path in self._issued.glob("*.pem")
                if slash(x509.load_pem_x509_certificate(path.read_bytes()).subject) == name
            ]
            if not serials:
                raise AuthorityError(f"no certificate was issued to {dn}")
            fresh = [serial for serial in serials if serial not in revoked]
            for serial in fresh:
                revoked[serial] = datetime.datetime.now(datetime.UTC).isoformat()
            _write(self._state, json.dumps(state).encode(), 0o600)
        return len(fresh)

    def crl(self, days: float) -> bytes:
        """Return a new PEM CRL that is valid for ``days`` days. Raises AuthorityError."""
        with self._locked():
            state = self._read_state()
            state["crl_number"] += 1
            now = datetime.datetime.now(datetime.UTC)
            end, issuer = _end(now - SKEW, now, days), self._certificate()
            identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            builder = (
                x509.CertificateRevocationListBuilder()
                .issuer_name(issuer.subject)
                .last_update(now - SKEW)
                .next_update(end)
                .add_extension(x509.CRLNumber(state["crl_number"]), critical=False)
                .add_extension(
                    x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
                )
            )
            for serial, when in state["revoked"].items():
                builder = builder.add_revoked_certificate(
                    x509.RevokedCertificateBuilder()
                    .serial_number(int(serial, 16))
                    .revocation_date(datetime.datetime.fromisoformat(when))
                    .build()
                )
            crl = builder.sign(self._key(), hashes.SHA256())
            _write(self._state, json.dumps(state).encode(), 0o600)
        return crl.public_bytes(serialization.Encoding.PEM)

    def _certificate(self) -> x509.Certificate:
        try:
            return x509.load_pem_x509_certificate(self.certificate_path.read_bytes())
        except FileNotFoundError:
            raise AuthorityError(f"{self.directory} holds no authority: pilotbed-ca create DN") from None

    def _key(self) -> rsa.RSAPrivateKey:
        key = serialization.load_pem_private_key(self._key_path.read_bytes(), None)
        assert isinstance(key, rsa.RSAPrivateKey)
        return key

    def _read_state(self) -> dict[str, Any]:
        if self._state.exists():
            state: dict[str, Any] = json.loads(self._state.read_text())
            return state
        return {"crl_number": 0, "revoked": {}}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time: the timer's CRL and an operator's revocation may meet."""
        self._certificate()
        with open(self.directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _requested(request: bytes, dn: str) -> rsa.RSAPublicKey:
    """Return the key of a PEM certificate request, which has signed it. Raises AuthorityError."""
    try:
        csr = x509.load_pem_x509_csr(request)
        public, signed = csr.public_key(), csr.is_signature_valid
    except (ValueError, TypeError, KeyError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise AuthorityError(f"the request for {dn} cannot be read: {error}") from error
    if not signed:
        raise AuthorityError(f"the request for {dn} is not signed by its own key")
    if not isinstance(public, rsa.RSAPublicKey) or public.key_size < KEY_BITS:
        raise AuthorityError(f"the request for {dn} has no RSA key of at least {KEY_BITS} bits")
    return public


def _host_name(name: x509.Name, dn: str) -> x509.SubjectAlternativeName:
    """Return the host's name, of the last CN: ``ce.grid.test``, or as Globus had it ``host/ce.grid.test``."""
    common = [str(attribute.value) for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME)]
    host = common[-1].rpartition("/")[2] if common else ""
    if not _HOST.fullmatch(host):
        raise AuthorityError(f"{dn}: the CN of a host must be its name, such as ce.grid.test")
    return x509.SubjectAlternativeName([x509.DNSName(host)])


def _key_usage(sign_certificates: bool = False, encipher_data: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_encipherment=not sign_certificates,
        data_encipherment=encipher_data,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file as a whole or not at all; it never exists with wider permissions than ``mode``."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)
