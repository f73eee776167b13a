"""The relay's agent: runs beside a daemon that nobody can connect to, and brings it the connections of a public port.

Standard library only, as are the modules that it imports: `zipapp` makes one file of them, for a worker.
"""

import argparse
import asyncio
import base64
import contextlib
import errno
import json
import logging
import random
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, cast

from pilotbed.files import replace_file
from pilotbed.relay.log import event, log_to_stderr
from pilotbed.relay.protocol import (
    MAX_SOURCES,
    VERSION,
    Connection,
    Failed,
    Frame,
    Load,
    Open,
    Query,
    Refusal,
    Refused,
    Register,
    Registered,
    Release,
    Side,
    backoff,
    load_order,
    network,
    preface,
    printable,
)
from pilotbed.relay.sockets import Dial, reset
from pilotbed.relay.streams import Forwarder, Traffic

EXIT_REFUSED = 3  # for good: the port is not (or no longer) ours
STREAMS = 1000  # at a time; the relay has its own, lower limit
QUERY_TIMEOUT = 3.0  # seconds for a relay to tell its load, from the first packet on
PROXY_CHECK = 5.0  # seconds between two looks at the proxy file
CONNECT_TIMEOUT = 8.0  # seconds for the target and for the relay; a token lives for 10

_log = logging.getLogger("pilotbed-relay-agent")

Address = tuple[str, int]


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        servers: host name and port of each relay to choose from; the name has to be in its certificate.
        proxy: PEM file of an RFC 3820 proxy with its key; read again when it changes.
        cadir: CA directory (HASH.0, HASH.r0).
        state: where the lease is written for the daemon's start-up.
        pilot: name for the relay's operators.
        target: where connections go; None: 127.0.0.1 at the dedicated port.
        sources: addresses and networks that may connect to the port; empty: everybody.
    """

    servers: tuple[Address, ...]
    proxy: Path
    cadir: Path
    state: Path
    pilot: str
    target: Address | None
    sources: tuple[str, ...]


class ControlConnection(asyncio.Protocol):
    """A connection to a relay: between a frame and what is done about it lies no turn of the loop.

    Args:
        act: called with each frame; what it raises ends the connection.
    Attributes:
        ended: resolved with the reason once there is one; then the connection is of no further use.
        closed: resolved when nothing is left of it.
    """

    def __init__(self, act: Callable[[Frame], None]) -> None:
        self._act = act
        self._loop = asyncio.get_running_loop()
        self._connection = Connection(Side.AGENT, self._loop.time())
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.ended: asyncio.Future[Exception] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()

    @property
    def relay(self) -> Address:
        """The relay's numeric address."""
        assert self._transport is not None
        host, port = self._transport.get_extra_info("peername")[:2]
        return host, port

    @property
    def own(self) -> str:
        """This host's numeric address, as the connection has it."""
        assert self._transport is not None
        return str(self._transport.get_extra_info("sockname")[0])

    def send(self, frame: Frame) -> None:
        """Send a frame if it may be sent now (the connection can be lost, or the lease ended, at any moment)."""
        if self._transport and self._connection.may(frame):
            self._transport.write(self._connection.send(frame, self._loop.time()))
            self._set_timer()

    def close(self) -> None:
        """Hang up when all is sent."""
        if self._timer:
            self._timer.cancel()
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        before = self._connection.state
        try:
            for frame in self._connection.receive(data, self._loop.time()):
                self._act(frame)
        except (Refusal, OSError) as error:
            self._end(error)
        if self._connection.state is not before:
            self._set_timer()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionError("the relay closed the connection"))
        self._transport = None
        self.closed.set_result(None)

    def _set_timer(self) -> None:
        """Set the timer of the state in which the connection is now."""
        if self._timer:
            self._timer.cancel()
        deadline = self._connection.deadline()
        self._timer = None if deadline is None or self.ended.done() else self._loop.call_at(deadline, self._due)

    def _due(self) -> None:
        try:
            beat = self._connection.due(self._loop.time())
        except Refusal as refusal:
            self._end(refusal)
            return
        if self._transport and beat:
            self._transport.write(beat)
        self._set_timer()

    def _end(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_result(error)
        self.close()


class Stream:
    """A stream: the target first, so that a dead daemon is told apart from a dead relay."""

    __slots__ = ("_agent", "_dial", "_forwarder", "_inner", "_relay", "_request")

    def __init__(self, agent: "Agent", request: Open, target: Address, relay: Address) -> None:
        self._agent, self._request, self._relay = agent, request, relay
        self._inner: socket.socket | None = None
        self._forwarder: Forwarder | None = None
        self._dial = Dial(target, CONNECT_TIMEOUT, self._target_connected)
        agent.streams.add(self)
        self._dial.start()

    def stop(self) -> None:
        """Reset both sides."""
        self._agent.streams.remove(self)
        if self._forwarder:
            self._forwarder.abort()
            return
        self._dial.cancel()
        if self._inner:
            reset(self._inner)

    def _target_connected(self, inner: socket.socket | OSError) -> None:
        if isinstance(inner, OSError):
            self._failed(inner)
            return
        self._inner = inner
        self._dial = Dial(self._relay, CONNECT_TIMEOUT, self._relay_connected)
        self._dial.start()

    def _relay_connected(self, outer: socket.socket | OSError) -> None:
        assert self._inner is not None
        try:
            if isinstance(outer, OSError):
                raise outer
            outer.send(preface(bytes.fromhex(self._request.token)))  # which an empty socket has room for
        except (OSError, ValueError) as error:
            if isinstance(outer, socket.socket):
                reset(outer)
            reset(self._inner)
            self._failed(error)
            return
        self._forwarder = Forwarder(outer, self._inner, self._agent.traffic, self._ended)

    def _failed(self, error: Exception) -> None:
        self._agent.streams.remove(self)
        self._agent.failed(self._request.stream, _text(error))

    def _ended(self, _: OSError | None) -> None:
        self._agent.streams.remove(self)


class Agent:
    """Holds one lease until stopped or refused for good."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.streams: set[Stream] = set()
        self.traffic = Traffic()
        self._server: Address | None = None  # whose lease it is: no other relay can serve what was published
        self._lease: str | None = None
        self._port = 0
        self._reserved: list[socket.socket] = []
        self._published = False  # by this process; then another port would be of no use to anybody
        self._attempt = 0
        self._target: Address | None = None  # its host a number
        self._control: ControlConnection | None = None
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Give the lease back and return from `run`."""
        self._stop.set()

    async def run(self) -> int:
        """Register, serve, reconnect. Returns the exit code: 0 stopped, `EXIT_REFUSED` refused for good."""
        self._server, self._lease = _read_lease(self.settings.state, self.settings.servers)
        work = asyncio.ensure_future(self._keep_registered())
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self._release()
        for task in (stopping, work):
            task.cancel()
        await asyncio.gather(work, return_exceptions=True)
        for stream in list(self.streams):
            stream.stop()
        return 0 if work.cancelled() else work.result()

    async def _keep_registered(self) -> int:
        refused: set[Address] = set()  # by these relays, for good
        waiting: list[Address] = []  # to be tried, the best one first
        while True:
            server = self._server
            if server is None:
                waiting = waiting or await self._by_load(
                    [each for each in self.settings.servers if each not in refused]
                )
                server = waiting.pop(0)
            try:
                await self._session(server)
                continue  # the proxy was renewed: register with the new one at once
            except Refusal as refusal:
                if refusal.code == "lease_unknown" and not self._published:
                    self._forget()  # it was left behind by an earlier process
                    continue
                event(
                    _log, "refused", level=logging.ERROR, code=refusal.code, reason=refusal.reason, relay=_name(server)
                )
                if refusal.final:
                    refused.add(server)
                if refusal.final and (self._server or refused.issuperset(self.settings.servers)):
                    if refusal.code != "superseded":
                        self._forget()
                    return EXIT_REFUSED
            except (OSError, TimeoutError) as error:
                event(_log, "relay_lost", level=logging.WARNING, reason=_text(error), relay=_name(server))
            if self._server or not waiting:
                await asyncio.sleep(backoff(self._attempt, random.random()))  # noqa: S311
                self._attempt += 1

    async def _by_load(self, servers: Sequence[Address]) -> list[Address]:
        """The relays, the one with the least to do first; those that do not tell in time come last."""
        if len(servers) == 1:
            return list(servers)
        loads = dict(zip(servers, await asyncio.gather(*map(self._load, servers)), strict=True))
        known = {server: load_order(load) for server, load in loads.items() if load}
        return sorted(servers, key=lambda server: (server not in known, known.get(server), random.random()))  # noqa: S311

    async def _load(self, server: Address) -> Load | None:
        answers: list[Load] = []

        def receive(frame: Frame) -> None:
            if isinstance(frame, Load):
                answers.append(frame)
            elif isinstance(frame, Refused):
                raise Refusal(frame.code, frame.reason, frame.final)

        try:
            async with asyncio.timeout(QUERY_TIMEOUT), self._connected(server, receive) as (control, _):
                control.send(Query(VERSION))
                error = await control.ended  # the relay hangs up after its answer
                if not answers:
                    raise error
        except (OSError, TimeoutError, Refusal) as error:
            event(_log, "load_unknown", level=logging.WARNING, reason=_text(error), relay=_name(server))
            return None
        event(_log, "load", relay=_name(server), **asdict(answers[0]))
        return answers[0]

    @contextlib.asynccontextmanager
    async def _connected(
        self, server: Address, act: Callable[[Frame], None]
    ) -> AsyncIterator[tuple[ControlConnection, tuple[str, ...]]]:
        """TLS to a relay, and the certificates for the first frame."""
        context, chain = self._credentials()
        opening = asyncio.get_running_loop().create_connection(
            lambda: ControlConnection(act), *server, ssl=context, server_hostname=server[0]
        )
        try:
            _, control = await asyncio.wait_for(opening, 20)
        except ssl.SSLCertVerificationError as error:
            raise Refusal("bad_certificate", f"the relay's: {error.verify_message}", not self._published) from None
        try:
            yield control, chain
        except ssl.SSLError as error:
            # With TLS 1.3 the relay judges our certificate after we think that the connection stands.
            reason = (error.reason or "").replace("_", " ").lower()
            if "alert" in reason and ("certificate" in reason or "unknown ca" in reason):
                raise Refusal("bad_certificate", f"the relay says: TLS {reason}") from None
            raise
        finally:
            control.close()
            await asyncio.wait({control.closed}, timeout=2)

    async def _session(self, server: Address) -> None:
        """One control connection, from TCP to its end; returns when it has to be made anew with a renewed proxy."""
        stamp = _stamp(self.settings.proxy)
        if self.settings.target:
            self._target = await _numeric(self.settings.target)
        async with self._connected(server, partial(self._act, server)) as (control, chain):
            self._control = control
            try:
                control.send(Register(VERSION, chain, self.settings.pilot, self._lease, self.settings.sources))
                while _stamp(self.settings.proxy) in (stamp, None):
                    await asyncio.wait({control.ended}, timeout=PROXY_CHECK)
                    if control.ended.done():
                        raise control.ended.result()
                event(_log, "proxy_renewed")
            finally:
                self._control = None

    def _credentials(self) -> tuple[ssl.SSLContext, tuple[str, ...]]:
        """TLS as it has to be, and the certificates that the relay wants to see again in the first frame."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(capath=str(self.settings.cadir))
        if any(self.settings.cadir.glob("*.r0")):
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        else:
            event(_log, "no_revocation_lists", level=logging.WARNING, directory=self.settings.cadir)
        try:
            context.load_cert_chain(str(self.settings.proxy))
            chain = _certificates(self.settings.proxy.read_text(encoding="ascii", errors="replace"))
        except OSError as error:
            raise Refusal("bad_certificate", f"{self.settings.proxy}: {_text(error)}", not self._published) from None
        return context, chain

    def _act(self, server: Address, frame: Frame) -> None:
        if isinstance(frame, Refused):
            raise Refusal(frame.code, frame.reason, frame.final)
        elif isinstance(frame, Registered):
            self._registered(frame, server)
        elif isinstance(frame, Open) and self._control:
            if len(self.streams) < STREAMS:
                Stream(self, frame, self._target or ("127.0.0.1", self._port), self._control.relay)
            else:
                self.failed(frame.stream, f"more than {STREAMS} streams")

    def failed(self, stream: int, reason: str) -> None:
        """Tell the relay that a stream cannot be had."""
        event(_log, "stream_failed", level=logging.WARNING, stream=stream, reason=reason)
        if self._control:
            self._control.send(Failed(stream, reason))

    def _reserve(self, port: int) -> None:
        """Have the lease's port on this host, too, for the daemon.

        Another relay may have given it to somebody else here, or a connection of this host's has it: HTCondor then
        runs without an address (its ad has no MyAddress). Other agents cannot bind what is reserved, nor is it taken
        for a connection; a daemon with SO_REUSEADDR can.

        Raises:
            Refusal: it is taken; the lease has been given back.
        """
        assert self._control is not None
        for host in dict.fromkeys(("127.0.0.1", self._control.own)):
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            self._reserved.append(sock)
            try:
                sock.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:  # one that only the daemon may bind, for instance
                    continue
                self._release()
                raise Refusal("port_busy", f"port {port} is in use on this host") from None
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def _release(self) -> None:
        """Give the lease back."""
        if self._control:
            self._control.send(Release())
        self._forget()

    def _registered(self, frame: Registered, server: Address) -> None:
        if frame.lease != self._lease and not self.settings.target:
            self._reserve(frame.port)
        self._server, self._lease, self._port = server, frame.lease, frame.port
        state = {"host": frame.host, "port": frame.port, "lease": frame.lease, "relay": _name(server)}
        replace_file(self.settings.state, json.dumps(state) + "\n", 0o600, durable=True)
        event(
            _log, "registered", relay=_name(server), host=frame.host, port=frame.port, expires=frame.expires,
            again=self._published,
        )  # fmt: skip
        self._published, self._attempt = True, 0

    def _forget(self) -> None:
        self._server = self._lease = None
        while self._reserved:
            self._reserved.pop().close()
        self.settings.state.unlink(missing_ok=True)


def _text(error: BaseException) -> str:
    return printable(str(error) or type(error).__name__, 400)


async def _numeric(address: Address) -> Address:
    """The address with its host looked up. Raises: OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(*address, type=socket.SOCK_STREAM)
    return str(found[0][4][0]), address[1]


def _certificates(pem: str) -> tuple[str, ...]:
    """The base64 of each certificate of a PEM text, in order."""
    blocks = pem.split("-----BEGIN CERTIFICATE-----")[1:]
    bodies = ("".join(block.partition("-----END CERTIFICATE-----")[0].split()) for block in blocks)
    return tuple(base64.b64encode(base64.b64decode(body)).decode() for body in bodies)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _read_lease(path: Path, servers: Sequence[Address]) -> tuple[Address, str] | tuple[None, None]:
    """The relay and the lease that an earlier process left, if it is one of these relays."""
    try:
        state = json.loads(path.read_text())
        return next(server for server in servers if _name(server) == state["relay"]), str(state["lease"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None, None


def _name(server: Address) -> str:
    return f"{server[0]}:{server[1]}"


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _network(text: str) -> str:
    try:
        return network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address or a network (192.0.2.0/24): {error}") from None


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The command line as settings; exits with 2 and a usage message when it is wrong."""
    parser = argparse.ArgumentParser(prog="pilotbed-relay-agent", description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True, action="append", type=_address, metavar="HOST:PORT",
                        help="a relay; of several the one with the least to do is taken")  # fmt: skip
    parser.add_argument("--proxy", required=True, type=Path, metavar="PEM", help="proxy certificate with its key")
    parser.add_argument("--cadir", required=True, type=Path, metavar="DIR", help="CA directory (HASH.0, HASH.r0)")
    parser.add_argument("--state", required=True, type=Path, metavar="FILE", help="written: JSON host, port, lease")
    parser.add_argument("--pilot", default=socket.gethostname(), metavar="NAME", help="for the relay's operators")
    parser.add_argument("--target", type=_address, metavar="HOST:PORT", help="default: 127.0.0.1 at the dedicated port")
    parser.add_argument("--allow", action="append", type=_network, metavar="NETWORK", default=[],
                        help=f"who may connect, up to {MAX_SOURCES} networks; default: everybody")  # fmt: skip
    given = parser.parse_args(arguments)
    if len(given.allow) > MAX_SOURCES:
        parser.error(f"--allow: {len(given.allow)} networks are more than {MAX_SOURCES}")
    servers, sources = tuple(dict.fromkeys(given.server)), tuple(given.allow)
    return Settings(servers, given.proxy, given.cadir, given.state, given.pilot[:200], given.target, sources)


async def _main(settings: Settings) -> int:
    agent = Agent(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, agent.stop)
    return await agent.run()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point; exits, as a zipapp's start-up drops a returned code: 0 stopped, 2 usage, 3 refused for good."""
    settings = parse(arguments)
    log_to_stderr()
    sys.exit(asyncio.run(_main(settings)))


if __name__ == "__main__":
    main()
