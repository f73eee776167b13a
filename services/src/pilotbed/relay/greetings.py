"""Connections to the relay's own port until they have said what they are: TLS (an agent) or a preface (a stream)."""

import asyncio
import socket

from pilotbed.relay.forwarding import Forwarding
from pilotbed.relay.listener import Address, format_address
from pilotbed.relay.protocol import PREFACE, PREFACE_LENGTH, Refusal, read_preface
from pilotbed.relay.refusals import Refusals
from pilotbed.relay.registrar import Registrar
from pilotbed.relay.sockets import reset

GREETING_TIMEOUT = 10.0  # seconds for a connection to say what it is
TLS_HANDSHAKE = b"\x16"  # first byte of a TLS connection (RFC 8446, 5.1: ContentType handshake)


class Greetings:
    """Hands new connections over to where they belong.

    Args:
        limit: connections that have not said what they are, or have not registered yet.
        registrar: gets agents.
        forwarding: gets stream connections.
        refusals: of the service.
    """

    def __init__(self, limit: int, registrar: Registrar, forwarding: Forwarding, refusals: Refusals) -> None:
        self._limit, self.registrar, self.forwarding, self.refusals = limit, registrar, forwarding, refusals
        self.silent: dict[Greeting, None] = {}  # the oldest first

    def connected(self, sock: socket.socket, address: Address) -> None:
        """Somebody connected to the relay's own port."""
        count = len(self.silent) + self.registrar.unregistered
        if count >= self._limit:
            refusal = Refusal("overload", f"{count} connections have not said what they are")
            # Whoever means it speaks at once: the oldest silent one gives way, or the silent would keep all others out.
            silent = next(iter(self.silent), None)
            if silent is None:
                self.refusals.record(refusal.code, refusal.reason, peer=format_address(address))
                reset(sock)
                return
            silent.refuse(refusal)
        Greeting(self, sock, format_address(address)).read()

    def stop(self) -> None:
        """End all of them."""
        for greeting in list(self.silent):
            greeting.drop()


class Greeting:
    """One such connection."""

    __slots__ = ("_data", "_greetings", "_loop", "_peer", "_sock", "_timer")

    def __init__(self, greetings: Greetings, sock: socket.socket, peer: str) -> None:
        self._greetings, self._sock, self._peer, self._data = greetings, sock, peer, b""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def read(self) -> None:
        """Read what it says; the first time, it has mostly spoken by now."""
        try:
            if not self._data and self._sock.recv(1, socket.MSG_PEEK) == TLS_HANDSHAKE:
                self._let_go()
                self._greetings.registrar.admit(self._sock, self._peer)
                return
            part = self._sock.recv(PREFACE_LENGTH - len(self._data))  # not one byte of the application's
            self._data += part
            if part and len(self._data) < PREFACE_LENGTH and self._data.startswith(PREFACE[: len(self._data)]):
                self._wait()
                return
            token = read_preface(self._data)
        except BlockingIOError:
            self._wait()
            return
        except (Refusal, OSError) as error:
            self.refuse(error)
            return
        self._let_go()
        self._greetings.forwarding.stream_connected(token, self._sock, self._peer)

    def refuse(self, error: Exception) -> None:
        """Count and log why, and hang up."""
        self._greetings.refusals.record_error(error, peer=self._peer)
        self.drop()

    def drop(self) -> None:
        """End the connection."""
        self._let_go()
        reset(self._sock)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(GREETING_TIMEOUT, self.refuse, TimeoutError())
            self._loop.add_reader(self._sock.fileno(), self.read)
            self._greetings.silent[self] = None

    def _let_go(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._loop.remove_reader(self._sock.fileno())
            del self._greetings.silent[self]
