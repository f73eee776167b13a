"""The agents: their admission by TLS, their registration, and the end of their leases."""

import asyncio
import datetime as dt
import socket

from pilotbed.relay import authorization
from pilotbed.relay.authorization import Authorization, WatchedCertificate
from pilotbed.relay.config import Config
from pilotbed.relay.control import ControlConnection
from pilotbed.relay.forwarding import Forwarding
from pilotbed.relay.log import event
from pilotbed.relay.ports import Port, Ports
from pilotbed.relay.protocol import (
    Connection,
    Failed,
    Frame,
    Load,
    Ping,
    Pong,
    Query,
    Refusal,
    Refused,
    Register,
    Registered,
    Release,
    Side,
    printable,
)
from pilotbed.relay.service import Service
from pilotbed.relay.throttle import Throttle
from pilotbed.relay.tls import TlsSocket
from pilotbed.x509.tls import ServerContext

HANDSHAKE_TIMEOUT = 10.0  # seconds


class Registrar:
    """Admits agents, gives them ports and takes those away again; the handler of control connections.

    Args:
        config: see there.
        service: that it belongs to.
        ports: from which the agents get theirs.
        forwarding: of the ports' streams.
        throttle: of handshakes and of the verification of certificates.
    """

    def __init__(
        self, config: Config, service: Service, ports: Ports, forwarding: Forwarding, throttle: Throttle
    ) -> None:
        self._config, self._service, self._ports, self._forwarding = config, service, ports, forwarding
        self._throttle = throttle
        self._authorization = Authorization(config, service.log)
        self._context = ServerContext(config.certificate, config.key, config.ca_directory)
        self._admitted: set[asyncio.Task[None] | ControlConnection | None] = set()  # and not registered yet

    @property
    def unregistered(self) -> int:
        """How many are in their handshake, or have not registered yet."""
        return len(self._admitted)

    def start(self) -> None:
        """Watch over the leases.

        Raises:
            OSError: the relay's certificate cannot be loaded.
        """
        self._context.current()
        self._service.spawn(self._service.repeat(1, self._end_due_leases))
        self._service.spawn(
            self._service.repeat(
                authorization.RECHECK, lambda: self._authorization.recheck(self._revoked, self._service.apart)
            )
        )

    def stop(self) -> None:
        """Tell the agents to come back."""
        for control in [*self._admitted, *(port.control for port in self._ports)]:
            if isinstance(control, ControlConnection):
                self.refuse(control, Refusal("stopping", "the relay stops"), counted=False)

    def admit(self, sock: socket.socket, peer: str) -> None:
        """Somebody begins a TLS handshake."""
        self._service.spawn(self._admit(sock, peer))

    async def _admit(self, sock: socket.socket, peer: str) -> None:
        task = asyncio.current_task()
        self._admitted.add(task)
        protocol = Connection(Side.RELAY, asyncio.get_running_loop().time(), self._config.heartbeat)
        try:
            tls = TlsSocket(sock, self._context.current())
            try:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                    await tls.handshake(self._throttle)
            except BaseException:
                self._service.spawn(tls.close(), last=True)
                raise
        except OSError as error:  # TimeoutError is one
            self._service.refusals.record_error(error, peer=peer)
            return
        finally:
            self._admitted.discard(task)
        control = ControlConnection(self, tls, peer, protocol)
        self._admitted.add(control)
        control.listen()

    # -- what control connections bring

    def frame_received(self, frame: Frame, control: ControlConnection) -> None:
        """Act on a frame that may be sent now."""
        if isinstance(frame, Query):
            control.send(Load(len(self._ports), self._ports.free, self._forwarding.streams))
        elif isinstance(frame, Register):
            self._service.spawn(self._register(frame, control))
        elif (port := self._ports.of(control.lease)) is None:
            return
        elif isinstance(frame, Ping):
            control.send(Pong())
        elif isinstance(frame, Release):
            self._end(port, "released")
        elif isinstance(frame, Failed):
            self._forwarding.target_failed(port, frame.stream, frame.reason)

    def refuse(self, control: ControlConnection, refusal: Refusal, *, counted: bool = True) -> None:
        """Tell an agent why, and hang up."""
        if counted:
            dn = control.lease.dn if control.lease else None
            self._service.refusals.record(refusal.code, refusal.reason, peer=control.peer, dn=dn)
        control.send(Refused(refusal.code, printable(refusal.reason, 2000), refusal.final))
        control.close()

    def connection_failed(self, control: ControlConnection, error: OSError) -> None:
        """Count it if there is no lease with which it is logged."""
        if control.lease is None:
            self._service.refusals.record_error(error, peer=control.peer)

    def connection_closed(self, control: ControlConnection) -> None:
        """The lease waits."""
        self._admitted.discard(control)
        self._ports.disconnect(control)
        self._service.spawn(control.tls.close(), last=True)

    async def _register(self, frame: Register, control: ControlConnection) -> None:
        try:
            async with self._throttle:
                if control.closed:
                    return
                agent = self._authorization.authorize(frame.chain, control.tls.peer_certificate)
            if control.closed:
                return
            port = self._ports.register(frame, agent)
            lease, again = port.lease, frame.lease is not None
            before, control.lease, port.control = port.control, lease, control
            if before:
                self.refuse(before, Refusal("superseded", "another connection registered with this lease"))
            try:
                await self._ports.save()
            except OSError as error:
                if not again:
                    self._end(port, "storage")
                raise Refusal("storage", f"the lease could not be written: {error.strerror}") from None
        except Refusal as refusal:
            self.refuse(control, refusal)
            return
        if control.closed:  # it hung up, or was superseded, meanwhile
            return
        event(
            self._service.log, "lease_renewed" if again else "lease_opened", lease=lease.label, port=lease.port,
            pilot=lease.pilot, dn=lease.dn, fqan=lease.fqan or None, peer=control.peer, expires=int(lease.expires),
        )  # fmt: skip
        self._admitted.discard(control)
        heartbeat = self._config.heartbeat
        control.send(Registered(lease.id, self._config.public_address, lease.port, int(lease.expires), heartbeat))
        control.set_timer()
        self._forwarding.request_waiting(port)

    # -- the end of a lease

    def _end(self, port: Port, why: str) -> None:
        self._ports.end(port, why)
        self._forwarding.end(port)

    async def _end_due_leases(self) -> None:
        for port, why in self._ports.due():
            with self._service.apart(port.lease.label):
                if port.control:
                    until = f"{dt.datetime.fromtimestamp(port.lease.expires, dt.UTC):%FT%TZ}"
                    refusal = Refusal("proxy_expired", f"the proxy, or its attributes, expired at {until}")
                    self.refuse(port.control, refusal)
                self._end(port, why)

    def _revoked(self, certificate: WatchedCertificate, reason: str) -> None:
        """The certificate of a holder, or of a VOMS server, was revoked: the leases that rest on it end."""
        for port in [port for port in self._ports if certificate in port.certificates]:
            if port.control:
                self.refuse(port.control, Refusal(certificate.code, reason))
            self._end(port, certificate.code)
