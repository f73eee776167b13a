"""A relay under attack: everything is refused, counted and logged with its reason, and pilots' traffic goes on.

      pump ──▶ dedicated port ─[ relay ]◀─ agent ──▶ sink        (processes of their own; the relay counts their bytes)
    intruders ──▶ control port ┘   └◀── strangers, on a port that is not for them

What one wrong agent or client is told: test_relay.py. What the protocol makes of any bytes: test_relay_protocol.py.
"""

import base64
import collections
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pki
import pytest
from pilotbed.relay.protocol import (
    MAX_FRAME,
    REFUSALS,
    Failed,
    Open,
    Ping,
    Pong,
    Query,
    Refused,
    Register,
    Registered,
    Release,
    encode,
    preface,
)
from pilotbed.x509 import make_proxy
from relaybed import HOUR, PATIENCE, PILOT, Bed, Scripted, Target, client_tls, echo, eventually, stream

ROLE = "/gridlab/Role=pilot"
RATE = 50_000_000  # bytes a second that the pump offers: half of a gigabit, with the machine far from busy

SINK = """
import socket, threading
def swallow(sock):
    while sock.recv(1 << 20): pass
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True: threading.Thread(target=swallow, args=(listener.accept()[0],)).start()
"""
PUMP = """
import socket, sys, time
sock, rate, piece = socket.create_connection(("127.0.0.1", int(sys.argv[1]))), int(sys.argv[2]), bytes(1 << 18)
due = time.monotonic()
while True:
    sock.sendall(piece)
    due = max(due + len(piece) / rate, time.monotonic() - 0.2)  # what was missed is not made up for
    time.sleep(max(0, due - time.monotonic()))
"""


@pytest.fixture
def bed(tmp_path):
    """A relay that asks for a FQAN, and an agent in front of the sink; `bed.vo` signs attributes."""
    made = Bed(tmp_path)
    made.vo = pki.VomsServer(tmp_path / "vomsdir", made.host)
    made.vo.publish()
    made.config |= {"authorized_dns": [PILOT], "authorized_fqans": [ROLE], "voms_directory": str(made.vo.directory)}
    made.pilots_proxy = tmp_path / "pilot.pem"
    attributed(made).save(made.pilots_proxy)
    yield made
    made.close()


def attributed(bed, fqan=ROLE, **options):
    """The pilot's proxy with an AC."""
    return pki.with_attributes(bed.pilot, bed.vo.attribute_certificate(bed.pilot, fqan, **options))


@pytest.fixture
def traffic(bed):
    """A relay with legitimate traffic; gives the bytes that the relay has carried of it."""
    bed.start_relay()
    with contextlib.ExitStack() as stack:
        def run(script, *arguments):
            command = [sys.executable, "-c", script, *map(str, arguments)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            return process

        sink = int(run(SINK).stdout.readline())
        bed.start_agent(port=sink, proxy=bed.pilots_proxy)
        bed.pump = run(PUMP, bed.registered()["port"], RATE)
        carried = lambda: bed.lease()["bytes_inward"]  # noqa: E731
        eventually(lambda: carried() > RATE / 10)
        yield carried


def goes_on(carried, attack, seconds=PATIENCE):
    """While four run the attack, which ends when its event is set: the relay carries what is offered in a second.

    How long it takes says who else computes here; what an attack gets of the relay: tests/unit/test_relay_throttle.py.
    """
    before, stop = carried(), threading.Event()
    with ThreadPoolExecutor(4) as pool:
        attackers = [pool.submit(attack, stop) for _ in range(4)]
        try:
            eventually(lambda: carried() > before + RATE, seconds)
        finally:
            stop.set()
    for attacker in attackers:
        attacker.result()


def test_traffic_that_does_not_go_on_is_seen(bed, traffic):
    """The control of the other tests: an attack that reaches the agent. What is on its way still arrives."""
    bed.agents[0].popen.send_signal(signal.SIGSTOP)
    eventually(lambda: traffic() == (time.sleep(1), traffic())[1])
    with pytest.raises(AssertionError, match="not in 2 s"):
        goes_on(traffic, threading.Event.wait, 2)
    bed.agents[0].popen.send_signal(signal.SIGCONT)
    goes_on(traffic, threading.Event.wait)


# -- who should not be here

class Intruder:
    """Somebody with a certificate, or without one."""

    def __init__(self, bed, credential=None):
        self.address = ("127.0.0.1", bed.control)
        self.context, self.chain = client_tls(bed, credential, "intruder.pem")

    def send(self, wire):
        """Send bytes; return the code of the relay's refusal, if it came to that, when the relay has hung up."""
        with (
            contextlib.suppress(ssl.SSLError, ConnectionError),
            socket.create_connection(self.address, PATIENCE) as plain,
            self.context.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            sock.sendall(wire)
            return json.loads(b"".join(iter(lambda: sock.recv(65536), b""))[4:])["code"]

    def register(self, chain=None, lease=None):
        return self.send(encode(Register(1, chain or self.chain, "intruder", lease)))


def plain(address, wire=b""):
    """Without TLS: send bytes, wait for the end."""
    try:
        with socket.create_connection(address, PATIENCE) as sock:
            sock.sendall(wire)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
    except TimeoutError:
        raise
    except OSError:  # reset, or no longer connected
        pass


@pytest.fixture
def attempts(bed):
    """Every kind of attempt: name -> (attempt, code by which it is refused, words of the reason)."""
    people = "/DC=test/DC=grid/O=Gridlab/OU=People/CN="
    alice, control = bed.ca.issue(people + "Alice Adams"), ("127.0.0.1", bed.control)
    revoked = bed.ca.issue(PILOT)
    bed.ca.revoke(revoked)
    other = pki.Authority(bed.directory / "other", "/O=Other/CN=CA").issue(PILOT)
    good = bed.vo.attribute_certificate(bed.pilot, ROLE)
    spoilt = pki.with_attributes(bed.pilot, good[:-1] + bytes([good[-1] ^ 1]))
    stolen = pki.with_attributes(bed.pilot, bed.vo.attribute_certificate(alice, ROLE))
    stale = attributed(bed, hours=(-2, -1))
    pilot = Intruder(bed, attributed(bed))
    impostor = Intruder(bed, make_proxy(alice, HOUR))
    registering = {
        "no certificate": (Intruder(bed), "tls", "did not return a certificate"),
        "wrong CA": (Intruder(bed, make_proxy(other, HOUR)), "tls", "unable to get"),
        "expired": (Intruder(bed, pki.proxy(bed.pilot, days=(-0.2, -0.1))), "tls", "certificate has expired"),
        "revoked": (Intruder(bed, make_proxy(revoked, HOUR)), "bad_certificate", "certificate revoked"),
        "a user's": (impostor, "not_authorized", "Alice Adams with any FQAN may not have a port here"),
        "no attributes": (Intruder(bed, make_proxy(bed.pilot, HOUR)), "not_authorized", "with no FQAN"),
        "another role": (Intruder(bed, attributed(bed, "/gridlab/Role=x")), "not_authorized", "Role=x may not"),
        "forged attributes": (Intruder(bed, spoilt), "bad_attributes", "VOMS: bad signature"),
        "another's attributes": (Intruder(bed, stolen), "bad_attributes", "VOMS: attributes of somebody else"),
        "expired attributes": (Intruder(bed, stale), "bad_attributes", "VOMS: attribute certificate expired"),
    }
    return {
        **{name: (who.register, code, words) for name, (who, code, words) in registering.items()},
        "the pilot's chain": (lambda: impostor.register(chain=pilot.chain), "bad_certificate", "does not start with"),
        "guessed lease": (lambda: pilot.register(lease=os.urandom(16).hex()), "lease_unknown", "lease"),
        "guessed token": (lambda: plain(control, preface(os.urandom(32))), "bad_token", "unknown, used or too old"),
        "another protocol": (lambda: plain(control, b"GET / HTTP/1.0\r\n\r\n"), "bad_frame", "neither TLS nor"),
        "another version": (lambda: plain(control, b"PBRS\x02" + bytes(32)), "bad_version", "stream of version 2"),
        "out of turn": (lambda: pilot.send(encode(Ping())), "bad_frame", "ping from the agent while greeting"),
        "no frame": (lambda: pilot.send(b"\xff" * 8), "bad_frame", "a frame announces"),
    }


def logged(bed, code, words):
    """The relay's lines about such a refusal."""
    return [line for line in bed.relay.text().splitlines() if f"event=refused code={code} " in line and words in line]


def test_every_attempt_is_refused_counted_and_logged_while_traffic_goes_on(bed, traffic, attempts):
    """Four at once, as fast as they can."""
    made, turn, lock = collections.Counter(), itertools.count(), threading.Lock()

    def attack(stop):
        while not stop.is_set():
            attempt, code, words = list(attempts.values())[next(turn) % len(attempts)]
            told = attempt()
            with lock:
                made[code, words] += 1
                if told not in (None, code):
                    made["told", told] += 1

    goes_on(traffic, attack)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:  # where the machine was busy, not each has had its turn
        rest = pool.submit(attack, stop)
        try:
            enough = lambda: len(made) >= len(attempts) and min(made.values()) >= 3  # noqa: E731
            eventually(enough, 2 * PATIENCE, evidence=lambda: str(made))
        finally:
            stop.set()
        rest.result()
    assert not [key for key in made if key[0] == "told"]
    assert len(made) == len(attempts), made
    # Who hangs up first may be counted a moment later.
    eventually(lambda: sum(bed.status()["refusals"].values()) >= sum(made.values()), evidence=bed.relay.text)
    for (code, words), count in made.items():
        assert len(logged(bed, code, words)) == count, (code, words, count)
    by_code = collections.Counter()
    for (code, _), count in made.items():
        by_code[code] += count
    assert bed.status()["refusals"] == by_code
    assert [lease["pilot"] for lease in bed.status()["leases"]] == ["agent"]
    assert "event=fault" not in bed.relay.text()


HELLO_SENDER = """
import socket, sys
hello = bytes.fromhex(sys.argv[2])
while True:
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as sock:
        sock.sendall(hello)
        sock.recv(1)
"""


def client_hello():
    """The first flight of a client."""
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def test_traffic_goes_on_beside_a_flood_of_handshakes(bed, traffic):
    """Sixteen who have the relay answer one hello after another; what they get: tests/unit/test_relay_throttle.py."""
    command = [sys.executable, "-c", HELLO_SENDER, str(bed.control), client_hello().hex()]

    def attack(stop):
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.callback(stack.enter_context(subprocess.Popen(command)).kill)
            stop.wait()
            # Who is reset may be noticed within the handshake, or after it.
            eventually(lambda: bed.refused("lost") + bed.refused("tls") >= 16, evidence=bed.relay.text)

    goes_on(traffic, attack)


def test_strangers_on_a_dedicated_port_reach_the_daemon_at_most(bed, traffic):
    """A port that is for others resets them; one for everybody gives them to the daemon, with whatever they say."""
    bed.start_agent(Target(echo), name="guarded", allow=["192.0.2.0/24"], proxy=bed.pilots_proxy)
    bed.start_agent(Target(echo), name="open", proxy=bed.pilots_proxy)
    guarded, made = bed.registered("guarded")["port"], itertools.count()
    lease = bed.registered("open")["lease"]

    def attack(stop):
        while not stop.is_set():
            plain(("127.0.0.1", guarded), b"let me in")
            next(made)
            time.sleep(0.002)

    goes_on(traffic, attack)
    count = next(made)
    eventually(lambda: bed.refused("source_refused") == count)
    assert len(logged(bed, "source_refused", f"port {guarded} is not for 127.0.0.1")) == count
    for wire in (preface(os.urandom(32)), encode(Register(1, ("AAAA",), "stranger", lease)), encode(Release())):
        stranger = bed.connect("open")
        stranger.sendall(wire)
        assert stranger.recv(len(wire), socket.MSG_WAITALL) == wire  # the daemon's echo, not the relay's answer
    assert bed.status()["refusals"] == {"source_refused": count}


def test_replayed_tokens_reach_nobody(bed):
    """While the stream that a token opened is alive, and after its end."""
    bed.start_relay()
    agent = Scripted(bed, attributed(bed))
    lease = agent.register()
    with socket.create_connection((lease.host, lease.port), PATIENCE) as client:
        token = bytes.fromhex(agent.receive().token)
        inner = stream(bed, token)
        inner.sendall(b"first")
        assert client.recv(5) == b"first"
        for _ in range(20):
            plain(("127.0.0.1", bed.control), preface(token) + b"intruder")
        client.sendall(b"question")
        assert inner.recv(100) == b"question"
        inner.sendall(b"answer")
        assert client.recv(100) == b"answer"
    plain(("127.0.0.1", bed.control), preface(token))
    assert eventually(lambda: bed.refused("bad_token") == 21)


# -- who says nothing

def descriptors(process):
    return len(list(Path(f"/proc/{process.popen.pid}/fd").iterdir()))


@pytest.fixture
def own_timeouts(bed):
    """The relay's own: who says nothing is cut off after ten seconds."""
    bed.changes = "pass"


@pytest.fixture
def many_files():
    """This process may have as many open files as it is allowed to at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 6000:
        pytest.skip(f"this process may have {hard} open files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def gets_through(bed):
    """Whether a client reaches the echo; on a busy machine the agent may not come in 10 s, and the client is reset."""
    with bed.connect("echo") as client, contextlib.suppress(ConnectionResetError):
        client.sendall(b"through")
        return client.recv(7) == b"through"
    return False


def test_five_thousand_silent_connections_keep_nobody_out(bed, own_timeouts, traffic, many_files):
    """They neither cost descriptors without bound nor keep anybody else out: the oldest gives way."""
    bed.start_agent(Target(echo), name="echo", proxy=bed.pilots_proxy)
    bed.registered("echo")
    limit, idle, before = 512, descriptors(bed.relay), traffic()
    most = 0
    with contextlib.ExitStack() as stack:
        for number in range(5000):
            silent = stack.enter_context(socket.socket())
            silent.connect(("127.0.0.1", bed.control))
            if number % 100 == 99:
                most = max(most, descriptors(bed.relay))
            # Seldom: more than `limit` come within their timeout, however slow the machine is.
            if number % 1000 == 999:
                for _ in range(10):
                    eventually(lambda: gets_through(bed), evidence=bed.relay.text)
        assert limit * 0.9 < most - idle < limit + 100
        eventually(lambda: traffic() > before + RATE, evidence=bed.relay.text)
        eventually(lambda: bed.refused("overload") + bed.refused("timeout") == 5000, evidence=bed.relay.text)
        assert bed.refused("overload") >= 5 * (1000 - limit)
        assert descriptors(bed.relay) < idle + 100
    assert len(logged(bed, "timeout", "said nothing in time")) == bed.refused("timeout")


# -- who says anything

def mutated(chance, wires):
    """Some frames in any order, with anything done to their bytes."""
    wire = bytearray(b"".join(chance.choices(wires, k=chance.randint(1, 3))))
    for _ in range(chance.choice((0, 1, 1, 2, 8))):
        place, kind = chance.randrange(len(wire)), chance.randrange(4)
        if kind == 0:
            wire[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del wire[place : place + chance.randint(1, 20)]
        elif kind == 2:
            wire[place:place] = chance.randbytes(chance.randint(1, 20))
        else:
            wire[place:] = b""
        wire = wire or bytearray(b"\0")
    return bytes(wire)


def test_any_bytes_get_a_refusal_that_the_protocol_knows(bed):
    """Over TLS from a pilot, and without: everybody gets a refusal that the protocol knows, or what was asked for."""
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    chance = random.Random(seed)
    bed.start_relay()
    bed.start_agent(Target(echo), proxy=bed.pilots_proxy)
    lease = bed.registered()["lease"]
    pilot = Intruder(bed, attributed(bed))
    broken = base64.b64encode(chance.randbytes(900)).decode()
    wires = [encode(frame) for frame in (
        Register(1, pilot.chain, "fuzz", None), Register(1, pilot.chain, "fuzz", os.urandom(16).hex()),
        Register(1, pilot.chain[:1], "fuzz", None), Register(1, (*pilot.chain[:-1], broken), "fuzz", None),
        Query(1), Ping(), Pong(), Release(), Failed(1, "no"), Open(1, "ab" * 32, "x"), Refused("trust", "x", False),
        Registered(lease, "h", 1, 1, 1),
    )]  # fmt: skip
    lengths = (0, 1, 4, MAX_FRAME, MAX_FRAME + 1)
    wires += [length.to_bytes(4, "big") + b"[" * min(length, MAX_FRAME) for length in lengths]

    def over_tls(wire, patience=0.1):
        """The code or the name of the first frame that comes back; "" if the relay hangs up, or waits for more."""
        with (
            contextlib.suppress(ConnectionError, ssl.SSLEOFError, TimeoutError),
            socket.create_connection(pilot.address, PATIENCE) as plain,
            pilot.context.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            sock.sendall(wire)
            sock.settimeout(patience)
            answer = b""
            while len(answer) < 4 or len(answer) < 4 + int.from_bytes(answer[:4], "big"):
                data = sock.recv(65536)
                if not data:
                    return ""
                answer += data
            frame = json.loads(answer[4 : 4 + int.from_bytes(answer[:4], "big")])
            return frame.get("code", frame["frame"])
        return ""

    told = [over_tls(wire, PATIENCE) for wire in wires]
    assert told == ["registered", "lease_unknown", "bad_certificate", "bad_certificate", "load"] + ["bad_frame"] * 12
    with ThreadPoolExecutor(8) as pool:
        told = collections.Counter(pool.map(over_tls, [mutated(chance, wires) for _ in range(400)]))
    assert told.keys() <= {*REFUSALS, "registered", "load", ""}, told
    assert told["bad_frame"] > 50, told
    first = [preface(os.urandom(32)), b"\x16\x03\x01\x02\0\1" + os.urandom(32)]
    for _ in range(400):
        plain(pilot.address, mutated(chance, first))
    with bed.connect() as client:
        client.sendall(b"still there")
        assert client.recv(11) == b"still there"
    assert bed.registered()["lease"] == lease
    assert "event=fault" not in bed.relay.text() and "Traceback" not in bed.relay.text(), bed.relay.text()
