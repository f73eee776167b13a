"""The relay's configuration file (TOML), which `pilotbed.settings` reads."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from pilotbed import dn


@dataclass(frozen=True)
class Config:
    """Keys of relay.toml; those without a default are required.

    Attributes:
        public_address: host name or address that daemons publish together with their port.
        ports: first and last dedicated port.
        certificate, key: the relay's own host certificate.
        ca_directory: HASH.0 and HASH.r0 of the CAs that agents may come from.
        state: file for the leases.
        status_socket: unix socket for `pilotbed-relay status`.
        authorized_dns: end-entity DNs (slash form) that may have ports; empty: any that has a FQAN of these.
        authorized_fqans: of which an agent needs one, verified; empty: none is asked for.
        authorized_hosts: end-entity DNs that may have ports without a FQAN: hosts are no members of a VO.
        voms_directory: VO/HOST.lsc of the VOMS servers whose FQANs are believed.
        address: to listen on, control and dedicated ports alike.
        port: for control and stream connections.
        metrics_port: Prometheus on 127.0.0.1; 0: none.
        leases_per_dn: how many leases one DN may hold.
        streams_per_lease: how many connections a dedicated port carries at a time.
        streams: how many all of them carry.
        greetings: connections to `port` that may be in TLS handshake or have not said yet what they want.
        heartbeat: seconds between an agent's pings; three missing ones cut it off.
        grace: seconds that a port is kept for an agent that has gone.
    """

    public_address: str
    ports: tuple[int, ...]
    certificate: Path
    key: Path
    ca_directory: Path
    state: Path
    status_socket: Path
    authorized_dns: tuple[str, ...] = ()
    authorized_fqans: tuple[str, ...] = ()
    authorized_hosts: tuple[str, ...] = ()
    voms_directory: Path = Path("/etc/grid-security/vomsdir")
    address: str = "0.0.0.0"  # noqa: S104  # a relay is there for everybody; who gets a port is decided by certificate
    port: int = 9700
    metrics_port: int = 9701
    leases_per_dn: int = 50
    streams_per_lease: int = 200
    streams: int = 10000
    greetings: int = 512
    heartbeat: int = 15
    grace: int = 300

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{field.name} = {value} must not be negative")
        ports = self.ports
        if len(ports) != 2 or not 1024 <= ports[0] <= ports[1] <= 65535 or self.port in self.range:
            raise ValueError(f"ports = {list(ports)}: not a range within 1024-65535 that leaves out {self.port}")
        for text in self.authorized_fqans:
            if not text.startswith("/"):
                raise ValueError(f"authorized_fqans: {text!r} is not in slash form (/VO/Role=…)")
        for name in ("authorized_dns", "authorized_hosts"):
            for text in getattr(self, name):
                try:
                    dn.parse(text)
                except dn.NotADn as error:
                    raise ValueError(f"{name}: {error}") from None
        if not (self.authorized_dns or self.authorized_fqans or self.authorized_hosts):
            raise ValueError("authorized_dns, authorized_fqans, authorized_hosts: one has to be there, or nobody may")

    @property
    def range(self) -> range:
        return range(self.ports[0], self.ports[1] + 1)

    def grants(self, name: str, fqans: Collection[str]) -> str | None:
        """By which FQAN the bearer of a DN and of verified FQANs may have a port; "" if none is asked for; None: no."""
        if name in self.authorized_hosts:
            return ""
        if self.authorized_dns and name not in self.authorized_dns:
            return None
        if not self.authorized_fqans:
            return "" if self.authorized_dns else None
        return next((fqan for fqan in fqans if fqan in self.authorized_fqans), None)
