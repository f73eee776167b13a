"""The server's TLS, directly on non-blocking sockets.

asyncio's own TLS throws the alert away that says why a certificate was refused (the client then sees a bare end of
file), and holds 256 kB a connection. An idle connection here is two callbacks in the loop's table, no coroutine.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from pilotbed.relay.sockets import readable, writable

_UNSENT = 1 << 20  # bytes for a peer that does not read; then it is cut off
_LINGER = 2.0  # seconds for the peer to take our last words


class TlsSocket:
    """A server's side of one connection; `handshake`, then `listen`.

    Args:
        sock: connected, non-blocking; closed by `close`.
        context: a server's.
    """

    __slots__ = ("_ended", "_loop", "_received", "_sock", "_unsent", "closing")

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._sock = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        self._loop = asyncio.get_running_loop()
        self._unsent = b""
        self.closing = False

    async def handshake(self, turn: AbstractAsyncContextManager[object]) -> None:
        """Do it, each step within a `turn`. Raises: OSError (ssl.SSLError with the reason), after the peer's alert."""
        while True:
            try:
                async with turn:
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

    def listen(self, received: Callable[[bytes], None], ended: Callable[[OSError | None], None]) -> None:
        """Call `received` with what the peer sends, and `ended` once when it has ended, or with what broke it."""
        self._received, self._ended = received, ended
        self._loop.add_reader(self._sock.fileno(), self._read)
        self._read()  # what came with the end of the handshake waits in OpenSSL, not in the socket

    def _read(self) -> None:
        while not self.closing:
            try:
                data = self._sock.recv(65536)
            except ssl.SSLWantReadError:
                return
            except ssl.SSLWantWriteError:  # an answer to the peer's key update finds the socket full
                self._loop.call_later(0.01, self._read)
                return
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                data = b""
            except OSError as error:
                self._stop(error)
                return
            if data:
                self._received(data)
            else:
                self._stop(None)

    def _stop(self, error: OSError | None) -> None:
        self.closing = True
        self._loop.remove_reader(self._sock.fileno())
        self._ended(error)

    def write(self, data: bytes) -> None:
        """Send as soon as the peer takes it; nothing after `close`, and no more than it takes in time."""
        if self.closing:
            return
        waiting = bool(self._unsent)
        self._unsent += data
        if len(self._unsent) > _UNSENT:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # the reader sees the end
        elif not waiting and not self._send():
            self._loop.add_writer(self._sock.fileno(), self._flush)

    def _send(self) -> bool:
        """Send what waits; false when the peer does not take it now."""
        while self._unsent:
            try:
                sent = self._sock.send(self._unsent[:16384])
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return False
            except OSError:
                sent = len(self._unsent)  # the reader gets the same error
            self._unsent = self._unsent[sent:]
        return True

    def _flush(self) -> None:
        if self._send():
            self._loop.remove_writer(self._sock.fileno())

    async def close(self) -> None:
        """Send what was written, say good-bye, and wait a moment so that a reset does not overtake it."""
        self.closing = True
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        try:
            with contextlib.suppress(OSError, TimeoutError, ValueError):
                async with asyncio.timeout(_LINGER):
                    while not self._send():
                        await writable(self._sock)
                    with contextlib.suppress(ssl.SSLError):
                        self._sock.unwrap()
                    self._sock.shutdown(socket.SHUT_WR)
                    while await self._discard():
                        pass
        finally:
            self._sock.close()

    async def _discard(self) -> bytes:
        """Bytes as they come, encrypted or not: nobody wants them any more."""
        await readable(self._sock)
        return socket.socket.recv(self._sock, 65536)
