"""Who an agent is, whether it may have a port, and whose revocation takes the port away again."""

import asyncio
import base64
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate, ObjectIdentifier
from cryptography.x509.oid import ExtendedKeyUsageOID

from pilotbed.relay.config import Config
from pilotbed.relay.log import event
from pilotbed.relay.protocol import Refusal
from pilotbed.x509 import Attributes, CertificateError, Chain, TrustError, TrustStore, VomsStore

RECHECK = 30.0  # seconds between two checks of the certificates of standing leases (revoked meanwhile?)


@dataclass(frozen=True, eq=False)
class WatchedCertificate:
    """A certificate whose revocation ends leases: an end entity's, or that of a VOMS server that signed its attributes.

    Attributes:
        chain: of the certificate alone.
        purpose: what it has to be good for.
        code: of the refusal with which the leases end.
    """

    chain: Chain
    purpose: ObjectIdentifier
    code: str


@dataclass(frozen=True)
class Authorized:
    """An agent that may have a port.

    Attributes:
        dn: its end-entity DN.
        fqan: that lets it in; "" if its DN is enough.
        expires: end of the proxy, or of the attributes if they end sooner; epoch seconds.
        certificates: whose revocation ends the lease.
    """

    dn: str
    fqan: str
    expires: float
    certificates: tuple[WatchedCertificate, ...]


class Authorization:
    """Verifies agents' certificates and attributes, and holds them against the configured lists.

    Args:
        config: see there.
        log: of the service.
    """

    def __init__(self, config: Config, log: logging.Logger) -> None:
        self._config, self._log = config, log
        self._trust = TrustStore(config.ca_directory)
        self._voms = VomsStore(config.voms_directory, self._trust)
        self._watched: WeakValueDictionary[bytes, WatchedCertificate] = WeakValueDictionary()  # by certificate (DER)

    def authorize(self, chain: Sequence[str], proved: bytes) -> Authorized:
        """Decide on an agent.

        Args:
            chain: what it sent, base64 DER, leaf first.
            proved: the certificate (DER) whose key it proved to have.
        Raises:
            Refusal: trust, bad_certificate, bad_attributes or not_authorized.
        """
        verified = self._identify(chain, proved)
        fqan, attributes = self._grant(verified)
        return Authorized(
            verified.dn,
            fqan,
            min(filter(None, (verified.not_after, attributes.not_after))).timestamp(),
            (
                self._watch(verified.end_entity, ExtendedKeyUsageOID.CLIENT_AUTH, "bad_certificate"),
                *(self._watch(each, ExtendedKeyUsageOID.SERVER_AUTH, "bad_attributes") for each in attributes.servers),
            ),
        )

    async def recheck(
        self,
        revoked: Callable[[WatchedCertificate, str], None],
        apart: Callable[[object], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Call `revoked` with each certificate that is no longer good, and the reason; `apart` is around each.

        An expired revocation list says nothing about them: it refuses new agents, but does not throw out the old.
        """
        for watched in list(self._watched.values()):
            await asyncio.sleep(0)
            with apart(watched.chain.dn):
                try:
                    self._trust.verify(watched.chain, purpose=watched.purpose)
                except TrustError as error:
                    event(self._log, "trust_stale", level=logging.ERROR, reason=error)
                    break
                except CertificateError as error:
                    revoked(watched, str(error))

    def _identify(self, chain: Sequence[str], proved: bytes) -> Chain:
        """The verified chain of the TLS peer; what it sent only helps with the certificates between it and the CA.

        Python gives the peer's whole chain since 3.13 only, and OpenSSL neither knows our rules for revocation lists
        nor tells why; so the agent sends its chain again, and its first certificate must be the one that TLS proved.
        """
        try:
            certificates = [base64.b64decode(text, validate=True) for text in chain]
            if certificates[0] != proved:
                raise Refusal("bad_certificate", "the chain does not start with the certificate of the TLS connection")
            return self._trust.verify(Chain.from_der(certificates))
        except TrustError as error:
            raise Refusal("trust", str(error)) from None
        except (CertificateError, ValueError) as error:
            raise Refusal("bad_certificate", str(error)) from None

    def _grant(self, chain: Chain) -> tuple[str, Attributes]:
        """The FQAN that lets a verified chain in; "" if its DN is enough: then attributes are not even looked at."""
        granted, fqans = self._config.grants(chain.dn, self._config.authorized_fqans), "any FQAN"
        found = Attributes((), None, ())
        if granted:
            try:
                found = self._voms.attributes(chain)
            except TrustError as error:
                raise Refusal("trust", str(error)) from None
            except CertificateError as error:
                raise Refusal("bad_attributes", str(error)) from None
            granted, fqans = self._config.grants(chain.dn, found.fqans), ", ".join(found.fqans) or "no FQAN"
        if granted is None:
            raise Refusal("not_authorized", f"{chain.dn} with {fqans} may not have a port here")
        return granted, found

    def _watch(self, certificate: Certificate, purpose: ObjectIdentifier, code: str) -> WatchedCertificate:
        """One object for all leases that rest on a certificate; proxies are in no revocation list."""
        watched = WatchedCertificate(Chain((certificate,)), purpose, code)
        return self._watched.setdefault(certificate.public_bytes(Encoding.DER), watched)
