"""Question 1: which components there are, and how they are protected from each other and from strangers."""

import pytest
from pilotbed_suite import declared
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, as_user, ok, until

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
    if report := request.config.pluginmanager.get_plugin("certificate"):
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
