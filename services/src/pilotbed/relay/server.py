"""The relay's server: gives dedicated ports to agents, and carries what comes to them. A thin asyncio shell.

Decisions are made elsewhere: `protocol` (what may be said), `leases` (who gets which port), `config` (who may),
`x509` (who is who). What is idle here is callbacks in the loop's table: an agent or a stream holds no task.
"""

import asyncio
import base64
import contextlib
import datetime as dt
import logging
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate, ObjectIdentifier
from cryptography.x509.oid import ExtendedKeyUsageOID

from pilotbed.relay import Joint, Pipe, Traffic, event, reset, unreset, write_durably
from pilotbed.relay.config import Config
from pilotbed.relay.keep import Keeper
from pilotbed.relay.leases import Lease, LeaseBook, TokenBook
from pilotbed.relay.protocol import (
    PREFACE,
    PREFACE_LENGTH,
    REFUSALS,
    TOKEN_LIFETIME,
    Connection,
    Failed,
    Frame,
    Load,
    Open,
    Ping,
    Pong,
    Query,
    Refusal,
    Refused,
    Register,
    Registered,
    Release,
    Side,
    State,
    read_preface,
)
from pilotbed.relay.service import Address, Figure, Listener, Networks, Service, command, where
from pilotbed.relay.tls import TlsSocket
from pilotbed.settings import SettingsError
from pilotbed.x509 import Attributes, CertificateError, Chain, TrustError, TrustStore, VomsStore

PATIENCE = 10.0  # seconds for a connection to say what it is, and for its TLS handshake
SHARE = 0.1  # of the time for handshakes and certificates of agents, while
FLOW = 256 * 1024  # bytes or more were carried since the last one
KEEP_AFTER = 2.0  # seconds after which a stream is one of those that systemd keeps: handing it over costs 0.2 ms
LOG_DELAY = 0.1  # seconds for which the lines about ended streams are gathered
RECHECK = 30.0  # seconds between two looks at the certificates of standing leases (revoked meanwhile?)
TLS_HANDSHAKE = b"\x16"  # first byte of a TLS connection (RFC 8446, 5.1: ContentType handshake)


class Pace:
    """Turns for what holds the loop up: one at a time, and while bytes flow, only `SHARE` of the time.

    Without it, whoever attempts TLS handshakes as fast as they can, for which nobody needs a certificate, would take
    the loop from the streams: milliseconds each, in which others carry megabytes.

    Args:
        traffic: of all streams.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic, self._moved, self._began = traffic, 0, 0.0
        self._lock = asyncio.Lock()  # first come, first served

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        self._began = asyncio.get_running_loop().time()

    async def __aexit__(self, *exception: object) -> None:
        moved, before = self._traffic.inward + self._traffic.outward, self._moved
        self._moved = moved
        if moved - before < FLOW:
            self._lock.release()
        else:
            loop = asyncio.get_running_loop()
            loop.call_later((loop.time() - self._began) * (1 / SHARE - 1), self._lock.release)


class Control:
    """An agent's control connection, from the end of the TLS handshake on.

    Attributes:
        peer: address of the agent, for people.
        certificate: the one (DER) whose key the agent has.
        port: what it registered for.
    """

    __slots__ = ("_loop", "_relay", "_timer", "_tls", "closed", "connection", "peer", "port")

    def __init__(self, relay: "Relay", tls: TlsSocket, peer: str, connection: Connection) -> None:
        self._relay, self._tls, self.peer, self.connection = relay, tls, peer, connection
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.port: Port | None = None
        self.closed = False

    @property
    def certificate(self) -> bytes:
        return self._tls.peer_certificate

    def listen(self) -> None:
        """Let the relay hear what the agent says, or that it is silent for too long."""
        self.watch()
        self._tls.listen(self._heard, self._ended)

    def watch(self) -> None:
        """Set the timer of the state in which the connection is now."""
        if self._timer:
            self._timer.cancel()
        deadline = self.connection.deadline()
        self._timer = None if deadline is None or self.closed else self._loop.call_at(deadline, self._due)

    def say(self, frame: Frame) -> None:
        """Send a frame if it may be sent now."""
        if self.connection.may(frame):
            self._tls.write(self.connection.send(frame, self._loop.time()))

    def close(self) -> None:
        """Hang up when all is sent."""
        if not self.closed:
            self.closed = True
            self.watch()
            self.connection.state = State.CLOSED
            self._relay.gone(self)
            self._relay.spawn(self._tls.close(), last=True)

    def _heard(self, data: bytes) -> None:
        try:
            for frame in self.connection.receive(data, self._loop.time()):
                self._relay.handle(frame, self)
        except Refusal as refusal:
            self._relay.refuse(self, refusal)
        if self.connection.state is State.CLOSED:
            self.close()

    def _due(self) -> None:
        """A deadline of old; there is a newer one if the agent has spoken since."""
        try:
            self.connection.due(self._loop.time())
        except Refusal as refusal:
            self._relay.refuse(self, refusal)
        else:
            self.watch()

    def _ended(self, error: OSError | None) -> None:
        if error and self.port is None and not self.closed:
            self._relay.count(_code(error), _reason(error), peer=self.peer)
        self.close()


@dataclass(eq=False, slots=True)
class Stream:
    """A connection to a dedicated port: waits for the agent's, then `joint` carries both."""

    number: int
    port: "Port"
    client: socket.socket
    peer: str
    began: float
    traffic: Traffic
    token: bytes | None = None
    timer: asyncio.TimerHandle | None = None
    joint: Joint | None = None
    kept: str = ""  # its name with systemd


@dataclass(frozen=True, eq=False)
class Relied:
    """Whose revocation ends leases: an end entity, or a VOMS server that signed its attributes; `code` says why."""

    chain: Chain
    purpose: ObjectIdentifier
    code: str


@dataclass(eq=False, slots=True)
class Port:
    """What a lease has while the relay runs; `relied`: on whom it rests, once an agent was here."""

    lease: Lease
    traffic: Traffic
    sources: Networks
    listener: Listener | None = None
    control: Control | None = None
    relied: tuple[Relied, ...] = ()
    streams: dict[int, Stream] = field(default_factory=dict)
    total: int = 0

    @property
    def served(self) -> bool:
        """Whether an agent is there, and knows that it has the lease."""
        return self.control is not None and self.control.connection.state is State.SERVING


class Greeting:
    """A connection to the relay's own port until it has said what it is: TLS (an agent) or a preface (a stream)."""

    __slots__ = ("_data", "_loop", "_peer", "_relay", "_sock", "_timer")

    def __init__(self, relay: "Relay", sock: socket.socket, peer: str) -> None:
        self._relay, self._sock, self._peer, self._data = relay, sock, peer, b""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def read(self) -> None:
        """Hear what it says; the first time, it has mostly spoken by now."""
        try:
            if not self._data and self._sock.recv(1, socket.MSG_PEEK) == TLS_HANDSHAKE:
                self._let_go()
                self._relay.spawn(self._relay.admit(self._sock, self._peer))
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
        self._relay.bring(token, self._sock, self._peer)

    def refuse(self, error: Exception) -> None:
        """Count and log why, and hang up."""
        self._relay.count(_code(error), _reason(error), peer=self._peer)
        self.drop()

    def drop(self) -> None:
        """End the connection."""
        self._let_go()
        reset(self._sock)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(PATIENCE, self.refuse, TimeoutError())
            self._loop.add_reader(self._sock.fileno(), self.read)
            self._relay.greetings[self] = None

    def _let_go(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._loop.remove_reader(self._sock.fileno())
            del self._relay.greetings[self]


class Relay(Service):
    """One relay.

    Args:
        config: see there.
    """

    def __init__(self, config: Config) -> None:
        super().__init__("relay", config.status_socket)
        self.config = config
        self.book = LeaseBook(config.range, config.leases_per_dn, config.grace)
        self.ports: dict[str, Port] = {}  # by lease id
        self.tokens: TokenBook[Stream] = TokenBook()
        self.traffic = Traffic()
        self._pace = Pace(self.traffic)
        self.streams = self.streams_total = 0
        # Who has not said yet what they are, the oldest first.
        self.greetings: dict[Greeting | Control | asyncio.Task[None] | None, None] = {}
        self._keeper = Keeper()
        self._ended_streams: list[tuple[Stream, str, float]] = []  # to be logged: why, and after how many seconds
        self.ended: deque[dict[str, object]] = deque(maxlen=50)
        self._trust = TrustStore(config.ca_directory)
        self._voms = VomsStore(config.voms_directory, self._trust)
        self._relied: WeakValueDictionary[bytes, Relied] = WeakValueDictionary()  # by certificate (DER)
        self._tls: tuple[object, ssl.SSLContext] | None = None
        self._saving = asyncio.Lock()
        self._changes = self._saved = 0

    # -- life

    async def start(self) -> None:
        """Restore the leases, listen.

        Raises:
            SettingsError: the state file is damaged.
            OSError: a socket cannot be bound, or the certificate cannot be loaded.
        """
        self._context()
        self._restore()
        self._adopt()
        self.listen((self.config.address, self.config.port), self._greet)
        await super().start()
        self.spawn(self._watch_leases())
        self.spawn(self._watch_certificates())
        event(self.log, "started", address=self.config.address, port=self.port, leases=len(self.ports))

    async def stop(self) -> None:
        """Tell the agents to come back, and close everything; leases stay on disk, and kept streams with systemd."""
        self.close_listener()
        for greeting in list(self.greetings):
            if isinstance(greeting, Greeting):
                greeting.drop()
        agents = [*self.greetings, *(port.control for port in self.ports.values())]
        for control in agents:
            if isinstance(control, Control):
                self.refuse(control, Refusal("stopping", "the relay stops"), counted=False)
        for port in self.ports.values():
            for stream in list(port.streams.values()):
                if stream.kept and stream.joint:
                    stream.joint.leave()
                    stream.kept = ""
                    self._forget(stream)
            self._close(port)
        self._log_streams()
        await super().stop()
        await self._save_later()
        event(self.log, "stopped")

    # -- state on disk

    def _restore(self) -> None:
        try:
            text = self.config.state.read_text()
            self.book.restore(text, time.time(), lambda lease: self.config.grants(lease.dn, [lease.fqan]) is not None)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{self.config.state}: {error}; repair it, or remove it (every pilot then needs a new port)"
            ) from None
        for lease in self.book:
            port = self.ports[lease.id] = Port(lease, Traffic(self.traffic), Networks(lease.sources))
            try:
                self._listen(port)
            except OSError as error:  # tried again when the agent comes back
                event(self.log, "port_busy", level=logging.ERROR, port=lease.port, reason=error.strerror)

    def _adopt(self) -> None:
        """Go on with the streams of an earlier process."""
        ports = {port.lease.port: port for port in self.ports.values()}
        for kept in self._keeper.kept():
            try:
                sockets = {sock.getsockname()[1]: sock for sock in kept.sockets}
                port = next(ports[number] for number in sockets if number in ports)
                outer = sockets.pop(port.lease.port)
                (inner,) = sockets.values()
                for sock in (outer, inner):
                    unreset(sock)
            except (OSError, StopIteration, ValueError):  # its lease has gone
                kept.reset()
                self._keeper.drop(kept.name)
                continue
            try:
                peer = where(outer.getpeername())
            except OSError:  # over for TCP, but what came on it has yet to be carried, or its reset
                peer = "gone"
            stream = self._stream(port, outer, peer)
            stream.kept = kept.name
            self._carry(stream, inner, (kept.pipes[0], kept.pipes[1]))
        if self.streams:
            event(self.log, "streams_adopted", streams=self.streams)

    async def _save(self) -> None:
        """Return when every change made until now is on disk; changes that come meanwhile share the next write."""
        self._changes += 1
        wanted = self._changes
        async with self._saving:
            if self._saved < wanted:
                covered, text = self._changes, self.book.dump()
                await asyncio.get_running_loop().run_in_executor(None, write_durably, self.config.state, text)
                self._saved = covered

    async def _save_later(self) -> None:
        try:
            await self._save()
        except OSError as error:
            event(self.log, "state_not_saved", level=logging.ERROR, file=self.config.state, reason=error.strerror)

    # -- the control and stream port

    def _greet(self, sock: socket.socket, address: Address) -> None:
        if len(self.greetings) >= self.config.greetings:
            refusal = Refusal("overload", f"{len(self.greetings)} connections have not said what they are")
            # Whoever means it speaks at once: the oldest silent one gives way, or the silent would keep all others out.
            silent = next((greeting for greeting in self.greetings if isinstance(greeting, Greeting)), None)
            if silent is None:
                self.count(refusal.code, refusal.reason, peer=where(address))
                reset(sock)
                return
            silent.refuse(refusal)
        Greeting(self, sock, where(address)).read()

    async def admit(self, sock: socket.socket, peer: str) -> None:
        """The TLS handshake of an agent."""
        task = asyncio.current_task()
        self.greetings[task] = None
        connection = Connection(Side.RELAY, asyncio.get_running_loop().time(), self.config.heartbeat)
        try:
            tls = TlsSocket(sock, self._context())
            try:
                async with asyncio.timeout(PATIENCE):
                    await tls.handshake(self._pace)
            except BaseException:
                self.spawn(tls.close(), last=True)
                raise
        except OSError as error:  # TimeoutError is one
            self.count(_code(error), _reason(error), peer=peer)
            return
        finally:
            self.greetings.pop(task, None)
        control = Control(self, tls, peer, connection)
        self.greetings[control] = None
        control.listen()

    def _context(self) -> ssl.SSLContext:
        """TLS for agents; made anew when certificate or CA directory changed, because OpenSSL keeps what it read."""
        config = self.config
        stamp = [path.stat().st_mtime_ns for path in (config.certificate, config.key, config.ca_directory)]
        if self._tls is None or self._tls[0] != stamp:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0  # a resumed session would skip the verification of the certificate
            # OpenSSL keeps the peer's key share as long as the connection: of the hybrid with ML-KEM, 6 kB an agent.
            # What passes here is of no use to somebody who can decrypt it in ten years.
            with contextlib.suppress(ssl.SSLError):  # Python 3.11 knows NIST's curves only: it does without
                context.set_ecdh_curve("X25519")
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VERIFY_ALLOW_PROXY_CERTS
            context.load_cert_chain(config.certificate, config.key)
            context.load_verify_locations(capath=str(config.ca_directory))
            self._tls = (stamp, context)
        return self._tls[1]

    # -- an agent

    def handle(self, frame: Frame, control: Control) -> None:
        """Act on a frame that may be said now."""
        if isinstance(frame, Query):
            control.say(Load(len(self.ports), len(self.config.range) - len(self.ports), self.streams))
        elif isinstance(frame, Register):
            self.spawn(self._register(frame, control))
        elif control.port is None:
            return
        elif isinstance(frame, Ping):
            control.say(Pong())
        elif isinstance(frame, Release):
            self._end(control.port, "released")
        elif isinstance(frame, Failed):
            stream = control.port.streams.get(frame.stream)
            if stream and not stream.joint:
                self._drop(stream, "target", f"the agent says: {frame.reason}")

    async def _register(self, frame: Register, control: Control) -> None:
        try:
            async with self._pace:
                if control.closed:
                    return
                chain = self._identify(frame, control)
                fqan, attributes = self._authorize(chain)
            if control.closed:
                return
            expires = min(filter(None, (chain.not_after, attributes.not_after))).timestamp()
            port = self._lease(frame, chain.dn, fqan, expires)
            lease, again = port.lease, frame.lease is not None
            before, control.port, port.control = port.control, port, control
            port.relied = (
                self._rely(chain.end_entity, ExtendedKeyUsageOID.CLIENT_AUTH, "bad_certificate"),
                *(self._rely(each, ExtendedKeyUsageOID.SERVER_AUTH, "bad_attributes") for each in attributes.servers),
            )
            if before:
                self.refuse(before, Refusal("superseded", "another connection registered with this lease"))
            try:
                await self._save()
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
            self.log, "lease_renewed" if again else "lease_opened", lease=lease.label, port=lease.port,
            pilot=lease.pilot, dn=lease.dn, fqan=lease.fqan or None, peer=control.peer, expires=int(lease.expires),
        )  # fmt: skip
        self.greetings.pop(control, None)
        control.say(
            Registered(lease.id, self.config.public_address, lease.port, int(lease.expires), self.config.heartbeat)
        )
        control.watch()
        for stream in list(port.streams.values()):
            if stream.joint is None:  # came while the agent was away, or was asked for on a connection now lost
                self._ask(stream)

    def _identify(self, frame: Register, control: Control) -> Chain:
        """The verified chain of the TLS peer; the frame only helps with the certificates between it and the CA.

        Python gives the peer's whole chain since 3.13 only, and OpenSSL neither knows our rules for revocation lists
        nor tells why; so the agent sends its chain again, and its first certificate must be the one that TLS proved.
        """
        try:
            certificates = [base64.b64decode(text, validate=True) for text in frame.chain]
            if certificates[0] != control.certificate:
                raise Refusal("bad_certificate", "the chain does not start with the certificate of the TLS connection")
            return self._trust.verify(Chain.from_der(certificates))
        except TrustError as error:
            raise Refusal("trust", str(error)) from None
        except (CertificateError, ValueError) as error:
            raise Refusal("bad_certificate", str(error)) from None

    def _authorize(self, chain: Chain) -> tuple[str, Attributes]:
        """The FQAN that lets a verified chain in; "" if its DN is enough: then attributes are not even looked at."""
        granted, fqans = self.config.grants(chain.dn, self.config.authorized_fqans), "any FQAN"
        found = Attributes((), None, ())
        if granted:
            try:
                found = self._voms.attributes(chain)
            except TrustError as error:
                raise Refusal("trust", str(error)) from None
            except CertificateError as error:
                raise Refusal("bad_attributes", str(error)) from None
            granted, fqans = self.config.grants(chain.dn, found.fqans), ", ".join(found.fqans) or "no FQAN"
        if granted is None:
            raise Refusal("not_authorized", f"{chain.dn} with {fqans} may not have a port here")
        return granted, found

    def _rely(self, certificate: Certificate, purpose: ObjectIdentifier, code: str) -> Relied:
        """One object for all leases that rest on a certificate; proxies are in no revocation list."""
        relied = Relied(Chain((certificate,)), purpose, code)
        return self._relied.setdefault(certificate.public_bytes(Encoding.DER), relied)

    def _lease(self, frame: Register, dn: str, fqan: str, expires: float) -> Port:
        """A lease with its listening port. Ports that something else uses are passed over, unless it is ours again."""
        unusable: list[int] = []
        while True:
            lease = self.book.register(frame, dn, fqan, expires, time.time(), unusable)
            sources = Networks(lease.sources)
            port = self.ports.setdefault(lease.id, Port(lease, Traffic(self.traffic), sources))
            port.sources = sources
            try:
                self._listen(port)
            except OSError as error:
                event(self.log, "port_busy", level=logging.ERROR, port=lease.port, reason=error.strerror)
                if frame.lease is not None:
                    self.book.lose(lease, time.time())
                    raise Refusal("port_busy", f"port {lease.port} is in use on the relay's host just now") from None
                unusable.append(lease.port)
                self.book.end(lease)
                del self.ports[lease.id]
            else:
                return port

    def _listen(self, port: Port) -> None:
        if port.listener is None:
            port.listener = Listener((self.config.address, port.lease.port), partial(self._knock, port), self.log)

    def gone(self, control: Control) -> None:
        """A control connection has ended; its lease waits."""
        self.greetings.pop(control, None)
        port = control.port
        if port is not None and port.control is control:
            port.control = None
            if port.lease in self.book:
                self.book.lose(port.lease, time.time())
                event(self.log, "agent_lost", lease=port.lease.label, port=port.lease.port, pilot=port.lease.pilot)

    def _end(self, port: Port, why: str) -> None:
        """End the lease for good."""
        lease = port.lease
        self.book.end(lease)
        self.ports.pop(lease.id, None)
        self.ended.append(self._seen(port) | {"state": why, "ended": int(time.time())})
        self._close(port)
        self.spawn(self._save_later())
        event(
            self.log, "lease_ended", why=why, lease=lease.label, port=lease.port, pilot=lease.pilot, dn=lease.dn,
            streams=port.total, inward=port.traffic.inward, outward=port.traffic.outward,
        )  # fmt: skip

    def _close(self, port: Port) -> None:
        if port.listener:
            port.listener.close()
            port.listener = None
        for stream in list(port.streams.values()):
            if stream.joint:
                stream.joint.cut()
                self._carried(stream, "lease ended")
            else:
                self._drop(stream, None, "the lease ended")

    # -- streams

    def _knock(self, port: Port, client: socket.socket, address: Address) -> None:
        """Somebody connected to a dedicated port."""
        peer, lease = where(address), port.lease
        refused = self._unwelcome(port, address[0])
        if refused:
            self.count(*refused, peer=peer, dn=lease.dn)
            reset(client)
            return
        stream = self._stream(port, client, peer)
        if port.served:
            self._ask(stream)
        stream.timer = asyncio.get_running_loop().call_later(TOKEN_LIFETIME, self._expire, stream)

    def _stream(self, port: Port, client: socket.socket, peer: str) -> Stream:
        self.streams += 1
        self.streams_total += 1
        port.total += 1
        now = asyncio.get_running_loop().time()
        stream = Stream(self.streams_total, port, client, peer, now, Traffic(port.traffic))
        port.streams[stream.number] = stream
        return stream

    def _unwelcome(self, port: Port, host: str) -> tuple[str, str] | None:
        if port.sources and host not in port.sources:
            return "source_refused", f"port {port.lease.port} is not for {host}"
        if len(port.streams) >= self.config.streams_per_lease:
            return "too_many_streams", f"port {port.lease.port} carries {len(port.streams)}"
        if self.streams >= self.config.streams:
            return "too_many_streams", f"the relay carries {self.streams}"
        return None

    def _ask(self, stream: Stream) -> None:
        assert stream.port.control is not None
        if stream.token:
            self.tokens.withdraw(stream.token)
        stream.token = self.tokens.issue(stream, time.monotonic())
        stream.port.control.say(Open(stream.number, stream.token.hex(), stream.peer))

    def bring(self, token: bytes, inner: socket.socket, peer: str) -> None:
        """A stream connection has shown a token."""
        stream = self.tokens.redeem(token, time.monotonic())
        if stream is None:
            self.count("bad_token", "stream with a token that is unknown, used or too old", peer=peer)
            reset(inner)
            return
        if stream.timer:
            stream.timer.cancel()
        stream.token = None
        stream.began = asyncio.get_running_loop().time()
        stream.timer = asyncio.get_running_loop().call_later(KEEP_AFTER, self._keep, stream)
        self._carry(stream, inner).pull()  # who connects has mostly spoken by now

    def _carry(
        self, stream: Stream, inner: socket.socket, pipes: tuple[Pipe | None, Pipe | None] | None = None
    ) -> Joint:
        stream.joint = Joint(
            stream.client, inner, stream.traffic,
            lambda error: self._carried(stream, _reason(error) if error else "eof"), pipes=pipes,
        )  # fmt: skip
        return stream.joint

    def _keep(self, stream: Stream) -> None:
        """A stream that has lasted so long is not to end with this process."""
        assert stream.joint is not None
        stream.timer = None
        try:
            stream.kept = self._keeper.keep(stream.joint)
        except OSError:  # out of descriptors
            stream.timer = asyncio.get_running_loop().call_later(KEEP_AFTER, self._keep, stream)

    def _carried(self, stream: Stream, end: str) -> None:
        self._forget(stream)
        if not self._ended_streams:
            asyncio.get_running_loop().call_later(LOG_DELAY, self._log_streams)
        self._ended_streams.append((stream, end, asyncio.get_running_loop().time() - stream.began))

    def _log_streams(self) -> None:
        """Log the streams that have ended: some at a time, as each line would keep the next client waiting."""
        for stream, end, seconds in self._ended_streams:
            lease, traffic = stream.port.lease, stream.traffic
            event(
                self.log, "stream", stream=stream.number, lease=lease.label, pilot=lease.pilot, port=lease.port,
                peer=stream.peer, inward=traffic.inward, outward=traffic.outward, seconds=f"{seconds:.1f}", end=end,
            )  # fmt: skip
        self._ended_streams.clear()

    def _expire(self, stream: Stream) -> None:
        code = "no_agent" if stream.token is None else "stream_timeout"
        self._drop(stream, code, f"nobody brought a connection for port {stream.port.lease.port} in time")

    def _drop(self, stream: Stream, code: str | None, reason: str) -> None:
        """Give up a stream that is not carried yet."""
        self._forget(stream)
        if stream.token:
            self.tokens.withdraw(stream.token)
        reset(stream.client)
        if code:
            self.count(code, reason, peer=stream.peer, dn=stream.port.lease.dn)

    def _forget(self, stream: Stream) -> None:
        if stream.port.streams.pop(stream.number, None):
            self.streams -= 1
        if stream.timer:
            stream.timer.cancel()
        if stream.kept:
            self._keeper.drop(stream.kept)

    # -- refusals

    def refuse(self, control: Control, refusal: Refusal, *, counted: bool = True) -> None:
        """Tell an agent why, and hang up."""
        if counted:
            dn = control.port.lease.dn if control.port else None
            self.count(refusal.code, refusal.reason, peer=control.peer, dn=dn)
        control.say(Refused(refusal.code, _line(refusal.reason), refusal.final))
        control.close()

    # -- timers

    async def _watch_leases(self) -> None:
        while True:
            await asyncio.sleep(1)
            for lease, why in self.book.due(time.time()):
                port = self.ports[lease.id]
                if port.control:
                    until = f"{dt.datetime.fromtimestamp(lease.expires, dt.UTC):%FT%TZ}"
                    refusal = Refusal("proxy_expired", f"the proxy, or its attributes, expired at {until}")
                    self.refuse(port.control, refusal)
                self._end(port, why)

    async def _watch_certificates(self) -> None:
        """End leases whose holder's or VOMS server's certificate was revoked meanwhile.

        An expired revocation list says nothing about them: it refuses new agents, but does not throw out the old.
        """
        while True:
            await asyncio.sleep(RECHECK)
            for relied in list(self._relied.values()):
                await asyncio.sleep(0)
                try:
                    self._trust.verify(relied.chain, purpose=relied.purpose)
                except TrustError as error:
                    event(self.log, "trust_stale", level=logging.ERROR, reason=error)
                    break
                except CertificateError as error:
                    for port in [port for port in self.ports.values() if relied in port.relied]:
                        if port.control:
                            self.refuse(port.control, Refusal(relied.code, str(error)))
                        self._end(port, relied.code)

    # -- to be seen

    def status(self) -> dict[str, Any]:
        """What `pilotbed-relay status` prints; holds no secret."""
        return {
            "started": int(self.started),
            "public_address": self.config.public_address,
            "ports": {"first": self.config.ports[0], "last": self.config.ports[1],
                      "free": len(self.config.range) - len(self.ports)},
            "leases": [self._seen(port) for port in self.ports.values()],
            "ended_leases": list(self.ended),
            "streams": self.streams,
            "streams_total": self.streams_total,
            "bytes_inward": self.traffic.inward,
            "bytes_outward": self.traffic.outward,
            **self.ledger(),
        }  # fmt: skip

    @staticmethod
    def _seen(port: Port) -> dict[str, object]:
        return {
            "lease": port.lease.label,
            "dn": port.lease.dn,
            "fqan": port.lease.fqan,
            "pilot": port.lease.pilot,
            "port": port.lease.port,
            "sources": port.lease.sources,
            "state": "connected" if port.served else "waiting",
            "agent": port.control.peer if port.control else None,
            "opened": int(port.lease.opened),
            "expires": int(port.lease.expires),
            "streams": len(port.streams),
            "streams_kept": sum(bool(stream.kept) for stream in port.streams.values()),
            "streams_total": port.total,
            "bytes_inward": port.traffic.inward,
            "bytes_outward": port.traffic.outward,
        }

    def figures(self) -> list[Figure]:
        connected = sum(port.served for port in self.ports.values())
        moved = {"inward": self.traffic.inward, "outward": self.traffic.outward}
        return [
            Figure("leases", "Leases by state",
                   {"connected": connected, "waiting": len(self.ports) - connected}, "state"),
            Figure("ports_free", "Dedicated ports free", {"": len(self.config.range) - len(self.ports)}),
            Figure("streams", "Streams carried or waiting", {"": self.streams}),
            Figure("streams", "Connections to dedicated ports", {"": self.streams_total}, counter=True),
            Figure("bytes", "Bytes carried", moved, "direction", counter=True),
        ]  # fmt: skip


def _code(error: BaseException) -> str:
    if isinstance(error, Refusal):
        return error.code
    return "tls" if isinstance(error, ssl.SSLError) else "timeout" if isinstance(error, TimeoutError) else "lost"


def _reason(error: BaseException) -> str:
    if isinstance(error, Refusal):
        return error.reason
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, TimeoutError):
        return "said nothing in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:2000]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit codes: 0, 1 something failed (said on stderr), 2 usage."""
    return command("relay", (__doc__ or "").splitlines()[0], Config, Relay, REFUSALS, arguments)


if __name__ == "__main__":
    sys.exit(main())
