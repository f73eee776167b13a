"""Question 7: logs that an intruder cannot change (docs/logs.md)."""

import json
import re
import secrets
import shlex
from dataclasses import dataclass

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import as_user, explained, ok, until, write
from testinfra.host import Host

REMOTE, STATE, COPY = "/var/log/journal/remote", "/var/lib/pilotbed-log", "/var/tmp/pilotbed-test-logs"
HOST = ("/etc/grid-security/hostcert.pem", "/etc/grid-security/hostkey.pem")
SCRATCH = "/var/tmp/pilotbed-test-log"


@pytest.fixture(scope="module")
def collector(grid):
    if not grid.names("log_collector"):
        pytest.skip("there is no host in group log_collector")
    return grid.node("log_collector")


@pytest.fixture(scope="module")
def worker(grid):
    return grid.names("worker")[0]


@pytest.fixture(scope="module")
def other(grid):
    return grid.names("submit")[0]


@pytest.fixture(scope="module")
def ask(grid, collector):
    """Ask the collector as who has a certificate: ``ask(node, cert, key, path, body)`` returns code and answer."""
    address = f"{grid.fqdn(grid.names('log_collector')[0])}:{grid.variable('grid_log_port')}"

    def asked(node, cert="", key="", path="/node", body="", account="root", headers=()):
        words = ["curl", "--silent", "--show-error", "--capath", "/etc/grid-security/certificates"]
        words += ["--cert", cert, "--key", key] if cert else []
        for header in headers:
            words += ["--header", header]
        if body:
            words += ["--header", "Content-Type: application/vnd.fdo.journal", "--header", "Expect:"]
            words += ["--header", "Transfer-Encoding: chunked", "--data-binary", "@-"]
        words += ["--write-out", "\n%{http_code}", f"https://{address}{path}"]
        given = f"printf %s {shlex.quote(body)} | " if body else ""
        said = as_user(node, account, given + shlex.join(words))[1]
        answer, _, code = said.rpartition("\n")
        return code, answer

    return asked


def word():
    """A word that no other record has."""
    return f"pilotbed-test-{secrets.token_hex(8)}"


def note(node, text):
    """Write a record on a node, as any of its accounts can."""
    ok(node, "runuser -u nobody -- logger --tag pilotbed-test %s", text)


def copies(collector, name, text):
    """Return the records with a text that the collector has of a node."""
    shown = ok(collector, "journalctl --quiet --directory=%s --output=json MESSAGE=%s", f"{REMOTE}/{name}", text)
    return [json.loads(line) for line in shown.splitlines()]


def arrives(collector, name, text):
    """Wait until the collector has a node's record."""
    with explained((host(name), "journalctl -u pilotbed-log-upload -n 20 --no-pager"),
                   (collector, f"journalctl -u pilotbed-log@{name} -u nginx -n 20 --no-pager")):  # fmt: skip
        return until(f"the collector has {name}'s record", lambda: copies(collector, name, text), 180)


# -- it comes, and from whom


@pytest.mark.check("D7.6")
def test_a_record_of_every_node_comes_to_the_collector(grid, collector):
    sent = {name: word() for name in grid.names("all")}
    for name, text in sent.items():
        note(host(name), text)
    for name, text in sent.items():
        (record,) = arrives(collector, name, text)
        assert record["_UID"] == str(ok(host(name), "id -u nobody").strip())


#: What glexec writes of a payload (`pilotbed.glexec.record`), as somebody else would: on a host, under an id.
PAYLOAD = """__REALTIME_TIMESTAMP=1700000000000000
__MONOTONIC_TIMESTAMP=1
_BOOT_ID=0123456789abcdef0123456789abcdef
_UID=0
_HOSTNAME={}
SYSLOG_IDENTIFIER=glexec
MESSAGE={}
GLEXEC_ID={}
GLEXEC_STARTED=1700000000.0
GLEXEC_WALL=1
GLEXEC_CPU=1
GLEXEC_MEMORY=1
GLEXEC_EXIT=0
GLEXEC_ENDED=exit 0
GLEXEC_TARGET=gl001

"""


def forged(name, text):
    return PAYLOAD.format(name, text, text)


def traced(collector, name, directory=REMOTE):
    """What pilotbed-trace says, of that time, of a node."""
    return ok(collector, "pilotbed-trace --node %s --since @1600000000 --directory %s --json", name, directory)


@pytest.mark.check("D7.6")
def test_a_node_that_claims_to_be_another_writes_as_itself(grid, collector, worker, other, ask):
    text = word()
    others = ("/upload", f"/upload?node={other}", f"/upload/{other}", f"/upload/../{other}/upload", f"//{other}/upload")
    for path in others:
        headers = (f"X-Node: {other}", f"Host: {grid.fqdn(other)}", f"X-SSL-Client-S-DN: /CN={grid.fqdn(other)}")
        ask(host(worker), *HOST, path, forged(grid.fqdn(other), text), headers=headers)
    assert copies(collector, worker, text), "as itself it may write anything"
    named = ok(collector, "ls %s", REMOTE).split()
    assert [name for name in named if name != worker and copies(collector, name, text)] == []
    assert text not in traced(collector, other)
    assert text in traced(collector, worker)


@pytest.mark.check("D7.6", control=True)
def test_in_one_directory_for_all_a_record_is_whose_it_says(grid, collector, other):
    text, directory = word(), f"{SCRATCH}-control"
    ok(collector, "mkdir -p %s", directory)
    write(collector, f"{directory}/sent", forged(grid.fqdn(other), text))
    try:
        ok(collector, "/usr/lib/systemd/systemd-journal-remote --split-mode=none --output=%s %s",
           f"{directory}/all.journal", f"{directory}/sent")  # fmt: skip
        assert text in traced(collector, other, directory)
    finally:
        ok(collector, "rm -r %s", directory)


@pytest.mark.check("D7.6", control=True)
def test_a_node_is_known_by_its_certificate(collector, worker, ask):
    assert ask(host(worker), *HOST) == ("200", f"{worker}\n")


@pytest.mark.check("D7.6")
def test_a_user_is_refused_with_certificate_and_proxy(collector, submit, alice, frontend_certificate, ask):
    assert ask(submit)[0] == "400"
    text = word()
    body = forged("submit", text)
    code, said = as_user(submit, alice.account, "voms-proxy-init --quiet --out ~/log.pem --voms " + alice.voms)
    assert code == 0, said
    home = ok(submit, "getent passwd %s", alice.account).split(":")[5]
    proxy = (f"{home}/log.pem", f"{home}/log.pem")
    answers = [ask(submit, *proxy, path, body, alice.account) for path in ("/upload", "/node")]
    as_user(submit, alice.account, "rm ~/log.pem")
    assert {code for code, _ in answers} == {"400"}, "a proxy is no certificate of a host"
    node, certificate = frontend_certificate
    assert ask(node, *certificate, "/upload", body)[0] == "403", "a valid one that is no host's"
    assert not [name for name in ok(collector, "ls %s", REMOTE).split() if copies(collector, name, text)]


@pytest.fixture
def frontend_certificate(grid):
    """A robot's certificate, with its node: its key has no pass phrase."""
    directory = "/etc/grid-security/services/frontend"
    return grid.node("frontend"), (f"{directory}/cert.pem", f"{directory}/key.pem")


@pytest.mark.check("D7.6")
def test_an_unknown_host_is_refused_and_a_revoked_one_not_even_heard(grid, collector, worker, ask):
    node, authority = host(worker), grid.node("certificate_authority")
    own = ok(node, "openssl x509 -noout -subject -nameopt compat -in %s", HOST[0]).strip().removeprefix("subject=")
    name = own.strip().replace(f"/CN={grid.fqdn(worker)}", f"/CN={word()}.{grid.variable('grid_domain')}")
    assert name != own.strip()
    ok(node, "mkdir -p -m 700 %s && openssl req -new -newkey rsa:2048 -nodes -subj /CN=x -keyout %s -out %s",
       SCRATCH, f"{SCRATCH}/key", f"{SCRATCH}/csr")  # fmt: skip
    try:
        request = ok(node, "cat %s", f"{SCRATCH}/csr")
        cert = ok(authority, "printf %%s %s | pilotbed-ca issue host %s --days 1", request, name)
        write(node, f"{SCRATCH}/cert", cert)
        own = (f"{SCRATCH}/cert", f"{SCRATCH}/key")
        assert ask(node, *own)[0] == "403"
        ok(authority, "pilotbed-ca revoke %s --days 7", name)
        ok(collector, "systemctl start pilotbed-fetch-crl")
        until("its certificate is refused itself", lambda: ask(node, *own)[0] == "400", 60)
        assert ask(node, *HOST)[0] == "200"
    finally:
        ok(node, "rm -rf %s", SCRATCH)


# -- nothing stops it


#: As any account: a record of 1023 fields; journald adds its own, and 1024 are too much for systemd-journal-remote.
MANY_FIELDS = """
import socket, sys
fields = b"".join(b"F%d=v\\n" % n for n in range(1022))
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(
    f"MESSAGE={sys.argv[1]}\\n".encode() + fields, "/run/systemd/journal/socket")
"""


@pytest.mark.check("D7.6")
def test_no_record_of_a_users_ends_what_comes_after_it(collector, worker):
    many, large, after = word(), word(), word()
    write(host(worker), SCRATCH, MANY_FIELDS, mode="0644")
    try:
        ok(host(worker), "runuser -u nobody -- python3 %s %s", SCRATCH, many)
    finally:
        ok(host(worker), "rm %s", SCRATCH)
    ok(host(worker), "(echo MESSAGE=%s; printf DATA=; head -c 12000000 /dev/zero | tr '\\0' x; echo) | "
       "runuser -u nobody -- logger --journald", large)  # fmt: skip
    note(host(worker), after)
    assert len(arrives(collector, worker, after)) == 1
    assert len(copies(collector, worker, many)) == 1
    assert len(copies(collector, worker, large)) == 1


@pytest.mark.check("D7.6")
def test_what_is_written_while_the_collector_is_away_comes_later(collector, worker):
    text, unit = word(), f"pilotbed-log@{worker}"
    ok(collector, "systemctl stop %s.socket %s.service", unit, unit)
    try:
        note(host(worker), text)
        until("the node could not send", lambda: host(worker).run(
            "journalctl -u pilotbed-log-upload --since -1min -o cat | grep ' 502 '").rc == 0)  # fmt: skip
        assert ok(host(worker), "systemctl is-active pilotbed-log-upload").strip() == "active"
        assert copies(collector, worker, text) == []
    finally:
        ok(collector, "systemctl start %s.socket", unit)
    assert len(arrives(collector, worker, text)) == 1


@pytest.mark.check("D7.6")
def test_deletion_on_the_node_leaves_the_copy(collector, worker):
    node, text, own = host(worker), word(), "/var/log/journal/$(cat /etc/machine-id)"
    note(node, text)
    before = arrives(collector, worker, text)
    kept = "/var/log/pilotbed-test-journal"
    try:
        # As `journalctl --rotate --vacuum-time=1s` or rm would; but it is put back.
        ok(node, f"journalctl --rotate && mkdir -p {kept} && mv {own}/*@*.journal {kept}/")
        assert ok(node, "journalctl --quiet MESSAGE=%s", text) == ""
        assert copies(collector, worker, text) == before
        later = word()
        note(node, later)
        arrives(collector, worker, later)
    finally:
        ok(node, f"mv {kept}/*.journal {own}/; rmdir {kept}")
    assert ok(node, "journalctl --quiet MESSAGE=%s", text)


# -- what is changed afterwards is found


@dataclass(frozen=True)
class Copy:
    """A copy of what the collector has of a node, in which a record has a text and a number."""

    collector: Host
    worker: str
    text: str
    number: int
    chain: str = f"{COPY}/pilotbed-log"

    def verify(self, more=""):
        """Return what `pilotbed-log verify` says, and whether nothing is wrong."""
        done = self.collector.run(f"pilotbed-log verify --journals {COPY} --chain {self.chain} {more} {self.worker}")
        assert done.rc in (0, 1), done.stderr
        return done.stdout, done.rc == 0


@pytest.fixture(scope="module")
def chained(collector, worker):
    """A worker's record in the chain: its text and its number."""
    text = word()
    note(host(worker), text)
    (record,) = arrives(collector, worker, text)
    ok(collector, "systemctl start pilotbed-log-chain")
    return text, int(re.search(r";i=([0-9a-f]+);", record["__CURSOR"])[1], 16)


@pytest.fixture
def copy(collector, worker, chained):
    """Copies of the worker's journal and of the chain; gives what verifies them."""
    ok(collector, "rm -rf %s && mkdir -m 700 %s && cp -a %s %s %s",
       COPY, COPY, f"{REMOTE}/{worker}", STATE, COPY)  # fmt: skip
    yield Copy(collector, worker, *chained)
    ok(collector, "rm -rf %s", COPY)


@pytest.mark.check("D7.6", control=True)
def test_what_nobody_changed_is_as_it_came_in(collector, copy):
    said, well = copy.verify()
    assert well, said
    ok(collector, "pilotbed-log verify")


@pytest.mark.check("D7.6")
def test_a_changed_byte_is_found(collector, worker, copy):
    found = ok(collector, "grep -r --only-matching --byte-offset --text --fixed-strings --with-filename MESSAGE=%s %s",
               copy.text, f"{COPY}/{worker}")  # fmt: skip
    file, at, field = found.strip().split(":")
    ok(collector, "printf X | dd of=%s bs=1 seek=%s conv=notrunc status=none", file, str(int(at) + len(field) - 1))
    said, well = copy.verify()
    assert not well
    assert f"{worker}: record {copy.number} is changed" in said


@pytest.mark.check("D7.6")
def test_a_removed_file_is_found(collector, worker, copy):
    ok(collector, f"rm {COPY}/{worker}/*.journal")
    said, well = copy.verify()
    assert not well
    assert re.search(rf"^{worker}: records? .* missing ", said, re.MULTILINE)


@pytest.mark.check("D7.6")
def test_a_removed_line_of_the_chain_is_found(collector, copy):
    ok(collector, f"f=$(ls {copy.chain}/*.chain | tail -n 1) && sed -i 2d $f")
    said, well = copy.verify()
    assert not well
    assert re.search(r"^line \d+ is missing in the chain", said)


@pytest.fixture
def remembered(worker):
    """The head of the chain that the worker remembers of this moment."""
    ok(host(worker), "systemctl restart pilotbed-log-upload")
    this = "$(systemctl show --property InvocationID --value pilotbed-log-upload)"
    shown = f"journalctl -o cat --no-pager _SYSTEMD_INVOCATION_ID={this} | grep ' head=' || true"
    return until("the node has seen the head", lambda: ok(host(worker), shown))


@pytest.mark.check("D7.6")
def test_a_chain_that_was_made_anew_is_found_by_what_the_nodes_remember(collector, remembered, copy):
    write(collector, f"{COPY}/seen", remembered)
    said, well = copy.verify(f"--seen {COPY}/seen")
    assert well, said
    write(collector, f"{COPY}/log.toml", f'journals = "{COPY}"\nchain = "{copy.chain}"\n')
    ok(collector, f"chown root {copy.chain} && rm {copy.chain}/*.* && pilotbed-log --config {COPY}/log.toml chain")
    assert copy.verify()[1], "by itself it cannot tell"
    said, well = copy.verify(f"--seen {COPY}/seen")
    assert not well
    assert "seen elsewhere" in said


# -- retention


@pytest.mark.check("D7.6")
def test_records_stay_for_as_long_as_is_declared(collector, worker):
    days = int(re.search(r"^days = (\d+)$", ok(collector, "cat /etc/pilotbed/log.toml"), re.MULTILINE)[1])
    assert days >= 90
    assert ok(collector, "systemctl is-enabled systemd-tmpfiles-clean.timer").strip() in ("static", "enabled")
    old, young = (f"{REMOTE}/{worker}/pilotbed-test-{age}" for age in ("old", "young"))
    try:
        for path, age in ((old, days + 2), (young, days)):
            ok(collector, "touch --date %s %s", f"-{age} days", path)
        ok(collector, "systemd-tmpfiles --clean --prefix %s", REMOTE)
        assert ok(collector, "ls %s", f"{REMOTE}/{worker}").split().count(young.rpartition("/")[2]) == 1
        assert collector.run("test -e %s", old).rc == 1
    finally:
        ok(collector, "rm -f %s %s", old, young)


@pytest.mark.check("D7.6")
def test_who_has_used_up_his_share_loses_nothing(collector, worker, other):
    """The mark is made by hand; the next run of the chain, which sees that there is room, takes it away."""
    text = word()
    ok(collector, "touch %s", f"{STATE}/full/{worker}")
    note(host(worker), text)
    note(host(other), text)
    arrives(collector, other, text)
    ok(collector, "systemctl start pilotbed-log-chain")
    assert len(arrives(collector, worker, text)) == 1
