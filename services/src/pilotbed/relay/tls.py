"""A TLS connection of the server, directly on a non-blocking socket.

asyncio's own TLS throws the alert away that says why a certificate was refused (the client then sees a bare end of
file), and holds 256 kB a connection.
"""

import asyncio
import contextlib
import socket
import ssl

from pilotbed.relay import readable, writable

_UNSENT = 1 << 20  # bytes for a peer that does not read; then it is cut off
_LINGER = 2.0  # seconds for the peer to take our last words


class TlsSocket:
    """A server's side of one connection; `handshake` first.

    Args:
        sock: connected, non-blocking; closed by `close`.
        context: a server's.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._sock = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        self._unsent = bytearray()
        self._flushing: asyncio.Task[None] | None = None
        self.closing = False

    async def handshake(self) -> None:
        """Raises: OSError (ssl.SSLError with the reason), after the peer was told by an alert."""
        while True:
            try:
                self._sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                await readable(self._sock)
            except ssl.SSLWantWriteError:
                await writable(self._sock)

    @property
    def peer_certificate(self) -> bytes:
        """The certificate (DER) whose key the peer proved to have; empty if it showed none."""
        return self._sock.getpeercert(binary_form=True) or b""

    async def read(self) -> bytes:
        """What the peer sent, empty at its end. Raises: OSError."""
        while True:
            try:
                return self._sock.recv(65536)
            except ssl.SSLWantReadError:
                await readable(self._sock)
            except ssl.SSLWantWriteError:
                await asyncio.sleep(0.01)  # an answer to the peer's key update; `writable` may be the flusher's
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return b""

    def write(self, data: bytes) -> None:
        """Send as soon as the peer takes it; nothing after `close`, and no more than it takes in time."""
        if self.closing:
            return
        self._unsent += data
        if len(self._unsent) > _UNSENT:
            self.closing = True
            self._sock.shutdown(socket.SHUT_RDWR)  # the reader sees the end
        elif self._flushing is None or self._flushing.done():
            self._flushing = asyncio.ensure_future(self._flush())

    async def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._sock.send(bytes(self._unsent[:16384]))
                del self._unsent[:sent]
            except ssl.SSLWantWriteError:
                await writable(self._sock)
            except OSError:
                return  # the reader gets the same error

    async def close(self) -> None:
        """Send what was written, say good-bye, and wait a moment so that a reset does not overtake it."""
        self.closing = True
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(_LINGER):
                if self._flushing:
                    await self._flushing
                with contextlib.suppress(ssl.SSLError):
                    self._sock.unwrap()
                self._sock.shutdown(socket.SHUT_WR)
                while await self._discard():
                    pass
        if self._flushing:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
        self._sock.close()

    async def _discard(self) -> bytes:
        """Bytes as they come, encrypted or not: nobody wants them any more."""
        await readable(self._sock)
        return socket.socket.recv(self._sock, 65536)
