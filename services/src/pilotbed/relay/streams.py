"""The forwarding of bytes between two sockets, by the kernel (splice(2)) where it can. Standard library only."""

import asyncio
import contextlib
import errno
import fcntl
import functools
import os
import socket
import sys
import termios
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pilotbed.relay.sockets import reset

_PIPE_BYTES = 1 << 20  # of a big pipe, as users may have it; what a direction holds there waits for its reader
_BIG_PIPES = 32  # half of what Linux lets a user have (pipe-user-pages-soft, pipe(7)); others have 64 kB
_TURN = 1 << 20  # bytes that a stream may move before others have their turn
_SMALL = 64 * 1024  # bytes: after less than this a socket is empty, and need not be asked again


@dataclass(slots=True)
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
        traffic: Traffic | None = self
        while traffic:
            traffic.inward += count
            traffic = traffic.parent

    def add_outward(self, count: int) -> None:
        traffic: Traffic | None = self
        while traffic:
            traffic.outward += count
            traffic = traffic.parent


class Forwarder:
    """Carries bytes between two connected non-blocking TCP sockets until both directions have ended; closes both.

    The end of one direction is passed on as such (half-close); a reset of one side resets the other. A side that
    does not read stops the other's sender: at most `_PIPE_BYTES` a direction are held here.

    Args:
        outer, inner: the sockets; `inner` is the one nearer to the daemon.
        traffic: counts.
        ended: called once, with None or with what broke the connection.
        splice: whether the kernel moves the bytes (splice(2)) or Python copies them; None: the kernel if it can.
        pipes: those of an earlier forwarder of these sockets, which goes on here (see `pin_pipes`).
    """

    __slots__ = ("_directions", "_ended", "inner", "loop", "outer")

    def __init__(
        self,
        outer: socket.socket,
        inner: socket.socket,
        traffic: Traffic,
        ended: Callable[[OSError | None], None],
        *,
        splice: bool | None = None,
        pipes: "tuple[Pipe | None, Pipe | None] | None" = None,
    ) -> None:
        self.outer, self.inner, self._ended = outer, inner, ended
        self.loop = asyncio.get_running_loop()
        if not _forwarders:
            self.loop.call_later(CHECK_INTERVAL, _check_all, self.loop)
        _forwarders.add(self)
        ways = (outer, inner, traffic.add_inward), (inner, outer, traffic.add_outward)
        if pipes:
            self._directions: list[_Direction] = [
                _Splice(self, *way, pipe) for way, pipe in zip(ways, pipes, strict=True) if pipe
            ]
            return
        kind = _Splice if (splice_works() if splice is None else splice) else _Copy
        self._directions = [kind(self, *way) for way in ways]

    def pin_pipes(self) -> "tuple[Pipe | None, Pipe | None]":
        """Have each direction keep one pipe from now on; return both, None for one that has ended or has no pipe.

        Whatever is under way is then in the kernel, in a socket or in a pipe: another process that has them can go on.

        Raises:
            OSError: there are no descriptors for that now.
        """
        found: list[Pipe | None] = [None, None]
        for direction in self._directions:
            if isinstance(direction, _Splice):
                found[direction.sink is self.outer] = direction.pin()
        return found[0], found[1]

    def detach(self) -> None:
        """Let go of sockets and pipes that somebody else has, too; where nobody goes on, their end is a reset."""
        _forwarders.discard(self)
        for direction in self._directions:
            direction.stop()
        self._directions.clear()
        reset(self.outer)
        reset(self.inner)

    def check_acknowledged(self) -> None:
        """Cut the connection if a side has acknowledged nothing of what was sent for too long.

        TCP itself tries for a quarter of an hour; keep-alives wait until nothing is under way, and TCP_USER_TIMEOUT
        takes a reader that pauses for a dead one (Linux counts zero-window probes, though they are answered).
        """
        for sock in (self.outer, self.inner):
            # tcpi_last_ack_recv of linux/tcp.h, in ms. Packets that this host's own filter drops count as not yet sent.
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
            silence = int.from_bytes(info[56:60], sys.byteorder) / 1000
            if silence > ACK_TIMEOUT and _queued(sock.fileno(), termios.TIOCOUTQ):
                self.abort(TimeoutError(f"no acknowledgement for {silence:.0f} s"))
                return

    def forward_waiting(self) -> None:
        """Carry at once what came on `outer` before there was a forwarder, rather than at the loop's next turn."""
        self._directions[0].readable()

    def direction_ended(self, direction: "_Direction") -> None:
        """A direction has ended in order."""
        self._directions.remove(direction)
        if self._directions:
            try:
                direction.sink.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
        else:
            _forwarders.discard(self)
            self.outer.close()
            self.inner.close()
            self._ended(None)

    def abort(self, error: OSError | None = None) -> None:
        """End both directions at once, by resets; `ended` hears of `error`, and of nothing without one."""
        self.detach()
        if error:
            self._ended(error)


class _Direction(ABC):
    """One direction of a forwarder. Its reader stays with the loop while bytes flow: a chunk costs two system calls."""

    __slots__ = ("_count", "_forwarder", "_left", "_reading", "_source", "sink")

    def __init__(
        self, forwarder: Forwarder, source: socket.socket, sink: socket.socket, count: Callable[[int], None]
    ) -> None:
        self._forwarder, self._source, self.sink, self._count = forwarder, source, sink, count
        self._left = 0  # bytes that were read and wait for the sink
        self._watch(reading=True)

    @abstractmethod
    def _fill(self) -> int:
        """Read from the source: how many bytes."""

    @abstractmethod
    def _empty(self) -> int:
        """Write to the sink: how many bytes."""

    @abstractmethod
    def _free(self) -> None:
        """Nothing is under way (or what is will not be needed)."""

    def stop(self) -> None:
        """Let go of both sockets."""
        self._unwatch()
        self._free()
        self._left = 0

    def _watch(self, *, reading: bool) -> None:
        self._reading = reading
        if reading:
            self._forwarder.loop.add_reader(self._source.fileno(), self.readable)
        else:
            self._forwarder.loop.add_writer(self.sink.fileno(), self._writable)

    def _unwatch(self) -> None:
        if self._reading:
            self._forwarder.loop.remove_reader(self._source.fileno())
        else:
            self._forwarder.loop.remove_writer(self.sink.fileno())

    def readable(self) -> None:
        """Carry what the source has."""
        try:
            moved = count = 0
            while moved == 0 or (count >= _SMALL and moved < _TURN):
                count = self._left = self._fill()
                if not count:
                    self.stop()
                    self._forwarder.direction_ended(self)
                    return
                moved += count
                self._drain()
        except BlockingIOError:
            if self._left:
                self._unwatch()
                self._watch(reading=False)
        except OSError as error:
            self._forwarder.abort(error)
        finally:
            if not self._left:
                self._free()

    def _writable(self) -> None:
        try:
            self._drain()
        except BlockingIOError:
            return
        except OSError as error:
            self._forwarder.abort(error)
            return
        self._free()
        self._unwatch()
        self._watch(reading=True)

    def _drain(self) -> None:
        while self._left:
            count = self._empty()
            self._left -= count
            self._count(count)


class _Copy(_Direction):
    """Python copies the bytes."""

    __slots__ = ("_data",)

    def __init__(self, *arguments: Any) -> None:
        self._data = b""
        super().__init__(*arguments)

    def _fill(self) -> int:
        self._data = self._source.recv(_SMALL)
        return len(self._data)

    def _empty(self) -> int:
        return self.sink.send(memoryview(self._data)[len(self._data) - self._left :])

    def _free(self) -> None:
        self._data = b""


class _Splice(_Copy):
    """The kernel moves the bytes through a pipe, which is held only while there are bytes in it, unless it is pinned.

    Where there is none to be had (EMFILE, ENFILE), Python copies: a stream that stands does not end by that.
    """

    __slots__ = ("_pinned", "_pipe")

    def __init__(
        self, forwarder: Forwarder, source: socket.socket, sink: socket.socket, count: Callable[[int], None],
        pipe: "Pipe | None" = None,
    ) -> None:  # fmt: skip
        self._pipe = pipe
        self._pinned = pipe is not None
        super().__init__(forwarder, source, sink, count)
        if pipe and (left := _queued(pipe[0], termios.FIONREAD)):
            self._left = left
            self._unwatch()
            self._watch(reading=False)

    def pin(self) -> "Pipe":
        """Keep one pipe from now on: the big ones are for who is busy."""
        if self._left and not self._pipe:
            raise BlockingIOError(errno.EAGAIN, "what is under way is not in the kernel")
        self._pipe = self._pipe or _take_pipe(big=False)
        self._pinned = True
        return self._pipe

    def stop(self) -> None:
        pipe, self._pipe = (self._pipe, None) if self._pinned else (None, self._pipe)
        super().stop()
        if pipe:  # and never give it to another stream: somebody else may have it, too
            _close_pipe(pipe)

    def _fill(self) -> int:
        try:
            self._pipe = self._pipe or _take_pipe()
        except OSError:
            return super()._fill()
        return os.splice(self._source.fileno(), self._pipe[1], _PIPE_BYTES)

    def _empty(self) -> int:
        if not self._pipe:
            return super()._empty()
        return os.splice(self._pipe[0], self.sink.fileno(), self._left)

    def _free(self) -> None:
        super()._free()
        if self._pipe is None or self._pinned:
            return
        if self._left == 0 and self._pipe[0] in _big:
            _spare.append(self._pipe)
        else:
            _close_pipe(self._pipe)
        self._pipe = None


#: Seconds between two checks of all forwarders, and for which a side may acknowledge nothing (see `sockets.prepare`).
CHECK_INTERVAL, ACK_TIMEOUT = 15.0, 120.0

_forwarders: set[Forwarder] = set()


def _check_all(loop: asyncio.AbstractEventLoop) -> None:
    for forwarder in list(_forwarders):
        forwarder.check_acknowledged()
    if _forwarders:
        loop.call_later(CHECK_INTERVAL, _check_all, loop)


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


Pipe = tuple[int, int]  # where one reads, and where one writes

_big: set[int] = set()  # the reading ends of the big pipes
_spare: list[Pipe] = []  # those that are empty


def _queued(descriptor: int, request: int) -> int:
    """How many bytes FIONREAD or TIOCOUTQ counts (ioctl_tty(2), tcp(7))."""
    return int.from_bytes(fcntl.ioctl(descriptor, request, bytes(4)), sys.byteorder)


def _take_pipe(*, big: bool = True) -> Pipe:
    if _spare and big:
        return _spare.pop()
    pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    if big and len(_big) < _BIG_PIPES:  # who does not read keeps one: small pipes are slower, but work
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe[0], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            _big.add(pipe[0])
    return pipe


def _close_pipe(pipe: Pipe) -> None:
    _big.discard(pipe[0])
    os.close(pipe[0])
    os.close(pipe[1])
