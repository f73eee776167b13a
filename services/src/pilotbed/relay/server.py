"""The relay's server: gives dedicated ports to agents, and carries what comes to them.

    client ──▶ ports ──▶ forwarding ◀── greetings ◀── agent's stream connections
                 ▲           ▲              │
                 └─────── registrar ◀── control ◀── agent's control connection (TLS)

Who may have a port is decided in `authorization`, which port in `leases`, what may be said in `protocol`; `streams`
carries the bytes, `fdstore` gives standing streams to systemd.
"""

import sys
from collections.abc import Sequence
from typing import Any

from pilotbed.relay.config import Config
from pilotbed.relay.forwarding import Forwarding
from pilotbed.relay.greetings import Greetings
from pilotbed.relay.log import event
from pilotbed.relay.metrics import Metric
from pilotbed.relay.ports import Ports
from pilotbed.relay.protocol import REFUSALS
from pilotbed.relay.registrar import Registrar
from pilotbed.relay.service import Service, command
from pilotbed.relay.streams import Traffic
from pilotbed.relay.throttle import Throttle


class Relay(Service):
    """One relay.

    Args:
        config: see there.
    """

    def __init__(self, config: Config) -> None:
        super().__init__("relay", config.status_socket, REFUSALS)
        self.config = config
        self._traffic = Traffic()
        self._forwarding = Forwarding(config, self)
        self._ports = Ports(config, self, self._traffic, self._forwarding.client_connected)
        self._registrar = Registrar(config, self, self._ports, self._forwarding, Throttle(self._traffic))
        self._greetings = Greetings(config.greetings, self._registrar, self._forwarding, self.refusals)

    async def start(self) -> None:
        """Restore leases and streams, listen.

        Raises:
            SettingsError: the state file is damaged.
            OSError: a socket cannot be bound, or the certificate cannot be loaded.
        """
        self._registrar.start()
        self._ports.restore()
        self._forwarding.adopt(self._ports)
        self.listen((self.config.address, self.config.port), self._greetings.connected)
        await super().start()
        event(self.log, "started", address=self.config.address, port=self.port, leases=len(self._ports))

    async def stop(self) -> None:
        """Tell the agents to come back, and close everything; leases stay on disk, and stored streams with systemd."""
        self.close_listener()
        self._greetings.stop()
        self._registrar.stop()
        for port in self._ports:
            self._forwarding.leave(port)
            self._ports.close(port)
            self._forwarding.end(port)
        self._forwarding.log_ended()
        await super().stop()
        await self._ports.save_or_log()
        event(self.log, "stopped")

    def status(self) -> dict[str, Any]:
        """What `pilotbed-relay status` prints; holds no secret."""
        return {
            "started": int(self.started),
            "public_address": self.config.public_address,
            "ports": {"first": self.config.ports[0], "last": self.config.ports[1], "free": self._ports.free},
            "leases": [port.status() for port in self._ports],
            "ended_leases": list(self._ports.ended),
            "streams": self._forwarding.streams,
            "streams_total": self._forwarding.total,
            "bytes_inward": self._traffic.inward,
            "bytes_outward": self._traffic.outward,
            **self.refusals.status(),
        }

    def metrics(self) -> list[Metric]:
        """What Prometheus gets, beside the refusals."""
        connected = sum(port.served for port in self._ports)
        waiting = len(self._ports) - connected
        moved = {"inward": self._traffic.inward, "outward": self._traffic.outward}
        return [
            Metric("leases", "Leases by state", {"connected": connected, "waiting": waiting}, "state"),
            Metric("ports_free", "Dedicated ports free", {"": self._ports.free}),
            Metric("streams", "Streams carried or waiting", {"": self._forwarding.streams}),
            Metric("streams", "Connections to dedicated ports", {"": self._forwarding.total}, counter=True),
            Metric("bytes", "Bytes carried", moved, "direction", counter=True),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit codes: 0, 1 something failed (said on stderr), 2 usage."""
    return command("relay", (__doc__ or "").splitlines()[0], Config, Relay, arguments)


if __name__ == "__main__":
    sys.exit(main())
