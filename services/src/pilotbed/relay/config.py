"""The server's configuration file (TOML)."""

import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

DEFAULT_PATH = Path("/etc/pilotbed/relay.toml")


class ConfigError(Exception):
    """The configuration cannot be used; the text names file, key and remedy."""


@dataclass(frozen=True)
class Config:
    """Keys of relay.toml; those without a default are required.

    Attributes:
        public_address: host name or address that daemons publish together with their port.
        ports: first and last dedicated port.
        certificate, key: the relay's own host certificate.
        ca_directory: HASH.0 and HASH.r0 of the CAs that agents may come from.
        authorized_dns: end-entity DNs (slash form) that may have ports.
        state: file for the leases.
        status_socket: unix socket for `pilotbed-relay status`.
        address: to listen on, control and dedicated ports alike.
        port: for control and stream connections.
        metrics_port: Prometheus on 127.0.0.1; 0: none.
        leases_per_dn: how many leases one DN may hold.
        streams_per_lease: how many connections a dedicated port carries at a time.
        greetings: connections to `port` that may be in TLS handshake or have not said yet what they want.
        heartbeat: seconds between an agent's pings; three missing ones cut it off.
        grace: seconds that a port is kept for an agent that has gone.
    """

    public_address: str
    ports: tuple[int, int]
    certificate: Path
    key: Path
    ca_directory: Path
    authorized_dns: tuple[str, ...]
    state: Path
    status_socket: Path
    address: str = "0.0.0.0"  # noqa: S104  # a relay is there for everybody; who gets a port is decided by certificate
    port: int = 9700
    metrics_port: int = 9701
    leases_per_dn: int = 50
    streams_per_lease: int = 200
    greetings: int = 512
    heartbeat: int = 15
    grace: int = 300

    @property
    def range(self) -> range:
        return range(self.ports[0], self.ports[1] + 1)

    def __post_init__(self) -> None:
        if not 1024 <= self.ports[0] <= self.ports[1] <= 65535 or self.port in self.range:
            raise ConfigError(f"ports = {list(self.ports)}: not a range within 1024-65535 that leaves out {self.port}")
        for dn in self.authorized_dns:
            if not dn.startswith("/"):
                raise ConfigError(f"authorized_dns: {dn!r} is not a DN in slash form (/DC=…/CN=…)")


def load(path: Path) -> Config:
    """Read the file.

    Raises:
        ConfigError: unreadable, not TOML, a key unknown, missing or of the wrong type.
    """
    try:
        given = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    known = {field.name: field for field in fields(Config)}
    if unknown := given.keys() - known.keys():
        raise ConfigError(f"{path}: unknown: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    required = {name for name, field in known.items() if field.default is MISSING}
    if missing := required - given.keys():
        raise ConfigError(f"{path}: missing: {', '.join(sorted(missing))}")
    try:
        return Config(**{name: _convert(known[name].type, value) for name, value in given.items()})
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _convert(wanted: Any, value: Any) -> Any:
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if wanted == tuple[str, ...] and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if wanted == tuple[int, int] and isinstance(value, list) and [type(item) for item in value] == [int, int]:
        return tuple(value)
    if (wanted is int and type(value) is int and value >= 0) or (wanted is str and isinstance(value, str)):
        return value
    raise ValueError(f"{value!r} is not {wanted if not isinstance(wanted, type) else wanted.__name__}")
