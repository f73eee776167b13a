"""What the relay's server and its border mode share: listening, and being seen."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pilotbed.relay import event, prepare

_log = logging.getLogger("pilotbed-relay")
Status = Callable[[], dict[str, Any]]


class Listener:
    """A listening socket that hands over each accepted connection; pauses when descriptors run out."""

    def __init__(self, address: tuple[str, int], accepted: Callable[[socket.socket, str], None]) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._sock = socket.create_server(address, family=family, backlog=1024)
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    @property
    def port(self) -> int:
        return int(self._sock.getsockname()[1])

    def close(self) -> None:
        if self._pause:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    event(_log, "accept_paused", level=logging.ERROR, reason=error.strerror, port=self.port)
                    self._loop.remove_reader(self._sock.fileno())
                    self._pause = self._loop.call_later(1.0, self._resume)
                    return
                continue  # the peer has gone before we looked (ECONNABORTED)
            prepare(sock)
            self._accepted(sock, f"{address[0]}:{address[1]}")

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._accept)


async def serve_status(path: Path, status: Status) -> asyncio.Server:
    """Tell everybody who connects to the unix socket `path` (mode 0660) the status, as JSON."""

    async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(status(), indent=2).encode() + b"\n")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(tell, path)
    path.chmod(0o660)
    return server


def ask_status(path: Path, program: str) -> int:
    """Print what the unix socket `path` tells. Returns the exit code: 0, or 1 with the reason on stderr."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.settimeout(10)
            sock.connect(str(path))
            while data := sock.recv(65536):
                sys.stdout.buffer.write(data)
        except OSError as error:
            print(f"{program}: {path}: {error}; does the relay run?", file=sys.stderr)
            return 1
    return 0


def serve_metrics(status: Status, figures: Callable[[dict[str, Any]], Iterator[Any]], port: int) -> None:
    """Prometheus metrics on 127.0.0.1:`port`, from prometheus_client's thread; it asks the loop for the status."""
    from prometheus_client import CollectorRegistry, start_http_server

    loop = asyncio.get_running_loop()

    async def ask() -> dict[str, Any]:
        return status()

    class Figures:
        def collect(self) -> Iterator[Any]:
            yield from figures(asyncio.run_coroutine_threadsafe(ask(), loop).result(5))

    registry = CollectorRegistry()
    registry.register(Figures())
    start_http_server(port, addr="127.0.0.1", registry=registry)


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3))."""
    where = os.environ.get("NOTIFY_SOCKET")
    if where:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + where[1:] if where.startswith("@") else where)
