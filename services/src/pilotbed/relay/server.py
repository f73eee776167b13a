"""The relay's server: gives dedicated ports to agents, and carries what comes to them. A thin asyncio shell.

Decisions are made elsewhere: `protocol` (what may be said), `leases` (who gets which port), `x509` (who is who).
"""

import argparse
import asyncio
import base64
import contextlib
import datetime as dt
import json
import logging
import signal
import socket
import ssl
import sys
import time
from collections import Counter, deque
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotbed.relay import Traffic, event, join, log_to_stderr, readable, reset, write_durably
from pilotbed.relay.config import DEFAULT_PATH, Config, ConfigError, load
from pilotbed.relay.leases import Lease, LeaseBook, TokenBook
from pilotbed.relay.protocol import (
    PREFACE,
    PREFACE_LENGTH,
    REFUSALS,
    TOKEN_LIFETIME,
    TRANSITIONS,
    Connection,
    Failed,
    Frame,
    Open,
    Ping,
    Pong,
    Refusal,
    Refused,
    Register,
    Registered,
    Release,
    Side,
    State,
    read_preface,
)
from pilotbed.relay.serving import Listener, ask_status, notify, serve_metrics, serve_status
from pilotbed.relay.tls import TlsSocket
from pilotbed.x509 import CertificateError, Chain, TrustError, TrustStore

PATIENCE = 10.0  # seconds for a connection to say what it is, and for its TLS handshake
RECHECK = 30.0  # seconds between two looks at the certificates of standing leases (revoked meanwhile?)
TLS_HANDSHAKE = b"\x16"  # first byte of a TLS connection (RFC 8446, 5.1: ContentType handshake)

_log = logging.getLogger("pilotbed-relay")


@dataclass(eq=False)
class Control:
    """An agent's control connection."""

    connection: Connection
    tls: TlsSocket
    peer: str
    task: asyncio.Task[None] | None

    def say(self, frame: Frame) -> None:
        """Send a frame if it may be sent now."""
        if (self.connection.state, Side.RELAY, type(frame)) in TRANSITIONS:
            self.tls.write(self.connection.send(frame, time.monotonic()))


@dataclass(eq=False)
class Stream:
    """A connection to a dedicated port: waits for the agent's, then both are carried by `task`."""

    number: int
    port: "Port"
    client: socket.socket
    peer: str
    token: bytes | None = None
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class Port:
    """What a lease has while the relay runs."""

    lease: Lease
    traffic: Traffic
    listener: Listener | None = None
    control: Control | None = None
    chain: Chain | None = None
    streams: dict[int, Stream] = field(default_factory=dict)
    total: int = 0

    @property
    def served(self) -> bool:
        """Whether an agent is there, and knows that it has the lease."""
        return self.control is not None and self.control.connection.state is State.SERVING


class Relay:
    """One relay.

    Args:
        config: see there.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.book = LeaseBook(config.range, config.leases_per_dn, config.grace)
        self.ports: dict[str, Port] = {}  # by lease id
        self.tokens: TokenBook[Stream] = TokenBook()
        self.traffic = Traffic()
        self.streams_total = 0
        self.refusals: Counter[str] = Counter()
        self.recent: deque[dict[str, object]] = deque(maxlen=50)
        self.ended: deque[dict[str, object]] = deque(maxlen=50)
        self.started = time.time()
        self._trust = TrustStore(config.ca_directory)
        self._tls: tuple[object, ssl.SSLContext] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._greeting = 0
        self._saving = asyncio.Lock()
        self._changes = self._saved = 0
        self._control: Listener | None = None
        self._status: asyncio.Server | None = None

    # -- life

    async def start(self) -> None:
        """Restore the leases, listen.

        Raises:
            ConfigError: the state file is damaged, or the certificate cannot be loaded.
            OSError: a socket cannot be bound.
        """
        self._context()
        self._restore()
        self._control = Listener((self.config.address, self.config.port), self._incoming)
        self._status = await serve_status(self.config.status_socket, self.status)
        self._spawn(self._watch_leases())
        self._spawn(self._watch_certificates())
        event(_log, "started", address=self.config.address, port=self.port, leases=len(self.ports))

    @property
    def port(self) -> int:
        """Where agents connect (also when the configured port was 0)."""
        assert self._control is not None
        return self._control.port

    async def stop(self) -> None:
        """Tell the agents to come back, and close everything; leases stay on disk."""
        if self._control:
            self._control.close()
        farewells = []
        for port in self.ports.values():
            if port.control:
                self._refuse(port.control, Refusal("stopping", "the relay stops"), counted=False)
                farewells.append(port.control.task)
            self._close(port)
        await asyncio.gather(*filter(None, farewells), return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._status:
            self._status.close()
            self.config.status_socket.unlink(missing_ok=True)
        await self._save_later()
        event(_log, "stopped")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("event=fault task=%s", task.get_coro(), exc_info=error)

    # -- state on disk

    def _restore(self) -> None:
        try:
            state = json.loads(self.config.state.read_text())
            self.book.restore(state, time.time(), self.config.authorized_dns.__contains__)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.config.state}: {error}; repair it, or remove it (every pilot then needs a new port)"
            ) from None
        for lease in self.book:
            port = self.ports[lease.id] = Port(lease, Traffic(self.traffic))
            try:
                self._listen(port)
            except OSError as error:  # tried again when the agent comes back
                event(_log, "port_busy", level=logging.ERROR, port=lease.port, reason=error.strerror)

    async def _save(self) -> None:
        """Return when every change made until now is on disk; changes that come meanwhile share the next write."""
        self._changes += 1
        wanted = self._changes
        async with self._saving:
            if self._saved < wanted:
                covered, text = self._changes, json.dumps(self.book.dump())
                await asyncio.get_running_loop().run_in_executor(None, write_durably, self.config.state, text)
                self._saved = covered

    async def _save_later(self) -> None:
        try:
            await self._save()
        except OSError as error:
            event(_log, "state_not_saved", level=logging.ERROR, file=self.config.state, reason=error.strerror)

    # -- the control and stream port

    def _incoming(self, sock: socket.socket, peer: str) -> None:
        if self._greeting >= self.config.greetings:
            self._count("overload", f"{self._greeting} connections have not said what they are", peer=peer)
            reset(sock)
        else:
            self._greeting += 1
            self._spawn(self._greet(sock, peer))

    async def _greet(self, sock: socket.socket, peer: str) -> None:
        """Tell TLS (an agent's control connection) from a preface (a stream) by the first byte."""
        with contextlib.ExitStack() as greeting:
            greeting.callback(self._greeted)
            try:
                async with asyncio.timeout(PATIENCE):
                    await readable(sock)
                if sock.recv(1, socket.MSG_PEEK) == TLS_HANDSHAKE:
                    tls, stream = TlsSocket(sock, self._context()), None
                else:
                    tls, stream = None, await self._redeem(sock)
            except (Refusal, OSError, TimeoutError) as error:
                self._count(_code(error), _reason(error), peer=peer)
                reset(sock)
                return
            except BaseException:
                sock.close()
                raise
            if tls:
                await self._serve(tls, peer, greeting)
            elif stream:
                greeting.close()
                await self._carry(stream, sock)

    def _greeted(self) -> None:
        self._greeting -= 1

    def _context(self) -> ssl.SSLContext:
        """TLS for agents; made anew when certificate or CA directory changed, because OpenSSL keeps what it read."""
        config = self.config
        stamp = [path.stat().st_mtime_ns for path in (config.certificate, config.key, config.ca_directory)]
        if self._tls is None or self._tls[0] != stamp:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0  # a resumed session would skip the verification of the certificate
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VERIFY_ALLOW_PROXY_CERTS
            context.load_cert_chain(config.certificate, config.key)
            context.load_verify_locations(capath=str(config.ca_directory))
            self._tls = (stamp, context)
        return self._tls[1]

    async def _redeem(self, sock: socket.socket) -> Stream:
        loop, data = asyncio.get_running_loop(), b""
        async with asyncio.timeout(PATIENCE):
            while len(data) < PREFACE_LENGTH:
                part = await loop.sock_recv(sock, PREFACE_LENGTH - len(data))  # not one byte of the application's
                data += part
                if not part or not data.startswith(PREFACE[: len(data)]):
                    break
        stream = self.tokens.redeem(read_preface(data), time.monotonic())
        if stream is None:
            raise Refusal("bad_token", "stream with a token that is unknown, used or too old", True)
        return stream

    # -- an agent

    async def _serve(self, tls: TlsSocket, peer: str, greeting: contextlib.ExitStack) -> None:
        """A control connection from TLS handshake to its end."""
        connection = Connection(Side.RELAY, time.monotonic(), self.config.heartbeat)
        control = Control(connection, tls, peer, asyncio.current_task())
        port: Port | None = None
        try:
            async with asyncio.timeout(PATIENCE):
                await tls.handshake()
            while connection.state is not State.CLOSED:
                deadline = connection.deadline()
                pause = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    data = await asyncio.wait_for(tls.read(), pause)
                except TimeoutError:
                    connection.due(time.monotonic())
                    continue
                if not data:
                    break
                for frame in connection.receive(data, time.monotonic()):
                    if isinstance(frame, Register):
                        port = await self._register(frame, control)
                        greeting.close()
                    elif port is not None:
                        self._handle(frame, port, control)
        except Refusal as refusal:
            self._refuse(control, refusal, dn=port.lease.dn if port else None)
        except (OSError, TimeoutError) as error:
            if port is None:
                self._count(_code(error), _reason(error), peer=peer)
        finally:
            if port is not None and port.control is control:
                self._lost(port)
            await tls.close()

    async def _register(self, frame: Register, control: Control) -> Port:
        chain = self._identify(frame, control)
        dn = chain.dn
        if dn not in self.config.authorized_dns:
            raise Refusal("not_authorized", f"{dn} may not have a port here")
        port = self._lease(frame, chain)
        lease, again = port.lease, frame.lease is not None
        if port.control is not None:
            self._refuse(port.control, Refusal("superseded", "another connection registered with this lease"), dn=dn)
        port.control, port.chain = control, chain
        try:
            await self._save()
        except OSError as error:
            if again:
                self._lost(port)
            else:
                self._end(port, "storage")
            raise Refusal("storage", f"the lease could not be written: {error.strerror}") from None
        event(
            _log, "lease_renewed" if again else "lease_opened", lease=lease.label, port=lease.port, pilot=lease.pilot,
            dn=dn, peer=control.peer, expires=int(lease.expires),
        )  # fmt: skip
        control.say(
            Registered(lease.id, self.config.public_address, lease.port, int(lease.expires), self.config.heartbeat)
        )
        for stream in list(port.streams.values()):
            if stream.task is None:  # came while the agent was away, or was asked for on a connection now lost
                self._ask(stream)
        return port

    def _identify(self, frame: Register, control: Control) -> Chain:
        """The verified chain of the TLS peer; the frame only helps with the certificates between it and the CA.

        Python gives the peer's whole chain since 3.13 only, and OpenSSL neither knows our rules for revocation lists
        nor tells why; so the agent sends its chain again, and its first certificate must be the one that TLS proved.
        """
        proven = control.tls.peer_certificate
        try:
            certificates = [base64.b64decode(text, validate=True) for text in frame.chain]
            if certificates[0] != proven:
                raise Refusal("bad_certificate", "the chain does not start with the certificate of the TLS connection")
            return self._trust.verify(Chain.from_der(certificates))
        except TrustError as error:
            raise Refusal("trust", str(error)) from None
        except (CertificateError, ValueError) as error:
            raise Refusal("bad_certificate", str(error)) from None

    def _lease(self, frame: Register, chain: Chain) -> Port:
        """A lease with its listening port. Ports that something else uses are passed over, unless it is ours again."""
        unusable: list[int] = []
        while True:
            lease = self.book.register(
                chain.dn, frame.pilot, frame.lease, chain.not_after.timestamp(), time.time(), unusable
            )
            port = self.ports.setdefault(lease.id, Port(lease, Traffic(self.traffic)))
            try:
                self._listen(port)
            except OSError as error:
                event(_log, "port_busy", level=logging.ERROR, port=lease.port, reason=error.strerror)
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
            address = (self.config.address, port.lease.port)
            port.listener = Listener(address, lambda sock, peer: self._knock(port, sock, peer))

    def _handle(self, frame: Frame, port: Port, control: Control) -> None:
        if isinstance(frame, Ping):
            control.say(Pong())
        elif isinstance(frame, Release):
            self._end(port, "released")
        elif isinstance(frame, Failed) and (stream := port.streams.get(frame.stream)) and stream.task is None:
            self._drop(stream, "target", f"the agent says: {frame.reason}")

    def _lost(self, port: Port) -> None:
        port.control = None
        if port.lease in self.book:
            self.book.lose(port.lease, time.time())
            event(_log, "agent_lost", lease=port.lease.label, port=port.lease.port, pilot=port.lease.pilot)

    def _end(self, port: Port, why: str) -> None:
        """End the lease for good."""
        lease = port.lease
        self.book.end(lease)
        self.ports.pop(lease.id, None)
        self.ended.append(self._seen(port) | {"state": why, "ended": int(time.time())})
        self._close(port)
        self._spawn(self._save_later())
        event(
            _log, "lease_ended", why=why, lease=lease.label, port=lease.port, pilot=lease.pilot, dn=lease.dn,
            streams=port.total, inward=port.traffic.inward, outward=port.traffic.outward,
        )  # fmt: skip

    def _close(self, port: Port) -> None:
        if port.listener:
            port.listener.close()
            port.listener = None
        for stream in list(port.streams.values()):
            if stream.task:
                stream.task.cancel()
            else:
                self._drop(stream, None, "the lease ended")

    # -- streams

    def _knock(self, port: Port, client: socket.socket, peer: str) -> None:
        """Somebody connected to a dedicated port."""
        if len(port.streams) >= self.config.streams_per_lease:
            self._count("too_many_streams", f"port {port.lease.port} carries {len(port.streams)}", peer=peer)
            reset(client)
            return
        self.streams_total += 1
        port.total += 1
        stream = Stream(self.streams_total, port, client, peer)
        port.streams[stream.number] = stream
        stream.timer = asyncio.get_running_loop().call_later(TOKEN_LIFETIME, self._expire, stream)
        if port.served:
            self._ask(stream)

    def _ask(self, stream: Stream) -> None:
        assert stream.port.control is not None
        if stream.token:
            self.tokens.withdraw(stream.token)
        stream.token = self.tokens.issue(stream, time.monotonic())
        stream.port.control.say(Open(stream.number, stream.token.hex(), stream.peer))

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
            self._count(code, reason, peer=stream.peer, dn=stream.port.lease.dn)

    def _forget(self, stream: Stream) -> None:
        stream.port.streams.pop(stream.number, None)
        if stream.timer:
            stream.timer.cancel()

    async def _carry(self, stream: Stream, inner: socket.socket) -> None:
        stream.task = asyncio.current_task()
        if stream.timer:
            stream.timer.cancel()
        traffic, began, end = Traffic(stream.port.traffic), time.monotonic(), "eof"
        try:
            await join(stream.client, inner, traffic)
        except OSError as error:
            end = _reason(error)
        except asyncio.CancelledError:
            end = "lease ended"
            raise
        finally:
            self._forget(stream)
            lease = stream.port.lease
            event(
                _log, "stream", stream=stream.number, lease=lease.label, pilot=lease.pilot, port=lease.port,
                peer=stream.peer, inward=traffic.inward, outward=traffic.outward,
                seconds=f"{time.monotonic() - began:.1f}", end=end,
            )  # fmt: skip

    # -- refusals

    def _refuse(self, control: Control, refusal: Refusal, *, counted: bool = True, dn: str | None = None) -> None:
        if counted:
            self._count(refusal.code, refusal.reason, peer=control.peer, dn=dn)
        control.say(Refused(refusal.code, _line(refusal.reason), refusal.final))
        control.connection.state = State.CLOSED
        if control.task and control.task is not asyncio.current_task():
            control.task.cancel()  # it waits for frames, and closes behind itself

    def _count(self, code: str, reason: str, *, peer: str, dn: str | None = None) -> None:
        self.refusals[code] += 1
        self.recent.append({"time": int(time.time()), "code": code, "reason": reason, "peer": peer, "dn": dn})
        event(_log, "refused", level=logging.WARNING, code=code, reason=reason, peer=peer, dn=dn)

    # -- timers

    async def _watch_leases(self) -> None:
        while True:
            await asyncio.sleep(1)
            for lease, why in self.book.due(time.time()):
                port = self.ports[lease.id]
                if port.control:
                    text = f"the proxy expired at {dt.datetime.fromtimestamp(lease.expires, dt.UTC):%FT%TZ}"
                    self._refuse(port.control, Refusal("proxy_expired", text), dn=lease.dn)
                self._end(port, why)

    async def _watch_certificates(self) -> None:
        """End leases whose certificate was revoked meanwhile.

        An expired revocation list says nothing about them: it refuses new agents, but does not throw out the old.
        """
        while True:
            await asyncio.sleep(RECHECK)
            for port in list(self.ports.values()):
                await asyncio.sleep(0)
                try:
                    if port.chain:
                        self._trust.verify(port.chain)
                except TrustError as error:
                    event(_log, "trust_stale", level=logging.ERROR, reason=error)
                    break
                except CertificateError as error:
                    if port.lease not in self.book:
                        continue
                    if port.control:
                        self._refuse(port.control, Refusal("bad_certificate", str(error)), dn=port.lease.dn)
                    self._end(port, "bad_certificate")

    # -- to be seen

    def status(self) -> dict[str, Any]:
        """What `pilotbed-relay status` prints; holds no secret."""
        leases = [self._seen(port) for port in self.ports.values()]
        return {
            "started": int(self.started),
            "public_address": self.config.public_address,
            "ports": {"first": self.config.ports[0], "last": self.config.ports[1],
                      "free": len(self.config.range) - len(leases)},
            "leases": leases,
            "ended_leases": list(self.ended),
            "streams": sum(len(port.streams) for port in self.ports.values()),
            "streams_total": self.streams_total,
            "bytes_inward": self.traffic.inward,
            "bytes_outward": self.traffic.outward,
            "refusals": dict(self.refusals),
            "recent_refusals": list(self.recent),
        }  # fmt: skip

    @staticmethod
    def _seen(port: Port) -> dict[str, object]:
        return {
            "lease": port.lease.label,
            "dn": port.lease.dn,
            "pilot": port.lease.pilot,
            "port": port.lease.port,
            "state": "connected" if port.served else "waiting",
            "agent": port.control.peer if port.control else None,
            "opened": int(port.lease.opened),
            "expires": int(port.lease.expires),
            "streams": len(port.streams),
            "streams_total": port.total,
            "bytes_inward": port.traffic.inward,
            "bytes_outward": port.traffic.outward,
        }


def figures(status: dict[str, Any]) -> Iterator[Any]:
    """Prometheus' view of a status."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    leases = GaugeMetricFamily("pilotbed_relay_leases", "Leases by state", labels=["state"])
    for state in ("connected", "waiting"):
        leases.add_metric([state], sum(lease["state"] == state for lease in status["leases"]))
    yield leases
    yield GaugeMetricFamily("pilotbed_relay_ports_free", "Dedicated ports free", status["ports"]["free"])
    yield GaugeMetricFamily("pilotbed_relay_streams", "Streams carried or waiting", status["streams"])
    yield CounterMetricFamily("pilotbed_relay_streams", "Connections to dedicated ports", status["streams_total"])
    moved = CounterMetricFamily("pilotbed_relay_bytes", "Bytes carried", labels=["direction"])
    for direction in ("inward", "outward"):
        moved.add_metric([direction], status[f"bytes_{direction}"])
    yield moved
    refused = CounterMetricFamily("pilotbed_relay_refusals", "Refusals by reason", labels=["code"])
    for code in {*REFUSALS, *status["refusals"]}:
        refused.add_metric([code], status["refusals"].get(code, 0))
    yield refused


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


async def _run(config: Config) -> int:
    relay = Relay(config)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await relay.start()
    if config.metrics_port:
        serve_metrics(relay.status, figures, config.metrics_port)
    notify("READY=1")
    await stopping.wait()
    notify("STOPPING=1")
    await relay.stop()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit codes: 0, 1 something failed (said on stderr), 2 usage."""
    parser = argparse.ArgumentParser(prog="pilotbed-relay", description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=["serve", "status"], default="serve")
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help=f"default: {DEFAULT_PATH}")
    given = parser.parse_args(arguments)
    try:
        config = load(given.config)
        if given.command == "status":
            return ask_status(config.status_socket, "pilotbed-relay")
        log_to_stderr()
        return asyncio.run(_run(config))
    except (ConfigError, OSError) as error:
        print(f"pilotbed-relay: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
