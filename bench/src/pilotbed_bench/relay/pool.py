"""The part of `bench_relay` that only HTCondor can play: its own ways through a firewall, beside the relay under it.

The pool is the smallest that has them: a collector (which is the broker, CCB) on `relay`, and a schedd a way on
`worker`. A client asks a schedd for no jobs, each time over a new connection in the same security session; for bulk it
fetches a file by condor_fetchlog, encrypted and integrity-checked like all that HTCondor sends.

CCB has the target connect back to the client. With CCB streaming, which a client that cannot be connected to asks for
(TOOLS_ASSUME_FIREWALLS without a shared port), all bytes pass the collector.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from . import ways

COLLECTOR = "relay.bench.test:9618"
FILE_BYTES = 512 << 20
#: Which schedd, and which client's configuration.
WAYS = {"direct": ("direct", "client"), "CCB": ("ccb", "client"), "CCB streaming": ("ccb", "firewalled"),
        "relay": ("relay", "client")}  # fmt: skip

_COMMON = """\
RELEASE_DIR = /usr
LIBEXEC = /usr/libexec/condor
SBIN = /usr/sbin
BIN = /usr/bin
LIB = /usr/lib/condor
LOG = $(LOCAL_DIR)/log
SPOOL = $(LOCAL_DIR)/spool
EXECUTE = $(LOCAL_DIR)/execute
RUN = $(LOCAL_DIR)/run
LOCK = $(LOCAL_DIR)/lock
COLLECTOR_HOST = {collector}
UID_DOMAIN = bench.test
ENABLE_IPV6 = false
USE_SHARED_PORT = false
BENCH_LOG = {directory}/file
# No process a query: what is measured is the connection.
SCHEDD_QUERY_WORKERS = 0
# As in the testbed's pool: who is who by certificate, and every connection encrypted and protected.
SEC_DEFAULT_AUTHENTICATION = REQUIRED
SEC_DEFAULT_INTEGRITY = REQUIRED
SEC_DEFAULT_ENCRYPTION = REQUIRED
SEC_DEFAULT_AUTHENTICATION_METHODS = SSL
SEC_CLIENT_AUTHENTICATION_METHODS = SSL
AUTH_SSL_SERVER_CADIR = {trust}
AUTH_SSL_CLIENT_CADIR = {trust}
AUTH_SSL_SERVER_USE_DEFAULT_CAS = false
AUTH_SSL_CLIENT_USE_DEFAULT_CAS = false
AUTH_SSL_SERVER_CERTFILE = {host}
AUTH_SSL_SERVER_KEYFILE = {host}
AUTH_SSL_CLIENT_CERTFILE = {host}
AUTH_SSL_CLIENT_KEYFILE = {host}
AUTH_SSL_REQUIRE_CLIENT_CERTIFICATE = true
AUTH_SSL_REQUIRE_CLIENT_MAPPING = true
# One certificate does for all three machines, by whatever address they are reached.
SSL_SKIP_HOST_CHECK = true
COLLECTOR_BOOTSTRAP_SSL_CERTIFICATE = false
CERTIFICATE_MAPFILE = {directory}/mapfile
CERTIFICATE_MAPFILE_ASSUME_HASH_KEYS = true
ALLOW_READ = condor@bench.test
ALLOW_WRITE = condor@bench.test
ALLOW_DAEMON = condor@bench.test
ALLOW_ADMINISTRATOR = condor@bench.test
ALLOW_ADVERTISE_MASTER = condor@bench.test
ALLOW_ADVERTISE_SCHEDD = condor@bench.test
"""
_BEHIND_CCB = {"CCB_ADDRESS": COLLECTOR, "PRIVATE_NETWORK_NAME": "worker", "CCB_RECONNECT_TIME": "1"}


class Pool:
    """A collector and a schedd a way; a context in which they run."""

    def __init__(self, trust: ways.Trust):
        self.trust = trust
        self.directory = ways.WORK / "condor"
        self.running = contextlib.ExitStack()

    def __enter__(self) -> Pool:
        self.directory.mkdir()
        (self.directory / "mapfile").write_text("SSL /.*/ condor\n")
        with open(self.directory / "file", "wb") as file:
            file.truncate(FILE_BYTES)
        with contextlib.ExitStack() as starting:
            starting.callback(self.running.close)
            self.configure("client", "client")
            self.configure("firewalled", "client", TOOLS_ASSUME_FIREWALLS="true")
            self.configure("broker", "relay")
            self.daemon("broker", "relay", "condor_collector", "-p", 9618)
            relay = self.running.enter_context(ways.Relay(self.trust))
            port = relay.agent("schedd")
            self.configure("direct", "worker", SCHEDD_NAME="direct@bench")
            self.configure("ccb", "worker", SCHEDD_NAME="ccb@bench", **_BEHIND_CCB)
            self.configure("relay", "worker", SCHEDD_NAME="relay@bench", TCP_FORWARDING_HOST=ways.ADDRESSES["relay"])
            self.daemon("direct", "worker", "condor_schedd")
            self.daemon("ccb", "worker", "condor_schedd")
            self.daemon("relay", "worker", "condor_schedd", "-p", port)
            starting.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.running.close()

    def configure(self, name: str, machine: str, **settings: str) -> None:
        """Write a configuration and make its directories."""
        local = self.directory / name
        for part in ("log", "spool", "execute", "run", "lock"):
            (local / part).mkdir(parents=True)
            shutil.chown(local / part, "condor", "condor")
        mine: Mapping[str, object] = {"LOCAL_DIR": local, "NETWORK_INTERFACE": ways.ADDRESSES[machine], **settings}
        common = _COMMON.format(
            collector=COLLECTOR, directory=self.directory, trust=self.trust.directory, host=self.trust.host
        )
        text = common + "".join(f"{key} = {value}\n" for key, value in mine.items())
        (self.directory / f"{name}.conf").write_text(text)

    def command(self, configuration: str, *command: object) -> list[str]:
        """Return a command that runs with a configuration."""
        return ["env", f"CONDOR_CONFIG={self.directory}/{configuration}.conf", *map(str, command)]

    def daemon(self, name: str, machine: str, *command: object) -> ways.Process:
        """Start a daemon in the foreground; it ends with the pool."""
        return self.running.enter_context(ways.Process(machine, f"condor-{name}", *self.command(name, *command, "-f")))

    def queries(self, way: str, workers: int, seconds: float) -> dict[str, float]:
        """Ask a way's schedd over and over; see `load.queries`."""
        schedd, configuration = WAYS[way]
        asked = ("queries", COLLECTOR, f"{schedd}@bench", workers, seconds)
        before = ways.cpu("relay")
        answer = ways.load(*asked, environment=self.command(configuration))
        return {**answer, "relay_cpu_ms": 1e3 * (ways.cpu("relay") - before) / answer["count"]}

    def fetch(self, way: str) -> dict[str, float]:
        """Fetch the file once by a way.

        Raises:
            ways.BenchError: not all of it came.
        """
        schedd, configuration = WAYS[way]
        command = self.command(configuration, "condor_fetchlog", "-schedd", f"{schedd}@bench", "BENCH")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        relay, worker, began = ways.cpu("relay"), ways.cpu("worker"), time.monotonic()
        with open(ways.WORK / "fetched", "w+b") as out:
            done = subprocess.run(
                [*ways.entered("client"), "sh", "-c", '"$@" | wc -c', "sh", *command],
                stdout=out, stderr=subprocess.PIPE, timeout=ways.DEADLINE, check=False,
            )  # fmt: skip
        seconds, relay, worker = time.monotonic() - began, ways.cpu("relay") - relay, ways.cpu("worker") - worker
        if (got := (ways.WORK / "fetched").read_text().strip()) != str(FILE_BYTES):
            raise ways.BenchError(f"{way}: condor_fetchlog brought {got} of {FILE_BYTES} bytes: {done.stderr.decode()}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        client = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        gigabytes = FILE_BYTES / 1e9
        return {
            "gb_per_s": gigabytes / seconds,
            "relay_cpu_s_per_gb": relay / gigabytes,
            "cpu_s_per_gb": (relay + worker + client) / gigabytes,
        }

    def log(self, way: str) -> str:
        """Return what broker and schedd say of CCB, the end of it."""
        logs = (self.directory / "broker/log/CollectorLog", self.directory / f"{WAYS[way][0]}/log/SchedLog")
        lines = [f"{path.name}: {line}" for path in logs for line in path.read_text().splitlines() if "CCB" in line]
        return "\n".join(lines[-30:])

    def streamed(self) -> int:
        """Return how many connections the broker says it has streamed."""
        asked = self.command("client", "condor_status", "-collector", "-af", "CCBStreamingSessions")
        command = [*ways.entered("client"), *asked]
        done = subprocess.run(command, capture_output=True, text=True, timeout=ways.DEADLINE, check=False)
        return int(done.stdout) if done.stdout.strip().isdigit() else 0


def measure(trust: ways.Trust) -> dict[str, list[dict[str, Any]]]:
    """Return the samples of every way.

    Raises:
        ways.BenchError: something does not answer, or what should be streamed is not.
    """
    samples: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with Pool(trust) as pool:
        for way in WAYS:
            ways.until(lambda way=way: _answers(pool, way), f"the schedd behind {way} answers")  # type: ignore[misc]
        before = pool.streamed()
        for number in range(ways.ROUNDS):
            began = time.monotonic()
            for way, got in samples.items():
                got.append(_sample(pool, way))
            ways.say(f"HTCondor, round {number + 1}: {time.monotonic() - began:.1f} s")
        ways.until(lambda: pool.streamed() > before, "the broker says that it streamed")
        return samples


def _sample(pool: Pool, way: str) -> dict[str, Any]:
    """Return one sample, and how many before it failed.

    Under eight clients the broker may lose the daemon behind it, on a quick machine more often than not ("CCB: failed
    to forward request"), and refuses all with "no daemon is currently registered with that id" until the daemon
    registers anew, CCB_RECONNECT_TIME later.
    """
    for failures in range(6):
        try:
            return {
                "fetch": pool.fetch(way),
                "one": pool.queries(way, 1, ways.SECONDS),
                "many": pool.queries(way, ways.WORKERS, ways.SECONDS),
                "failures": failures,
            }
        except ways.BenchError as error:
            ways.say(f"{way} failed: {error}\n{pool.log(way)}")
            ways.until(lambda: _answers(pool, way), f"the schedd behind {way} answers again")
    raise ways.BenchError(f"{way} failed six times; the reasons stand above")


def _answers(pool: Pool, way: str) -> bool:
    with contextlib.suppress(ways.BenchError):
        return pool.queries(way, 1, 0)["count"] > 0
    return False
