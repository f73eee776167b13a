"""The relay's protocol: frames, states and timers of both sides, without I/O (see docs/relay.md).

A control connection (TLS) carries frames: four bytes of length, big endian, then a JSON object. A stream connection
(plain TCP to the same port; its bytes are the application's, which protects them itself) starts with a preface that
holds the one-time token out of an `open` frame. Standard library only: it is part of the agent's zipapp.
"""

import ipaddress
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

VERSION = 1
MAX_FRAME = 64 * 1024  # bytes of JSON; a chain of five RSA 4096 certificates with VOMS attributes needs 20 kB
MAX_SOURCES = 32  # networks that a lease may be limited to
TOKEN_BYTES = 32
TOKEN_LIFETIME = 10.0  # seconds from `open` until the stream connection must have shown the token
PREFACE = b"PBRS" + bytes([VERSION])  # its first byte is none that a TLS record can start with
PREFACE_LENGTH = len(PREFACE) + TOKEN_BYTES


class Refusal(Exception):
    """The other side is refused, or we are.

    Attributes:
        code: a key of `REFUSALS`.
        reason: text for people; holds no secret.
        final: whether to try again is useless.
    """

    def __init__(self, code: str, reason: str, final: bool | None = None) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason, self.final = code, reason, REFUSALS[code] if final is None else final


# Why somebody is refused -> whether that is final.
REFUSALS: Mapping[str, bool] = {
    "bad_frame": True,  # not of this protocol, or not in this state
    "bad_version": True,
    "bad_certificate": True,  # chain does not verify: unknown CA, revoked, forged, not the TLS peer's
    "bad_attributes": True,  # VOMS attributes that do not verify: forged, expired, another's, of a server not known
    "not_authorized": True,  # a good certificate of somebody who may not have a port
    "proxy_expired": True,  # at registration, or in mid-lease: a lease ends with its proxy
    "lease_unknown": True,  # asked for a lease that has ended, or is another's
    "range_exhausted": True,
    "too_many_leases": True,  # limit of this DN
    "superseded": True,  # somebody else registered with this lease
    "trust": False,  # the relay's own revocation lists are missing or expired
    "port_busy": False,  # something else on the relay's host, or on the agent's, uses the lease's port just now
    "storage": False,  # the lease could not be written to disk
    "timeout": False,
    "overload": False,
    "stopping": False,
}


@dataclass(frozen=True)
class Frame:
    """One message; the subclass is its kind, `name` what it is called on the wire."""

    name: ClassVar[str]


@dataclass(frozen=True)
class Register(Frame):
    """First frame of the agent. `chain`: base64 DER of its certificates, leaf first. `lease`: to have it again.

    `sources`: addresses and networks that may connect to the port; empty: everybody.
    """

    name = "register"
    version: int
    chain: tuple[str, ...]
    pilot: str
    lease: str | None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Query(Frame):
    """First frame of an agent that may choose among relays."""

    name = "query"
    version: int


@dataclass(frozen=True)
class Load(Frame):
    """Last frame of the relay: its leases, the ports that it could still give, the streams under way."""

    name = "load"
    leases: int
    free: int
    streams: int


@dataclass(frozen=True)
class Registered(Frame):
    """The lease: what the daemon behind the agent publishes is `host`:`port`. `expires`: epoch seconds."""

    name = "registered"
    lease: str
    host: str
    port: int
    expires: int
    heartbeat: int


@dataclass(frozen=True)
class Refused(Frame):
    """Last frame of the relay, at any time."""

    name = "refused"
    code: str
    reason: str
    final: bool


@dataclass(frozen=True)
class Open(Frame):
    """Somebody (`peer`, for the log) connected to the port: bring a stream connection with `token` (hex)."""

    name = "open"
    stream: int
    token: str
    peer: str


@dataclass(frozen=True)
class Failed(Frame):
    """The agent cannot serve this stream."""

    name = "failed"
    stream: int
    reason: str


@dataclass(frozen=True)
class Ping(Frame):
    name = "ping"


@dataclass(frozen=True)
class Pong(Frame):
    name = "pong"


@dataclass(frozen=True)
class Release(Frame):
    """Last frame of an agent that will not come back: the lease ends at once."""

    name = "release"


Check = Callable[[Any], Any]


def _text(limit: int, least: int = 0) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not least <= len(value) <= limit or not value.isprintable():
            raise ValueError(f"not a text of {least} to {limit} printable characters")
        return value

    return check


def _number(least: int, most: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"not a number from {least} to {most}")
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def _list(one: Check, least: int, most: int) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise ValueError(f"not a list of {least} to {most}")
        return tuple(map(one, value))

    return check


def network(value: Any) -> str:
    """The text, if it is an address or a network without host bits (192.0.2.0/24).

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or len(value) > 50:
        raise ValueError("not the text of a network")
    return str(ipaddress.ip_network(value))


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


_HEX = _text(64, 8)
# Every frame with the check of each of its fields: no field may be missing, none may be added within a version.
FRAMES: Mapping[type[Frame], Mapping[str, Check]] = {
    Register: {
        "version": _number(0, 2**31),
        "chain": _list(_text(16384, 1), 1, 16),
        "pilot": _text(200),
        "lease": _or_null(_HEX),
        "sources": _list(network, 0, MAX_SOURCES),
    },
    Query: {"version": _number(0, 2**31)},
    Load: {"leases": _number(0, 65535), "free": _number(0, 65535), "streams": _number(0, 2**53)},
    Registered: {
        "lease": _HEX,
        "host": _text(253, 1),
        "port": _number(1, 65535),
        "expires": _number(0, 2**53),
        "heartbeat": _number(1, 3600),
    },
    Refused: {"code": _text(40, 1), "reason": _text(2000), "final": _flag},
    Open: {"stream": _number(1, 2**53), "token": _text(2 * TOKEN_BYTES, 2 * TOKEN_BYTES), "peer": _text(100)},
    Failed: {"stream": _number(1, 2**53), "reason": _text(500)},
    Ping: {},
    Pong: {},
    Release: {},
}
_BY_NAME = {kind.name: kind for kind in FRAMES}
_json = json.JSONEncoder(separators=(",", ":")).encode


def encode(frame: Frame) -> bytes:
    """The frame's bytes on the wire."""
    body = _json({"frame": frame.name, **vars(frame)}).encode()
    if len(body) > MAX_FRAME:
        raise ValueError(f"{frame.name} frame of {len(body)} bytes is longer than {MAX_FRAME}")
    return struct.pack(">I", len(body)) + body


def _decode(body: bytes) -> Frame:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal("bad_frame", "a frame is not JSON") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("frame"), str):
        raise Refusal("bad_frame", "a frame is not an object with a name")
    name = fields.pop("frame")
    kind = _BY_NAME.get(name)
    if kind is None:
        raise Refusal("bad_frame", f"unknown frame {name[:40]!r}")
    # A later version may have other fields, so it is told apart before they are looked at.
    if "version" in FRAMES[kind] and fields.get("version") != VERSION:
        raise Refusal("bad_version", f"this side speaks version {VERSION} only")
    checks = FRAMES[kind]
    if fields.keys() != checks.keys():
        odd = ", ".join(sorted(str(key)[:40] for key in fields.keys() ^ checks.keys()))
        raise Refusal("bad_frame", f"{name}: missing or unknown: {odd[:400]}")
    try:
        return kind(**{key: check(fields[key]) for key, check in checks.items()})
    except ValueError as error:
        raise Refusal("bad_frame", f"{name}: {error}") from None


class Decoder:
    """Cuts a byte stream into frames; holds at most one frame that is not complete yet."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames completed by `data`, in order.

        Raises:
            Refusal: `bad_frame` or `bad_version`; the connection is of no further use.
        """
        self._buffer += data
        frames = []
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from(">I", self._buffer)
            if length > MAX_FRAME:
                raise Refusal("bad_frame", f"a frame announces {length} bytes, more than {MAX_FRAME}")
            if len(self._buffer) < 4 + length:
                break
            body = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            frames.append(_decode(body))
        return frames


class Side(Enum):
    __hash__ = object.__hash__  # Enum's own is Python, and there are two of them in every look-up of a transition

    AGENT = "agent"
    RELAY = "relay"


class State(Enum):
    __hash__ = object.__hash__

    GREETING = "greeting"  # TLS stands; the agent has to register, or to ask
    ASKED = "asked"  # the relay has to say its load
    DECIDING = "deciding"  # the relay has to answer
    SERVING = "serving"
    CLOSED = "closed"


# Who may say what in which state, and what state comes then. Whatever is not here is refused as bad_frame.
TRANSITIONS: Mapping[tuple[State, Side, type[Frame]], State] = {
    (State.GREETING, Side.AGENT, Register): State.DECIDING,
    (State.GREETING, Side.AGENT, Query): State.ASKED,
    (State.GREETING, Side.RELAY, Refused): State.CLOSED,
    (State.ASKED, Side.RELAY, Load): State.CLOSED,
    (State.ASKED, Side.RELAY, Refused): State.CLOSED,
    (State.DECIDING, Side.RELAY, Registered): State.SERVING,
    (State.DECIDING, Side.RELAY, Refused): State.CLOSED,
    (State.SERVING, Side.RELAY, Open): State.SERVING,
    (State.SERVING, Side.AGENT, Failed): State.SERVING,
    (State.SERVING, Side.AGENT, Ping): State.SERVING,
    (State.SERVING, Side.RELAY, Pong): State.SERVING,
    (State.SERVING, Side.AGENT, Release): State.CLOSED,
    (State.SERVING, Side.RELAY, Refused): State.CLOSED,
}

# Seconds that each side bears silence of the other in a state; while serving: heartbeats missed.
SILENCE_TIMEOUTS: Mapping[tuple[Side, State], float] = {
    (Side.RELAY, State.GREETING): 10.0,
    (Side.AGENT, State.ASKED): 3.0,  # somebody else answers sooner
    (Side.AGENT, State.DECIDING): 30.0,
}
MISSED_HEARTBEATS = 3


class Connection:
    """One side of a control connection.

    Args:
        side: which side this is.
        now: seconds of any monotonic clock, as for all methods.
        heartbeat: the relay's choice, seconds; the agent learns it from `registered`.
    """

    __slots__ = ("_decoder", "_other", "_received", "_sent", "heartbeat", "side", "state")

    def __init__(self, side: Side, now: float, heartbeat: int = 15) -> None:
        self.side, self.state, self.heartbeat = side, State.GREETING, heartbeat
        self._other = Side.AGENT if side is Side.RELAY else Side.RELAY
        self._decoder = Decoder()
        self._received = self._sent = now

    def receive(self, data: bytes, now: float) -> list[Frame]:
        """Frames for the shell to act on, in order; after the last frame of a connection nothing more is read.

        Raises:
            Refusal: the other side broke the protocol; the relay sends it as `refused`, then both hang up.
        """
        self._received = now
        frames: list[Frame] = []
        for frame in self._decoder.feed(data) if self.state is not State.CLOSED else ():
            if self.state is State.CLOSED:
                break
            self._step(self._other, frame)
            if isinstance(frame, Registered):
                self.heartbeat = frame.heartbeat
            frames.append(frame)
        return frames

    def may(self, frame: Frame) -> bool:
        """Whether this side may say that now."""
        return (self.state, self.side, type(frame)) in TRANSITIONS

    def send(self, frame: Frame, now: float) -> bytes:
        """The bytes to write for `frame`.

        Raises:
            Refusal: this side may not say that now, which is a fault of the shell.
        """
        self._step(self.side, frame)
        self._sent = now
        return encode(frame)

    def deadline(self) -> float | None:
        """When `due` has to be asked again; None: never."""
        times = [time for time in (self._silent_until(), self._ping_at()) if time is not None]
        return min(times, default=None)

    def due(self, now: float) -> bytes:
        """Bytes that have to be written by now: the agent's ping, or nothing.

        Raises:
            Refusal: `timeout`, the other side has been silent for too long.
        """
        limit, ping = self._silent_until(), self._ping_at()
        if limit is not None and now >= limit:
            silent = now - self._received
            raise Refusal("timeout", f"{self._other.value} silent for {silent:.0f} s ({self.state.value})")
        return self.send(Ping(), now) if ping is not None and now >= ping else b""

    def _silent_until(self) -> float | None:
        if self.state is State.SERVING:
            return self._received + MISSED_HEARTBEATS * self.heartbeat
        timeout = SILENCE_TIMEOUTS.get((self.side, self.state))
        return None if timeout is None else self._received + timeout

    def _ping_at(self) -> float | None:
        return self._sent + self.heartbeat if (self.side, self.state) == (Side.AGENT, State.SERVING) else None

    def _step(self, sender: Side, frame: Frame) -> None:
        after = TRANSITIONS.get((self.state, sender, type(frame)))
        if after is None:
            raise Refusal("bad_frame", f"{frame.name} from the {sender.value} while {self.state.value}")
        self.state = after


def printable(text: str, limit: int) -> str:
    """The text as a frame may have it: printable, and not longer than `limit`."""
    return "".join(character if character.isprintable() else " " for character in text[:limit])


def preface(token: bytes) -> bytes:
    """The first bytes of a stream connection."""
    return PREFACE + token


def read_preface(data: bytes) -> bytes:
    """The token in `data`, which is exactly `PREFACE_LENGTH` bytes.

    Raises:
        Refusal: `bad_version` for another version's stream, `bad_frame` for anything else.
    """
    if len(data) != PREFACE_LENGTH or data[:4] != PREFACE[:4]:
        raise Refusal("bad_frame", "neither TLS nor a stream's preface")
    if data[:5] != PREFACE:
        raise Refusal("bad_version", f"stream of version {data[4]}, this side speaks {VERSION}")
    return data[5:]


def load_order(load: Load) -> tuple[bool, float, int]:
    """By what relays are ordered, the one to take first: those with free ports, by share of ports given, by streams."""
    ports = load.leases + load.free
    return load.free == 0, load.leases / ports if ports else 1.0, load.streams


def backoff(attempt: int, jitter: float) -> float:
    """Seconds to wait before reconnection `attempt` (0, 1, …): doubles from 1 to 30, of which `jitter` (0..1) halves.

    Agents of a whole site lose a relay at the same moment; the jitter keeps them from coming back at the same moment.
    """
    return float(min(30, 2 ** min(attempt, 5))) * (0.5 + jitter / 2)
