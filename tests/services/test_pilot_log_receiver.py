"""pilotbed-pilot-log-receiver, with curl and a pilot's send_logs.sh before it: who may send, and what comes of it."""

import gzip
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress

import pki
import pytest
from pilotbed.factory.parts import sent
from pilotbed.glidein.builder import script
from pilotbed.x509 import make_proxy
from relaybed import FRIEND, HOUR, PILOT, SOURCE, Process, eventually, free_ports
from stagebed import STANDARD, clean, last

USER = "/DC=test/DC=grid/O=Gridlab/OU=People/CN=Alice Adams"
LAUNCH = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); from pilotbed.factory import receiver; "


class Receiver:
    """The service and its CA."""

    def __init__(self, directory):
        self.directory = directory
        self.ca = pki.Authority(directory / "certificates")
        self.ca.issue("/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=localhost", host="localhost").save(directory / "host.pem")
        (self.port,) = free_ports(1)
        self.config = {
            "pilots": [PILOT], "entries": ["alpha"], "certificate": str(directory / "host.pem"),
            "key": str(directory / "host.pem"), "ca_directory": str(self.ca.directory),
            "directory": str(directory / "sent"), "port": self.port, "address": "127.0.0.1", "pilot": 1 << 20,
        }  # fmt: skip
        (directory / "sent").mkdir()
        self.pilot = self.proxy(PILOT)
        self.process = None

    def start(self, changes="pass"):
        file = self.directory / "pilot-log-receiver.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in self.config.items()))
        launch = f"{LAUNCH}{changes}; sys.exit(receiver.main())"
        self.process = Process(self.directory / "receiver.log", "-c", launch, "--config", file)
        eventually(lambda: self.process.popen.poll() is not None or self.listens(), evidence=self.process.text)
        return self

    def listens(self):
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def proxy(self, dn, name="proxy", **options):
        path = self.directory / f"{name}.pem"
        pki.proxy(self.ca.issue(dn), **options).save(path)
        return path

    def put(self, path="/alpha/3.0/glidein_7_8/StartLog/0", body=None, shown=None, *options):
        """Return the HTTP status, or curl's exit code where there was none."""
        part = self.directory / "part"
        part.write_bytes(gzip.compress(b"said\n") if body is None else body)
        certificate = ["--cert", str(shown), "--key", str(shown)] if shown else []
        done = subprocess.run(
            ["curl", "-q", "--silent", "--noproxy", "*", "--capath", str(self.ca.directory), *certificate, *options,
             "--write-out", "%{http_code}", "--output", "/dev/null", "--path-as-is", "--upload-file", str(part),
             f"https://localhost:{self.port}{path}"],
            capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        return int(done.stdout) or -done.returncode

    @property
    def sent(self):
        return sent(self.directory / "sent")

    def close(self):
        if self.process:
            self.process.end()


@pytest.fixture
def service(tmp_path):
    (tmp_path / "logs").mkdir()
    made = Receiver(tmp_path / "logs")
    yield made
    made.close()


@pytest.fixture
def runs(service):
    return service.start()


def test_a_pilot_sends_a_part(runs):
    assert runs.put(shown=runs.pilot) == 204
    (one,) = runs.sent
    assert (one.sender, one.logs(1000)) == (PILOT, {"StartLog": "said\n"})
    assert runs.process.end() == 0


def test_who_is_no_pilot_sends_nothing(runs):
    other = pki.Authority(runs.directory / "others", "/DC=test/CN=Another CA")
    foreign = runs.directory / "foreign.pem"
    pki.proxy(other.issue(PILOT)).save(foreign)
    revoked = runs.ca.issue(PILOT)
    pki.proxy(revoked).save(runs.directory / "revoked.pem")
    assert runs.put(shown=runs.directory / "revoked.pem") == 204, "control"
    runs.ca.revoke(revoked)
    runs.ca.publish()
    for shown, code in (
        (runs.proxy(FRIEND, "friend"), 403), (runs.proxy(USER, "user"), 403), (runs.directory / "revoked.pem", 403),
        (runs.directory / "host.pem", 403),
    ):  # fmt: skip
        assert runs.put("/alpha/4.0/glidein_1_1/StartLog/0", shown=shown) == code, shown
    for shown in (None, foreign):
        assert runs.put("/alpha/4.0/glidein_1_1/StartLog/0", shown=shown) < 0, "there is no TLS connection"
    assert [one.job for one in runs.sent] == ["3.0"]
    assert f"{USER} is no pilot of this factory's" in runs.process.text()


def test_a_limited_proxy_is_a_pilots_as_well(runs):
    """As a computing element may have delegated it."""
    limited = runs.directory / "limited.pem"
    make_proxy(runs.ca.issue(PILOT), HOUR, "limited").save(limited)
    assert runs.put(shown=limited) == 204


@pytest.mark.parametrize(("path", "code"), [
    ("/beta/3.0/glidein_7_8/StartLog/0", 404), ("/alpha/3.0/glidein_7_8/../../0", 404), ("/", 404),
    ("/alpha/3.0/glidein_7_8/..%2f..%2fx/0", 404), ("/alpha/3.0/glidein_7_8/StartLog/0?x", 404),
])  # fmt: skip
def test_paths_stay_inside(runs, path, code):
    assert runs.put(path, shown=runs.pilot) == code
    assert not runs.sent


def test_what_is_too_much_is_refused_before_it_is_read(runs):
    assert runs.put(body=random.randbytes(300 << 10), shown=runs.pilot) == 413
    assert runs.put(body=b"plain", shown=runs.pilot) == 400
    for at in range(9):
        code = runs.put(f"/alpha/3.0/glidein_7_8/StartLog/{at}", gzip.compress(random.randbytes(200 << 10)), runs.pilot)
    assert code == 507
    assert runs.put("/alpha/5.0/glidein_7_8/StartLog/0", shown=runs.pilot) == 204


def test_another_ones_pilot_is_not_spoken_for(service):
    service.config["pilots"] = [PILOT, FRIEND]
    service.start()
    assert service.put(shown=service.pilot) == 204
    assert service.put("/alpha/3.0/glidein_7_8/StartLog/1", shown=service.proxy(FRIEND, "friend")) == 403


@contextmanager
def crowd(service, count):
    """Connections that say nothing, and one that stops in the middle."""
    context = ssl.create_default_context(capath=str(service.ca.directory))
    context.load_cert_chain(service.pilot)
    with ExitStack() as opened:
        made = [opened.enter_context(socket.create_connection(("localhost", service.port))) for _ in range(count)]
        made[0] = opened.enter_context(context.wrap_socket(made[0], server_hostname="localhost"))
        made[0].sendall(b"PUT /alpha/3.0/glidein_7_8/StartLog/0 HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc")
        yield made


def test_who_says_nothing_keeps_nobody_waiting_while_there_is_a_turn_left(service):
    service.start("receiver.AT_A_TIME = 4")
    with crowd(service, 3), ExitStack() as more:
        assert service.put(shown=service.pilot) == 204

        def refused():
            """With one more; again, as the turn before may not have been given back yet."""
            more.enter_context(socket.create_connection(("localhost", service.port)))
            return service.put("/alpha/6.0/glidein_7_8/StartLog/0", shown=service.pilot) < 0

        eventually(refused)
    assert "Traceback" not in service.process.text()


def test_who_says_nothing_is_cut_off(service):
    # On a busy machine two seconds were too few for who does say something, down to the crowd's own handshake.
    service.start("receiver.DEADLINE = 10.0; receiver.AT_A_TIME = 4")
    with crowd(service, 4) as silent:
        for each in silent:
            each.settimeout(60)
            with suppress(ConnectionError, ssl.SSLError):
                while each.recv(100):
                    pass
    eventually(lambda: service.put("/alpha/6.0/glidein_7_8/StartLog/0", shown=service.pilot) == 204)
    assert "Traceback" not in service.process.text()


@pytest.mark.parametrize("said", [
    b"\x00" * 100, b"GET / HTTP/1.0\r\n\r\n", b"PUT\r\n\r\n", b"PUT / HTTP/9.9\r\n\r\n", b"X" * 70000,
    b"PUT /alpha/3.0/glidein_7_8/StartLog/0 HTTP/1.0\r\nContent-Length: -5\r\n\r\n",
    b"PUT /alpha/3.0/glidein_7_8/StartLog/0 HTTP/1.0\r\nContent-Length: \xb2\r\n\r\n",
    b"PUT /alpha/3.0/glidein_7_8/StartLog/0 HTTP/1.0\r\n\r\n",
    b"PUT /alpha/3.0/glidein_7_8/StartLog/0 HTTP/1.0\r\nContent-Length: 90\r\n\r\nshort",
    b"PUT /\xff\xfe\x00 HTTP/1.0\r\nContent-Length: 1\r\n\r\nx", b"PUT / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
])  # fmt: skip
def test_whatever_a_pilot_says_the_service_goes_on(runs, said):
    context = ssl.create_default_context(capath=str(runs.ca.directory))
    context.load_cert_chain(runs.pilot)
    with context.wrap_socket(socket.create_connection(("localhost", runs.port)), server_hostname="localhost") as sock:
        sock.sendall(said)
        sock.settimeout(60)
        socket.socket.shutdown(sock, socket.SHUT_WR)
        try:
            while sock.recv(1000):
                pass
        except OSError:
            pass
    assert runs.put("/alpha/8.0/glidein_7_8/StartLog/0", shown=runs.pilot) == 204
    assert [one.job for one in runs.sent] == ["8.0"]
    assert "Traceback" not in runs.process.text()


@pytest.mark.parametrize(("key", "value", "why"), [
    ("port", 70000, "port = 70000"), ("most", 1, "most = 1"), ("certificate", "/nonexistent", "No such file"),
    ("pilots", "x", "pilots"),
])  # fmt: skip
def test_a_configuration_that_cannot_be_used_is_named(service, key, value, why):
    service.config[key] = value
    service.start()
    assert service.process.exit_code() == 1
    assert why in service.process.text()
    assert "Traceback" not in service.process.text()


# -- the pilot's side -----------------------------------------------------------------------------------------------


LOGS = """#!/bin/bash
mkdir -p "$GLIDEIN_WORK_DIR/log"
echo "one" > "$GLIDEIN_WORK_DIR/log/StartLog"
touch {here}/up
while [ ! -e {here}/more ]; do sleep .1; done
echo "two" >> "$GLIDEIN_WORK_DIR/log/StartLog"
while [ ! -e {here}/stop ]; do sleep .1; done
"""


def command(site, service, here, **parameters):
    site.put("factory", *STANDARD, script("send_logs.sh", "exec"), **last(LOGS.format(here=here)))
    given = {"GLIDEIN_Log_Server": f"https://localhost:{service.port}", "GLIDEIN_Log_Period": "1",
             "X509_CERT_DIR": str(service.ca.directory)} | parameters  # fmt: skip
    given = {name: value for name, value in given.items() if value}
    return site.command(parameters=given, cluster="3", subcluster="0", dir=".")


def started(site, service, here, **parameters):
    environment = clean() | {"X509_USER_PROXY": str(service.pilot)}
    return subprocess.Popen(command(site, service, here, **parameters), cwd=site.worker, env=environment,
                            stdout=(here / "out").open("wb"), stderr=subprocess.STDOUT)  # fmt: skip


def ended(pilot, here):
    """Return the exit code of a pilot that is to end, and all that it said."""
    eventually(lambda: pilot.poll() is not None, 120, (here / "out").read_text)
    return pilot.returncode, (here / "out").read_text()


def test_a_pilot_that_is_killed_has_sent_its_logs(site, runs, tmp_path):
    pilot = started(site, runs, tmp_path)
    try:
        first = eventually(lambda: [one for one in runs.sent if one.logs(1000).get("StartLog") == "one\n"],
                           evidence=(tmp_path / "out").read_text)[0]  # fmt: skip
        assert (first.entry, first.job) == ("alpha", "3.0")
        (tmp_path / "more").touch()
        pilot.send_signal(signal.SIGKILL)
        eventually(lambda: runs.sent[0].logs(1000)["StartLog"] == "one\ntwo\n")
        assert "running send_logs.sh" in runs.sent[0].logs(10000)["out"]
    finally:
        (tmp_path / "more").touch()
        (tmp_path / "stop").touch()
        pilot.kill()
        pilot.wait()


@pytest.mark.parametrize("server", ["down", "refuses", "none"])
def test_where_nothing_can_be_sent_the_pilot_runs(site, service, tmp_path, server):
    if server == "refuses":
        service.config["pilots"] = [FRIEND]
        service.start()
    pilot = started(site, service, tmp_path, **{"GLIDEIN_Log_Server": None} if server == "none" else {})
    eventually((tmp_path / "up").exists, evidence=(tmp_path / "out").read_text)
    time.sleep(2)
    (tmp_path / "more").touch()
    (tmp_path / "stop").touch()
    code, said = ended(pilot, tmp_path)
    assert code == 0, said
    assert list(site.worker.iterdir()) == []
    assert not service.sent


@pytest.mark.parametrize(("name", "value"), [
    ("GLIDEIN_Log_Server", "http://localhost:1"), ("GLIDEIN_Log_Server", "https://a:1;id"), ("GLIDEIN_Log_Period", "0"),
])  # fmt: skip
def test_what_cannot_be_meant_ends_the_pilot_by_name(site, service, tmp_path, name, value):
    pilot = started(site, service, tmp_path, **{name: value})
    code, said = ended(pilot, tmp_path)
    assert code == 1 and f"{name} '{value}'" in said, said
