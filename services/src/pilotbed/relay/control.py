"""An agent's control connection, at the relay."""

import asyncio
from typing import Protocol

from pilotbed.relay.leases import Lease
from pilotbed.relay.protocol import Connection, Frame, Refusal, State
from pilotbed.relay.tls import TlsSocket


class Handler(Protocol):
    """Who acts on what control connections bring."""

    def frame_received(self, frame: Frame, control: "ControlConnection") -> None:
        """A frame came that may be sent now. Raises: Refusal."""

    def refuse(self, control: "ControlConnection", refusal: Refusal) -> None:
        """The agent broke the protocol, or was silent for too long: it has to be told, and the connection closed."""

    def connection_failed(self, control: "ControlConnection", error: OSError) -> None:
        """The connection is broken; `connection_closed` follows."""

    def connection_closed(self, control: "ControlConnection") -> None:
        """The connection is of no further use; its TLS has yet to be closed."""


class ControlConnection:
    """A control connection, from the end of the TLS handshake on.

    What is idle is callbacks in the loop's table: an agent holds no task.

    Args:
        handler: acts on what comes.
        tls: after its handshake.
        peer: address of the agent, for people.
        protocol: the relay's side, as old as the connection.
    Attributes:
        lease: what the agent registered for.
        closed: whether the connection is of no further use.
    """

    __slots__ = ("_handler", "_loop", "_timer", "closed", "lease", "peer", "protocol", "tls")

    def __init__(self, handler: Handler, tls: TlsSocket, peer: str, protocol: Connection) -> None:
        self._handler, self.tls, self.peer, self.protocol = handler, tls, peer, protocol
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.lease: Lease | None = None
        self.closed = False

    @property
    def serving(self) -> bool:
        """Whether the agent knows that it has the lease."""
        return self.protocol.state is State.SERVING

    def listen(self) -> None:
        """Have the handler learn what the agent sends, or that it is silent for too long."""
        self.set_timer()
        self.tls.listen(self._received, self._ended)

    def set_timer(self) -> None:
        """Set the timer of the state in which the connection is now."""
        if self._timer:
            self._timer.cancel()
        deadline = self.protocol.deadline()
        self._timer = None if deadline is None or self.closed else self._loop.call_at(deadline, self._due)

    def send(self, frame: Frame) -> None:
        """Send a frame if it may be sent now."""
        if self.protocol.may(frame):
            self.tls.write(self.protocol.send(frame, self._loop.time()))

    def close(self) -> None:
        """Hang up when all is sent."""
        if not self.closed:
            self.closed = True
            self.set_timer()
            self.protocol.state = State.CLOSED
            self._handler.connection_closed(self)

    def _received(self, data: bytes) -> None:
        try:
            for frame in self.protocol.receive(data, self._loop.time()):
                self._handler.frame_received(frame, self)
        except Refusal as refusal:
            self._handler.refuse(self, refusal)
        if self.protocol.state is State.CLOSED:
            self.close()

    def _due(self) -> None:
        """A deadline of old; there is a newer one if the agent has spoken since."""
        try:
            self.protocol.due(self._loop.time())
        except Refusal as refusal:
            self._handler.refuse(self, refusal)
        else:
            self.set_timer()

    def _ended(self, error: OSError | None) -> None:
        if error and not self.closed:
            self._handler.connection_failed(self, error)
        self.close()
