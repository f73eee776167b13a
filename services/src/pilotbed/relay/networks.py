"""Who may connect: addresses and networks."""

import ipaddress
from collections.abc import Iterable


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
