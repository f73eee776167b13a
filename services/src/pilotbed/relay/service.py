"""What the relay and its border mode share: listening, the ledger of refusals, status and metrics, life as a daemon."""

import argparse
import asyncio
import contextlib
import errno
import ipaddress
import json
import logging
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pilotbed.relay import event, log_to_stderr, prepare
from pilotbed.service import notify
from pilotbed.settings import SettingsError, load

Address = tuple[Any, ...]  # of a socket: host, port, for IPv6 more


class Networks:
    """Addresses, as `host in networks`.

    Args:
        texts: addresses or networks, `192.0.2.0/24`.
    Raises:
        ValueError: a text is neither; host bits are set.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(text) for text in texts)

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, host: str) -> bool:
        address = ipaddress.ip_address(host.partition("%")[0])
        return any(address in network for network in self._networks)


def where(address: Address) -> str:
    """The address as HOST:PORT, for people."""
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


class Listener:
    """A listening socket that hands over each accepted connection; pauses when descriptors run out.

    Args:
        address: host and port to listen on.
        accepted: called with socket and peer.
    Raises:
        OSError: it cannot be bound.
    """

    __slots__ = ("_accepted", "_log", "_loop", "_pause", "_sock")

    def __init__(
        self, address: tuple[str, int], accepted: Callable[[socket.socket, Address], None], log: logging.Logger
    ) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._accepted, self._log = accepted, log
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._sock = socket.create_server(address, family=family, backlog=1024)
        prepare(self._sock)  # accepted sockets inherit all of it but not to block
        self._loop.add_reader(self._sock.fileno(), self._accept)

    @property
    def port(self) -> int:
        return int(self._sock.getsockname()[1])

    def close(self) -> None:
        """Take no more."""
        if self._pause:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _accept(self) -> None:
        """Take one: for more the loop calls again, and to learn that there are none costs as much as to take one."""
        try:
            sock, address = self._sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                event(self._log, "accept_paused", level=logging.ERROR, reason=error.strerror, port=self.port)
                self._loop.remove_reader(self._sock.fileno())
                self._pause = self._loop.call_later(1.0, self._resume)
            return  # or the peer has gone before we looked (ECONNABORTED)
        sock.setblocking(False)
        self._accepted(sock, address)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._accept)


@dataclass(frozen=True)
class Figure:
    """A Prometheus metric.

    Attributes:
        name: with its unit, without prefix and `_total`.
        help: what it counts.
        values: by value of `label`; by "" without one.
        label: what tells the values apart.
        counter: whether it only grows (else a gauge).
    """

    name: str
    help: str
    values: Mapping[str, float]
    label: str = ""
    counter: bool = False


class Service(ABC):
    """A daemon that is asked by its unix socket, and counts whom it refused.

    Args:
        name: its prefix in metrics, `relay` or `border`.
        status_socket: path of the unix socket.
    """

    def __init__(self, name: str, status_socket: Path) -> None:
        self.name, self.status_socket = name, status_socket
        self.log = logging.getLogger(f"pilotbed-{name}")
        self.started = time.time()
        self.refusals: Counter[str] = Counter()
        self.recent: deque[dict[str, object]] = deque(maxlen=50)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._last: set[asyncio.Task[Any]] = set()
        self._status: asyncio.Server | None = None
        self._listener: Listener | None = None

    def listen(self, address: tuple[str, int], accepted: Callable[[socket.socket, Address], None]) -> None:
        """Have `accepted` called with each connection to `address` and its peer. Raises: OSError."""
        self._listener = Listener(address, accepted, self.log)

    def close_listener(self) -> None:
        """Take no more connections."""
        if self._listener:
            self._listener.close()

    @property
    def port(self) -> int:
        """Where it listens (also when the configured port was 0)."""
        assert self._listener is not None
        return self._listener.port

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """What `pilotbed-relay status` prints; holds no secret."""

    @abstractmethod
    def figures(self) -> list[Figure]:
        """What Prometheus gets, beside the refusals."""

    def reload(self, config: Any) -> None:
        """Take over what may change while the service runs, of a configuration that was read anew (SIGHUP)."""
        event(self.log, "not_reloaded", level=logging.WARNING, reason="this service has to be restarted")

    @abstractmethod
    async def start(self) -> None:
        """Listen; `Service`'s own part serves the status.

        Raises:
            OSError: a socket cannot be bound.
        """
        self.status_socket.unlink(missing_ok=True)
        self._status = await asyncio.start_unix_server(self._tell_status, self.status_socket)
        self.status_socket.chmod(0o660)

    @abstractmethod
    async def stop(self) -> None:
        """Close everything; `Service`'s own part ends its tasks and the status."""
        for task in self._tasks - self._last:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._status:
            self._status.close()
            self.status_socket.unlink(missing_ok=True)

    def spawn(self, work: Coroutine[Any, Any, None], *, last: bool = False) -> asyncio.Task[None]:
        """Run `work` beside, and log a fault of it. The service's end waits for `last` work, and cancels other."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        if last:
            self._last.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._last.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.log.error("event=fault task=%s", task.get_coro(), exc_info=error)

    def count(self, code: str, reason: str, *, peer: str, **more: object) -> None:
        """Log and count that somebody was refused; `more` says who or what it was about."""
        self.refusals[code] += 1
        self.recent.append({"time": int(time.time()), "code": code, "reason": reason, "peer": peer, **more})
        event(self.log, "refused", level=logging.WARNING, code=code, reason=reason, peer=peer, **more)

    def ledger(self) -> dict[str, Any]:
        """The refusals' part of the status."""
        return {"refusals": dict(self.refusals), "recent_refusals": list(self.recent)}

    async def _tell_status(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(self.status()).encode() + b"\n")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def serve_metrics(service: Service, port: int, codes: Iterable[str]) -> None:
    """Prometheus metrics on 127.0.0.1:`port`, from prometheus_client's thread; it asks the loop for the figures.

    Args:
        codes: of refusals that are shown before they happen.
    """
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    loop = asyncio.get_running_loop()

    async def figures() -> list[Figure]:
        refused = {code: service.refusals[code] for code in sorted({*codes, *service.refusals})}
        return [*service.figures(), Figure("refusals", "Refusals by reason", refused, "code", counter=True)]

    class Figures:
        def collect(self) -> Any:
            for figure in asyncio.run_coroutine_threadsafe(figures(), loop).result(5):
                kind = CounterMetricFamily if figure.counter else GaugeMetricFamily
                labels = [figure.label] if figure.label else []
                family = kind(f"pilotbed_{service.name}_{figure.name}", figure.help, labels=labels)
                for value, number in figure.values.items():
                    family.add_metric([value] if figure.label else [], number)
                yield family

    registry = CollectorRegistry()
    registry.register(Figures())
    start_http_server(port, addr="127.0.0.1", registry=registry)


async def _run(service: Service, reload: Callable[[], object], metrics_port: int, codes: Iterable[str]) -> int:
    stopping = asyncio.Event()

    def reread() -> None:
        try:
            service.reload(reload())
        except (SettingsError, OSError) as error:
            event(service.log, "not_reloaded", level=logging.ERROR, reason=error)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reread)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await service.start()
    if metrics_port:
        serve_metrics(service, metrics_port, codes)
    notify("READY=1")
    await stopping.wait()
    notify("STOPPING=1")
    await service.stop()
    return 0


def _print_status(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        try:
            sock.connect(str(path))
            text = b"".join(iter(lambda: sock.recv(65536), b""))
        except OSError as error:
            raise OSError(f"{path}: {error.strerror or error}; does the service run?") from None
    print(json.dumps(json.loads(text), indent=2))
    return 0


class Common(Protocol):
    """What every configuration has."""

    @property
    def status_socket(self) -> Path: ...
    @property
    def metrics_port(self) -> int: ...


_Config = TypeVar("_Config", bound=Common)


def command(
    name: str,
    description: str,
    schema: type[_Config],
    make: Callable[[_Config], Service],
    codes: Iterable[str],
    arguments: Sequence[str] | None,
) -> int:
    """Run `pilotbed-NAME [serve|status] [--config FILE]`; serves until SIGTERM or SIGINT.

    Args:
        name: NAME; the configuration is /etc/pilotbed/NAME.toml unless the command line says otherwise.
        description: for `--help`.
        schema: what the configuration is read into.
        make: the service; called inside the event loop.
        codes: of refusals that metrics show before they happen.
        arguments: of the command line.
    Returns:
        the exit code: 0, or 1 with the reason on stderr.
    """
    default = Path(f"/etc/pilotbed/{name}.toml")
    parser = argparse.ArgumentParser(prog=f"pilotbed-{name}", description=description)
    parser.add_argument("command", nargs="?", choices=["serve", "status"], default="serve")
    parser.add_argument("--config", type=Path, default=default, metavar="FILE", help=f"default: {default}")
    given = parser.parse_args(arguments)

    async def serve(config: _Config) -> int:
        return await _run(make(config), lambda: load(given.config, schema), config.metrics_port, codes)

    try:
        config = load(given.config, schema)
        if given.command == "status":
            return _print_status(config.status_socket)
        log_to_stderr()
        return asyncio.run(serve(config))
    except (SettingsError, OSError) as error:
        print(f"pilotbed-{name}: {error}", file=sys.stderr)
        return 1
