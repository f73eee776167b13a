"""The authority: what it issues and revokes, kept in one directory on the CA's host.

Profiles follow the IGTF's classic profile as far as the middleware looks: see ``PROFILES``.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KEY_BITS = 2048
CA_DAYS = 3650
#: Everything is dated back, since clocks of a grid's nodes differ.
SKEW = datetime.timedelta(minutes=5)

_ATTRIBUTES = {
    "DC": NameOID.DOMAIN_COMPONENT,
    "C": NameOID.COUNTRY_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "CN": NameOID.COMMON_NAME,
}


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
    """Return the name that a DN in slash form (``/DC=test/O=Gridlab/CN=Alice Adams``) stands for.

    Raises:
        AuthorityError: the text is not such a DN, or has an attribute other than DC, C, O, OU, CN.
    """
    parts = text.split("/")
    if len(parts) < 2 or parts[0]:
        raise AuthorityError(f"{text!r} is not a DN in slash form, such as /DC=test/DC=grid/CN=Alice Adams")
    names = []
    for part in parts[1:]:
        kind, _, value = part.partition("=")
        if kind not in _ATTRIBUTES or not value:
            raise AuthorityError(f"{text!r}: {part!r} is not one of {', '.join(_ATTRIBUTES)}=value")
        names.append(x509.NameAttribute(_ATTRIBUTES[kind], value))
    return x509.Name(names)


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

    def create(self, dn: str) -> bool:
        """Make key and certificate for ``dn`` if there are none; return whether they were made.

        Raises:
            AuthorityError: there is an authority with another name.
        """
        name = parse_dn(dn)
        if self.certificate_path.exists():
            if self._certificate().subject != name:
                have = self._certificate().subject.rfc4514_string()
                raise AuthorityError(
                    f"{self.directory} holds the authority {have}, not {dn}: keep the name, or move it away"
                )
            return False
        self._issued.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = rsa.generate_private_key(public_exponent=65537, key_size=KEY_BITS)
        now = datetime.datetime.now(datetime.UTC)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
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

    def sign(self, request: bytes, dn: str, kind: str) -> bytes:
        """Return the PEM certificate for a PEM certificate request.

        Args:
            request: the request; its signature proves that the sender has the key.
            dn: the subject that the certificate gets, whatever the request says.
            kind: a key of ``PROFILES``.

        Raises:
            AuthorityError: the request is no good, or the kind unknown.
        """
        if kind not in PROFILES:
            raise AuthorityError(f"{kind!r} is no kind of certificate; there is {', '.join(PROFILES)}")
        profile = PROFILES[kind]
        try:
            csr = x509.load_pem_x509_csr(request)
        except ValueError as error:
            raise AuthorityError(f"the request for {dn} cannot be read: {error}") from error
        public = csr.public_key()
        if not csr.is_signature_valid:
            raise AuthorityError(f"the request for {dn} is not signed by its own key")
        if not isinstance(public, rsa.RSAPublicKey) or public.key_size < KEY_BITS:
            raise AuthorityError(f"the request for {dn} has no RSA key of at least {KEY_BITS} bits")
        with self._locked():
            key, issuer = self._key(), self._certificate()
            now = datetime.datetime.now(datetime.UTC)
            identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            usages = [ExtendedKeyUsageOID.SERVER_AUTH] if profile.server else []
            builder = (
                x509.CertificateBuilder()
                .subject_name(parse_dn(dn))
                .issuer_name(issuer.subject)
                .public_key(public)
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - SKEW)
                .not_valid_after(now + datetime.timedelta(days=profile.days))
                .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                .add_extension(_key_usage(encipher_data=profile.encipher_data), critical=True)
                .add_extension(x509.ExtendedKeyUsage([*usages, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
                .add_extension(
                    x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
                )
            )
            if profile.server:
                name = dn.rpartition("/CN=")[2]
                builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            certificate = builder.sign(key, hashes.SHA256())
            pem = certificate.public_bytes(serialization.Encoding.PEM)
            _write(self._issued / f"{certificate.serial_number:x}.pem", pem, 0o644)
        return pem

    def revoke(self, dn: str) -> int:
        """Revoke every certificate that was issued to ``dn``; return how many were not revoked before.

        Raises:
            AuthorityError: nothing was issued to that DN.
        """
        name = parse_dn(dn)
        with self._locked():
            state = self._read_state()
            revoked: dict[str, str] = state["revoked"]
            serials = [
                path.stem
                for path in self._issued.glob("*.pem")
                if x509.load_pem_x509_certificate(path.read_bytes()).subject == name
            ]
            if not serials:
                raise AuthorityError(f"no certificate was issued to {dn}")
            fresh = [serial for serial in serials if serial not in revoked]
            for serial in fresh:
                revoked[serial] = datetime.datetime.now(datetime.UTC).isoformat()
            _write(self._state, json.dumps(state).encode(), 0o600)
        return len(fresh)

    def crl(self, days: float) -> bytes:
        """Return a new PEM CRL that is valid for ``days`` days."""
        with self._locked():
            state = self._read_state()
            state["crl_number"] += 1
            now = datetime.datetime.now(datetime.UTC)
            issuer = self._certificate()
            identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            builder = (
                x509.CertificateRevocationListBuilder()
                .issuer_name(issuer.subject)
                .last_update(now - SKEW)
                .next_update(now + datetime.timedelta(days=days))
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
        return x509.load_pem_x509_certificate(self.certificate_path.read_bytes())

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
        with open(self.directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


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
