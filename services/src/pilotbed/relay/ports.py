"""The dedicated ports: each is a lease, on disk as long as it lasts, and a listening socket."""

import asyncio
import functools
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from pilotbed.files import replace_file
from pilotbed.relay.authorization import Authorized, WatchedCertificate
from pilotbed.relay.config import Config
from pilotbed.relay.control import ControlConnection
from pilotbed.relay.leases import Lease, LeaseBook
from pilotbed.relay.listener import Address, Listener
from pilotbed.relay.log import event
from pilotbed.relay.networks import Networks
from pilotbed.relay.protocol import Refusal, Register
from pilotbed.relay.service import Service
from pilotbed.relay.streams import Forwarder, Traffic
from pilotbed.settings import SettingsError


@dataclass(eq=False, slots=True)
class Stream:
    """A connection to a dedicated port: waits for the agent's, then `forwarder` carries both."""

    number: int
    port: "Port"
    client: socket.socket
    peer: str
    began: float
    traffic: Traffic
    token: bytes | None = None
    timer: asyncio.TimerHandle | None = None
    forwarder: Forwarder | None = None
    stored: str = ""  # its name in systemd's store


@dataclass(eq=False, slots=True)
class Port:
    """What a lease has while the relay runs; `certificates`: on which it rests, once an agent was here."""

    lease: Lease
    traffic: Traffic
    sources: Networks
    listener: Listener | None = None
    control: ControlConnection | None = None
    certificates: tuple[WatchedCertificate, ...] = ()
    streams: dict[int, Stream] = field(default_factory=dict)
    total: int = 0

    @property
    def served(self) -> bool:
        """Whether an agent is there, and knows that it has the lease."""
        return self.control is not None and self.control.serving

    def status(self) -> dict[str, object]:
        """Its part of the relay's status; holds no secret."""
        return {
            "lease": self.lease.label,
            "dn": self.lease.dn,
            "fqan": self.lease.fqan,
            "pilot": self.lease.pilot,
            "port": self.lease.port,
            "sources": self.lease.sources,
            "state": "connected" if self.served else "waiting",
            "agent": self.control.peer if self.control else None,
            "opened": int(self.lease.opened),
            "expires": int(self.lease.expires),
            "streams": len(self.streams),
            "streams_kept": sum(bool(stream.stored) for stream in self.streams.values()),
            "streams_total": self.total,
            "bytes_inward": self.traffic.inward,
            "bytes_outward": self.traffic.outward,
        }


class Ports:
    """The ports that are given.

    Args:
        config: see there.
        service: that they belong to.
        traffic: in which each port's is counted, too.
        client_connected: called with each connection to a port.
    Attributes:
        ended: status of the last ports that were taken away.
    """

    def __init__(
        self,
        config: Config,
        service: Service,
        traffic: Traffic,
        client_connected: Callable[[Port, socket.socket, Address], None],
    ) -> None:
        self._config, self._service, self._log, self._traffic = config, service, service.log, traffic
        self._client_connected = client_connected
        self._book = LeaseBook(config.range, config.leases_per_dn, config.grace)
        self._ports: dict[str, Port] = {}  # by lease id
        self.ended: deque[dict[str, object]] = deque(maxlen=50)
        self._saving = asyncio.Lock()
        self._changes = self._saved = 0

    def __iter__(self) -> Iterator[Port]:
        return iter(list(self._ports.values()))

    def __len__(self) -> int:
        return len(self._ports)

    @property
    def free(self) -> int:
        """How many could still be given."""
        return len(self._config.range) - len(self._ports)

    def of(self, lease: Lease | None) -> Port | None:
        """The port of a lease; None once that has ended."""
        return self._ports.get(lease.id) if lease else None

    def register(self, wish: Register, agent: Authorized) -> Port:
        """A lease with its listening port. Ports that something else uses are passed over, unless it is ours again.

        Args:
            wish: what the agent asks for.
            agent: who that is.
        Raises:
            Refusal: see `LeaseBook.register`; or port_busy.
        """
        unusable: list[int] = []
        while True:
            lease = self._book.register(wish, agent.dn, agent.fqan, agent.expires, time.time(), unusable)
            sources = Networks(lease.sources)
            port = self._ports.setdefault(lease.id, Port(lease, Traffic(self._traffic), sources))
            port.sources = sources
            try:
                self._listen(port)
            except OSError as error:
                self._log_busy(port, error)
                if wish.lease is not None:
                    self._book.agent_lost(lease, time.time())
                    raise Refusal("port_busy", f"port {lease.port} is in use on the relay's host just now") from None
                unusable.append(lease.port)
                self._book.end(lease)
                del self._ports[lease.id]
            else:
                port.certificates = agent.certificates
                return port

    def disconnect(self, control: ControlConnection) -> None:
        """A control connection has ended; its lease waits for the agent, if that has no newer one."""
        port = self.of(control.lease)
        if port is not None and port.control is control:
            port.control = None
            self._book.agent_lost(port.lease, time.time())
            event(self._log, "agent_lost", lease=port.lease.label, port=port.lease.port, pilot=port.lease.pilot)

    def due(self) -> list[tuple[Port, str]]:
        """Ports whose lease has to end now, each with why: `proxy_expired` or `grace`."""
        return [(self._ports[lease.id], why) for lease, why in self._book.due(time.time())]

    def end(self, port: Port, why: str) -> None:
        """End the lease for good, and listen no longer; its streams are for the caller to end."""
        lease = port.lease
        self._book.end(lease)
        self._ports.pop(lease.id, None)
        self.ended.append(port.status() | {"state": why, "ended": int(time.time())})
        self.close(port)
        self._service.spawn(self.save_or_log())
        event(
            self._log, "lease_ended", why=why, lease=lease.label, port=lease.port, pilot=lease.pilot, dn=lease.dn,
            streams=port.total, inward=port.traffic.inward, outward=port.traffic.outward,
        )  # fmt: skip

    def close(self, port: Port) -> None:
        """Listen no longer."""
        if port.listener:
            port.listener.close()
            port.listener = None

    def _listen(self, port: Port) -> None:
        if port.listener is None:
            address = (self._config.address, port.lease.port)
            port.listener = Listener(address, partial(self._client_connected, port), self._log)

    def _log_busy(self, port: Port, error: OSError) -> None:
        event(self._log, "port_busy", level=logging.ERROR, port=port.lease.port, reason=error.strerror)

    # -- on disk

    def restore(self) -> None:
        """Take over what an earlier process left on disk.

        Raises:
            SettingsError: the state file is damaged.
        """
        config = self._config
        try:
            text = config.state.read_text()
            self._book.restore(text, time.time(), lambda lease: config.grants(lease.dn, [lease.fqan]) is not None)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{config.state}: {error}; repair it, or remove it (every pilot then needs a new port)"
            ) from None
        for lease in self._book:
            port = self._ports[lease.id] = Port(lease, Traffic(self._traffic), Networks(lease.sources))
            try:
                self._listen(port)
            except OSError as error:  # tried again when the agent comes back
                self._log_busy(port, error)

    async def save(self) -> None:
        """Return when every change made until now is on disk; changes that come meanwhile share the next write.

        Raises:
            OSError: the state could not be written.
        """
        self._changes += 1
        wanted = self._changes
        async with self._saving:
            if self._saved < wanted:
                covered, text = self._changes, self._book.dump()
                write = functools.partial(replace_file, self._config.state, text, 0o600, durable=True)
                await asyncio.get_running_loop().run_in_executor(None, write)
                self._saved = covered

    async def save_or_log(self) -> None:
        """Save; log if that cannot be."""
        try:
            await self.save()
        except OSError as error:
            event(self._log, "state_not_saved", level=logging.ERROR, file=self._config.state, reason=error.strerror)
