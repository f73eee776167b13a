"""The relay's agent: runs beside a daemon that nobody can connect to, and brings it the connections of a public port.

Standard library only; with `pilotbed/__init__.py`, `pilotbed/relay/__init__.py` and `pilotbed/relay/protocol.py` it is
all that a zipapp needs.
"""

import argparse
import asyncio
import base64
import contextlib
import ipaddress
import json
import logging
import random
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from pilotbed.relay import Traffic, event, join, log_to_stderr, prepare, reset, write_durably
from pilotbed.relay.protocol import (
    MAX_SOURCES,
    TRANSITIONS,
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
    crowded,
    network,
    preface,
)

EXIT_REFUSED = 3  # for good: the port is not (or no longer) ours
STREAMS = 1000  # at a time; the relay has its own, lower limit
QUERY_TIMEOUT = 3.0  # seconds for a relay to tell its load, from the first packet on
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


class Agent:
    """Holds one lease until stopped or refused for good."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.traffic = Traffic()
        self._server: Address | None = None  # whose lease it is: no other relay can serve what was published
        self._lease: str | None = None
        self._port = 0
        self._published = False  # by this process; then another port would be of no use to anybody
        self._attempt = 0
        self._control: tuple[Connection, asyncio.StreamWriter] | None = None
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

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
            self._say(Release())
            self._forget()
        for task in (stopping, work, *self._tasks):
            task.cancel()
        await asyncio.gather(work, *self._tasks, return_exceptions=True)
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
        told = {server: crowded(load) for server, load in loads.items() if load}
        return sorted(servers, key=lambda server: (server not in told, told.get(server), random.random()))  # noqa: S311

    async def _load(self, server: Address) -> Load | None:
        try:
            async with asyncio.timeout(QUERY_TIMEOUT), self._connected(server) as (reader, writer, _):
                connection = Connection(Side.AGENT, time.monotonic())
                writer.write(connection.send(Query(VERSION), time.monotonic()))
                while data := await reader.read(65536):
                    for frame in connection.receive(data, time.monotonic()):
                        if isinstance(frame, Load):
                            event(_log, "load", relay=_name(server), **asdict(frame))
                            return frame
                        self._handle(frame)
                raise ConnectionError("the relay closed the connection")
        except (OSError, TimeoutError, Refusal) as error:
            event(_log, "load_unknown", level=logging.WARNING, reason=_text(error), relay=_name(server))
            return None

    @contextlib.asynccontextmanager
    async def _connected(
        self, server: Address
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, tuple[str, ...]]]:
        """TLS to a relay, and the certificates for the first frame."""
        context, chain = self._credentials()
        try:
            opening = asyncio.open_connection(*server, ssl=context, server_hostname=server[0])
            reader, writer = await asyncio.wait_for(opening, 20)
        except ssl.SSLCertVerificationError as error:
            raise Refusal("bad_certificate", f"the relay's: {error.verify_message}", not self._published) from None
        try:
            yield reader, writer, chain
        except ssl.SSLError as error:
            # With TLS 1.3 the relay judges our certificate after we think that the connection stands.
            reason = (error.reason or "").replace("_", " ").lower()
            if "alert" in reason and ("certificate" in reason or "unknown ca" in reason):
                raise Refusal("bad_certificate", f"the relay says: TLS {reason}") from None
            raise
        finally:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 2)

    async def _session(self, server: Address) -> None:
        """One control connection, from TCP to its end; returns when it has to be made anew with a renewed proxy."""
        stamp = _stamp(self.settings.proxy)
        async with self._connected(server) as (reader, writer, chain):
            connection = Connection(Side.AGENT, time.monotonic())
            self._control = connection, writer
            try:
                self._say(Register(VERSION, chain, self.settings.pilot, self._lease, self.settings.sources))
                while _stamp(self.settings.proxy) in (stamp, None):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(connection.deadline()):
                            data = await reader.read(65536)
                        if not data:
                            raise ConnectionError("the relay closed the connection")
                        for frame in connection.receive(data, time.monotonic()):
                            if isinstance(frame, Registered):
                                self._registered(frame, server)
                            else:
                                self._handle(frame)
                    writer.write(connection.due(time.monotonic()))
                event(_log, "proxy_renewed")
            finally:
                self._control = None

    def _say(self, frame: Frame) -> None:
        """Send a frame if it may be sent now (the connection can be lost, or the lease ended, at any moment)."""
        if self._control is not None:
            connection, writer = self._control
            if (connection.state, Side.AGENT, type(frame)) in TRANSITIONS:
                writer.write(connection.send(frame, time.monotonic()))

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

    def _handle(self, frame: Frame) -> None:
        if isinstance(frame, Refused):
            raise Refusal(frame.code, frame.reason, frame.final)
        elif isinstance(frame, Open) and self._control is not None:
            self._spawn(self._serve(frame, self._control[1].get_extra_info("peername")[:2]))

    def _registered(self, frame: Registered, server: Address) -> None:
        self._server, self._lease, self._port = server, frame.lease, frame.port
        state = {"host": frame.host, "port": frame.port, "lease": frame.lease, "relay": _name(server)}
        write_durably(self.settings.state, json.dumps(state) + "\n")
        event(
            _log, "registered", relay=_name(server), host=frame.host, port=frame.port, expires=frame.expires,
            again=self._published,
        )  # fmt: skip
        self._published, self._attempt = True, 0

    async def _serve(self, request: Open, relay: Address) -> None:
        """One stream: the target first, so that a dead daemon is told apart from a dead relay."""
        target = self.settings.target or ("127.0.0.1", self._port)
        inner = outer = None
        try:
            if len(self._tasks) > STREAMS:
                raise OSError(f"more than {STREAMS} streams")
            inner = await _connect(target)
            outer = await _connect(relay)
            await asyncio.get_running_loop().sock_sendall(outer, preface(bytes.fromhex(request.token)))
        except (OSError, ValueError, TimeoutError) as error:
            for sock in filter(None, (inner, outer)):
                reset(sock)
            event(_log, "stream_failed", level=logging.WARNING, stream=request.stream, reason=_text(error))
            self._say(Failed(request.stream, _text(error)))
            return
        traffic = Traffic(self.traffic)
        with contextlib.suppress(OSError):
            await join(outer, inner, traffic)
        event(_log, "stream", stream=request.stream, peer=request.peer, inward=traffic.inward, outward=traffic.outward)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _forget(self) -> None:
        self._server = self._lease = None
        self.settings.state.unlink(missing_ok=True)


def _text(error: BaseException) -> str:
    text = (str(error) or type(error).__name__)[:400]
    return "".join(character if character.isprintable() else " " for character in text)


async def _connect(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, where = (socket.AF_INET6 if ":" in address[0] else socket.AF_INET), address
    if not _numeric(address[0]):  # which takes a thread
        found = await loop.getaddrinfo(*address, type=socket.SOCK_STREAM)
        family, where = found[0][0], found[0][4]  # type: ignore[assignment]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        prepare(sock)
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await loop.sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock


def _numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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
