"""Streams that outlive the relay's process: the manager of these tests does what systemd does (relaybed.Manager)."""

import contextlib
import resource
import signal
import socket
import threading
import time

import pytest
from pilotbed.relay.sockets import reset
from relaybed import PATIENCE, Manager, Target, drain, echo, eventually

BLOCK, BLOCKS = 1 << 20, 64  # bytes, and how many of them


LINES = b"".join(b"%05d of block #### of ******..\n" % line for line in range(BLOCK // 32))


def block(side, number):
    """Every line of it tells where it belongs, so that what is lost, repeated or mixed up can be told apart."""
    return LINES.replace(b"####", b"%04d" % number).replace(b"******", side.encode())


@pytest.fixture
def kept(bed):
    """A bed whose relay has its long streams kept."""
    bed.manager = Manager(bed.directory)
    return bed


def said(sock, data):
    """What comes back for some bytes."""
    sock.sendall(data)
    return taken(sock, len(data))


def taken(sock, count):
    """The next bytes of a stream, so many."""
    found = bytearray()
    while len(found) < count:
        part = sock.recv(count - len(found))
        assert part, "the stream ended"
        found += part
    return found


def is_kept(bed, streams=1):
    eventually(lambda: len(bed.manager.kept) == 6 * streams, evidence=bed.relay.text)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "restarted"])
def test_stream_goes_on_after_the_relay(kept, end):
    kept.start_relay()
    kept.start_agent(Target(echo))
    kept.registered()
    client = kept.connect()
    assert said(client, b"before") == b"before"
    is_kept(kept)
    kept.relay.end(end)
    client.sendall(b"mean")  # the kernel takes it
    kept.start_relay()
    assert client.recv(4) == b"mean"
    assert said(client, b"after") == b"after"
    assert kept.status()["streams"] == 1
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    eventually(lambda: kept.manager.kept == [], evidence=kept.relay.text)
    assert kept.status()["streams"] == 0


def test_control_without_a_manager_the_stream_ends_with_the_relay(bed):
    bed.start_relay()
    bed.start_agent(Target(echo))
    bed.registered()
    client = bed.connect()
    assert said(client, b"before") == b"before"
    bed.relay.end(signal.SIGKILL)
    with pytest.raises((ConnectionResetError, AssertionError)):
        said(client, b"after")


@contextlib.contextmanager
def no_more_descriptors(process):
    """It has all it had, and nothing new."""
    pid, kind = process.popen.pid, resource.RLIMIT_NOFILE
    limits = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (3, limits[1]))
    yield
    resource.prlimit(pid, kind, limits)


def test_streams_go_on_when_descriptors_run_out(kept):
    """Slow readers hold more than the relay has pipes for; their streams are kept once there are descriptors again."""
    kept.start_relay()
    kept.start_agent(Target(echo))
    kept.registered()
    clients = [kept.connect() for _ in range(4)]
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        assert said(client, b"before") == b"before"
    many = LINES * 16
    with no_more_descriptors(kept.relay):
        for client in clients:
            client.sendall(many)
        time.sleep(2.2)  # by now they would be kept
        for client in clients:
            assert taken(client, len(many)) == many
    is_kept(kept, 4)
    for client in clients:
        assert said(client, many) == many


def test_short_streams_are_not_stored(kept):
    """Handing a stream over costs more than most of them need in all."""
    kept.start_relay()
    kept.start_agent(Target(echo))
    kept.registered()
    with kept.connect() as client:
        assert said(client, b"short") == b"short"
    eventually(lambda: kept.status()["streams"] == 0)
    assert kept.manager.kept == []


def test_no_more_streams_are_stored_than_there_is_room_for(bed):
    bed.manager = Manager(bed.directory, room=2 * 6 + 5)
    bed.start_relay()
    bed.start_agent(Target(echo))
    bed.registered()
    clients = [bed.connect() for _ in range(3)]
    assert [said(client, b"x") for client in clients] == [b"x"] * 3
    is_kept(bed, 2)
    clients[0].close()
    clients[1].close()
    clients[2].close()
    eventually(lambda: bed.manager.kept == [])
    again = bed.connect()
    assert said(again, b"y") == b"y"
    is_kept(bed, 1)


def test_nothing_is_lost_or_repeated_when_killed_in_mid_transfer(kept):
    """Again and again, in both directions at once, while neither side reads as fast as the other writes."""
    kept.start_relay()
    gate = threading.Event()
    wrong = {}

    def send(sock, side):
        for number in range(BLOCKS):
            sock.sendall(block(side, number))
            gate.wait()
        sock.shutdown(socket.SHUT_WR)

    def receive(sock, side):
        """Tell for what another side has sent where it first differs, "" if it does not."""
        wrong[side] = f"nothing has come to the end of what the {side} sent"
        for number in range(BLOCKS):
            expected, found = block(side, number), b""
            while len(found) < BLOCK and (part := sock.recv(BLOCK - len(found))):
                found += part
            if found != expected:
                pairs = zip(found, expected, strict=False)
                at = next((at for at, (one, other) in enumerate(pairs) if one != other), len(found))
                wrong[side] = f"block {number} of the {side}: {len(found)} bytes, from {at} on {found[at:][:48]!r}"
                return
        wrong[side] = "more than was sent" if sock.recv(1) else ""

    def swap(sock):
        """A daemon that sends as much as it is sent, at the same time."""
        sender = threading.Thread(target=send, args=(sock, "daemon"))
        sender.start()
        receive(sock, "client")
        sender.join()

    kept.start_agent(Target(swap))
    kept.registered()
    client = kept.connect()
    client.settimeout(PATIENCE)
    sender = threading.Thread(target=send, args=(client, "client"))
    sender.start()
    is_kept(kept)  # until then each side has sent one block
    gate.set()
    reader = threading.Thread(target=receive, args=(client, "daemon"))
    reader.start()
    for _ in range(4):
        before = kept.status()["bytes_inward"]
        eventually(lambda before=before: kept.status()["bytes_inward"] > before or not reader.is_alive())
        kept.relay.end(signal.SIGKILL)
        kept.start_relay()
    reader.join(PATIENCE)
    sender.join(PATIENCE)
    eventually(lambda: "nothing" not in wrong.get("client", "nothing"), evidence=lambda: wrong)
    assert wrong == {"client": "", "daemon": ""}


def test_nothing_is_lost_when_killed_after_both_sides_have_ended(kept):
    """The daemon ended first and has yet to read; the client's connection is over (TIME_WAIT) but for what it sent."""
    reads, received = threading.Event(), []

    def behave(sock):
        sock.sendall(sock.recv(3))
        sock.shutdown(socket.SHUT_WR)
        reads.wait()
        received.append(len(drain(sock)))

    kept.start_relay()
    kept.start_agent(Target(behave))
    kept.registered()
    client = kept.connect()
    is_kept(kept)
    client.sendall(b"end")
    assert drain(client) == b"end"
    sent = 3
    while kept.status()["bytes_inward"] == sent:  # until the way to the daemon is full, and the relay holds something
        client.sendall(block("client", 0))
        sent += BLOCK
        with contextlib.suppress(AssertionError):
            eventually(lambda: kept.status()["bytes_inward"] == sent, 1)  # noqa: B023
    client.shutdown(socket.SHUT_WR)
    kept.relay.end(signal.SIGKILL)
    kept.start_relay()
    reads.set()
    eventually(lambda: received, evidence=kept.relay.text)
    assert received == [sent - 3]
    eventually(lambda: kept.manager.kept == [], evidence=kept.relay.text)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "restarted"])
def test_stream_of_a_lease_that_has_ended_is_reset(kept, end):
    kept.start_relay()
    agent = kept.start_agent(Target(echo))
    kept.registered()
    client = kept.connect()
    assert said(client, b"before") == b"before"
    is_kept(kept)
    kept.relay.end(end)
    agent.end(signal.SIGKILL)
    (kept.directory / "leases.json").unlink()
    kept.start_relay()
    eventually(lambda: kept.manager.kept == [])
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_stream_whose_client_closed_meanwhile_ends(kept):
    kept.start_relay()
    ended = []
    kept.start_agent(Target(lambda sock: ended.append(drain(sock))))
    kept.registered()
    client = kept.connect()
    client.sendall(b"all")
    is_kept(kept)
    kept.relay.end(signal.SIGKILL)
    client.close()
    kept.start_relay()
    eventually(lambda: ended == [b"all"], evidence=kept.relay.text)
    eventually(lambda: kept.manager.kept == [])


def test_stream_whose_client_was_reset_meanwhile_is_reset(kept):
    kept.start_relay()
    ended = []

    def behave(sock):
        with pytest.raises(ConnectionResetError):
            drain(sock)
        ended.append("reset")

    kept.start_agent(Target(behave))
    kept.registered()
    client = kept.connect()
    client.sendall(b"some")
    is_kept(kept)
    kept.relay.end(signal.SIGKILL)
    reset(client)
    kept.start_relay()
    eventually(lambda: ended, evidence=kept.relay.text)
    eventually(lambda: kept.manager.kept == [])
