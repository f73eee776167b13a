"""Who holds which dedicated port, and which streams wait for their connection: the relay's books, without I/O."""

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Generic, TypeVar

from pilotbed.relay.protocol import TOKEN_BYTES, TOKEN_LIFETIME, Refusal, Register, network

FORMAT = 1  # of the state file


@dataclass
class Lease:
    """A dedicated port and who holds it.

    Attributes:
        id: secret: whoever shows it (with the same DN) has the port again. Logs and status show `label`.
        dn: end-entity DN that opened it.
        pilot: name that the agent gave itself; for people.
        port: the dedicated port.
        opened, expires: epoch seconds; it expires with the proxy that opened or last renewed it.
        fqan: for which it was given; "" if none was asked for.
        sources: addresses and networks that may connect to the port; empty: everybody.
        lost: epoch seconds since when no agent is connected; None while one is.
    """

    id: str
    dn: str
    pilot: str
    port: int
    opened: float
    expires: float
    fqan: str = ""
    sources: Sequence[str] = ()
    lost: float | None = None

    @cached_property
    def label(self) -> str:
        """The lease's name in logs and status; of no use to somebody who wants the port."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:10]


_SAVED = tuple(field.name for field in fields(Lease) if field.name != "lost")


class LeaseBook:
    """Leases over a range of ports.

    Args:
        ports: the dedicated ports, in order.
        per_dn: leases that one end-entity DN may hold.
        grace: seconds that a lease outlives the loss of its agent.
    """

    def __init__(self, ports: range, per_dn: int, grace: float) -> None:
        self.ports, self.per_dn, self.grace = ports, per_dn, grace
        self._leases: dict[str, Lease] = {}
        self._by_port: dict[int, Lease] = {}
        self._held: Counter[str] = Counter()  # leases by DN
        self._text: dict[str, str] = {}  # each lease as JSON: the whole book is written often
        self._last: int = ports[0] - 1

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._leases.values()))

    def __contains__(self, lease: Lease) -> bool:
        return lease.id in self._leases

    def register(
        self, wish: Register, dn: str, fqan: str, expires: float, now: float, unusable: Collection[int] = ()
    ) -> Lease:
        """Give a lease, or the one that is asked for again.

        Args:
            wish: what the agent asks for.
            dn: its verified end-entity DN.
            fqan: the verified FQAN that lets it in; "" if its DN is enough.
            expires: end of the agent's proxy, epoch seconds.
            now: epoch seconds.
            unusable: ports that something else on this host uses.
        Raises:
            Refusal: proxy_expired, lease_unknown, too_many_leases or range_exhausted.
        """
        if expires <= now:
            raise Refusal("proxy_expired", "the proxy has expired")
        if wish.lease is not None:
            old = self._leases.get(wish.lease)
            if old is None or old.dn != dn or old.expires <= now:
                raise Refusal("lease_unknown", "no such lease of this DN: it has ended")
            old.pilot, old.fqan, old.sources, old.expires, old.lost = wish.pilot, fqan, wish.sources, expires, None
            self._write(old)
            return old
        if self._held[dn] >= self.per_dn:
            raise Refusal("too_many_leases", f"{dn} holds {self.per_dn} leases, which is its limit")
        port = self._last = self._free_port(unusable)
        lease = Lease(secrets.token_hex(16), dn, wish.pilot, port, now, expires, fqan, wish.sources)
        self._add(lease)
        return lease

    def agent_lost(self, lease: Lease, now: float) -> None:
        """The agent is gone; the lease waits for it for `grace` seconds."""
        lease.lost = now

    def end(self, lease: Lease) -> None:
        """Free the port. It is given to somebody else only after every other one of the range has been."""
        if self._leases.pop(lease.id, None):
            del self._by_port[lease.port], self._text[lease.id]
            self._held[lease.dn] -= 1

    def due(self, now: float) -> list[tuple[Lease, str]]:
        """Leases that have to end now, each with why: `proxy_expired` or `grace`."""
        return [
            (lease, "proxy_expired" if lease.expires <= now else "grace")
            for lease in self
            if lease.expires <= now or (lease.lost is not None and lease.lost + self.grace <= now)
        ]

    def dump(self) -> str:
        """The book as JSON, for the state file."""
        leases = ",\n".join(self._text.values())
        return f'{{"format": {FORMAT}, "last_port": {self._last}, "leases": [\n{leases}]}}\n'

    def restore(self, text: str, now: float, may: Callable[[Lease], bool]) -> None:
        """Take over what `dump` wrote; nobody is connected yet, so every grace period starts now.

        Args:
            text: the state file.
            now: epoch seconds.
            may: whether its holder may (still) have the lease; others are dropped, as are those outside the range.
        Raises:
            ValueError: not such a state.
        """
        try:
            state = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"damaged lease book: {error}") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"not a lease book of format {FORMAT}")
        try:
            leases = [_restored(entry, now) for entry in state["leases"]]
            last = int(state["last_port"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"damaged lease book: {error}") from None
        for lease in leases:
            if lease.port in self.ports and lease.port not in self._by_port and lease.expires > now and may(lease):
                self._add(lease)
        self._last = last

    def _add(self, lease: Lease) -> None:
        self._leases[lease.id] = self._by_port[lease.port] = lease
        self._held[lease.dn] += 1
        self._write(lease)

    def _write(self, lease: Lease) -> None:
        self._text[lease.id] = json.dumps({name: getattr(lease, name) for name in _SAVED})

    def _free_port(self, unusable: Collection[int]) -> int:
        start = self._last - self.ports[0] + 1
        for step in range(len(self.ports) if len(self._leases) < len(self.ports) else 0):
            port = self.ports[(start + step) % len(self.ports)]
            if port not in self._by_port and port not in unusable:
                return port
        raise Refusal(
            "range_exhausted", f"all {len(self.ports)} ports {self.ports[0]}-{self.ports[-1]} of this relay are taken"
        )


def _restored(entry: dict[str, Any], now: float) -> Lease:
    """Return a lease of the state file, which somebody may have edited. Raises TypeError and ValueError."""
    lease = Lease(**entry | {"lost": now})
    for name in ("id", "dn", "pilot", "fqan"):
        if not isinstance(getattr(lease, name), str):
            raise TypeError(f"{name} is {getattr(lease, name)!r}")
    for name in ("port", "opened", "expires"):
        if not isinstance(value := getattr(lease, name), int | float) or not 0 <= value < 2**53:
            raise TypeError(f"{name} is {value!r}")
    if not isinstance(lease.sources, list):
        raise TypeError(f"sources is {lease.sources!r}")
    for source in lease.sources:
        network(source)
    return lease


_Waiting = TypeVar("_Waiting")


class TokenBook(Generic[_Waiting]):
    """One-time tokens: each stands for a connection that waits for the agent's, and dies at first use or of age.

    Only a token's digest is kept, so the look-up tells nothing by its duration.
    """

    def __init__(self, lifetime: float = TOKEN_LIFETIME) -> None:
        self.lifetime = lifetime
        self._waiting: dict[bytes, tuple[float, _Waiting]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def issue(self, waiting: _Waiting, now: float) -> bytes:
        """A new token for `waiting`; `now`: seconds of a monotonic clock."""
        token = secrets.token_bytes(TOKEN_BYTES)
        self._waiting[self._key(token)] = (now + self.lifetime, waiting)
        return token

    def redeem(self, token: bytes, now: float) -> _Waiting | None:
        """What waits for `token`; None for a token that is unknown, used or too old."""
        until, waiting = self._waiting.pop(self._key(token), (now, None))
        return waiting if now < until else None

    def revoke(self, token: bytes) -> None:
        """Forget a token, used or not."""
        self._waiting.pop(self._key(token), None)

    @staticmethod
    def _key(token: bytes) -> bytes:
        return hashlib.sha256(token).digest()
