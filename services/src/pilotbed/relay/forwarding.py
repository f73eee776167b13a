"""The streams of the dedicated ports: from the client's connection to the last byte, or to the next process."""

import asyncio
import socket
import time

from pilotbed.relay.config import Config
from pilotbed.relay.fdstore import DescriptorStore
from pilotbed.relay.leases import TokenBook
from pilotbed.relay.listener import Address, format_address
from pilotbed.relay.log import event
from pilotbed.relay.ports import Port, Ports, Stream
from pilotbed.relay.protocol import TOKEN_LIFETIME, Open
from pilotbed.relay.refusals import reason_of
from pilotbed.relay.service import Service
from pilotbed.relay.sockets import reset, undo_reset
from pilotbed.relay.streams import Forwarder, Pipe, Traffic

STORE_AFTER = 2.0  # seconds after which systemd gets a stream to store: handing it over costs 0.2 ms
LOG_DELAY = 0.1  # seconds for which the lines about ended streams are gathered


class Forwarding:
    """Brings clients of dedicated ports and stream connections of agents together.

    What is idle is callbacks in the loop's table: a stream holds no task.

    Args:
        config: see there.
        service: that it belongs to.
    Attributes:
        streams: how many are carried, or wait for the agent.
        total: how many there were since the process began.
    """

    def __init__(self, config: Config, service: Service) -> None:
        self._config, self._log, self._refusals = config, service.log, service.refusals
        self._loop = asyncio.get_running_loop()
        self._tokens: TokenBook[Stream] = TokenBook()
        self._store = DescriptorStore()
        self._ended: list[tuple[Stream, str, float]] = []  # to be logged: why, and after how many seconds
        self.streams = self.total = 0

    # -- both ends

    def client_connected(self, port: Port, client: socket.socket, address: Address) -> None:
        """Somebody connected to a dedicated port."""
        peer, lease = format_address(address), port.lease
        refused = self._refusal(port, address[0])
        if refused:
            self._refusals.record(*refused, peer=peer, dn=lease.dn)
            reset(client)
            return
        stream = self._add(port, client, peer)
        if port.served:
            self._request(stream)
        stream.timer = self._loop.call_later(TOKEN_LIFETIME, self._expire, stream)

    def request_waiting(self, port: Port) -> None:
        """Ask the agent for what came while it was away, or was asked for on a connection now lost."""
        for stream in list(port.streams.values()):
            if stream.forwarder is None:
                self._request(stream)

    def stream_connected(self, token: bytes, inner: socket.socket, peer: str) -> None:
        """A stream connection has shown a token."""
        stream = self._tokens.redeem(token, time.monotonic())
        if stream is None:
            self._refusals.record("bad_token", "stream with a token that is unknown, used or too old", peer=peer)
            reset(inner)
            return
        if stream.timer:
            stream.timer.cancel()
        stream.token = None
        stream.began = self._loop.time()
        stream.timer = self._loop.call_later(STORE_AFTER, self._store_stream, stream)
        self._forward(stream, inner).forward_waiting()  # who connects has mostly spoken by now

    def target_failed(self, port: Port, number: int, reason: str) -> None:
        """The agent cannot serve a stream."""
        stream = port.streams.get(number)
        if stream and not stream.forwarder:
            self._drop(stream, "target", f"the agent says: {reason}")

    def _refusal(self, port: Port, host: str) -> tuple[str, str] | None:
        """Why a client may not connect: code and reason."""
        if port.sources and host not in port.sources:
            return "source_refused", f"port {port.lease.port} is not for {host}"
        if len(port.streams) >= self._config.streams_per_lease:
            return "too_many_streams", f"port {port.lease.port} carries {len(port.streams)}"
        if self.streams >= self._config.streams:
            return "too_many_streams", f"the relay carries {self.streams}"
        return None

    def _add(self, port: Port, client: socket.socket, peer: str) -> Stream:
        self.streams += 1
        self.total += 1
        port.total += 1
        stream = Stream(self.total, port, client, peer, self._loop.time(), Traffic(port.traffic))
        port.streams[stream.number] = stream
        return stream

    def _request(self, stream: Stream) -> None:
        """Ask the agent for a stream connection."""
        assert stream.port.control is not None
        if stream.token:
            self._tokens.revoke(stream.token)
        stream.token = self._tokens.issue(stream, time.monotonic())
        stream.port.control.send(Open(stream.number, stream.token.hex(), stream.peer))

    def _forward(
        self, stream: Stream, inner: socket.socket, pipes: tuple[Pipe | None, Pipe | None] | None = None
    ) -> Forwarder:
        stream.forwarder = Forwarder(
            stream.client, inner, stream.traffic,
            lambda error: self._forwarded(stream, reason_of(error) if error else "eof"), pipes=pipes,
        )  # fmt: skip
        return stream.forwarder

    # -- ends

    def end(self, port: Port) -> None:
        """End every stream of a port whose lease ends."""
        for stream in list(port.streams.values()):
            if stream.forwarder:
                stream.forwarder.abort()
                self._forwarded(stream, "lease ended")
            else:
                self._drop(stream, None, "the lease ended")

    def log_ended(self) -> None:
        """Log the streams that have ended: some at a time, as each line would keep the next client waiting."""
        for stream, end, seconds in self._ended:
            lease, traffic = stream.port.lease, stream.traffic
            event(
                self._log, "stream", stream=stream.number, lease=lease.label, pilot=lease.pilot, port=lease.port,
                peer=stream.peer, inward=traffic.inward, outward=traffic.outward, seconds=f"{seconds:.1f}", end=end,
            )  # fmt: skip
        self._ended.clear()

    def _forwarded(self, stream: Stream, end: str) -> None:
        """A stream that was carried has ended."""
        self._remove(stream)
        if not self._ended:
            self._loop.call_later(LOG_DELAY, self.log_ended)
        self._ended.append((stream, end, self._loop.time() - stream.began))

    def _expire(self, stream: Stream) -> None:
        code = "no_agent" if stream.token is None else "stream_timeout"
        self._drop(stream, code, f"nobody brought a connection for port {stream.port.lease.port} in time")

    def _drop(self, stream: Stream, code: str | None, reason: str) -> None:
        """Give up a stream that is not carried yet."""
        self._remove(stream)
        if stream.token:
            self._tokens.revoke(stream.token)
        reset(stream.client)
        if code:
            self._refusals.record(code, reason, peer=stream.peer, dn=stream.port.lease.dn)

    def _remove(self, stream: Stream) -> None:
        if stream.port.streams.pop(stream.number, None):
            self.streams -= 1
        if stream.timer:
            stream.timer.cancel()
        if stream.stored:
            self._store.remove(stream.stored)

    # -- from process to process

    def adopt(self, ports: Ports) -> None:
        """Go on with the streams of an earlier process."""
        by_number = {port.lease.port: port for port in ports}
        for stored in self._store.restore():
            try:
                sockets = {sock.getsockname()[1]: sock for sock in stored.sockets}
                port = next(by_number[number] for number in sockets if number in by_number)
                outer = sockets.pop(port.lease.port)
                (inner,) = sockets.values()
                for sock in (outer, inner):
                    undo_reset(sock)
            except (OSError, StopIteration, ValueError):  # its lease has gone
                stored.reset()
                self._store.remove(stored.name)
                continue
            try:
                peer = format_address(outer.getpeername())
            except OSError:  # over for TCP, but what came on it has yet to be carried, or its reset
                peer = "gone"
            stream = self._add(port, outer, peer)
            stream.stored = stored.name
            self._forward(stream, inner, (stored.pipes[0], stored.pipes[1]))
        if self.streams:
            event(self._log, "streams_adopted", streams=self.streams)

    def leave(self, port: Port) -> None:
        """Leave a port's stored streams to the next process."""
        for stream in list(port.streams.values()):
            if stream.stored and stream.forwarder:
                stream.forwarder.detach()
                stream.stored = ""
                self._remove(stream)

    def _store_stream(self, stream: Stream) -> None:
        """A stream that has lasted so long is not to end with this process."""
        assert stream.forwarder is not None
        stream.timer = None
        try:
            stream.stored = self._store.store(stream.forwarder)
        except OSError:  # out of descriptors
            stream.timer = self._loop.call_later(STORE_AFTER, self._store_stream, stream)
