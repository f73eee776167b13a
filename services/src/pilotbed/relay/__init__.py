"""The relay: dedicated public ports for daemons behind firewalls, in the manner of GCB, for those who may have one.

Here is what the two shells (`server`, `agent`) share: the joining of two sockets, and log lines. Standard library only:
the pilot stages this package's `__init__`, `protocol` and `agent` for its agent.
"""

import asyncio
import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import secrets
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PIPE_BYTES = 256 * 1024  # what one direction of a busy stream may hold here; an idle stream holds nothing
_SPARE_PIPES = 64
_TURN = 16  # chunks that a stream may move before others have theirs


@dataclass
class Traffic:
    """Bytes moved; what is counted here is counted in `parent` too.

    Attributes:
        inward: towards the daemon behind the agent.
        outward: away from it.
    """

    parent: "Traffic | None" = None
    inward: int = 0
    outward: int = 0

    def add_inward(self, count: int) -> None:
        self.inward += count
        if self.parent:
            self.parent.add_inward(count)

    def add_outward(self, count: int) -> None:
        self.outward += count
        if self.parent:
            self.parent.add_outward(count)


async def join(outer: socket.socket, inner: socket.socket, traffic: Traffic, *, splice: bool | None = None) -> None:
    """Carry bytes between two connected non-blocking TCP sockets until both directions have ended; closes both.

    The end of one direction is passed on as such (half-close); a reset of one side resets the other. A side that
    does not read stops the other's sender: at most `_PIPE_BYTES` a direction are held here.

    Args:
        outer, inner: the sockets; `inner` is the one nearer to the daemon.
        traffic: counts.
        splice: whether the kernel moves the bytes (splice(2)) or Python copies them; None: the kernel if it can.
    Raises:
        OSError: the connection broke.
    """
    pump = _splice if (splice_works() if splice is None else splice) else _copy
    directions = [
        asyncio.ensure_future(pump(outer, inner, traffic.add_inward)),
        asyncio.ensure_future(pump(inner, outer, traffic.add_outward)),
    ]
    try:
        await asyncio.gather(*directions)
    except BaseException:
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
        reset(outer)
        reset(inner)
        raise
    outer.close()
    inner.close()


def reset(sock: socket.socket) -> None:
    """Close so that the peer learns of it as an error (RST), not as an orderly end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def prepare(sock: socket.socket) -> None:
    """What every carried socket gets: no delay, and keep-alives that find a dead peer (or lost NAT entry) in 2 min."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


@functools.cache
def splice_works() -> bool:
    """Whether the kernel splices from a socket (some sandboxes do not)."""
    if not hasattr(os, "splice"):
        return False
    one, other = socket.socketpair()
    read, write = os.pipe()
    try:
        one.send(b"x")
        return os.splice(other.fileno(), write, 1) == 1 and os.read(read, 1) == b"x"
    except OSError:
        return False
    finally:
        one.close()
        other.close()
        os.close(read)
        os.close(write)


_spare: list[tuple[int, int]] = []  # empty pipes; a stream takes one only while bytes are under way


def _take_pipe() -> tuple[int, int]:
    if _spare:
        return _spare.pop()
    pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # past the user's soft limit pipes stay small, which is slower but works
        fcntl.fcntl(pipe[0], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return pipe


def _drop_pipe(pipe: tuple[int, int], *, empty: bool) -> None:
    if empty and len(_spare) < _SPARE_PIPES:
        _spare.append(pipe)
    else:
        os.close(pipe[0])
        os.close(pipe[1])


async def _splice(source: socket.socket, sink: socket.socket, count: Callable[[int], None]) -> None:
    for turn in _turns():
        pipe, empty = _take_pipe(), True
        try:
            try:
                moved = left = os.splice(source.fileno(), pipe[1], _PIPE_BYTES)
            except BlockingIOError:
                moved = None
            else:
                empty = not moved
                while left:
                    try:
                        left -= os.splice(pipe[0], sink.fileno(), left)
                    except BlockingIOError:
                        await writable(sink)
                empty = True
        finally:
            _drop_pipe(pipe, empty=empty)
        if moved is None:
            await readable(source)
        elif moved:
            count(moved)
            if turn:
                await asyncio.sleep(0)
        else:
            break
    _end(sink)


async def _copy(source: socket.socket, sink: socket.socket, count: Callable[[int], None]) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _PIPE_BYTES):
        await loop.sock_sendall(sink, data)
        count(len(data))
    _end(sink)


def _turns() -> Any:
    """Endless; true when it is somebody else's turn."""
    number = 0
    while True:
        number += 1
        yield number % _TURN == 0


def _end(sink: socket.socket) -> None:
    try:
        sink.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise


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


def write_durably(path: Path, text: str) -> None:
    """Write a file with mode 0600: readers see the old one or the whole new one, and after return it survives a crash.

    Raises:
        OSError: it could not be written; the old file stands.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def log_to_stderr() -> None:
    """One line an event; under systemd without a time of our own, the journal has it."""
    stamp = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=stamp + "%(levelname)s %(message)s")


def event(log: logging.Logger, name: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log `event=NAME key=value …`; values that are not plain words are quoted as JSON, so a line stays a line."""
    plain = {key: str(value) for key, value in fields.items() if value is not None}
    text = (f"{key}={value if _plain(value) else json.dumps(value)}" for key, value in plain.items())
    log.log(level, "%s", " ".join([f"event={name}", *text]))


def _plain(value: str) -> bool:
    return value != "" and value.isascii() and value.isprintable() and not set(value) & set(' "=\\')
