"""X.509 as grids use it: slash-form DNs, RFC 3820 proxies, verification of chains and of VOMS attributes.

A `Chain` says what a presented chain *claims*; only a chain that came out of `TrustStore.verify` may be authorised on.
"""

from pilotbed.x509.chain import (
    CertificateError,
    Chain,
    Credential,
    ProxyInfo,
    delegate,
    is_proxy,
    load_pem,
    make_proxy,
    proxy_info,
)
from pilotbed.x509.names import name_hash, slash
from pilotbed.x509.trust import TrustError, TrustStore
from pilotbed.x509.voms import Attributes, VomsStore, has_attributes

__all__ = [
    "Attributes",
    "CertificateError",
    "Chain",
    "Credential",
    "ProxyInfo",
    "TrustError",
    "TrustStore",
    "VomsStore",
    "delegate",
    "has_attributes",
    "is_proxy",
    "load_pem",
    "make_proxy",
    "name_hash",
    "proxy_info",
    "slash",
]
