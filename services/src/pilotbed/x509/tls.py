"""A server's TLS towards pilots and other holders of proxies."""

import contextlib
import ssl
from pathlib import Path


class ServerContext:
    """TLS for clients with a certificate or a proxy; made anew when a file changed, as OpenSSL keeps what it read.

    OpenSSL knows neither our rules for revocation lists nor tells why: what a client showed is for `TrustStore`.

    Args:
        certificate, key: of the server (PEM).
        ca_directory: HASH.0 of the CAs that clients may come from.
    """

    def __init__(self, certificate: Path, key: Path, ca_directory: Path) -> None:
        self._certificate, self._key, self._ca_directory = certificate, key, ca_directory
        self._made: tuple[object, ssl.SSLContext] | None = None

    def current(self) -> ssl.SSLContext:
        """The context of the files as they are now. Raises: OSError (ssl.SSLError is one)."""
        stamp = [path.stat().st_mtime_ns for path in (self._certificate, self._key, self._ca_directory)]
        if self._made is None or self._made[0] != stamp:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0  # a resumed session would skip the verification of the certificate
            # OpenSSL keeps the peer's key share as long as the connection: of the hybrid with ML-KEM, 6 kB an agent.
            # What passes here is of no use to somebody who can decrypt it in ten years.
            with contextlib.suppress(ssl.SSLError):  # Python 3.11 knows NIST's curves only: it does without
                context.set_ecdh_curve("X25519")
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VERIFY_ALLOW_PROXY_CERTS
            context.load_cert_chain(self._certificate, self._key)
            context.load_verify_locations(capath=str(self._ca_directory))
            self._made = (stamp, context)
        return self._made[1]


def shown_chain(connection: ssl.SSLSocket) -> list[bytes]:
    """Return the certificates (DER) by which a client was verified, its own first; the CA is the last one.

    Python offers them since 3.13; before, under the name that it had for itself.
    """
    if hasattr(connection, "get_verified_chain"):
        return list(connection.get_verified_chain())
    import _ssl

    return [one.public_bytes(_ssl.ENCODING_DER) for one in connection._sslobj.get_verified_chain()]  # type: ignore[attr-defined]
