"""The relay's protocol core and its books: every state, every frame, every bound, without a socket."""

import itertools
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.relay import leases, protocol
from pilotbed.relay.leases import LeaseBook, TokenBook
from pilotbed.relay.networks import Networks
from pilotbed.relay.protocol import (
    FRAMES,
    MAX_FRAME,
    TRANSITIONS,
    Connection,
    Decoder,
    Failed,
    Load,
    Open,
    Ping,
    Pong,
    Query,
    Refusal,
    Refused,
    Register,
    Registered,
    Release,
    Side,
    State,
    encode,
)

EXAMPLES = {
    Register: Register(1, ("TUlJ", "QkJC"), "glidein_7", None, ("10.70.0.14/32", "2001:db8::/32")),
    Query: Query(1),
    Load: Load(3, 97, 12),
    Registered: Registered("0123456789abcdef", "relay.grid.test", 41000, 1800000000, 15),
    Refused: Refused("range_exhausted", "all 100 ports 41000-41099 of this relay are taken", True),
    Open: Open(7, "ab" * 32, "10.70.0.15:4711"),
    Failed: Failed(7, "Connection refused"),
    Ping: Ping(),
    Pong: Pong(),
    Release: Release(),
}


def raw(body):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return struct.pack(">I", len(body)) + body


def connection(side, state, now=0.0):
    """A connection led to `state` by legal frames only."""
    made = Connection(side, now)
    steps = {State.GREETING: [], State.DECIDING: [Register], State.SERVING: [Register, Registered],
             State.ASKED: [Query], State.CLOSED: [Register, Refused]}[state]  # fmt: skip
    for kind in steps:
        sender = Side.AGENT if kind in (Register, Query) else Side.RELAY
        if sender is side:
            made.send(EXAMPLES[kind], now)
        else:
            made.receive(encode(EXAMPLES[kind]), now)
    assert made.state is state
    return made


# -- states

@pytest.mark.parametrize(("state", "sender", "kind"), list(itertools.product(State, Side, FRAMES)))
def test_every_frame_in_every_state_from_either_side(state, sender, kind):
    """What the table allows leads to the same state on both sides; all else is refused, or unheard once closed."""
    receiver = Side.RELAY if sender is Side.AGENT else Side.AGENT
    after = TRANSITIONS.get((state, sender, kind))
    speaking, hearing = connection(sender, state), connection(receiver, state)
    if after is not None:
        assert hearing.receive(speaking.send(EXAMPLES[kind], 0), 0) == [EXAMPLES[kind]]
        assert speaking.state is hearing.state is after
        return
    with pytest.raises(Refusal, match="bad_frame"):
        speaking.send(EXAMPLES[kind], 0)
    if state is State.CLOSED:
        assert hearing.receive(encode(EXAMPLES[kind]), 0) == []
    else:
        with pytest.raises(Refusal, match=f"bad_frame: {kind.name} from the {sender.value} while {state.value}"):
            hearing.receive(encode(EXAMPLES[kind]), 0)


def test_nothing_is_read_after_the_last_frame():
    assert not [key for key in TRANSITIONS if key[0] is State.CLOSED]
    relay = connection(Side.RELAY, State.SERVING)
    assert relay.receive(encode(Release()) + encode(Ping()), 0) == [Release()]


# -- timers

def test_agent_pings_and_the_answer_keeps_it_alive():
    agent, relay = connection(Side.AGENT, State.SERVING), connection(Side.RELAY, State.SERVING)
    for now in (15, 30, 45, 60):
        assert agent.due(now - 0.1) == b""
        assert relay.receive(agent.due(now), now) == [Ping()]
        assert agent.receive(relay.send(Pong(), now), now) == [Pong()]
    assert agent.deadline() == 75


@pytest.mark.parametrize(("side", "state", "seconds"), [
    (Side.RELAY, State.GREETING, 10), (Side.AGENT, State.DECIDING, 30), (Side.AGENT, State.ASKED, 3),
    (Side.RELAY, State.SERVING, 45), (Side.AGENT, State.SERVING, 45),
])  # fmt: skip
def test_silence_times_out(side, state, seconds):
    silent = connection(side, state)
    silent.due(seconds - 0.1)
    with pytest.raises(Refusal, match=r"timeout: (agent|relay) silent for"):
        silent.due(seconds)
    assert silent.deadline() <= seconds


@pytest.mark.parametrize(("side", "state"), [(Side.AGENT, State.GREETING), (Side.RELAY, State.ASKED),
                                             (Side.RELAY, State.DECIDING), (Side.RELAY, State.CLOSED),
                                             (Side.AGENT, State.CLOSED)])  # fmt: skip
def test_no_timer_where_it_is_our_turn(side, state):
    assert connection(side, state).deadline() is None
    assert connection(side, state).due(10**9) == b""


def test_relay_chooses_the_heartbeat():
    agent = connection(Side.AGENT, State.DECIDING)
    agent.receive(encode(Registered("0123456789", "h", 41000, 0, 60)), 0)
    assert agent.deadline() == 60


def test_relays_are_ordered_by_load():
    """Share of the ports first, then streams; one without a free port comes last, whatever its size."""
    loads = [Load(0, 10, 5), Load(0, 100, 9), Load(10, 90, 0), Load(2, 8, 0), Load(1, 0, 0), Load(0, 0, 0)]
    found = sorted([*loads[3:], *loads[:3]], key=protocol.load_order)
    assert (found[:4], set(found[4:])) == (loads[:4], set(loads[4:]))


def test_backoff_grows_to_its_bound_and_scatters():
    assert [protocol.backoff(attempt, 1) for attempt in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert protocol.backoff(10**6, 0) == 15


# -- frames

@pytest.mark.parametrize("frame", EXAMPLES.values(), ids=lambda frame: frame.name)
def test_every_frame_is_decoded_as_it_was_encoded(frame):
    assert Decoder().feed(encode(frame)) == [frame]


def test_every_frame_has_an_example():
    assert EXAMPLES.keys() == FRAMES.keys()


@given(st.lists(st.sampled_from(list(EXAMPLES.values())), max_size=8), st.data())
def test_cut_anywhere_the_frames_are_the_same(frames, data):
    wire, decoder, found = b"".join(map(encode, frames)), Decoder(), []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        found += decoder.feed(wire[:size])
        wire = wire[size:]
    assert found == frames


@given(st.binary(max_size=300))
def test_any_bytes_are_frames_or_refused(data):
    try:
        for frame in Decoder().feed(data):
            assert type(frame) in FRAMES
    except Refusal as refusal:
        assert refusal.final


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))


@given(st.sampled_from(list(FRAMES)), st.data())
def test_any_json_in_any_field_is_checked(kind, data):
    """One field of a good frame is replaced; what comes through still passes every check when sent again."""
    good = json.loads(encode(EXAMPLES[kind])[4:])
    key = data.draw(st.sampled_from([*good, "other"]))
    good[key] = data.draw(JSON)
    try:
        (frame,) = Decoder().feed(raw(good))
    except Refusal as refusal:
        assert refusal.code in ("bad_frame", "bad_version")
        assert refusal.reason.isprintable() and len(refusal.reason) < 1000
    else:
        assert Decoder().feed(encode(frame)) == [frame]


@given(st.sampled_from(Side), st.lists(st.sampled_from([*map(encode, EXAMPLES.values()), b"\0\0\0\7{", b"\0\0\1"])
                                       | st.binary(max_size=40) | st.integers(0, 60), max_size=12))  # fmt: skip
def test_any_conversation_keeps_to_the_table_or_is_refused(side, steps):
    """Pieces of wire, and seconds that pass: only what the table allows comes through, and little is held."""
    hearing, state, now = Connection(side, 0), State.GREETING, 0
    other = Side.AGENT if side is Side.RELAY else Side.RELAY
    try:
        for step in steps:
            if isinstance(step, bytes):
                for frame in hearing.receive(step, now):
                    state = TRANSITIONS[state, other, type(frame)]
            else:
                now += step
                hearing.due(now)
            assert hearing.state is state
            assert len(hearing._decoder._buffer) < 4 + MAX_FRAME
    except Refusal as refusal:
        assert refusal.code in ("bad_frame", "bad_version", "timeout")


@pytest.mark.parametrize(("wire", "reason"), [
    (struct.pack(">I", MAX_FRAME + 1), "announces 65537 bytes"),
    (b"GET / HTTP/1.1\r\n\r\n", "announces"),
    (raw(b""), "not JSON"),
    (raw(b"\xff\xfe"), "not JSON"),
    (raw(b"[" * 60000), "not JSON"),
    (raw(b"1" * 5000), "not JSON"),
    (raw([1]), "not an object"),
    (raw({"frame": 1}), "not an object"),
    (raw({"frame": "listen"}), "unknown frame 'listen'"),
    (raw({"frame": "ping", "more": 1}), "ping: missing or unknown: more"),
    (raw({"frame": "failed", "stream": 1}), "failed: missing or unknown: reason"),
    (raw({"frame": "failed", "stream": True, "reason": ""}), "failed: not a number"),
    (raw({"frame": "failed", "stream": 1, "reason": "a\nb"}), "failed: not a text"),
    (raw({"frame": "register", "version": 1, "chain": [], "pilot": "p", "lease": None, "sources": []}),
     "register: not a list of 1 to 16"),
    (raw({"frame": "register", "version": 1, "chain": ["A"], "pilot": "p", "lease": None, "sources": ["10.0.0.1/8"]}),
     "register: 10.0.0.1/8 has host bits set"),
    (raw({"frame": "register", "version": 1, "chain": ["A"], "pilot": "p", "lease": None, "sources": ["::1"] * 33}),
     "register: not a list of 0 to 32"),
])  # fmt: skip
def test_refused_with_a_reason(wire, reason):
    with pytest.raises(Refusal) as caught:
        Decoder().feed(wire)
    assert caught.value.code == "bad_frame"
    assert reason in caught.value.reason


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_versions_are_refused_before_their_fields_are_judged(version):
    with pytest.raises(Refusal, match="bad_version: this side speaks version 1 only"):
        Decoder().feed(raw({"frame": "register", "version": version, "unheard": "of"}))


def test_frames_are_limited_in_length():
    """16 certificates as large as the table allows do not fit: the frame's own limit holds."""
    with pytest.raises(ValueError, match="longer than 65536"):
        encode(Register(1, ("A" * 16384,) * 4, "p", None))
    big = Register(1, ("A" * 16384,) * 3, "p", None)
    assert Decoder().feed(encode(big)) == [big]


def test_preface_gives_its_token_or_is_refused():
    token = bytes(range(32))
    assert protocol.read_preface(protocol.preface(token)) == token
    assert protocol.PREFACE[0] != 0x16
    for data, code in ((b"PBRS\x02" + token, "bad_version"), (b"PBRS\x01", "bad_frame"), (b"x" * 37, "bad_frame")):
        with pytest.raises(Refusal) as caught:
            protocol.read_preface(data)
        assert caught.value.code == code


# -- leases

PILOT, OTHER = "/CN=pilot", "/CN=other"


def book(ports=3, per_dn=10):
    return LeaseBook(range(41000, 41000 + ports), per_dn, grace=300)


def wish(lease=None, sources=()):
    return Register(1, ("AAAA",), "p", lease, sources)


def refused(code, call, *arguments, **named):
    with pytest.raises(Refusal) as caught:
        call(*arguments, **named)
    assert caught.value.code == code


def test_ports_are_given_in_turn_and_reused_last():
    leases = book()
    first, second = (leases.register(wish(), PILOT, "", 1000, 0) for _ in range(2))
    leases.end(first)
    third, fourth = (leases.register(wish(), PILOT, "", 1000, 0) for _ in range(2))
    assert [lease.port for lease in (first, second, third, fourth)] == [41000, 41001, 41002, 41000]
    refused("range_exhausted", leases.register, wish(), PILOT, "", 1000, 0)


def test_unusable_ports_are_passed_over():
    leases = book()
    assert leases.register(wish(), PILOT, "", 1000, 0, {41000, 41001}).port == 41002
    refused("range_exhausted", leases.register, wish(), PILOT, "", 1000, 0, {41000, 41001})


def test_ended_leases_do_not_count_for_the_limit():
    leases = book(per_dn=1)
    leases.end(leases.register(wish(), PILOT, "", 1000, 0))
    leases.register(wish(), PILOT, "", 1000, 0)


def test_leases_are_limited_per_dn():
    leases = book(per_dn=1)
    leases.register(wish(), PILOT, "", 1000, 0)
    refused("too_many_leases", leases.register, wish(), PILOT, "", 1000, 0)
    leases.register(wish(), OTHER, "", 1000, 0)


def test_the_same_lease_again_renews_it():
    leases = book(per_dn=1)
    lease = leases.register(wish(), PILOT, "", 1000, 0)
    leases.agent_lost(lease, 10)
    again = leases.register(wish(lease.id), PILOT, "", 2000, 20)
    assert (again.port, again.expires, again.lost) == (lease.port, 2000, None)
    assert leases.due(1500) == []


def test_a_lease_is_of_its_dn_only():
    leases = book()
    lease = leases.register(wish(), PILOT, "", 1000, 0)
    refused("lease_unknown", leases.register, wish(lease.id), OTHER, "", 1000, 0)
    refused("lease_unknown", leases.register, wish(lease.label), PILOT, "", 1000, 0)
    refused("lease_unknown", leases.register, wish("0" * 32), PILOT, "", 1000, 0)


def test_expired_proxies_open_and_renew_nothing():
    leases = book()
    refused("proxy_expired", leases.register, wish(), PILOT, "", 1000, 1000)
    lease = leases.register(wish(), PILOT, "", 1000, 0)
    refused("lease_unknown", leases.register, wish(lease.id), PILOT, "", 3000, 1000)


def test_leases_are_due_when_the_proxy_or_the_grace_period_ends():
    leases = book()
    short, lost, kept = (leases.register(wish(), PILOT, "", expires, 0) for expires in (100, 1000, 1000))
    leases.agent_lost(lost, 0)
    assert leases.due(99) == []
    assert leases.due(300) == [(short, "proxy_expired"), (lost, "grace")]
    leases.end(short)
    leases.end(short)  # ending twice is no fault
    assert list(leases) == [lost, kept]


def test_restored_as_dumped():
    leases = book()
    lease = leases.register(wish(sources=("10.0.0.0/8",)), PILOT, "/vo/Role=pilot", 1000, 0)
    leases.register(wish(), OTHER, "", 1000, 0)
    leases.register(wish(), PILOT, "", 50, 0)
    again = book()
    again.restore(leases.dump(), 60, lambda lease: lease.dn == PILOT)
    (kept,) = again  # not the other DN's, who may no longer, nor the expired
    assert (kept.id, kept.port, kept.lost) == (lease.id, lease.port, 60)
    assert (kept.fqan, list(kept.sources)) == ("/vo/Role=pilot", ["10.0.0.0/8"])
    assert again.register(wish(lease.id), PILOT, "", 1000, 70).port == lease.port
    assert again.due(361) == []


@pytest.mark.parametrize("state", [None, [], {}, {"format": 2}, {"format": 1}, {"format": 1, "leases": [{}]},
                                   {"format": 1, "leases": [], "last_port": "x"}])  # fmt: skip
def test_damaged_books_are_refused(state):
    with pytest.raises(ValueError, match="lease book"):
        book().restore(json.dumps(state), 0, lambda _: True)


@given(st.data())
def test_a_book_that_was_edited_is_restored_or_refused(data):
    """Whatever stands in the file: the relay says that it is damaged, or can work with what it has read."""
    leases = book()
    leases.register(wish(sources=("10.0.0.0/8",)), PILOT, "/vo/Role=pilot", 1000, 0)
    state = json.loads(leases.dump())
    (entry,) = state["leases"]
    changes = st.dictionaries(st.sampled_from([*sorted(entry), "odd"]), JSON, max_size=2)
    state["leases"] = data.draw(st.lists(changes.map(lambda changed: entry | changed) | JSON, max_size=3))
    state |= data.draw(st.dictionaries(st.sampled_from(sorted(state)), JSON, max_size=1))
    again = book()
    try:
        again.restore(json.dumps(state), 60, lambda lease: lease.dn.startswith("/"))
    except ValueError as error:
        assert "lease book" in str(error)
        return
    for lease in list(again):
        Networks(lease.sources)
        assert int(lease.expires) > 60 and len(lease.label) == 10
    again.due(10**6)
    again.restore(again.dump(), 60, lambda _: True)


@given(st.lists(st.tuples(st.sampled_from("oaeld"), st.integers(0, 5)), max_size=40))
def test_no_port_is_ever_held_twice(steps):
    leases, now = book(ports=4, per_dn=3), 0
    for step, which in steps:
        held = list(leases)
        try:
            if step in "oa":
                leases.register(wish(), PILOT if step == "o" else OTHER, "", now + 100, now)
            elif held and step == "e":
                leases.end(held[which % len(held)])
            elif held and step == "l":
                leases.agent_lost(held[which % len(held)], now)
            elif step == "d":
                now += 60
                for lease, _ in leases.due(now):
                    leases.end(lease)
        except Refusal as refusal:
            assert refusal.code in ("range_exhausted", "too_many_leases")
        ports = [lease.port for lease in leases]
        assert len(ports) == len(set(ports))
        assert all(port in leases.ports for port in ports)
        assert all(sum(lease.dn == dn for lease in leases) <= 3 for dn in (PILOT, OTHER))


# -- tokens

def test_token_works_once_and_expires():
    tokens = TokenBook()
    first, second, third = (tokens.issue(name, 0.0) for name in "abc")
    assert tokens.redeem(first, 1.0) == "a"
    assert tokens.redeem(first, 1.0) is None
    assert tokens.redeem(second, protocol.TOKEN_LIFETIME) is None
    tokens.revoke(third)
    assert tokens.redeem(third, 1.0) is None
    assert tokens.redeem(bytes(32), 1.0) is None
    assert len(tokens) == 0


def test_label_does_not_give_the_lease_away():
    lease = leases.Lease("0123456789abcdef", PILOT, "p", 41000, 0, 1)
    assert lease.label not in lease.id and lease.id not in lease.label
