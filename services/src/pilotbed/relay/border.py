"""The relay in border mode: opens the connections of a sealed site's nodes, to allowed targets only.

The site's nodes route through the border, whose packet filter forwards nothing and redirects their TCP connections
here. Where each was going is asked of the kernel; if that is allowed, a connection of our own is opened there and the
bytes are carried between the two as they are: TLS stays end to end, and no program on the nodes has to know. The
relay's agent, HTCondor's daemons and curl pass alike. What is sealed stays sealed: no packet crosses the border.
"""

import asyncio
import contextlib
import ipaddress
import logging
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotbed.relay.listener import Address, format_address
from pilotbed.relay.log import event
from pilotbed.relay.metrics import Metric
from pilotbed.relay.networks import Networks
from pilotbed.relay.service import Service, command
from pilotbed.relay.sockets import Dial, reset
from pilotbed.relay.streams import Forwarder, Traffic

SO_ORIGINAL_DST = 80  # getsockopt(SOL_IP) after a redirect: struct sockaddr_in (linux/netfilter_ipv4.h)
RESOLVE = 60.0  # seconds between two looks at the addresses of targets' names

REFUSALS = ("source_refused", "not_redirected", "target_refused", "overload", "unreachable")
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

    def networks(self) -> Networks:
        """Return `sources`, parsed."""
        try:
            return Networks(self.sources)
        except ValueError as error:
            raise ValueError(f"sources: not a network such as 10.73.0.0/24: {error}") from None

    def rules(self) -> tuple["Rule", ...]:
        """Return `targets`, parsed."""
        return tuple(map(Rule.parse, self.targets))


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


class Stream:
    """A connection that is carried, from the dialling of the border's own one on."""

    __slots__ = ("_began", "_border", "_dial", "_forwarder", "_inner", "_peer", "_target", "_traffic")

    def __init__(self, border: "Border", inner: socket.socket, peer: str, target: tuple[str, int]) -> None:
        self._border, self._inner, self._peer, self._target = border, inner, peer, target
        self._traffic, self._began = Traffic(border.traffic), time.monotonic()
        self._forwarder: Forwarder | None = None
        self._dial = Dial(target, border.config.connect_timeout, self._dialled)
        border.streams.add(self)
        self._dial.start()

    def stop(self) -> None:
        """Reset both sides."""
        if self._forwarder:
            self._forwarder.abort()
        else:
            self._dial.cancel()
            reset(self._inner)
        self._ended("stopped")

    def _dialled(self, outer: socket.socket | OSError) -> None:
        if isinstance(outer, OSError):
            self._border.streams.remove(self)
            reset(self._inner)
            target = format_address(self._target)
            self._border.refusals.record("unreachable", outer.strerror or "", peer=self._peer, target=target)
            return
        self._forwarder = Forwarder(
            outer, self._inner, self._traffic,
            lambda error: self._ended((error.strerror or str(error)) if error else "eof"),
        )  # fmt: skip

    def _ended(self, end: str) -> None:
        self._border.streams.remove(self)
        traffic = self._traffic
        event(
            self._border.log, "stream", peer=self._peer, target=format_address(self._target), inward=traffic.inward,
            outward=traffic.outward, seconds=f"{time.monotonic() - self._began:.1f}", end=end,
        )  # fmt: skip


class Border(Service):
    """One border.

    Args:
        config: see there.
        target_of: where an accepted connection was going.
    """

    def __init__(self, config: Config, target_of: Callable[[socket.socket], tuple[str, int]] = original_target) -> None:
        super().__init__("border", config.status_socket, REFUSALS)
        self.config, self.target_of = config, target_of
        self.traffic = Traffic()
        self.total = 0
        self._sources, self._rules = config.networks(), config.rules()
        self._names: dict[str, frozenset[str]] = {}
        self.streams: set[Stream] = set()

    async def start(self) -> None:
        """Look up the names, listen. Raises: OSError."""
        await self._resolve()
        self.listen((self.config.address, self.config.port), self._accepted)
        await super().start()
        self.spawn(self.repeat(RESOLVE, self._resolve))
        event(self.log, "started", address=self.config.address, port=self.port, targets=len(self._rules))

    async def stop(self) -> None:
        """Close everything."""
        self.close_listener()
        for stream in list(self.streams):
            stream.stop()
        await super().stop()
        event(self.log, "stopped")

    def reload(self, config: Config) -> None:
        """Take over sources, targets and limits; who is carried already stays."""
        self.config, self._sources, self._rules = config, config.networks(), config.rules()
        self.spawn(self._resolve())
        event(self.log, "reloaded", targets=len(self._rules))

    async def _resolve(self) -> None:
        """Look up every name; one that is not found keeps the addresses that it had."""
        loop = asyncio.get_running_loop()
        for name in {rule.place for rule in self._rules if isinstance(rule.place, str)}:
            try:
                found = await loop.getaddrinfo(name, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
                self._names[name] = frozenset(str(entry[4][0]) for entry in found)
            except (OSError, UnicodeError) as error:  # UnicodeError: a label that is too long for the DNS
                event(self.log, "unresolved", level=logging.WARNING, host=name, reason=error)

    def refusal(self, source: str, target: tuple[str, int], here: tuple[str, int]) -> tuple[str, str] | None:
        """Why a connection is refused (code, text for people), or None.

        Args:
            source: address of the node.
            target: where it was going.
            here: where it arrived; the same as `target` if nothing redirected it.
        """
        if source not in self._sources:
            return "source_refused", "not of a network that may use this border"
        if target == here:
            return "not_redirected", "came to the border itself, which would connect to itself for ever"
        if not any(rule.allows(*target, self._names) for rule in self._rules):
            return "target_refused", "no rule allows this target"
        if len(self.streams) >= self.config.connections:
            return "overload", f"{len(self.streams)} connections are carried already"
        return None

    def _accepted(self, sock: socket.socket, peer: Address) -> None:
        here = sock.getsockname()[:2]
        try:
            target = self.target_of(sock)
        except OSError:  # no entry in the kernel's table of connections
            target = here
        refused = self.refusal(peer[0], target, here)
        if refused:
            self.refusals.record(*refused, peer=format_address(peer), target=format_address(target))
            reset(sock)
            return
        self.total += 1
        Stream(self, sock, format_address(peer), target)

    def status(self) -> dict[str, Any]:
        """What `pilotbed-border status` prints."""
        return {
            "started": int(self.started),
            "targets": list(self.config.targets),
            "streams": len(self.streams),
            "streams_total": self.total,
            "bytes_inward": self.traffic.inward,
            "bytes_outward": self.traffic.outward,
            **self.refusals.status(),
        }

    def metrics(self) -> list[Metric]:
        """What Prometheus gets, beside the refusals."""
        moved = {"inward": self.traffic.inward, "outward": self.traffic.outward}
        return [
            Metric("streams", "Connections carried", {"": len(self.streams)}),
            Metric("streams", "Connections opened", {"": self.total}, counter=True),
            Metric("bytes", "Bytes carried", moved, "direction", counter=True),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit codes: 0, 1 something failed (said on stderr), 2 usage."""
    return command("border", (__doc__ or "").splitlines()[0], Config, Border, arguments)


if __name__ == "__main__":
    sys.exit(main())
