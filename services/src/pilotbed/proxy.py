"""Proxy files as factory and frontend handle them: whose they are and how long they live.

Nothing is verified here: who may send a proxy is decided by the protocol, and whether it is good by the CE.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from asn1crypto import cms, core

from pilotbed.x509 import voms
from pilotbed.x509.chain import CertificateError, Chain


class ProxyError(Exception):
    """A text that is no usable proxy; the message never holds any of it."""


@dataclass(frozen=True)
class Proxy:
    """A proxy's end-entity DN (slash form) and when chain or VOMS attributes end (seconds, Unix)."""

    dn: str
    ends: float

    @classmethod
    def read(cls, pem: str) -> Proxy:
        """Read a proxy file's text: a certificate chain with an unencrypted key.

        Raises:
            ProxyError: not a proxy with its key, or one that no CE would take.
        """
        if "PRIVATE KEY-----" not in pem or "ENCRYPTED" in pem:
            raise ProxyError("not a proxy file: it holds no unencrypted private key")
        try:
            chain = Chain.from_pem(pem.encode())
            if not chain.proxies:
                raise ProxyError(f"not a proxy but the long-lived credential of {chain.dn}: keep that where it is")
            if chain.limited:
                raise ProxyError(f"a limited proxy of {chain.dn}: no computing element starts jobs for it")
        except CertificateError as error:
            raise ProxyError(f"not a proxy file: {error}") from error
        ends = [chain.not_after.timestamp(), *_attributes_end(chain)]
        return cls(chain.dn, min(ends))

    def left(self, now: float) -> int:
        """Return the seconds that it lives on after ``now``; negative when it has ended."""
        return int(self.ends - now)

    def __str__(self) -> str:
        return f"{self.dn} until {dt.datetime.fromtimestamp(self.ends, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _attributes_end(chain: Chain) -> list[float]:
    """Return when the chain's VOMS attribute certificate ends (seconds, Unix); empty if it has none.

    Raises:
        ProxyError: it cannot be read.
    """
    for certificate in chain.certificates:
        for extension in certificate.extensions:
            if extension.oid == voms.ACSEQ:
                try:
                    first = core.Sequence.load(extension.value.public_bytes())[0][0]
                    info = cms.AttributeCertificateV2.load(first.dump())["ac_info"]
                    return [info["att_cert_validity_period"]["not_after_time"].native.timestamp()]
                except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                    raise ProxyError("not a proxy file: its VOMS attributes cannot be read") from error
    return []
