"""Question 1: which components there are, and how they are protected from each other and from strangers."""

import re
import shlex
from contextlib import contextmanager

import pytest
from pilotbed_suite import declared
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, HOLD, PILOT_PROXY, as_user, ok, until, until_none, work_dirs

#: Ways to talk to a daemon with less than it requires, as a client may be configured.
LESS = {
    "no encryption": "_CONDOR_SEC_CLIENT_ENCRYPTION=NEVER",
    "no integrity": "_CONDOR_SEC_CLIENT_INTEGRITY=NEVER _CONDOR_SEC_CLIENT_ENCRYPTION=NEVER",
    "a name that is only claimed": "_CONDOR_SEC_CLIENT_AUTHENTICATION_METHODS=CLAIMTOBE",
    "nobody": "_CONDOR_SEC_CLIENT_AUTHENTICATION_METHODS=ANONYMOUS",
    "nothing at all": " ".join(
        f"_CONDOR_SEC_CLIENT_{what}=NEVER" for what in ("AUTHENTICATION", "ENCRYPTION", "INTEGRITY")
    ),
}
#: From where, with which command, which daemon of HTCondor's; the pool's, and the factory's own.
DAEMONS = {
    "collector": ("submit", "condor_ping -type collector"),
    "negotiator": ("submit", "condor_ping -type negotiator"),
    "schedd": ("submit", "condor_ping -type schedd"),
    "factory's collector": ("factory", "pilotbed-factory-pool condor_ping -type collector"),
    "factory's schedd": ("factory", "pilotbed-factory-pool condor_ping -type schedd"),
}


@pytest.fixture(scope="module")
def found(request):
    """Every listening socket of every node; kept for the report, with the connections that are open."""
    names = {name: host(name) for name in GRID.names("all")}
    there = {name: declared.sockets(name, node) for name, node in names.items()}
    if report := request.config.stash.get(declared.RUNNING, None):
        by_address = {address: name for name in names for address in GRID.addresses(name).values()}
        report.sockets = [one for sockets in there.values() for one in sockets]
        report.links = [link for name, node in names.items() for link in declared.links(name, node, by_address)]
    return there


@pytest.mark.check("D1.1")
def test_every_listening_socket_is_declared(found):
    strangers = [one for sockets in found.values() for one in sockets if not one.declared]
    assert not strangers, "\n".join(
        f"{one.node}: {one.program} listens at {one.protocol} {one.address}:{one.port}" for one in strangers
    )


@pytest.mark.check("D1.1")
def test_every_declared_socket_is_there(found):
    lacking = {name: gone for name, sockets in found.items() if (gone := declared.missing(name, sockets))}
    assert not lacking


@pytest.mark.check("D1.1", control=True)
def test_a_socket_that_nobody_declared_is_found():
    node = GRID.node("submit")
    unit, program = "pilotbed-test-socket", "import socket, time; s = socket.create_server(('', 4242)); time.sleep(60)"
    ok(node, "systemd-run --quiet --service-type exec --unit %s python3 -c %s", unit, program)
    try:
        name = GRID.names("submit")[0]
        until("it is found", lambda: 4242 in [one.port for one in declared.sockets(name, node) if not one.declared])
    finally:
        ok(node, "systemctl stop %s", unit)


def pinged(daemon, environment=""):
    """What a daemon says to alice, or on the factory's host to root, who asks whether he may read."""
    group, command = DAEMONS[daemon]
    node, asked = GRID.node(group), f"env {environment} timeout 20 {command} -verbose READ"
    if group == "submit":
        return as_user(node, "alice", asked)[1]
    return node.run(f"exec 2>&1; {asked}").stdout


@pytest.mark.check("D1.2")
@pytest.mark.check("P6")
@pytest.mark.parametrize("daemon", DAEMONS)
def test_a_daemon_authenticates_encrypts_and_protects(daemon):
    said = dict(line.split(":", 1) for line in pinged(daemon).splitlines() if ":" in line)
    said = {key: value.strip() for key, value in said.items()}
    assert (said["Encryption"], said["Integrity"], said["Authorized"]) == ("AES", "AES", "TRUE")
    assert said["Authenticated using"] in ("SSL", "FS"), "FS: on the daemon's own host"


@pytest.mark.check("D1.2")
@pytest.mark.check("P6")
@pytest.mark.parametrize("less", LESS)
@pytest.mark.parametrize("daemon", DAEMONS)
def test_who_asks_for_less_is_refused(daemon, less):
    said = pinged(daemon, LESS[less])
    # Who looks for a negotiator or another host's schedd is refused by the collector already.
    assert "READ failed" in said or "couldn't locate" in said, said
    assert "Authorized: " not in said


HEARD = "/run/pilotbed-test-heard"
#: Writes what goes through a host into a file, frame by frame, until it is told to stop; not what stays on the host.
LISTENS = """
import socket, sys
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
with open(sys.argv[1], "wb", buffering=0) as out:
    while True:
        frame, (card, *_) = wire.recvfrom(1 << 16)
        if card != "lo":
            out.write(frame)
"""


@contextmanager
def heard(nodes):
    """Hear what goes through each node; a function tells on which of them any of some words was."""
    unit = "pilotbed-test-listener"
    for node in nodes.values():
        ok(node, "systemd-run --quiet --service-type exec --unit %s python3 -c %s %s", unit, LISTENS, HEARD)

    def which(words):
        asked = "grep --text --only-matching --fixed-strings --file=/dev/stdin %s | sort -u | wc -l"
        given = shlex.quote("\n".join(words))
        return {name for name, node in nodes.items() if ok(node, f"printf %%s {given} | {asked}", HEARD) != "0\n"}

    try:
        yield which
    finally:
        for node in nodes.values():
            ok(node, "systemctl stop %s; rm -f %s", unit, HEARD)


def keys(pem):
    """The lines of a file's private keys, as they are written in it."""
    found = re.findall(r"-----BEGIN [A-Z ]*PRIVATE KEY-----\n(.*?)\n-----END", pem, re.DOTALL)
    assert found
    return [line for body in found for line in body.splitlines() if len(line) == 64]


@pytest.mark.check("D1.3")
@pytest.mark.stage(2)
def test_no_key_is_on_the_wire_while_a_pilot_and_a_job_start(grid, submit, any_site, jobs, alice, bob):
    """At the site's router and the relay, while a new pilot fetches what it needs, and a job gets its proxy and files.

    The same words are heard when somebody sends a key in the clear: the control.
    """
    factory, frontend = grid.node("factory"), grid.node("frontend")
    hops = {name: host(name) for name in {any_site.router, *grid.names("relay")}}
    factory.run("pilotbed-factory-pool condor_rm -constraint %s", f'GlideinEntryName == "{any_site.name}"')
    until_none("a pilot of before runs", lambda: [work for name in any_site.workers for work in work_dirs(host(name))])
    with heard(hops) as which:
        job = jobs.submit(alice, any_site, f"#!/bin/sh\ncat $X509_USER_PROXY > /tmp/proxy.pem\n{HOLD}\n")
        # A second pilot with the first, for the tests that follow; asked for after it, it comes when A-REX says, once a
        # minute, that the first one runs.
        jobs.submit(bob, any_site)
        worker, process = job.holds(any_site)
        payloads = ok(worker, "cat /proc/%s/root/tmp/proxy.pem", str(process.pid))
        users = ok(submit, "cat %s", f"/tmp/x509up_u{ok(submit, 'id -u %s', alice.account).strip()}")
        pilots_own = ok(frontend, "cat %s", PILOT_PROXY)
        secrets = ["PRIVATE KEY-----", *keys(payloads), *keys(users), *keys(pilots_own)]
        assert any_site.router in which(["HTTP/1."]), "the stage area is fetched in the clear, and signed"
        assert [name for name, node in hops.items() if ok(node, "stat -c %%s %s", HEARD) == "0\n"] == [], "all hear"
        assert which(secrets) == set()
        server = grid.fqdn(grid.names("factory")[0])
        worker.run("curl --silent --max-time 20 --data-binary %s http://%s/", users, server)
        until("the router hears it", lambda: any_site.router in which(secrets))
    job.remove()
