"""What the relay and its border mode share: life as a daemon, status and metrics, the command line."""

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pilotbed.relay.listener import Address, Listener
from pilotbed.relay.log import event, log_to_stderr
from pilotbed.relay.metrics import Metric, serve_metrics
from pilotbed.relay.refusals import Refusals
from pilotbed.service import notify
from pilotbed.settings import SettingsError, load


class Service(ABC):
    """A daemon that is asked by its unix socket, and counts whom it refused.

    Args:
        name: its prefix in metrics, `relay` or `border`.
        status_socket: path of the unix socket.
        codes: of refusals that metrics show before they happen.
    """

    def __init__(self, name: str, status_socket: Path, codes: Iterable[str]) -> None:
        self.name, self.status_socket = name, status_socket
        self.log = logging.getLogger(f"pilotbed-{name}")
        self.started = time.time()
        self.refusals = Refusals(self.log, codes)
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
    def metrics(self) -> list[Metric]:
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
        self._status = await asyncio.start_unix_server(self._send_status, self.status_socket)
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

    async def repeat(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` for ever, `seconds` after it has ended; a fault of it is logged, and does not end that."""
        while True:
            await asyncio.sleep(seconds)
            with self.apart(work):
                await work()

    @contextlib.contextmanager
    def apart(self, what: object) -> Iterator[None]:
        """Log a fault of what is done about one lease, one certificate ..., and go on with the others."""
        try:
            yield
        except Exception:
            self.log.exception("event=fault what=%s", what)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._last.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.log.error("event=fault task=%s", task.get_coro(), exc_info=error)

    async def _send_status(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(self.status()).encode() + b"\n")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _run(service: Service, reload: Callable[[], object], metrics_port: int) -> int:
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
        serve_metrics(f"pilotbed_{service.name}", lambda: [*service.metrics(), service.refusals.metric()], metrics_port)
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


class ServiceConfig(Protocol):
    """What every service's configuration has."""

    @property
    def status_socket(self) -> Path: ...
    @property
    def metrics_port(self) -> int: ...


_Config = TypeVar("_Config", bound=ServiceConfig)


def command(
    name: str,
    description: str,
    schema: type[_Config],
    make: Callable[[_Config], Service],
    arguments: Sequence[str] | None,
) -> int:
    """Run `pilotbed-NAME [serve|status] [--config FILE]`; serves until SIGTERM or SIGINT.

    Args:
        name: NAME; the configuration is /etc/pilotbed/NAME.toml unless the command line says otherwise.
        description: for `--help`.
        schema: what the configuration is read into.
        make: the service; called inside the event loop.
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
        return await _run(make(config), lambda: load(given.config, schema), config.metrics_port)

    try:
        config = load(given.config, schema)
        if given.command == "status":
            return _print_status(config.status_socket)
        log_to_stderr()
        return asyncio.run(serve(config))
    except (SettingsError, OSError) as error:
        print(f"pilotbed-{name}: {error}", file=sys.stderr)
        return 1
