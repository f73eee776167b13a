"""Listening sockets, which outlast a shortage of descriptors."""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any

from pilotbed.relay.log import event
from pilotbed.relay.sockets import prepare

Address = tuple[Any, ...]  # of a socket: host, port, for IPv6 more


def format_address(address: Address) -> str:
    """The address as HOST:PORT, for people."""
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


class Listener:
    """A listening socket that hands over each accepted connection; pauses when descriptors run out.

    Args:
        address: host and port to listen on.
        accepted: called with socket and peer.
    Raises:
        OSError: it cannot be bound.
    """

    __slots__ = ("_accepted", "_log", "_loop", "_pause", "_sock")

    def __init__(
        self, address: tuple[str, int], accepted: Callable[[socket.socket, Address], None], log: logging.Logger
    ) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._accepted, self._log = accepted, log
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._sock = socket.create_server(address, family=family, backlog=1024)
        prepare(self._sock)  # accepted sockets inherit all of it but not to block
        self._loop.add_reader(self._sock.fileno(), self._accept)

    @property
    def port(self) -> int:
        return int(self._sock.getsockname()[1])

    def close(self) -> None:
        """Take no more."""
        if self._pause:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _accept(self) -> None:
        """Take one: for more the loop calls again, and to learn that there are none costs as much as to take one."""
        try:
            sock, address = self._sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                event(self._log, "accept_paused", level=logging.ERROR, reason=error.strerror, port=self.port)
                self._loop.remove_reader(self._sock.fileno())
                self._pause = self._loop.call_later(1.0, self._resume)
            return  # or the peer has gone before we looked (ECONNABORTED)
        sock.setblocking(False)
        self._accepted(sock, address)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._accept)
