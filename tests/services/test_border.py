"""The relay in border mode behind a real redirect: a sealed node, the border, the world, each a network namespace.

    node 192.0.2.2 ── 192.0.2.1 border 198.51.100.1 ── 198.51.100.2 world
                      redirects all TCP, forwards nothing
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pilotbed
import pytest
from pilotbed.relay.border import Border, Config, Rule
from pilotbed.settings import SettingsError, load
from relaybed import Process, eventually

SOURCE = Path(pilotbed.__path__[0])
NAMESPACES = {name: f"pbtest-{name}" for name in ("node", "border", "world")}
WIRES = """
link add eth0 netns pbtest-node type veth peer name inside netns pbtest-border
link add eth0 netns pbtest-world type veth peer name outside netns pbtest-border
-n pbtest-node addr add 192.0.2.2/24 dev eth0
-n pbtest-border addr add 192.0.2.1/24 dev inside
-n pbtest-border addr add 198.51.100.1/24 dev outside
-n pbtest-world addr add 198.51.100.2/24 dev eth0
-n pbtest-node link set eth0 up
-n pbtest-border link set inside up
-n pbtest-border link set outside up
-n pbtest-border link set lo up
-n pbtest-world link set eth0 up
-n pbtest-node route add default via 192.0.2.1
"""
REDIRECT = """
table inet site {
    chain out { type nat hook prerouting priority dstnat; iifname "inside" ip daddr != 192.0.2.0/24 meta l4proto tcp \
redirect to :9710; }
    chain through { type filter hook forward priority filter; policy drop; }
}
"""
#: Echoes in capitals; at the end of what came in it says how much that was, and ends, too.
SERVER = """
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        count = 0
        while data := self.request.recv(65536):
            count += len(data)
            self.request.sendall(data.upper())
        self.request.sendall(b"<%d from %s>" % (count, self.client_address[0].encode()))
socketserver.ThreadingTCPServer.daemon_threads = True
with socketserver.ThreadingTCPServer(("198.51.100.2", PORT), Echo) as server:
    server.serve_forever()
"""
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as sock:
    try:  # when the reset comes is chance: shutdown after it says "not connected"
        sock.sendall(b"x" * int(sys.argv[3]))
        sock.shutdown(socket.SHUT_WR)
        got = b"".join(iter(lambda: sock.recv(65536), b""))
    except OSError as error:
        sys.exit(f"reset: {error}")
print(got.count(b"X"), got[got.rindex(b"<"):].decode() if b"<" in got else "nothing")
"""


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wires():
    def clear():
        for name in NAMESPACES.values():
            run("ip", "netns", "del", name)

    clear()
    for name in NAMESPACES.values():
        subprocess.run(["ip", "netns", "add", name], check=True)
    for line in WIRES.strip().splitlines():
        subprocess.run(["ip", *line.split()], check=True)
    nft = ["ip", "netns", "exec", NAMESPACES["border"], "nft", "-f", "-"]
    subprocess.run(nft, input=REDIRECT, text=True, check=True)
    yield
    clear()


def inside(name, directory, *command):
    """A process in one of the namespaces, with its log."""
    launch = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    return Process(directory / f"{name}.log", "-c", launch, "ip", "netns", "exec", NAMESPACES[name], *command)


class Site:
    def __init__(self, directory):
        self.directory = directory
        self.config = {
            "targets": ["198.51.100.0/24:7000-7001"], "sources": ["192.0.2.0/24"], "metrics_port": 0,
            "status_socket": str(directory / "border.sock"),
        }  # fmt: skip
        self.processes = []

    def write(self):
        file = self.directory / "border.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in self.config.items()))
        return file

    def start(self):
        file = self.write()
        self.command = [sys.executable, "-m", "pilotbed.relay.border", "--config", file]
        self.border = inside("border", self.directory, "env", f"PYTHONPATH={SOURCE.parent}", *self.command)
        self.processes.append(self.border)
        eventually(lambda: "event=started" in self.border.text(), evidence=self.border.text)
        for port in (7000, 7002):
            self.serve(port)

    def serve(self, port):
        code = SERVER.replace("PORT", str(port))
        self.processes.append(inside("world", self.directory, sys.executable, "-c", code))
        listening = ["ip", "netns", "exec", NAMESPACES["world"], "ss", "-Hltn", f"sport = :{port}"]
        eventually(lambda: run(*listening).stdout)

    def connect(self, port, count=1000, address="198.51.100.2", namespace="node"):
        """What a client said: bytes that came back in capitals, and the server's last word; or its error."""
        client = ["ip", "netns", "exec", NAMESPACES[namespace], sys.executable, "-c", CLIENT, address, port, count]
        done = run(*map(str, client))
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    def status(self):
        environment = {"PYTHONPATH": str(SOURCE.parent)}
        asked = subprocess.run([*self.command, "status"], capture_output=True, text=True, check=True, env=environment)
        return json.loads(asked.stdout)

    def close(self):
        for process in self.processes:
            process.end()


@pytest.fixture
def site(wires, tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


def test_an_allowed_target_is_reached_and_half_a_close_kept(site):
    site.start()
    assert site.connect(7000, 3_000_000) == "3000000 <3000000 from 198.51.100.1>"
    status = eventually(lambda: (found := site.status())["streams"] == 0 and found)
    assert (status["streams_total"], status["bytes_outward"]) == (1, 3_000_000)
    assert status["bytes_inward"] > 3_000_000
    assert "event=stream peer=192.0.2.2:" in site.border.text()


def test_without_the_border_nothing_gets_out(site):
    """The negative control of the site itself: no packet is forwarded."""
    site.serve(7000)
    assert "refused" in site.connect(7000)


def test_another_target_is_refused_by_name(site):
    site.start()
    assert "reset" in site.connect(7002)
    assert site.status()["refusals"] == {"target_refused": 1}
    assert "code=target_refused" in site.border.text() and "target=198.51.100.2:7002" in site.border.text()


def test_targets_are_read_anew_and_bad_ones_not_taken_over(site):
    site.start()
    site.config["targets"] = ["198.51.100.0/24:7002"]
    site.write()
    site.border.popen.send_signal(signal.SIGHUP)
    eventually(lambda: site.status()["targets"] == site.config["targets"], evidence=site.border.text)
    assert "from 198.51.100.1" in site.connect(7002)
    assert "reset" in site.connect(7000)
    site.config["targets"] = ["nonsense"]
    site.write()
    site.border.popen.send_signal(signal.SIGHUP)
    eventually(lambda: "event=not_reloaded" in site.border.text(), evidence=site.border.text)
    assert "from 198.51.100.1" in site.connect(7002)


def test_the_border_does_not_connect_to_itself(site):
    site.config["targets"].append("192.0.2.1:1-65535")
    site.start()
    assert "reset" in site.connect(9710, address="192.0.2.1")
    assert site.status()["refusals"] == {"not_redirected": 1}


def test_others_may_not_use_it(site):
    site.start()
    assert "reset" in site.connect(9710, address="198.51.100.1", namespace="world")
    assert site.status()["refusals"] == {"source_refused": 1}


def test_a_target_that_does_not_listen_is_reported(site):
    site.start()
    assert "reset" in site.connect(7001)
    assert site.status()["refusals"] == {"unreachable": 1}


def test_too_many_connections_are_refused(site):
    site.config["connections"] = 0
    site.start()
    assert "reset" in site.connect(7000)
    assert site.status()["refusals"] == {"overload": 1}


def test_metrics_show_streams_bytes_and_refusals(site):
    site.config["metrics_port"] = 9702
    site.start()
    site.connect(7000)
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9702/metrics').read().decode())"
    text = run("ip", "netns", "exec", NAMESPACES["border"], sys.executable, "-c", code).stdout
    assert "pilotbed_border_streams_total 1.0" in text
    assert 'pilotbed_border_refusals_total{code="target_refused"} 0.0' in text


@pytest.mark.parametrize(
    ("rule", "target", "allowed"),
    [
        ("198.51.100.2:80", ("198.51.100.2", 80), True),
        ("198.51.100.2:80", ("198.51.100.2", 81), False),
        ("198.51.100.2:80", ("198.51.100.3", 80), False),
        ("198.51.100.0/24:80-90", ("198.51.100.255", 90), True),
        ("198.51.100.0/24:80-90", ("198.51.101.0", 90), False),
        ("ce.grid.test:443", ("198.51.100.7", 443), True),
        ("other.grid.test:443", ("198.51.100.7", 443), False),
    ],
)
def test_rule_allows_its_targets_only(rule, target, allowed):
    assert Rule.parse(rule).allows(*target, {"ce.grid.test": frozenset({"198.51.100.7"})}) is allowed


@pytest.mark.parametrize(
    "text", ["ce.grid.test", ":80", "ce:0", "ce:90-80", "ce:65536", "10.0.0.1/24:80", "a b:80", "ce:x"]
)
def test_a_bad_target_is_named(tmp_path, text):
    file = tmp_path / "border.toml"
    file.write_text(f'targets = ["{text}"]\nsources = []\nstatus_socket = "/x"\n')
    with pytest.raises(SettingsError, match="targets: "):
        load(file, Config)


def test_without_sources_everybody_is_refused():
    border = Border(Config(("198.51.100.2:80",), (), Path("/x")))
    assert border.refusal("192.0.2.2", ("198.51.100.2", 80), ("192.0.2.1", 9710))[0] == "source_refused"
