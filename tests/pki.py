"""A CA, people, hosts and proxies made on the spot, laid out as /etc/grid-security/certificates is."""

import datetime as dt
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID as Eku
from cryptography.x509.oid import NameOID
from pilotbed.x509 import Chain, Credential, name_hash

DAY = dt.timedelta(days=1)
_KINDS = {"DC": NameOID.DOMAIN_COMPONENT, "O": NameOID.ORGANIZATION_NAME, "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
          "CN": NameOID.COMMON_NAME}  # fmt: skip


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0)


def name(slash: str) -> x509.Name:
    pairs = (part.split("=", 1) for part in slash.strip("/").split("/"))
    return x509.Name([x509.NameAttribute(_KINDS[kind], value) for kind, value in pairs])


def usage(**given: bool) -> x509.KeyUsage:
    every = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{key: given.get(key, False) for key in every})


def sign(subject, issuer, key, signer, *, days=(-1, 30), serial=None, extensions=(), algorithm=None):
    """A certificate of any kind; `days`: validity relative to now, in days (fractions allowed)."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(now() + days[0] * DAY)
        .not_valid_after(now() + days[1] * DAY)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, algorithm or hashes.SHA256())


def rsa_key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


class Authority:
    """A CA with its directory entry; `publish` writes certificate and revocation list into `directory`."""

    def __init__(self, directory: Path, dn: str = "/DC=test/DC=grid/O=Gridlab/CN=Gridlab CA", issuer=None, **options):
        self.directory, self.name, self.key, self.revoked = directory, name(dn), rsa_key(), []
        options.setdefault("extensions", (
            (x509.BasicConstraints(ca=True, path_length=options.pop("path_length", None)), True),
            (usage(key_cert_sign=True, crl_sign=True), True),
            (x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False),
        ))  # fmt: skip
        parent_name, parent_key = (issuer.name, issuer.key) if issuer else (self.name, self.key)
        self.certificate = sign(self.name, parent_name, self.key, parent_key, **options)
        directory.mkdir(parents=True, exist_ok=True)
        self.publish()

    def path(self, suffix: str) -> Path:
        return self.directory / f"{name_hash(self.name)}.{suffix}"

    def publish(self, days=(-1, 7), signer=None) -> None:
        self.path("0").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name)
            .last_update(now() + days[0] * DAY)
            .next_update(now() + days[1] * DAY)
            .add_extension(x509.CRLNumber(len(self.revoked) + 1), critical=False)
        )
        for serial in self.revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now()).build()
            builder = builder.add_revoked_certificate(entry)
        crl = builder.sign(signer or self.key, hashes.SHA256())
        temporary = self.path("new")
        temporary.write_bytes(crl.public_bytes(serialization.Encoding.PEM))
        temporary.replace(self.path("r0"))

    def revoke(self, credential: Credential) -> None:
        self.revoked.append(credential.chain.end_entity.serial_number)
        self.publish()

    def issue(self, dn: str, *, host: str | None = None, extensions=None, **options) -> Credential:
        """An end entity; `host`: the DNS name of a host certificate."""
        key = rsa_key()
        if extensions is None:
            extensions = [
                (x509.BasicConstraints(ca=False, path_length=None), True),
                (usage(digital_signature=True, key_encipherment=True, data_encipherment=True), True),
                (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
                (x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False),
                (x509.ExtendedKeyUsage([Eku.CLIENT_AUTH, *([Eku.SERVER_AUTH] if host else [])]), False),
            ]
            if host:
                extensions.append((x509.SubjectAlternativeName([x509.DNSName(host)]), False))
        certificate = sign(name(dn), self.name, key, self.key, extensions=extensions, **options)
        return Credential(Chain((certificate,)), key)
