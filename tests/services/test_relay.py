"""The relay as it is run: `pilotbed-relay` and its agent as processes (relaybed.py), evidence from `status`."""

import contextlib
import datetime as dt
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pki
import pytest
from pilotbed.relay.protocol import Refused, Register, Registered, encode
from pilotbed.x509 import make_proxy
from relaybed import (
    FRIEND,
    HOUR,
    PATIENCE,
    PILOT,
    SOURCE,
    Bed,
    Scripted,
    Target,
    client_tls,
    drain,
    echo,
    eventually,
    stream,
)

ROLE = "/gridlab/Role=pilot"


def moved(bed, address):
    """The bed with its relay at another address, as on another host: the dedicated ports are free on the agent's."""
    bed.config |= {"address": address, "public_address": address}
    Target(lambda sock: splice(sock, (address, bed.control)), bed.control)  # by the name that its certificate has
    return bed


@pytest.fixture
def elsewhere(bed):
    return moved(bed, "127.0.0.2")


@pytest.fixture
def other(bed, tmp_path):
    """A second relay under the same CA."""
    (tmp_path / "other").mkdir()
    made = Bed(tmp_path / "other", bed.ca)
    made.config["ports"][1] -= 2
    yield made
    made.close()


# -- bytes

def test_bytes_go_both_ways_at_once_and_are_counted(served):
    data = os.urandom(20_000_000)
    client = served.connect()
    sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
    sender.start()
    assert hashlib.sha256(drain(client)).digest() == hashlib.sha256(data).digest()
    sender.join()
    eventually(lambda: served.lease()["streams"] == 0)
    lease = served.lease()
    assert (lease["bytes_inward"], lease["bytes_outward"], lease["streams_total"]) == (len(data), len(data), 1)


def test_half_close_is_passed_on(bed):
    """The target answers only when it has seen the end of the question."""
    bed.start_relay()
    bed.start_agent(Target(lambda sock: sock.sendall(hashlib.sha256(drain(sock)).hexdigest().encode())))
    bed.registered()
    client = bed.connect()
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert drain(client) == hashlib.sha256(b"question").hexdigest().encode()


def test_target_may_speak_first(bed):
    bed.start_relay()
    bed.start_agent(Target(lambda sock: sock.sendall(b"220 hello\r\n")))
    bed.registered()
    assert drain(bed.connect()) == b"220 hello\r\n"


def test_target_that_does_not_read_stops_the_client(bed):
    """A target that does not read stops the client; nothing grows in between, nothing is lost."""
    read = threading.Event()
    bed.start_relay()
    bed.start_agent(Target(lambda sock: (read.wait(30), sock.sendall(str(len(drain(sock))).encode()))))
    bed.registered()
    before = memory(bed.relay)
    client = bed.connect()
    client.setblocking(False)
    sent, idle_since = 0, time.monotonic()
    while time.monotonic() - idle_since < 0.5:
        try:
            sent += client.send(bytes(1 << 20))
            idle_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
        assert sent < 200_000_000
    assert memory(bed.relay) - before < 20_000
    read.set()
    client.setblocking(True)
    client.shutdown(socket.SHUT_WR)
    assert int(drain(client)) == sent


def memory(process):
    """Resident kB."""
    text = Path(f"/proc/{process.popen.pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


def test_many_streams_are_carried_side_by_side(served):
    clients = [served.connect() for _ in range(50)]
    for number, client in enumerate(clients):
        client.sendall(b"%03d" % number)
    assert [client.recv(3) for client in clients] == [b"%03d" % number for number in range(50)]
    assert served.lease()["streams"] == 50


def test_reset_is_passed_on(bed):
    def abort(sock):
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    bed.start_relay()
    bed.start_agent(Target(abort))
    bed.registered()
    client = bed.connect()
    client.sendall(b"x")
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_client_of_a_daemon_that_does_not_listen_is_reset(bed):
    bed.start_relay()
    deaf = bed.sockets.enter_context(socket.socket())
    deaf.bind(("127.0.0.1", 0))
    bed.start_agent(port=deaf.getsockname()[1])
    bed.registered()
    with pytest.raises(ConnectionResetError):
        bed.connect().recv(1)
    assert "Connection refused" in bed.status()["recent_refusals"][-1]["reason"]
    assert bed.refused("target") == 1


def test_default_target_is_the_dedicated_port_itself(elsewhere):
    """As HTCondor's shared port needs it."""
    elsewhere.start_relay()
    elsewhere.start_agent()
    port = elsewhere.registered()["port"]
    with socket.create_server(("127.0.0.1", port)) as daemon:
        client = elsewhere.connect()
        daemon.settimeout(PATIENCE)
        sock, _ = daemon.accept()
        with sock:
            client.sendall(b"to the daemon")
            assert sock.recv(100) == b"to the daemon"


def test_default_target_that_is_taken_is_passed_over(elsewhere, other):
    """By a daemon, by a connection, or by an agent of another relay's whose daemon has yet to start."""
    first, last = elsewhere.config["ports"]
    moved(other, "127.0.0.3").config["ports"] = [first, last]
    here = ("127.0.0.1", first)
    elsewhere.sockets.enter_context(socket.create_server(here))
    elsewhere.sockets.enter_context(socket.create_connection(here, source_address=("127.0.0.1", first + 1)))
    for bed, found in ((elsewhere, first + 2), (other, first + 3)):
        bed.start_relay()
        agent = bed.start_agent()
        assert bed.registered()["port"] == found
        assert agent.text().count("is in use on this host") == found - first
        assert len(bed.status()["leases"]) == 1


def splice(sock, address):
    def carry(source, sink):
        with contextlib.suppress(OSError):  # the other way has ended by a reset
            for data in iter(lambda: source.recv(65536), b""):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    with socket.create_connection(address) as other:
        back = threading.Thread(target=carry, args=(other, sock))
        back.start()
        carry(sock, other)
        back.join()


# -- who may register

def test_agent_publishes_the_configured_address_for_its_account_only(served):
    published = json.loads(served.state().read_text())
    assert published.keys() == {"host", "port", "lease", "relay"}
    assert published["host"] == served.config["public_address"]
    assert served.config["ports"][0] <= published["port"] <= served.config["ports"][1]
    assert served.state().stat().st_mode & 0o777 == 0o600
    assert served.lease()["dn"] == PILOT


def test_dn_that_is_not_listed_is_refused(bed):
    bed.start_relay()
    alice = bed.ca.issue("/DC=test/DC=grid/O=Gridlab/OU=People/CN=Alice Adams")
    agent = bed.start_agent(proxy=bed.proxy(credential=alice))
    assert agent.exit_code() == 3
    assert "event=refused code=not_authorized" in agent.text()
    assert bed.refused("not_authorized") == 1
    assert bed.status()["leases"] == []


@pytest.fixture
def vo(bed):
    """A relay that asks for a FQAN; `vo(fqan, …)` is a proxy that has it."""
    server = pki.VomsServer(bed.directory / "vomsdir", bed.host)
    server.publish()
    bed.config |= {"authorized_dns": [PILOT], "authorized_fqans": [ROLE], "voms_directory": str(server.directory)}

    def proxy(*fqans, credential=None, name="voms_proxy", **options):
        ac = server.attribute_certificate(credential or bed.pilot, *fqans, **options)
        path = bed.directory / name
        pki.with_attributes(bed.pilot, ac).save(path)
        return path

    return proxy


def test_listed_fqan_gets_a_port(bed, vo):
    bed.start_relay()
    bed.start_agent(Target(echo), proxy=vo("/gridlab/Role=NULL/Capability=NULL", f"{ROLE}/Capability=NULL"))
    bed.registered()
    assert bed.lease()["fqan"] == ROLE
    assert f"fqan={ROLE}" in bed.relay.text().replace('"', "")
    assert works(bed)


def test_other_fqans_or_none_are_refused(bed, vo):
    bed.start_relay()
    assert bed.start_agent(proxy=vo("/gridlab/Role=NULL/Capability=NULL")).exit_code() == 3
    assert "with /gridlab may not have a port" in bed.agents[0].text()
    assert bed.start_agent(proxy=bed.proxy(), name="plain").exit_code() == 3
    assert "with no FQAN may not have a port" in bed.agents[1].text()
    assert bed.refused("not_authorized") == 2


def test_fqan_of_somebody_else_or_forged_is_refused_as_such(bed, vo):
    bed.start_relay()
    friend = bed.ca.issue(FRIEND)
    for name, proxy in (("borrowed", vo(ROLE, credential=friend)), ("forged", vo(ROLE, key=pki.rsa_key()))):
        assert bed.start_agent(proxy=proxy, name=name).exit_code() == 3
    assert bed.refused("bad_attributes") == 2


def short(bed, proxy):
    """Return a lifetime that is over soon, and not before an agent could use it, as another does now by `proxy`."""
    began = time.monotonic()
    bed.start_agent(Target(echo), proxy=proxy, name="other")
    bed.registered("other")
    return dt.timedelta(seconds=3 + 5 * (time.monotonic() - began))


def test_a_lease_ends_with_its_attributes(bed, vo):
    bed.start_relay()
    lifetime = short(bed, vo(ROLE, name="other.pem"))
    ends = time.time() + lifetime.total_seconds()
    agent = bed.start_agent(Target(echo), proxy=vo(ROLE, hours=(0, lifetime / HOUR)))
    assert bed.registered() and ends - 2 < bed.lease()["expires"] < ends + 60
    assert agent.exit_code() == 3
    assert "code=proxy_expired" in agent.text()
    assert bed.lease() is None


def test_a_lease_ends_when_its_holder_or_its_voms_server_is_revoked(bed, vo):
    bed.changes += "; authorization.RECHECK = 0.5"
    bed.config["authorized_hosts"] = [FRIEND]
    friend = bed.ca.issue(FRIEND)
    bed.start_relay()
    proxy = bed.proxy(credential=friend, name="friend")
    agents = {
        "bad_certificate": bed.start_agent(Target(echo), proxy=proxy, name="friend"),
        "bad_attributes": bed.start_agent(Target(echo), proxy=vo(ROLE)),
    }
    bed.registered("friend")
    bed.registered()
    for code, revoked, left in (("bad_certificate", friend, 1), ("bad_attributes", bed.host, 0)):
        bed.ca.revoke(revoked)
        assert agents[code].exit_code() == 3
        assert f"code={code}" in agents[code].text() and "revoked" in agents[code].text()
        assert len(bed.status()["leases"]) == left


def test_listed_fqan_of_a_dn_that_is_not_listed_is_refused(bed, vo):
    bed.config["authorized_dns"] = [FRIEND]
    bed.start_relay()
    assert bed.start_agent(proxy=vo(ROLE)).exit_code() == 3
    assert bed.refused("not_authorized") == 1


def test_fqan_alone_is_enough_where_no_dn_is_asked_for(bed, vo):
    bed.config["authorized_dns"] = []
    bed.start_relay()
    bed.start_agent(Target(echo), proxy=vo(ROLE))
    bed.registered()


def test_hosts_need_no_fqan(bed, vo):
    bed.config["authorized_hosts"] = [FRIEND]
    bed.start_relay()
    bed.start_agent(Target(echo), proxy=bed.proxy(credential=bed.ca.issue(FRIEND)))
    bed.registered()
    assert bed.lease()["fqan"] == ""


@pytest.mark.parametrize("change", [{"authorized_fqans": ["/gridlab/Role=other"]}, {"authorized_dns": [FRIEND]}, {}])
def test_leases_whose_holders_may_no_longer_end_with_the_relay(bed, vo, change):
    bed.start_relay()
    agent = bed.start_agent(Target(echo), proxy=vo(ROLE))
    bed.registered()
    agent.end(signal.SIGKILL)
    bed.relay.end()
    bed.config |= change
    bed.start_relay()
    assert len(bed.status()["leases"]) == (0 if change else 1)


def test_expired_proxy_is_refused(bed):
    bed.start_relay()
    agent = bed.start_agent(proxy=bed.proxy(lifetime=-dt.timedelta(minutes=1)))
    assert agent.exit_code() == 3
    assert "certificate expired" in agent.text()
    assert bed.status()["recent_refusals"][0]["reason"] == "certificate has expired"


def test_certificate_revoked_while_the_relay_runs_is_refused(bed):
    bed.start_relay()
    proxy = bed.proxy()
    bed.ca.revoke(bed.pilot)  # while the relay runs
    agent = bed.start_agent(proxy=proxy)
    assert agent.exit_code() == 3
    assert "certificate revoked" in agent.text()
    assert bed.refused("bad_certificate") == 1


def test_missing_revocation_list_refuses_until_it_is_there(bed):
    bed.start_relay()
    bed.ca.path("r0").unlink()
    agent = bed.start_agent(Target(echo))
    eventually(lambda: bed.refused("trust"), evidence=agent.text)
    assert agent.popen.poll() is None
    bed.ca.publish()
    bed.registered()


def test_certificate_of_an_unknown_ca_is_refused(bed):
    bed.start_relay()
    stranger = pki.Authority(bed.directory / "other", "/O=Other/CN=CA").issue(PILOT)
    agent = bed.start_agent(proxy=bed.proxy(credential=stranger))
    assert agent.exit_code() == 3
    assert bed.refused("tls") == 1


def test_agent_without_a_certificate_is_refused(bed):
    bed.start_relay()
    context, _ = client_tls(bed)
    with socket.create_connection(("127.0.0.1", bed.control)) as plain, pytest.raises(ssl.SSLError, match="required"):
        context.wrap_socket(plain, server_hostname="localhost").recv(1)
    eventually(lambda: bed.refused("tls"))
    assert "did not return a certificate" in bed.status()["recent_refusals"][0]["reason"]


def test_tls_1_2_is_refused(bed):
    bed.start_relay()
    context, _ = client_tls(bed, make_proxy(bed.pilot, HOUR))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", bed.control)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="localhost")


@pytest.mark.parametrize("server", ["127.0.0.1", "localhost"])
def test_agent_refuses_an_impostor(bed, server):
    """Another host's certificate (the address is not in ours), and a revoked one."""
    bed.start_relay()
    proxy = bed.proxy()
    if server == "localhost":
        bed.ca.revoke(bed.host)
    agent = bed.start_agent(proxy=proxy, server=f"{server}:{bed.control}")
    assert agent.exit_code() == 3
    assert ("certificate revoked" if server == "localhost" else "IP address mismatch") in agent.text()


# -- an agent of our own (Scripted), which says what the real one never would

def test_chain_that_tls_did_not_prove_is_refused(bed):
    """TLS proved one certificate; the first frame shows another's."""
    bed.start_relay()
    friend = make_proxy(bed.ca.issue(FRIEND), HOUR)
    borrowed = Scripted(bed).chain
    answer = Scripted(bed, friend).register(chain=borrowed)
    assert (answer.code, answer.final) == ("bad_certificate", True)
    assert "does not start with the certificate of the TLS connection" in answer.reason


@pytest.mark.parametrize(("wire", "code"), [
    (encode(Register(1, ("AAAA",), "p", None)).replace(b'"version":1', b'"version":2'), "bad_version"),
    (b"\0\0\0\x11" + b'{"frame":"bogus"}', "bad_frame"),
    (b"\xff" * 8, "bad_frame"),
    (encode(Refused("trust", "me", False)), "bad_frame"),
])  # fmt: skip
def test_unknown_frames_and_versions_get_a_reason(bed, wire, code):
    bed.start_relay()
    agent = Scripted(bed)
    agent.sock.sendall(wire)
    data = b"".join(iter(lambda: agent.sock.recv(65536), b""))
    assert json.loads(data[4:])["code"] == code
    assert bed.refused(code) == 1


def test_token_works_once(bed):
    bed.start_relay()
    agent = Scripted(bed)
    lease = agent.register()
    assert isinstance(lease, Registered)
    client, token = agent.client(lease)
    first = stream(bed, token)
    first.sendall(b"hello")
    assert client.recv(5) == b"hello"
    with pytest.raises(ConnectionResetError):
        stream(bed, token).recv(1)
    with pytest.raises(ConnectionResetError):
        stream(bed, os.urandom(32)).recv(1)
    assert bed.refused("bad_token") == 2
    client.sendall(b"still there")
    assert first.recv(11) == b"still there"


def test_token_expires_with_its_client(bed):
    bed.start_relay()
    agent = Scripted(bed)
    lease = agent.register()
    client, token = agent.client(lease)
    began = time.monotonic()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert time.monotonic() - began > 9
    with pytest.raises(ConnectionResetError):
        stream(bed, token).recv(1)
    assert (bed.refused("stream_timeout"), bed.refused("bad_token")) == (1, 1)


def test_another_protocol_is_refused(bed):
    bed.start_relay()
    sock = bed.sockets.enter_context(socket.create_connection(("127.0.0.1", bed.control), 10))
    sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(1) == b""
    assert eventually(lambda: bed.refused("bad_frame")) == 1


def test_another_dn_cannot_take_a_lease(served):
    lease = json.loads(served.state().read_text())["lease"]
    friend = make_proxy(served.ca.issue(FRIEND), HOUR)
    assert Scripted(served, friend).register(lease=lease).code == "lease_unknown"
    own = Scripted(served).register(lease=lease)  # control: the same frame from the right DN does
    assert own.port == json.loads(served.state().read_text())["port"]


def test_nothing_secret_is_logged(served):
    client = served.connect()
    client.sendall(b"x")
    client.recv(1)
    client.close()
    agent = Scripted(served)
    lease = agent.register()
    client, token = agent.client(lease)
    client.close()
    assert "event=stream" in eventually(lambda: "event=stream" in served.relay.text() and served.relay.text())
    seen = served.relay.text() + served.agents[0].text() + json.dumps(served.status())
    assert lease.lease not in seen
    assert json.loads(served.state().read_text())["lease"] not in seen
    assert token.hex() not in seen
    assert Path(served.config["state"]).stat().st_mode & 0o777 == 0o600


# -- leases

def works(bed, name="agent", source=None):
    client = bed.connect(name, source)
    client.sendall(b"ping")
    return client.recv(4) == b"ping"


def test_same_port_after_the_agent_was_killed(served):
    before = json.loads(served.state().read_text())
    target = Target(echo)
    served.agents[0].end(signal.SIGKILL)
    eventually(lambda: served.lease()["state"] == "waiting")
    served.start_agent(target)
    assert served.registered() == before
    assert works(served)


def test_same_port_after_the_relay_was_killed(served):
    before = json.loads(served.state().read_text())
    assert works(served)
    served.relay.end(signal.SIGKILL)
    served.start_relay()
    assert served.lease()["state"] in ("waiting", "connected")
    assert served.registered() == before
    assert works(served)


def test_same_port_after_the_relay_was_stopped(served):
    before = json.loads(served.state().read_text())
    assert served.relay.end() == 0
    served.start_relay()
    assert served.registered() == before
    assert "code=stopping" in served.agents[0].text()


def test_client_waits_for_an_agent_that_comes_back(served):
    served.agents[0].end(signal.SIGKILL)
    eventually(lambda: served.lease()["state"] == "waiting")
    client = served.connect()
    client.sendall(b"patience")
    served.start_agent(Target(echo))
    assert client.recv(8) == b"patience"


def test_waiting_client_is_asked_for_again_on_a_new_connection(bed):
    bed.start_relay()
    first = Scripted(bed)
    lease = first.register()
    client, old = first.client(lease)
    second = Scripted(bed)
    assert second.register(lease=lease.lease).port == lease.port
    assert first.receive().code == "superseded"
    again = second.receive()
    with pytest.raises(ConnectionResetError):
        stream(bed, old).recv(1)
    stream(bed, bytes.fromhex(again.token)).sendall(b"here")
    assert client.recv(4) == b"here"


def test_stopped_agent_gives_its_port_back(served):
    port = served.lease()["port"]
    assert served.agents[0].end() == 0
    eventually(lambda: served.lease() is None)
    (ended,) = served.status()["ended_leases"]
    assert (ended["port"], ended["state"]) == (port, "released")
    assert not served.state().exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert json.loads(Path(served.config["state"]).read_text())["leases"] == []


def test_lease_ends_after_the_grace_period_without_an_agent(bed):
    bed.config["grace"] = 1
    bed.start_relay()
    agent = bed.start_agent(Target(echo))
    bed.registered()
    agent.end(signal.SIGKILL)
    eventually(lambda: bed.lease() is None)
    bed.start_agent(Target(echo))  # finds an old state file, is told that the lease has ended, takes a new one
    bed.registered()
    assert bed.refused("lease_unknown") == 1


def test_agent_is_refused_when_the_range_is_exhausted(bed):
    bed.config["ports"] = bed.config["ports"][:1] * 2
    bed.start_relay()
    bed.start_agent(Target(echo), name="first")
    bed.registered("first")
    second = bed.start_agent(Target(echo), name="second")
    assert second.exit_code() == 3
    assert "code=range_exhausted" in second.text()
    assert not bed.state("second").exists()
    assert bed.refused("range_exhausted") == 1


def test_leases_are_limited_per_dn(bed):
    bed.config["leases_per_dn"] = 1
    bed.start_relay()
    bed.start_agent(Target(echo), name="first")
    bed.registered("first")
    assert bed.start_agent(Target(echo), name="second").exit_code() == 3
    assert bed.refused("too_many_leases") == 1
    bed.start_agent(Target(echo), name="third", proxy=bed.proxy(credential=bed.ca.issue(FRIEND), name="friend"))
    bed.registered("third")


def test_port_that_something_else_uses_is_passed_over(bed):
    bed.sockets.enter_context(socket.create_server(("127.0.0.1", bed.config["ports"][0])))
    bed.start_relay()
    bed.start_agent(Target(echo))
    assert bed.registered()["port"] == bed.config["ports"][0] + 1


def test_lease_ends_with_its_proxy(bed):
    bed.start_relay()
    lifetime = short(bed, bed.proxy(name="other.pem"))
    agent = bed.start_agent(Target(echo), proxy=bed.proxy(lifetime))
    bed.registered()
    client = bed.connect()
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    assert agent.exit_code() == 3
    assert "code=proxy_expired" in agent.text()
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""
    assert bed.lease() is None
    assert bed.lease("other")["state"] == "connected"


def test_renewed_proxy_renews_the_lease(bed):
    bed.config["heartbeat"] = 1
    bed.start_relay()
    bed.start_agent(Target(echo), proxy=bed.proxy())
    before = bed.registered()
    expires = bed.lease()["expires"]
    client = bed.connect()
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    bed.proxy(2 * HOUR)
    eventually(lambda: bed.lease()["expires"] > expires + 3000)
    assert bed.registered() == before
    client.sendall(b"y")
    assert client.recv(1) == b"y"


def test_streams_are_limited_per_lease(bed):
    bed.config["streams_per_lease"] = 2
    bed.start_relay()
    bed.start_agent(Target(echo))
    bed.registered()
    held = [bed.connect() for _ in range(2)]
    for client in held:
        client.sendall(b"x")
        client.recv(1)
    with pytest.raises(ConnectionResetError):
        bed.connect().recv(1)
    assert bed.refused("too_many_streams") == 1
    held[0].close()
    eventually(lambda: bed.lease()["streams"] == 1)
    assert works(bed)


def test_streams_are_limited_per_relay(bed):
    bed.config["streams"] = 1
    bed.start_relay()
    for name in ("first", "second"):
        bed.start_agent(Target(echo), name=name)
        bed.registered(name)
    assert works(bed, "first")
    eventually(lambda: bed.status()["streams"] == 1)
    with pytest.raises(ConnectionResetError):
        bed.connect("second").recv(1)
    assert bed.refused("too_many_streams") == 1
    bed.sockets.close()
    eventually(lambda: bed.status()["streams"] == 0)
    assert works(bed, "second")


# -- who may connect to a port

def test_other_sources_are_refused(bed):
    bed.start_relay()
    bed.start_agent(Target(echo), allow=["127.0.0.2", "192.0.2.0/24"])
    bed.registered()
    assert bed.lease()["sources"] == ["127.0.0.2/32", "192.0.2.0/24"]
    with pytest.raises(ConnectionResetError):
        bed.connect().recv(1)
    assert bed.refused("source_refused") == 1
    assert "is not for 127.0.0.1" in bed.relay.text()
    assert works(bed, source="127.0.0.2")


def test_sources_outlive_the_relay(bed):
    bed.start_relay()
    agent = bed.start_agent(Target(echo), allow=["192.0.2.0/24"])
    bed.registered()
    agent.end(signal.SIGKILL)
    bed.relay.end(signal.SIGKILL)
    bed.start_relay()
    with pytest.raises(ConnectionResetError):
        bed.connect().recv(1)
    assert bed.refused("source_refused") == 1


@pytest.mark.parametrize("networks", [["10.0.0.1/8"], ["nonsense"], ["10.0.0.1"] * 33])
def test_bad_sources_are_a_usage_error(bed, networks):
    agent = bed.start_agent(allow=networks)
    assert agent.exit_code() == 2
    assert "--allow" in agent.text()


# -- several relays

def test_the_relay_with_the_least_to_do_is_taken(bed, other):
    bed.start_relay()
    other.start_relay()
    for number in range(4):
        bed.start_agent(Target(echo), name=f"agent{number}", others=[other])
        eventually(lambda name=f"agent{number}": bed.lease(name) or other.lease(name), evidence=bed.agents[-1].text)
    # Shares of five and three ports: 0/5 = 0/3, then the other one's is free, then 1/5 < 1/3, then 1/3 < 2/5.
    assert sorted(len(each.status()["leases"]) for each in (bed, other)) == [2, 2]
    assert "event=load" in bed.agents[0].text()


def test_agent_takes_the_next_relay_when_the_best_refuses(bed, other):
    bed.config["authorized_dns"] = [FRIEND]
    bed.start_relay()
    other.start_relay()
    bed.start_agent(Target(echo), name="busy", server=f"localhost:{other.control}")
    eventually(lambda: other.lease("busy"))  # so that the one that refuses is asked first
    agent = bed.start_agent(Target(echo), others=[other])
    eventually(lambda: other.lease("agent"), evidence=agent.text)
    assert bed.refused("not_authorized") == 1


def test_agent_takes_the_next_relay_when_one_is_down_or_full(bed, other):
    other.config["ports"] = other.config["ports"][:1] * 2
    other.start_relay()
    first = bed.start_agent(Target(echo), name="first", others=[other])  # this bed's own relay does not run
    eventually(lambda: other.lease("first"), evidence=first.text)
    assert "event=load_unknown" in first.text()
    bed.start_relay()
    second = bed.start_agent(Target(echo), name="second", others=[other])
    eventually(lambda: bed.lease("second"), evidence=second.text)


def test_agent_ends_when_all_relays_refuse(bed, other):
    for each in (bed, other):
        each.config["authorized_dns"] = [FRIEND]
        each.start_relay()
    assert bed.start_agent(Target(echo), others=[other]).exit_code() == 3
    assert (bed.refused("not_authorized"), other.refused("not_authorized")) == (1, 1)


def test_agent_stays_with_the_relay_that_it_published(bed, other):
    """When that relay is gone it waits for it: the daemon's address is of no use elsewhere."""
    bed.start_relay()
    agent = bed.start_agent(Target(echo), others=[other])
    before = bed.registered()
    other.start_relay()
    bed.relay.end(signal.SIGKILL)
    eventually(lambda: "event=relay_lost" in agent.text())
    agent.end(signal.SIGKILL)
    bed.start_relay()
    bed.start_agent(Target(echo), others=[other])
    assert bed.registered() == before
    assert other.status()["leases"] == []


# -- the pilot

def set_up_traversal(bed, **values):
    """The pilot's script as the start-up runs it; returns its result and the configuration that it made."""
    startup = SOURCE / "glidein" / "glidein_startup.sh"
    own, _, helpers = startup.read_text().partition("\ngconfig_get() {")
    helpers = "gconfig_get() {" + helpers.partition("\n# --- the end")[0]
    warn = next(line for line in own.splitlines() if line.startswith("warn() "))
    (bed.directory / "helpers").write_text(f"{warn}\n{helpers}\n")
    (bed.directory / "say").write_text("#!/bin/sh\necho \"$@\"\n")
    (bed.directory / "say").chmod(0o755)
    config, local = bed.directory / "glidein_config", bed.directory / "local"
    local.mkdir()
    given = {
        "ADD_CONFIG_LINE_SOURCE": bed.directory / "helpers", "ERROR_GEN_PATH": bed.directory / "say",
        "GLIDEIN_LOCAL_DIR": local, "RELAY_AGENT": bed.directory / "agent.pyz",
        "X509_USER_PROXY": bed.proxy(), "X509_CERT_DIR": bed.ca.directory, "GLIDEIN_Pilot_Name": "pilot", **values,
    }  # fmt: skip
    config.write_text("".join(f"{name} {value}\n" for name, value in given.items()))
    script = SOURCE / "glidein" / "files" / "traversal_setup.sh"
    done = subprocess.run(["bash", script, config], capture_output=True, text=True, check=False, timeout=60)
    made = dict(line.split(" ", 1) for line in config.read_text().splitlines())
    if "RELAY_AGENT_PID" in made:
        bed.sockets.callback(os.kill, int(made["RELAY_AGENT_PID"]), signal.SIGTERM)
    return done, made


def test_pilot_takes_a_port_for_its_submit_hosts_only(elsewhere, other):
    elsewhere.start_relay()
    servers = f"localhost:{other.control}, localhost:{elsewhere.control}"  # the first one does not run
    done, made = set_up_traversal(
        elsewhere, GLIDEIN_Traversal="relay", GLIDEIN_Relay_Server=servers, GLIDEIN_Relay_Sources="127.0.0.1"
    )
    assert done.returncode == 0, done
    lease = elsewhere.lease("pilot")
    assert lease["sources"] == ["127.0.0.1/32"]
    assert made["GLIDEIN_Relay_Address"] == f"127.0.0.2:{lease['port']}"
    assert (made["SHARED_PORT_PORT"], made["TCP_FORWARDING_HOST"]) == (str(lease["port"]), "127.0.0.2")


def test_pilot_starts_a_killed_agent_again_with_the_same_port(elsewhere):
    """As when a node short of memory kills it: HTCondor has published the port."""
    elsewhere.start_relay()
    servers = f"localhost:{elsewhere.control}"
    _, made = set_up_traversal(elsewhere, GLIDEIN_Traversal="relay", GLIDEIN_Relay_Server=servers)
    before = eventually(lambda: (found := elsewhere.lease("pilot"))["state"] == "connected" and found)

    def agents():
        found = subprocess.run(["pgrep", "-P", made["RELAY_AGENT_PID"]], capture_output=True, text=True, check=False)
        return found.stdout.split()

    killed = agents()
    os.kill(int(killed[0]), signal.SIGKILL)
    eventually(lambda: agents() not in ([], killed))

    def again():
        """The lease, but for where its agent is, once that is another one."""
        now = elsewhere.lease("pilot")
        return now["state"] == "connected" and now["agent"] != before["agent"] and {**now, "agent": None}

    assert eventually(again) == {**before, "agent": None}
    os.kill(int(made["RELAY_AGENT_PID"]), signal.SIGTERM)
    eventually(lambda: elsewhere.lease("pilot") is None)


@pytest.mark.parametrize("ways", ["relay,ccb", "relay"])
def test_pilot_takes_the_broker_when_the_range_is_exhausted_where_its_entry_allows_it(bed, ways):
    bed.config["ports"] = bed.config["ports"][:1] * 2
    bed.start_relay()
    bed.start_agent(Target(echo), name="first")
    bed.registered("first")
    done, made = set_up_traversal(bed, GLIDEIN_Traversal=ways, GLIDEIN_Relay_Server=f"localhost:{bed.control}")
    if ways == "relay":
        assert (done.returncode, "-error" in done.stdout, "code=range_exhausted" in done.stdout) == (1, True, True)
    else:
        assert (done.returncode, made["GLIDEIN_Traversal"]) == (0, "ccb")
        assert "code=range_exhausted" in done.stderr
    assert "TCP_FORWARDING_HOST" not in made


# -- running it

@pytest.mark.parametrize(("change", "words"), [
    ({"colour": "red"}, "unknown key colour"),
    ({"ports": [41000]}, "not a range"),
    ({"ports": [1, 2]}, "not a range"),
    ({"port": "x"}, "'x' must be int"),
    ({"grace": -1}, "grace = -1 must not be negative"),
    ({"authorized_dns": ["CN=pilot,O=x"]}, "slash form"),
    ({"authorized_hosts": ["/CN=host/a.test"]}, r"authorized_hosts: '/CN=host/a.test' is /CN=host\/a.test in"),
    ({"authorized_dns": []}, "one has to be there, or nobody may"),
    ({"key": "/nowhere"}, "No such file"),
])  # fmt: skip
def test_bad_configuration_is_named(bed, change, words):
    bed.config |= change
    with pytest.raises(AssertionError, match="pilotbed-relay: "):
        bed.start_relay()
    assert words in bed.relay.text()
    assert bed.relay.exit_code() == 1


def test_damaged_state_is_not_overwritten(bed):
    state = Path(bed.config["state"])
    state.write_text("{")
    with pytest.raises(AssertionError, match="repair it, or remove it"):
        bed.start_relay()
    assert state.read_text() == "{"


def test_status_command_prints_the_leases_or_says_that_nothing_runs(served):
    command = [sys.executable, "-m", "pilotbed.relay.server", "status", "--config", served.directory / "relay.toml"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parent)}
    asked = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(asked.stdout)["leases"][0]["pilot"] == "agent"
    served.relay.end()
    asked = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (asked.returncode, "does the service run?" in asked.stderr) == (1, True)


def test_metrics_show_leases_streams_and_refusals(bed):
    pytest.importorskip("prometheus_client")
    bed.config["metrics_port"] = bed.metrics
    bed.start_relay()
    bed.start_agent(Target(echo))
    bed.registered()
    assert works(bed)
    with urllib.request.urlopen(f"http://127.0.0.1:{bed.metrics}/metrics") as answer:
        text = answer.read().decode()
    assert 'pilotbed_relay_leases{state="connected"} 1.0' in text
    assert "pilotbed_relay_streams_total 1.0" in text
    assert 'pilotbed_relay_refusals_total{code="not_authorized"} 0.0' in text
