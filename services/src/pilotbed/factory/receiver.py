"""pilotbed-pilot-log-receiver: takes parts of the logs of pilots that run, over HTTPS, from who shows a pilot's proxy.

    PUT /ENTRY/CLUSTER.PROC/PILOT/LOG/NUMBER    a gzip member; 204 when it is kept

Who shows no certificate of a CA gets no answer at all; what may be sent, and what of it is kept, is in `parts`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pilotbed.service import event, notify, set_up_logging
from pilotbed.settings import SettingsError, load
from pilotbed.x509 import CertificateError, Chain, TrustError, TrustStore
from pilotbed.x509.tls import ServerContext, shown_chain

from .parts import PACKED, Part, Refusal, Store

#: Seconds that a client has for everything, and connections at a time; who comes then is told nothing, and comes again.
DEADLINE, AT_A_TIME = 60.0, 64

_log = logging.getLogger("pilotbed.pilot-log-receiver")


@dataclass(frozen=True)
class Config:
    """Keys of pilot-log-receiver.toml.

    Args:
        pilots: end-entity DNs whose proxies may send.
        entries: names of the factory's entries.
        certificate, key: the host's own.
        ca_directory: HASH.0 and HASH.r0 of the CAs that pilots' certificates may come from.
        directory: where the parts are kept.
        port: to listen on.
        address: to listen on.
        most: octets that are kept of all pilots; the oldest go first.
        pilot: octets that are kept of one.
    """

    pilots: tuple[str, ...]
    entries: tuple[str, ...]
    certificate: Path
    key: Path
    ca_directory: Path
    directory: Path
    port: int
    address: str = "0.0.0.0"  # noqa: S104 # for pilots of every site; who may send is decided by certificate
    most: int = 1 << 30
    pilot: int = 4 << 20

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port = {self.port} must be 1 to 65535")
        if self.pilot <= 0 or self.most < self.pilot:
            raise ValueError(f"pilot = {self.pilot} must be more than 0, and no more than most = {self.most}")


class Server(ThreadingHTTPServer):
    """The service; `Handler` does the work of a connection, in a thread of its own.

    Raises: OSError: the address is taken, or the certificate cannot be read.
    """

    daemon_threads = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.store = Store(config.directory, config.most, config.pilot)
        self.trust = TrustStore(config.ca_directory)
        self.context = ServerContext(config.certificate, config.key, config.ca_directory)
        self.context.current()
        self._turns = threading.BoundedSemaphore(AT_A_TIME)
        super().__init__((config.address, config.port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, if there is one."""
        if self._turns.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection; give the thread back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._turns.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in a line what went wrong with a connection: nothing that a client does is a traceback."""
        error = sys.exc_info()[1]
        expected = isinstance(error, OSError)
        _log.info(event("failed", peer=client_address[0], why=error or type(error).__name__),
                  exc_info=None if expected else error)  # fmt: skip

    def service_actions(self) -> None:
        """Tell the watchdog that connections are taken."""
        notify("WATCHDOG=1")

    def sender(self, connection: ssl.SSLSocket) -> str:
        """Return the end-entity DN of who is at the other end.

        Raises:
            Refusal: it may not send.
        """
        try:
            chain = self.trust.verify(Chain.from_der(shown_chain(connection)))
        except (TrustError, CertificateError, ValueError) as error:
            raise Refusal(HTTPStatus.FORBIDDEN, str(error)) from None
        if chain.dn not in self.config.pilots:
            raise Refusal(HTTPStatus.FORBIDDEN, f"{chain.dn} is no pilot of this factory's")
        return chain.dn


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    server: Server
    server_version, sys_version = "pilotbed-pilot-log-receiver", ""
    #: Seconds for a single step.
    timeout = 20

    def setup(self) -> None:
        """Have the client show what it has; from now on its time runs."""
        self.request.settimeout(self.timeout)
        context = self.server.context.current()
        self.request = context.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
        self._cut = threading.Timer(DEADLINE, self._end)
        self._cut.daemon = True
        self._cut.start()
        try:
            self.request.do_handshake()
            super().setup()
        except BaseException:
            self._cut.cancel()
            self.request.close()
            raise

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.request, socket.SHUT_RDWR)  # TLS's own is the other thread's

    def finish(self) -> None:
        """Say good-bye: without it a client takes the end for a cut."""
        try:
            with contextlib.suppress(OSError, ValueError):
                super().finish()
                self.request.unwrap()
        finally:
            self._cut.cancel()
            self.request.close()

    def do_PUT(self) -> None:
        """Keep a part."""
        sender = ""
        try:
            sender = self.server.sender(self.request)
            part = Part.of(self.path)
            if part.entry not in self.server.config.entries:
                raise Refusal(HTTPStatus.NOT_FOUND, "there is no such entry")
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit() and len(length) < 10):
                raise Refusal(HTTPStatus.LENGTH_REQUIRED, "Content-Length is not a number")
            if int(length) > PACKED:
                raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a part is at most {PACKED} octets")
            self.server.store.take(part, sender, self.rfile.read(int(length)))
            self._answer(HTTPStatus.NO_CONTENT, "")
        except Refusal as refusal:
            _log.warning(event("refused", peer=self.client_address[0], dn=sender, path=self.path[:200], why=refusal))
            self._answer(refusal.status, f"{refusal}\n")
        except OSError as error:
            if isinstance(error, ssl.SSLError | TimeoutError | ConnectionError):
                raise
            _log.error(event("not-kept", path=self.path[:200], why=error))
            self._answer(HTTPStatus.INSUFFICIENT_STORAGE, f"cannot be kept: {error.strerror}\n")

    def _answer(self, status: HTTPStatus, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each part of each pilot is too many."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``pilotbed-pilot-log-receiver``."""
    parser = argparse.ArgumentParser(prog="pilotbed-pilot-log-receiver", description="Take parts of pilots' logs.")
    default = Path("/etc/pilotbed/pilot-log-receiver.toml")
    parser.add_argument("--config", type=Path, default=default, metavar="FILE.toml")
    options = parser.parse_args(argv)
    set_up_logging()
    try:
        server = Server(load(options.config, Config))
    except (SettingsError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: threading.Thread(target=server.shutdown).start())
    notify("READY=1")
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
