"""What the relay, its border mode and its agent need of TCP sockets. Standard library only."""

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable


def reset(sock: socket.socket) -> None:
    """Close so that the peer learns of it as an error (RST), not as an orderly end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def undo_reset(sock: socket.socket) -> None:
    """Undo what `reset` set on a socket that somebody else had, too; it does not block."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))


def prepare(sock: socket.socket) -> None:
    """What every carried socket gets: no delay, and keep-alives that find a dead peer (or lost NAT entry) in 2 min."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


class Dial:
    """A TCP connection in the making.

    Args:
        address: numeric host, and port.
        seconds: for the other side to answer.
        done: called once, perhaps before `start` returns: with the connected socket, prepared, or with what went wrong.
    """

    __slots__ = ("_address", "_done", "_loop", "_seconds", "_sock", "_timer")

    def __init__(
        self, address: tuple[str, int], seconds: float, done: Callable[[socket.socket | OSError], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._address, self._seconds, self._done = address, seconds, done
        self._timer: asyncio.TimerHandle | None = None
        self._sock: socket.socket | None = None

    def start(self) -> None:
        """Connect."""
        try:
            self._sock = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET)
        except OSError as error:  # out of descriptors
            self._done(error)
            return
        prepare(self._sock)
        code = self._sock.connect_ex(self._address)
        if code == errno.EINPROGRESS:  # which the kernel says of a connection within the host, too, that stands by now
            code = self._sock.connect_ex(self._address)
        if code == errno.EALREADY:
            self._timer = self._loop.call_later(self._seconds, self._end, self._sock, errno.ETIMEDOUT)
            self._loop.add_writer(self._sock.fileno(), self._answered, self._sock)
        else:
            self._end(self._sock, code)

    def cancel(self) -> None:
        """Give up; `done` will hear nothing."""
        if self._sock:
            self._let_go(self._sock)
            self._sock.close()

    def _answered(self, sock: socket.socket) -> None:
        self._end(sock, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _end(self, sock: socket.socket, code: int) -> None:
        self._let_go(sock)
        if code:
            sock.close()
            self._done(OSError(code, os.strerror(code), f"{self._address[0]}:{self._address[1]}"))
        else:
            self._done(sock)

    def _let_go(self, sock: socket.socket) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
            self._loop.remove_writer(sock.fileno())


async def readable(sock: socket.socket) -> None:
    """Return when a read from the socket would not block."""
    loop = asyncio.get_running_loop()
    await _ready(loop.add_reader, loop.remove_reader, sock.fileno())


async def writable(sock: socket.socket) -> None:
    """Return when a write to the socket would not block."""
    loop = asyncio.get_running_loop()
    await _ready(loop.add_writer, loop.remove_writer, sock.fileno())


async def _ready(add: Callable[..., None], remove: Callable[[int], bool], descriptor: int) -> None:
    ready = asyncio.Event()
    add(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        remove(descriptor)
