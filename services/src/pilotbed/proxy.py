"""Proxy files as factory and frontend handle them: whose they are and how long they live.

Nothing is verified here: who may send a proxy is decided by the protocol, and whether it is good by the CE.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

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
            chain = Chain.from_pem(pem.encode(errors="replace"))
            if not chain.proxies:
                raise ProxyError(f"not a proxy but the long-lived credential of {chain.dn}: keep that where it is")
            if chain.limited:
                raise ProxyError(f"a limited proxy of {chain.dn}: no computing element starts jobs for it")
            ends = [chain.not_after, *voms.ends(chain)]
        except CertificateError as error:
            raise ProxyError(f"not a proxy file: {error}") from error
        return cls(chain.dn, min(ends).timestamp())

    def left(self, now: float) -> int:
        """Return the seconds that it lives on after ``now``; negative when it has ended."""
        return int(self.ends - now)

    def __str__(self) -> str:
        return f"{self.dn} until {dt.datetime.fromtimestamp(self.ends, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"

