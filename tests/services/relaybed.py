"""A relay with everything around it, as processes, for the tests of this directory.

      client ──▶ dedicated port ─[ relay ]◀─ control (TLS) ─[ agent ]──▶ target (a daemon, played by the test)
                                          ◀─ one stream a client ─
"""

import base64
import contextlib
import datetime as dt
import fcntl
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pilotbed
import pki
from cryptography.hazmat.primitives import serialization
from pilotbed.relay.protocol import Connection, Open, Register, Side, preface
from pilotbed.relay.zipapp import agent_zipapp
from pilotbed.x509 import make_proxy

PILOT = "/DC=test/DC=grid/O=Gridlab/OU=Services/CN=pilot"
FRIEND = "/DC=test/DC=grid/O=Gridlab/OU=Services/CN=friend"
HOUR = dt.timedelta(hours=1)
SOURCE = Path(pilotbed.__path__[0])
#: Seconds that anything may take here: how fast it is, is said elsewhere (bench/). On a machine that was busy with two
#: labs a relay and its agent took twelve to start.
PATIENCE = 90
#: The relay's, too: on a busy machine an agent or an attempt would end by its own ten seconds.
PATIENT = ("from pilotbed.relay import greetings, registrar; "
           f"greetings.GREETING_TIMEOUT = registrar.HANDSHAKE_TIMEOUT = {PATIENCE}")  # fmt: skip


def eventually(check, seconds=PATIENCE, evidence=lambda: ""):
    """The first true value of `check`; fails with `evidence` after `seconds`."""
    until = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < until, f"not in {seconds} s\n{evidence()}"
        time.sleep(0.02)
    return value


_reserved = []


def free_ports(count):
    """Adjacent ports that nobody uses, below those that the kernel gives to clients; others at each call.

    They are this process's until it ends, also while nobody listens at them: two processes of the tests that saw the
    same ones free took both ("Address already in use" from a relay that started). Names of the abstract namespace say
    so: they are the network namespace's, as ports are, and go with their process.
    """
    for first in range(20000, 32000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0pilotbed-tests-port-{port}")
                socket.create_server(("127.0.0.1", port)).close()
            _reserved.append(stack.pop_all())
            return list(range(first, first + count))
    raise AssertionError("no free ports")


class Process:
    """A program with its log in a file; `descriptors` and `environment` are its own, too."""

    def __init__(self, log, *command, descriptors=(), environment=None):
        self.log = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                [sys.executable, *map(str, command)], stdout=file, stderr=file,
                pass_fds=descriptors, env=os.environ | (environment or {}),
            )  # fmt: skip

    def text(self):
        return self.log.read_text()

    def end(self, number=signal.SIGTERM):
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(PATIENCE)

    def exit_code(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.popen.wait(PATIENCE)
        raise AssertionError(f"still running\n{self.text()}")


class Manager:
    """Does for a relay what systemd does: keeps its descriptors, and gives them to the next process.

    See sd_pid_notify_with_fds(3), sd_listen_fds_with_names(3), FileDescriptorStoreMax= in systemd.service(5).
    """

    #: Run in the relay's process first: the descriptors that were passed become 3, 4, …
    RECEIVE = (
        "import os; given = [int(word) for word in os.environ.pop('GIVEN').split()];"
        "[(os.dup2(each, 3 + number), os.close(each)) for number, each in enumerate(given)];"
        "os.environ['LISTEN_PID'] = str(os.getpid());"
    )

    def __init__(self, directory, room=600):
        self.path, self.room, self.kept = directory / "notify.sock", room, []
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(self.path))
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self):
        with contextlib.suppress(OSError):
            while True:
                data, descriptors, _, _ = socket.recv_fds(self.sock, 4096, 253)
                said = dict(line.split("=", 1) for line in data.decode().splitlines())
                if "FDSTORE" in said:
                    self.kept += [(said["FDNAME"], fcntl.fcntl(each, fcntl.F_DUPFD, 100)) for each in descriptors]
                elif "FDSTOREREMOVE" in said:
                    gone = [entry for entry in self.kept if entry[0] == said["FDNAME"]]
                    self.kept = [entry for entry in self.kept if entry not in gone]
                    descriptors = [each for _, each in gone]
                for each in descriptors:
                    os.close(each)

    def gives(self):
        """What Process needs for the next relay."""
        names, descriptors = zip(*reversed(self.kept), strict=True) if self.kept else ((), ())
        environment = {
            "NOTIFY_SOCKET": str(self.path), "FDSTORE": str(self.room), "GIVEN": " ".join(map(str, descriptors)),
        }  # fmt: skip
        if names:
            environment |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
        return {"descriptors": descriptors, "environment": environment}

    def close(self):
        self.sock.close()
        for _, descriptor in self.kept:
            os.close(descriptor)


class Bed:
    """A relay with everything around it; `config` may be changed before `start_relay`; `ca`: of another bed."""

    def __init__(self, directory, ca=None):
        self.directory = directory
        self.ca = ca or pki.Authority(directory / "certificates")
        self.pilot = self.ca.issue(PILOT)
        self.host = self.ca.issue("/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=localhost", host="localhost")
        self.host.save(directory / "host.pem")
        control, metrics, *dedicated = free_ports(7)
        self.control, self.metrics = control, metrics
        self.config = {
            "address": "127.0.0.1", "port": control, "public_address": "127.0.0.1",
            "ports": [dedicated[0], dedicated[-1]], "metrics_port": 0,
            "certificate": str(directory / "host.pem"), "key": str(directory / "host.pem"),
            "ca_directory": str(self.ca.directory), "authorized_dns": [PILOT, FRIEND],
            "state": str(directory / "leases.json"), "status_socket": str(directory / "status.sock"),
        }  # fmt: skip
        self.changes = PATIENT  # to the relay's constants, as `authorization.RECHECK = 1`
        self.agents = []
        self.relay = None
        self.manager = None
        self.sockets = contextlib.ExitStack()
        # What the pilot stages; it runs without site-packages (-S), so standard library only.
        (directory / "agent.pyz").write_bytes(agent_zipapp())

    def start_relay(self):
        # JSON's texts, numbers and lists are TOML's too.
        file = self.directory / "relay.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in self.config.items()))
        launch, given = (self.manager.RECEIVE, self.manager.gives()) if self.manager else ("", {})
        launch += f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r});"
        launch += f"from pilotbed.relay import authorization, server; {self.changes}; sys.exit(server.main())"
        self.relay = Process(self.directory / "relay.log", "-c", launch, "--config", file, **given)
        eventually(lambda: self.relay.popen.poll() is not None or self.status(), evidence=self.relay.text)
        assert self.relay.popen.poll() is None, self.relay.text()

    def status(self):
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(self.config["status_socket"])
            except OSError:
                return None
            return json.loads(b"".join(iter(lambda: sock.recv(65536), b"")))

    def proxy(self, lifetime=HOUR, credential=None, name="proxy"):
        path = self.directory / name
        make_proxy(credential or self.pilot, lifetime).save(path)
        return path

    def start_agent(self, target=None, proxy=None, name="agent", server=None, port=None, others=(), allow=()):
        """`others`: beds whose relays it may choose, too."""
        servers = [server or f"localhost:{self.control}", *(f"localhost:{other.control}" for other in others)]
        arguments = [word for each in servers for word in ("--server", each)]
        arguments += [word for each in allow for word in ("--allow", each)]
        arguments += ["--proxy", proxy or self.proxy(), "--cadir", self.ca.directory, "--state", self.state(name),
                      "--pilot", name]  # fmt: skip
        if target or port:
            arguments += ["--target", f"127.0.0.1:{port or target.port}"]
        agent = Process(self.directory / f"{name}.log", "-I", "-S", self.directory / "agent.pyz", *arguments)
        self.agents.append(agent)
        return agent

    def state(self, name="agent"):
        return self.directory / f"{name}.json"

    def registered(self, name="agent"):
        """The state file, once the relay says that this agent is connected."""
        def logs():
            return "\n".join(file.read_text() for file in self.directory.glob("*.log"))
        eventually(lambda: (self.lease(name) or {}).get("state") == "connected", evidence=logs)
        return json.loads(eventually(lambda: self.state(name).exists() and self.state(name).read_text()))

    def lease(self, name="agent"):
        status = self.status()
        return next((lease for lease in (status or {}).get("leases", []) if lease["pilot"] == name), None)

    def connect(self, name="agent", source=None):
        published = json.loads(self.state(name).read_text())
        address, local = (published["host"], published["port"]), (source, 0) if source else None
        return self.sockets.enter_context(socket.create_connection(address, PATIENCE, local))

    def refused(self, code):
        return ((self.status() or {}).get("refusals") or {}).get(code, 0)

    def close(self):
        self.sockets.close()
        for process in [*self.agents, *filter(None, [self.relay])]:
            process.end(signal.SIGKILL)
        if self.manager:
            self.manager.close()


class Target:
    """A daemon: every connection is served by `behave(sock)` in a thread."""

    def __init__(self, behave, port=0):
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.behave = behave
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with sock, contextlib.suppress(OSError):
            self.behave(sock)


def echo(sock):
    while data := sock.recv(65536):
        sock.sendall(data)


def drain(sock):
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


def client_tls(bed, credential=None, name="client.pem"):
    """TLS to the relay, with a credential or without, and the credential's chain as `register` has it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(capath=bed.ca.directory)
    if credential is None:
        return context, ("AAAA",)
    credential.save(bed.directory / name)
    context.load_cert_chain(bed.directory / name)
    certificates = (each.public_bytes(serialization.Encoding.DER) for each in credential.chain.certificates)
    return context, tuple(base64.b64encode(each).decode() for each in certificates)


class Scripted:
    """An agent's control connection, step by step."""

    def __init__(self, bed, credential=None):
        self.bed = bed
        context, self.chain = client_tls(bed, credential or make_proxy(bed.pilot, HOUR), "scripted.pem")
        plain = socket.create_connection(("127.0.0.1", bed.control), PATIENCE)
        self.sock = bed.sockets.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
        self.connection = Connection(Side.AGENT, 0)
        self.frames = []

    def send(self, frame):
        self.sock.sendall(self.connection.send(frame, 0))

    def receive(self):
        while not self.frames:
            data = self.sock.recv(65536)
            assert data, "the relay hung up"
            self.frames += self.connection.receive(data, 0)
        return self.frames.pop(0)

    def register(self, chain=None, lease=None):
        self.send(Register(1, chain or self.chain, "scripted", lease))
        return self.receive()

    def client(self, lease):
        """A client of the lease's port, and the token by which the relay asks for it."""
        sock = self.bed.sockets.enter_context(socket.create_connection((lease.host, lease.port), PATIENCE))
        asked = self.receive()
        assert isinstance(asked, Open)
        return sock, bytes.fromhex(asked.token)


def stream(bed, token):
    sock = bed.sockets.enter_context(socket.create_connection(("127.0.0.1", bed.control), PATIENCE))
    sock.sendall(preface(token))
    return sock
