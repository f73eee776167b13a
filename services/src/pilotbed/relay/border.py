"""The relay in border mode: opens the connections of a sealed site's nodes, to allowed targets only.

The site's nodes route through the border, whose packet filter forwards nothing and redirects their TCP connections
here. Where each was going is asked of the kernel; if that is allowed, a connection of our own is opened there and the
bytes are carried between the two as they are: TLS stays end to end, and no program on the nodes has to know. The
relay's agent, HTCondor's daemons and curl pass alike. What is sealed stays sealed: no packet crosses the border.
"""

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotbed.relay import Traffic, event, join, log_to_stderr, prepare, reset
from pilotbed.relay.serving import Listener, ask_status, notify, serve_metrics, serve_status
from pilotbed.settings import SettingsError, load

DEFAULT_PATH = Path("/etc/pilotbed/border.toml")
SO_ORIGINAL_DST = 80  # getsockopt(SOL_IP) after a redirect: struct sockaddr_in (linux/netfilter_ipv4.h)
RESOLVE = 60.0  # seconds between two looks at the addresses of targets' names

_log = logging.getLogger("pilotbed-border")
Network = ipaddress.IPv4Network


@dataclass(frozen=True)
class Config:
    """Keys of border.toml; those without a default are required.

    Attributes:
        targets: where connections may go: `PLACE:PORT` or `PLACE:FIRST-LAST`, PLACE being a host name, an IPv4 address
            or a network (CIDR).
        sources: networks (CIDR) of the nodes that may use the border.
        status_socket: unix socket for `pilotbed-border status`.
        address, port: where the redirected connections come.
        metrics_port: Prometheus on 127.0.0.1; 0: none.
        connections: how many are carried at a time; more are reset.
        connect_timeout: seconds for a target to accept.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    status_socket: Path
    address: str = "0.0.0.0"  # noqa: S104  # redirected connections come to the address of the interface; see sources
    port: int = 9710
    metrics_port: int = 9702
    connections: int = 4000
    connect_timeout: int = 10

    def __post_init__(self) -> None:
        self.networks()
        self.rules()

    def networks(self) -> tuple[Network, ...]:
        """Return `sources`, parsed."""
        return tuple(_network(text, "sources") for text in self.sources)

    def rules(self) -> tuple["Rule", ...]:
        """Return `targets`, parsed."""
        return tuple(map(Rule.parse, self.targets))


def _network(text: str, key: str) -> Network:
    try:
        return Network(text)
    except ValueError as error:
        raise ValueError(f"{key}: {text!r} is not a network such as 10.73.0.0/24: {error}") from None


@dataclass(frozen=True)
class Rule:
    """One allowed target: a name or a network, and a range of ports."""

    place: str | Network
    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Read `PLACE:PORT` or `PLACE:FIRST-LAST`. Raises: ValueError."""
        place, colon, ports = text.rpartition(":")
        first, _, last = ports.partition("-")
        numbers = [int(port) for port in (first, last or first) if port.isdigit()]
        if not (place and colon and len(numbers) == 2 and 1 <= numbers[0] <= numbers[1] <= 65535):
            raise ValueError(f"targets: {text!r} is not HOST:PORT, NETWORK:PORT or HOST:FIRST-LAST")
        with contextlib.suppress(ValueError):
            return cls(Network(place), *numbers)
        if not all(part and part.replace("-", "").isalnum() for part in place.split(".")):
            raise ValueError(f"targets: {place!r} is neither a host name nor an IPv4 network")
        return cls(place, *numbers)

    def allows(self, address: str, port: int, names: dict[str, frozenset[str]]) -> bool:
        """Whether a connection to `address`:`port` is meant; `names`: host names and their addresses."""
        if not self.first <= port <= self.last:
            return False
        if isinstance(self.place, Network):
            return ipaddress.IPv4Address(address) in self.place
        return address in names.get(self.place, ())


def original_target(sock: socket.socket) -> tuple[str, int]:
    """Where a redirected connection was going. Raises: OSError if the kernel knows of no redirect."""
    _, port, address = struct.unpack("!HH4s8x", sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
    return socket.inet_ntoa(address), port


@dataclass
class Border:
    """One border.

    Args:
        config: see there.
        target_of: where an accepted connection was going.
    """

    config: Config
    target_of: Callable[[socket.socket], tuple[str, int]] = original_target
    traffic: Traffic = field(default_factory=Traffic)
    total: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    recent: deque[dict[str, object]] = field(default_factory=lambda: deque(maxlen=50))

    def __post_init__(self) -> None:
        self._sources, self._rules = self.config.networks(), self.config.rules()
        self._names: dict[str, frozenset[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: Listener | None = None

    async def start(self) -> None:
        """Look up the names, listen. Raises: OSError."""
        await self.resolve()
        self._listener = Listener((self.config.address, self.config.port), self._accepted)
        event(_log, "started", address=self.config.address, port=self.port, targets=len(self._rules))

    @property
    def port(self) -> int:
        """Where it listens (also when the configured port was 0)."""
        assert self._listener is not None
        return self._listener.port

    async def resolve(self) -> None:
        """Look up every name; one that is not found keeps the addresses that it had."""
        loop = asyncio.get_running_loop()
        for name in {rule.place for rule in self._rules if isinstance(rule.place, str)}:
            try:
                found = await loop.getaddrinfo(name, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
                self._names[name] = frozenset(str(entry[4][0]) for entry in found)
            except OSError as error:
                event(_log, "unresolved", level=logging.WARNING, host=name, reason=error.strerror)

    async def keep_resolved(self) -> None:
        """Never returns."""
        while True:
            await asyncio.sleep(RESOLVE)
            await self.resolve()

    async def stop(self) -> None:
        """Close everything."""
        if self._listener:
            self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        event(_log, "stopped")

    def status(self) -> dict[str, Any]:
        """What `pilotbed-border status` prints."""
        return {
            "targets": list(self.config.targets),
            "streams": len(self._tasks),
            "streams_total": self.total,
            "bytes_inward": self.traffic.inward,
            "bytes_outward": self.traffic.outward,
            "refusals": dict(self.refusals),
            "recent_refusals": list(self.recent),
        }

    def judge(self, source: str, target: tuple[str, int], here: tuple[str, int]) -> tuple[str, str] | None:
        """Why a connection is refused (code, text for people), or None.

        Args:
            source: address of the node.
            target: where it was going.
            here: where it arrived; the same as `target` if nothing redirected it.
        """
        if not any(ipaddress.IPv4Address(source) in network for network in self._sources):
            return "source_refused", "not of a network that may use this border"
        if target == here:
            return "not_redirected", "came to the border itself, which would connect to itself for ever"
        if not any(rule.allows(*target, self._names) for rule in self._rules):
            return "target_refused", "no rule allows this target"
        if len(self._tasks) >= self.config.connections:
            return "overload", f"{len(self._tasks)} connections are carried already"
        return None

    def _accepted(self, sock: socket.socket, peer: str) -> None:
        here = sock.getsockname()[:2]
        try:
            target = self.target_of(sock)
        except OSError:  # no entry in the kernel's table of connections
            target = here
        refused = self.judge(peer.rpartition(":")[0], target, here)
        if refused:
            self._refuse(sock, *refused, peer=peer, target=target)
            return
        self.total += 1
        task = asyncio.ensure_future(self._carry(sock, peer, target))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refuse(self, sock: socket.socket, code: str, reason: str, *, peer: str, target: tuple[str, int]) -> None:
        where = f"{target[0]}:{target[1]}"
        self.refusals[code] += 1
        self.recent.append({"time": int(time.time()), "code": code, "reason": reason, "peer": peer, "target": where})
        event(_log, "refused", level=logging.WARNING, code=code, reason=reason, peer=peer, target=where)
        reset(sock)

    async def _carry(self, inner: socket.socket, peer: str, target: tuple[str, int]) -> None:
        traffic, began, end = Traffic(self.traffic), time.monotonic(), "eof"
        outer = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        prepare(outer)
        try:
            async with asyncio.timeout(self.config.connect_timeout):
                await asyncio.get_running_loop().sock_connect(outer, target)
        except (OSError, TimeoutError) as error:
            outer.close()
            reason = "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
            self._refuse(inner, "unreachable", reason, peer=peer, target=target)
            return
        except BaseException:
            outer.close()
            inner.close()
            raise
        try:
            await join(outer, inner, traffic)
        except OSError as error:
            end = error.strerror or str(error)
        except asyncio.CancelledError:
            end = "stopped"
            raise
        finally:
            event(
                _log, "stream", peer=peer, target=f"{target[0]}:{target[1]}", inward=traffic.inward,
                outward=traffic.outward, seconds=f"{time.monotonic() - began:.1f}", end=end,
            )  # fmt: skip


def figures(status: dict[str, Any]) -> Iterator[Any]:
    """Prometheus' view of a status."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    yield GaugeMetricFamily("pilotbed_border_streams", "Connections carried", status["streams"])
    yield CounterMetricFamily("pilotbed_border_streams", "Connections opened", status["streams_total"])
    moved = CounterMetricFamily("pilotbed_border_bytes", "Bytes carried", labels=["direction"])
    for direction in ("inward", "outward"):
        moved.add_metric([direction], status[f"bytes_{direction}"])
    yield moved
    refused = CounterMetricFamily("pilotbed_border_refusals", "Refusals by reason", labels=["code"])
    for code, count in status["refusals"].items():
        refused.add_metric([code], count)
    yield refused


async def _run(config: Config) -> int:
    border, stopping = Border(config), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await border.start()
    resolving = asyncio.ensure_future(border.keep_resolved())
    async with await serve_status(config.status_socket, border.status):
        if config.metrics_port:
            serve_metrics(border.status, figures, config.metrics_port)
        notify("READY=1")
        await stopping.wait()
        notify("STOPPING=1")
    resolving.cancel()
    await border.stop()
    config.status_socket.unlink(missing_ok=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit codes: 0, 1 something failed (said on stderr), 2 usage."""
    parser = argparse.ArgumentParser(prog="pilotbed-border", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", nargs="?", choices=["serve", "status"], default="serve")
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help=f"default: {DEFAULT_PATH}")
    given = parser.parse_args(arguments)
    try:
        config = load(given.config, Config)
        if given.command == "status":
            return ask_status(config.status_socket, "pilotbed-border")
        log_to_stderr()
        return asyncio.run(_run(config))
    except (SettingsError, OSError) as error:
        print(f"pilotbed-border: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
