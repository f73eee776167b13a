"""A CA, people, hosts, proxies and VOMS attributes made on the spot, laid out as in /etc/grid-security."""

import datetime as dt
from pathlib import Path

from asn1crypto import cms, core
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID as Eku
from cryptography.x509.oid import NameOID
from pilotbed.x509 import Chain, Credential, name_hash, slash, voms
from pilotbed.x509 import chain as chains

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


def proxy(issuer, *, subject=None, info=None, critical=True, signer=None, extensions=(), key=None, **options):
    """A proxy with anything changed; `info`: DER of proxyCertInfo."""
    key, parent = key or rsa_key(), issuer.chain.leaf
    info = info or chains._ProxyCertInfo({"policy": {"language": chains.INHERIT_ALL}}).dump()
    subject = subject or x509.Name([*parent.subject, x509.NameAttribute(x509.NameOID.COMMON_NAME, "4711")])
    known = x509.UnrecognizedExtension(chains.PROXY_CERT_INFO, info)
    options.setdefault("days", (-0.1, 0.5))
    signed = sign(subject, parent.subject, key, signer or issuer.key,
                  extensions=[(known, critical), *extensions], **options)  # fmt: skip
    return Credential(Chain((signed, *issuer.chain.certificates)), key)


def directory_name(wanted: x509.Name) -> asn1.GeneralName:
    return asn1.GeneralName({"directory_name": asn1.Name.load(wanted.public_bytes())})


def uri(text: str) -> asn1.GeneralName:
    """As it is, where asn1crypto would make something proper of it."""
    return asn1.GeneralName.load(core.IA5String(text, implicit=6).dump())


def extension(oid: str, critical: bool, value: bytes) -> asn1.Extension:
    marked = core.Boolean(True).dump() if critical else b""
    return asn1.Extension.load(sequence(core.ObjectIdentifier(oid).dump(), marked, core.OctetString(value).dump()))


def sequence(*items: bytes) -> bytes:
    """A DER SEQUENCE."""
    content = b"".join(items)
    return core.Sequence(contents=content).dump()


class VomsServer:
    """Signs attribute certificates as vomsd does; `publish` writes its .lsc below `directory`."""

    def __init__(self, directory: Path, credential: Credential, vo: str = "gridlab", host: str = "voms.grid.test"):
        self.directory, self.credential, self.vo, self.host = directory, credential, vo, host
        self.certificate = credential.chain.leaf
        self.lsc = directory / vo / f"{host}.lsc"

    def names(self) -> list[str]:
        return [slash(self.certificate.subject), slash(self.certificate.issuer)]

    def publish(self, *lines: str) -> None:
        self.lsc.parent.mkdir(parents=True, exist_ok=True)
        self.lsc.write_text("".join(f"{line}\n" for line in lines or self.names()))

    def extensions(self, **changed: tuple[str, bool, bytes] | None) -> list[asn1.Extension]:
        """Those of an AC; each by a word: OID, critical, value; None leaves it out."""
        der = self.certificate.public_bytes(serialization.Encoding.DER)
        key = x509.SubjectKeyIdentifier.from_public_key(self.certificate.public_key()).digest
        known = {
            "signers": (voms.CERTIFICATES, False, sequence(sequence(der))),
            "no_revocation": (voms.NO_REVOCATION, False, b"\5\0"),
            "authority_key": (voms.AUTHORITY_KEY, False, asn1.AuthorityKeyIdentifier({"key_identifier": key}).dump()),
            **changed,
        }
        return [extension(*given) for given in known.values() if given]

    def syntax(self, *fqans: bytes, authority: str = "") -> cms.IetfAttrSyntax:
        authority = authority or f"{self.vo}://{self.host}:15000"
        return cms.IetfAttrSyntax({
            "policy_authority": [uri(authority)], "values": [cms.IetfAttrValue({"octets": fqan}) for fqan in fqans],
        })  # fmt: skip

    def attribute_certificate(self, holder: Credential, *fqans: str, hours=(0, 12), edit=None, key=None,
                              algorithm="sha256_rsa", outer=None) -> bytes:  # fmt: skip
        """DER of an AC.

        `hours`: validity from now; `edit`: called with the ac_info before it is signed; `key`: signs in place of the
        server's; `outer`: algorithm as named outside of the signed part.
        """
        owner = holder.chain.end_entity
        not_before, not_after = (now() + hour * DAY / 24 for hour in hours)
        info = cms.AttributeCertificateInfoV2({
            "version": "v2",
            "holder": {"base_certificate_id": {"issuer": [directory_name(owner.issuer)],
                                               "serial": owner.serial_number}},
            "issuer": {"v2_form": {"issuer_name": [directory_name(self.certificate.subject)]}},
            "signature": {"algorithm": algorithm},
            "serial_number": 7,
            "att_cert_validity_period": {"not_before_time": not_before, "not_after_time": not_after},
            "attributes": [{"type": voms.FQANS, "values": [self.syntax(*(fqan.encode() for fqan in fqans))]}],
            "extensions": self.extensions(),
        })  # fmt: skip
        if edit:
            edit(info)
        signed, key = info.dump(), key or self.credential.key
        digest = getattr(hashes, algorithm.partition("_")[0].upper())()
        if isinstance(key, ec.EllipticCurvePrivateKey):
            signature = key.sign(signed, ec.ECDSA(digest))
        else:
            signature = key.sign(signed, padding.PKCS1v15(), digest)
        named = asn1.SignedDigestAlgorithm({"algorithm": outer or algorithm})
        return sequence(signed, named.dump(), core.OctetBitString(signature).dump())


def carrying(issuer: Credential, content: bytes, **options) -> Credential:
    """A proxy with this as the content of VOMS's extension."""
    return proxy(issuer, extensions=[(x509.UnrecognizedExtension(voms.ACSEQ, content), False)], **options)


def with_attributes(issuer: Credential, *acs: bytes, **options) -> Credential:
    """A proxy that carries attribute certificates."""
    return carrying(issuer, sequence(sequence(*acs)), **options)
