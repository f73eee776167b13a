"""The inner half of `bench_relay`: three machines on one switch, and the ways from one to the other, measured in turn.

::

    client 10.99.0.1 ──┐
    relay  10.99.0.2 ──┼── switch ── (this process, 10.99.0.254, which only gives orders)
    worker 10.99.0.3 ──┘

Runs in namespaces of its own (see `bench_relay.enclosed`): what it makes ends with it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pilotbed.ca.authority import Authority, parse_dn
from pilotbed.x509 import Chain, Credential, make_proxy, name_hash

ADDRESSES = {"client": "10.99.0.1", "relay": "10.99.0.2", "worker": "10.99.0.3"}
HERE = "10.99.0.254"
RELAY = "relay.bench.test"
SERVICE_PORT = 5001
WAY_PORT = 6001
CONTROL_PORT = 9700
DEDICATED = (20000, 23999)
WORK = Path("/run/bench")
LOAD = (sys.executable, "-m", "pilotbed_bench.relay.load")
DEADLINE = 90.0  # seconds for anything to start or to answer; a daemon that CCB lost comes back after 60

ROUNDS = 5
SECONDS = 1.0  # of one measurement of throughput or of connections
STREAMS = 8
ECHOES = 1000
WORKERS = 8
IDLE_STREAMS = 200
IDLE_AGENTS = {"ssh -R": 10, "relay": 100}
LEVELS = (100, 500, 2000)
STREAMS_PER_AGENT = 5
PROBES = 1000  # 0.4 CPU-s at the relay: the kernel tells hundredths


class BenchError(Exception):
    """Something did not start or answer; the message has the log."""


# -- machines


def make_machines() -> None:
    """Make the switch and the three network namespaces.

    Raises:
        subprocess.CalledProcessError: iproute2 refuses.
    """
    lines = ["link set lo up", "link add switch type bridge", f"addr add {HERE}/24 dev switch", "link set switch up"]
    for name in ADDRESSES:
        lines += [f"netns add {name}", f"link add {name} type veth peer name eth0 netns {name}",
                  f"link set {name} master switch up"]  # fmt: skip
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)
    for name, address in ADDRESSES.items():
        inside = ["link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up"]
        subprocess.run(["ip", "-n", name, "-batch", "-"], input="\n".join(inside), text=True, check=True)
        # A second's connections must not end at the ports that the last second's left in TIME_WAIT.
        command = [*entered(name), "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1", "net.core.somaxconn=8192"]
        subprocess.run(command, check=True)
    with open("/etc/hosts", "a") as hosts:
        hosts.write("".join(f"{address} {name}.bench.test\n" for name, address in ADDRESSES.items()))


def entered(machine: str) -> list[str]:
    """Return the start of a command that runs on ``machine``."""
    return ["nsenter", f"--net=/run/netns/{machine}", "--"]


def cpu_of(stat: str) -> float:
    """Return the CPU-seconds of a process and of its children that have ended, from its /proc/PID/stat (proc(5))."""
    fields = stat.rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def _processes(machine: str) -> Iterator[Path]:
    wanted = Path(f"/run/netns/{machine}").stat().st_ino
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (path / "ns/net").stat().st_ino == wanted:
                yield path


def cpu(machine: str) -> float:
    """Return the CPU-seconds that the processes of ``machine`` have used so far."""
    total = 0.0
    for path in _processes(machine):
        with contextlib.suppress(OSError):
            total += cpu_of((path / "stat").read_text())
    return total


def memory(machine: str) -> int:
    """Return the anonymous memory of the processes of ``machine`` in kB, what a fork shares counted once.

    Program text is not in it: how much of that is one's own share changes with every other process.
    """
    total = 0
    for path in _processes(machine):
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss_Anon:\s*(\d+)", (path / "smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total


class Process:
    """A program on a machine, its log in a file; a context that ends it.

    Args:
        machine: where.
        name: of the log.
        command: the program.
        talks: whether it takes orders on stdin and answers on stdout, a JSON line each.
    """

    def __init__(self, machine: str, name: str, *command: object, talks: bool = False):
        self.log = WORK / f"{name}.log"
        pipe = subprocess.PIPE if talks else None
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*entered(machine), *map(str, command)], stdin=pipe or subprocess.DEVNULL, stdout=pipe or log,
                stderr=log, text=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(5)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        for pipe in filter(None, (self.popen.stdin, self.popen.stdout)):
            pipe.close()

    def ask(self, order: object) -> Any:
        """Give an order and return the answer.

        Raises:
            BenchError: it ended instead.
        """
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.write(json.dumps(order) + "\n")
            self.popen.stdin.flush()
        answer = self.popen.stdout.readline()
        if not answer:
            raise BenchError(f"{self.log.name} ended:\n{self.tail()}")
        return json.loads(answer)

    def tail(self) -> str:
        """Return the end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def until(check: Callable[[], Any], what: str, *processes: Process) -> Any:
    """Return the first true value of ``check``.

    Raises:
        BenchError: there is none within the deadline, or one of ``processes`` ended.
    """
    end = time.monotonic() + DEADLINE
    while not (value := check()):
        if time.monotonic() > end or any(process.popen.poll() is not None for process in processes):
            logs = "\n".join(f"-- {process.log.name}:\n{process.tail()}" for process in processes)
            raise BenchError(f"{what}: not within {DEADLINE:.0f} s\n{logs}")
        time.sleep(0.02)
    return value


def echoes(port: int, host: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 2) as sock:
        sock.sendall(b"Ex")
        return sock.recv(1) == b"x"
    return False


def load(*arguments: object, environment: Sequence[str] = ()) -> dict[str, float]:
    """Run a client of the load program on `client`; return what it printed. ``environment``: env(1), its assignments.

    Raises:
        BenchError: it failed.
    """
    command = [*entered("client"), *environment, *LOAD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(map(str, arguments))}: {done.stderr[-2000:]}")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


# -- who is who


class Trust:
    """A CA of the bench's own: the relay's host certificate, a pilot's proxy, the directory that both sides trust."""

    PILOT = "/DC=test/DC=bench/CN=pilot"

    def __init__(self, directory: Path):
        authority = Authority(directory / "ca")
        authority.create("/DC=test/DC=bench/CN=Bench CA")
        pem = authority.certificate_path.read_bytes()
        self.directory = directory / "certificates"
        self.directory.mkdir()
        hashed = name_hash(x509.load_pem_x509_certificate(pem).subject)
        (self.directory / f"{hashed}.0").write_bytes(pem)
        (self.directory / f"{hashed}.r0").write_bytes(authority.crl(1))
        self._authority = authority
        self.host = directory / "host.pem"
        self.issue(f"/DC=test/DC=bench/CN={RELAY}", "host").save(self.host)
        self.proxy = directory / "proxy.pem"
        make_proxy(self.issue(self.PILOT, "service"), dt.timedelta(hours=2)).save(self.proxy)

    def issue(self, dn: str, kind: str) -> Credential:
        """Return a new end entity."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        request = x509.CertificateSigningRequestBuilder().subject_name(parse_dn(dn)).sign(key, hashes.SHA256())
        signed = self._authority.sign(request.public_bytes(serialization.Encoding.PEM), dn, kind)
        return Credential(Chain((x509.load_pem_x509_certificate(signed),)), key)


# -- ways


class Way:
    """A way from client to service; a context in which it stands.

    Attributes:
        name: of the way.
        host, port: where the client connects.
    """

    name: str
    host, port = ADDRESSES["relay"], WAY_PORT

    def __init__(self, trust: Trust):
        self.trust = trust
        self.running = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as starting:
            starting.callback(self.running.close)
            processes = self.start()
            until(lambda: echoes(self.port, self.host), f"{self.name} carries an echo", *processes)
            starting.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.running.close()

    def run(self, machine: str, name: str, *command: object, talks: bool = False) -> Process:
        """Start a program that ends with the way."""
        return self.running.enter_context(Process(machine, name, *command, talks=talks))

    def start(self) -> list[Process]:
        """Start what the way needs, and return it."""
        raise NotImplementedError

    def more_agents(self, count: int) -> None:
        """Have ``count`` more agents, which idle."""
        raise NotImplementedError


class Direct(Way):
    """The client connects to the service itself."""

    name = "direct"
    host, port = ADDRESSES["worker"], SERVICE_PORT

    def start(self) -> list[Process]:
        return []


class Haproxy(Way):
    """haproxy at the relay, TCP mode, splicing, as many threads as it likes; it can reach the worker."""

    name = "haproxy"

    def start(self) -> list[Process]:
        return [self.haproxy("relay", f"{ADDRESSES['worker']}:{SERVICE_PORT}")]

    def haproxy(self, machine: str, target: str) -> Process:
        """Start one on a machine, in front of ``target``."""
        config = WORK / f"haproxy-{machine}.cfg"
        config.write_text(
            "global\n  maxconn 4000\n"
            "defaults\n  mode tcp\n  option splice-auto\n"
            "  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n"
            f"listen way\n  bind {ADDRESSES[machine]}:{self.port}\n  server next {target}\n"
        )
        return self.run(machine, f"haproxy-{machine}", "haproxy", "-db", "-f", config)


class TwoHops(Haproxy):
    """One haproxy at the relay and one in the agent's place: what a reversed connection has to pay at least."""

    name = "haproxy, two hops"

    def start(self) -> list[Process]:
        inner = self.haproxy("worker", f"127.0.0.1:{SERVICE_PORT}")
        return [self.haproxy("relay", f"{ADDRESSES['worker']}:{self.port}"), inner]


class Socat(Way):
    """socat at the relay, a process a connection; it can reach the worker."""

    name = "socat"

    def start(self) -> list[Process]:
        listen = f"TCP-LISTEN:{self.port},fork,reuseaddr,nodelay,backlog=1024"
        target = f"TCP:{ADDRESSES['worker']}:{SERVICE_PORT},nodelay"
        return [self.run("relay", "socat", "socat", "-b", 262144, listen, target)]


class SshR(Way):
    """`ssh -R` from the worker, which cannot be reached, to an sshd at the relay."""

    name = "ssh -R"

    def start(self) -> list[Process]:
        directory = WORK / "ssh"
        if not directory.exists():
            directory.mkdir()
            for key in ("host", "user"):
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
            Path("/run/sshd").mkdir(exist_ok=True)
        config = directory / "sshd_config"
        config.write_text(
            f"ListenAddress {self.host}\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nGatewayPorts clientspecified\n"
            "MaxStartups 100\n"
        )
        server = self.run("relay", "sshd", "/usr/sbin/sshd", "-D", "-e", "-f", config)
        until(lambda: _listens(22, self.host), "sshd listens", server)
        return [server, self._ssh(self.port)]

    def _ssh(self, port: int) -> Process:
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ExitOnForwardFailure=yes")
        return self.run(
            "worker", "ssh", "ssh", "-N", "-i", WORK / "ssh/user", *(f"-o{option}" for option in options),
            "-R", f"{self.host}:{port}:127.0.0.1:{SERVICE_PORT}", f"root@{self.host}",
        )  # fmt: skip

    def more_agents(self, count: int) -> None:
        for port in range(self.port + 1, self.port + 1 + count):
            process = self._ssh(port)
            until(lambda port=port: _listens(port, self.host), "ssh -R listens", process)  # type: ignore[misc]


def _listens(port: int, host: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 2):
        return True
    return False


class Relay(Way):
    """`pilotbed-relay`, and `pilotbed-relay-agent` at the worker, which cannot be reached."""

    name = "relay"

    def start(self) -> list[Process]:
        state = Path(self.running.enter_context(tempfile.TemporaryDirectory(dir=WORK)))
        config = {
            "address": self.host, "port": CONTROL_PORT, "public_address": self.host, "ports": list(DEDICATED),
            "metrics_port": 0, "certificate": str(self.trust.host), "key": str(self.trust.host),
            "ca_directory": str(self.trust.directory), "authorized_dns": [Trust.PILOT],
            "state": str(state / "leases.json"), "status_socket": str(state / "status.sock"),
            "leases_per_dn": DEDICATED[1] - DEDICATED[0] + 1, "streams_per_lease": 1000,
        }  # fmt: skip
        file = state / "relay.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
        self.server = self.run("relay", "relay", sys.executable, "-m", "pilotbed.relay.server", "--config", file)
        until(lambda: _listens(CONTROL_PORT, self.host), "the relay listens", self.server)
        self.state = state
        self.port = self.agent("agent", *self.target)
        return [self.server]

    target = ("--target", f"127.0.0.1:{SERVICE_PORT}")

    def agent(self, name: str, *target: str) -> int:
        """Start an agent; return its dedicated port, which without ``target`` is the one that it connects to, too."""
        published = self.state / f"{name}.json"
        program = (sys.executable, "-m", "pilotbed.relay.agent")
        process = self.run("worker", name, *program, *self.arguments(), *target, "--state", published)
        return int(json.loads(until(lambda: published.exists() and published.read_text(), name, process))["port"])

    def arguments(self) -> list[str]:
        """Return what every agent's command line has."""
        return ["--server", f"{RELAY}:{CONTROL_PORT}", "--proxy", str(self.trust.proxy),
                "--cadir", str(self.trust.directory)]  # fmt: skip

    def swarm(self) -> Process:
        """Return a process that is many agents; see `load.agents`."""
        directory = self.state / "agents"
        directory.mkdir()
        return self.run("worker", "agents", *LOAD, "agents", directory, 32, *self.arguments(), *self.target, talks=True)

    def more_agents(self, count: int) -> None:
        self.swarm().ask(count)


WAYS: tuple[type[Way], ...] = (Direct, Haproxy, TwoHops, Socat, SshR, Relay)


# -- measurements


def measure(way: Way) -> dict[str, Any]:
    """Return one sample of everything, of a way that stands and has carried nothing yet."""
    sample: dict[str, Any] = {}
    if way.name != "direct":
        sample["idle_stream_kb"] = _idle_streams(way)
    if way.name in IDLE_AGENTS:
        before = memory("relay")
        way.more_agents(IDLE_AGENTS[way.name])
        sample["idle_agent_kb"] = (memory("relay") - before) / IDLE_AGENTS[way.name]
    for streams in (1, STREAMS):
        for direction in ("up", "down"):
            sample[f"{direction}_{streams}"] = _transfer(way, direction, streams)
    sample["echo"] = load("echo", way.host, way.port, ECHOES)
    before_cpu = cpu("relay")
    sample["connections"] = load("connections", way.host, way.port, WORKERS, SECONDS)
    sample["connections"]["relay_cpu_ms"] = 1e3 * (cpu("relay") - before_cpu) / sample["connections"]["count"]
    return sample


def _transfer(way: Way, direction: str, streams: int) -> dict[str, float]:
    relay, worker = cpu("relay"), cpu("worker")
    moved = load(direction, way.host, way.port, streams, SECONDS)
    relay, worker = cpu("relay") - relay, cpu("worker") - worker
    gigabytes = moved["bytes"] / 1e9
    return {
        "gb_per_s": gigabytes / moved["seconds"],
        "relay_cpu_s_per_gb": relay / gigabytes,
        "cpu_s_per_gb": (relay + worker + moved["cpu"]) / gigabytes,
    }


def _idle_streams(way: Way) -> float:
    with Process("client", "hold", *LOAD, "hold", talks=True) as holder:
        before = memory("relay")
        holder.ask({"host": way.host, "ports": [way.port], "each": IDLE_STREAMS, "keep": True})
        return (memory("relay") - before) / IDLE_STREAMS


def descriptors_allowed() -> int:
    """Raise the limit of open files as far as possible; return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # not every container's root may
        resource.setrlimit(resource.RLIMIT_NOFILE, (100_000, max(hard, 100_000)))
        return 100_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def streams_each(agents: int, descriptors: int) -> int:
    """Return how many streams each of ``agents`` gets: five, or what the relay's open files allow.

    An agent takes a listening and a control socket, a stream two sockets.
    """
    return max(0, min(STREAMS_PER_AGENT, (descriptors - 500 - 2 * agents) // (2 * agents)))


def grow(trust: Trust, descriptors: int) -> list[dict[str, float]]:
    """Have ever more agents, each with its streams; return the relay's cost at each level."""
    levels = []
    with Relay(trust) as way, way.swarm() as swarm, Process("client", "hold", *LOAD, "hold", talks=True) as holder:
        known: list[int] = []
        for level in LEVELS:
            began, before, used = time.monotonic(), memory("relay"), cpu("relay")
            ready = swarm.ask(level)
            fresh = ready["ports"][len(known) :]
            agents_kb, agents_cpu = memory("relay") - before, cpu("relay") - used
            before, used = memory("relay"), cpu("relay")
            each = streams_each(LEVELS[-1], descriptors)
            filled = holder.ask({"host": way.host, "ports": fresh, "each": each, "keep": True})
            streams_kb, streams_cpu = memory("relay") - before, cpu("relay") - used
            known = ready["ports"]
            probes = []
            for _ in range(ROUNDS):
                used = cpu("relay")
                ports = known[:: max(1, len(known) // PROBES)][:PROBES]
                order = {"host": way.host, "ports": ports, "each": PROBES // len(ports), "keep": False}
                probe = holder.ask(order)
                probe["relay_cpu_ms"] = 1e3 * (cpu("relay") - used) / probe["opened"]
                probes.append(probe)
            levels.append({
                "agents": level,
                "streams": level * each,
                "registrations_per_s": len(fresh) / ready["seconds"],
                "registration_relay_cpu_ms": 1e3 * agents_cpu / len(fresh),
                "agent_kb": agents_kb / len(fresh),
                "stream_kb": streams_kb / filled["opened"],
                "stream_relay_cpu_ms": 1e3 * streams_cpu / filled["opened"],
                "relay_mb": memory("relay") / 1024,
                "probes": probes,
            })  # fmt: skip
            say(f"{level} agents: {time.monotonic() - began:.1f} s")
    return levels


def say(text: str) -> None:
    """Report progress."""
    print(f"  {text}", file=sys.stderr, flush=True)
