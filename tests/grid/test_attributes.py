"""VOMS attributes: our own verdict beside those of VOMS's tool and of LCMAPS, on the same proxies.

    the proxy                              ours      voms-proxy-info   LCMAPS
    alice's, bob's, the pilot's: genuine   FQANs     0                 account
    made with the VOMS server's key        FQANs     0                 account       (control of those that follow)
    one bit of the signature changed       refused   1                 refused
    the AC expired an hour ago             refused   0, 0 s left       refused
    the AC valid from an hour on           refused   0                 refused
    alice's AC in bob's proxy              refused   0                 refused
    signed by a user's certificate         refused   1                 refused
    from a host that no .lsc names         refused   1                 refused
    an FQAN of another VO                  refused   1                 refused
    a critical extension                   refused   1                 refused
    the AC expired three minutes ago       refused   0, 0 s left       account       (VOMS: five minutes of grace)
    signed with SHA-1                      refused   0                 account       (VOMS: whatever OpenSSL takes)

voms-proxy-info looks at server, signature and form only; who may do what is LCMAPS's verdict.
"""

from types import SimpleNamespace

import pki
import pytest
from pilotbed.x509 import Chain, load_pem, voms
from pilotbed_suite.reach import host
from pilotbed_suite.support import PILOT_PROXY, as_user, ok, write

PLACE = "/run/pilotbed-test-attributes.pem"

OURS = """
import sys
sys.path.insert(0, "/usr/lib/pilotbed")
from pathlib import Path
from pilotbed.x509 import CertificateError, Chain, TrustStore, VomsStore
trust = TrustStore(Path("/etc/grid-security/certificates"))
try:
    chain = trust.verify(Chain.from_pem(Path(sys.argv[1]).read_bytes()))
    print(*VomsStore(Path("/etc/grid-security/vomsdir"), trust).fqans(chain), sep="\\n")
except CertificateError as error:
    sys.exit(f"refused: {error}")
"""

LCMAPS = """
import pwd, sys
sys.path.insert(0, "/usr/lib/pilotbed")
from pathlib import Path
from pilotbed.glexec import mapper, policy
from pilotbed.mapping import MAPPER_ACCOUNT
conf = policy.parse_conf(Path(policy.CONF_PATH).read_text())
try:
    print(mapper.identify(Path(sys.argv[1]).read_bytes(), conf, pwd.getpwnam(MAPPER_ACCOUNT)).fqan)
except policy.Refusal as refusal:
    sys.exit(f"refused: {refusal}")
"""


def normalised(fqan):
    return fqan.replace("/Role=NULL", "").replace("/Capability=NULL", "")


@pytest.fixture(scope="module")
def worker(filtered_site):
    return host(filtered_site.workers[0])


@pytest.fixture
def verdicts(submit, worker):
    """What the three say about a proxy (PEM): ours, voms-proxy-info, seconds left according to that, LCMAPS."""

    def ask(pem):
        for node in (submit, worker):
            write(node, PLACE, pem)
        return SimpleNamespace(
            ours=submit.run("python3 -I -c %s %s", OURS, PLACE),
            info=submit.run("voms-proxy-info -file %s -all", PLACE),
            fqans=submit.run("voms-proxy-info -file %s -fqan", PLACE).stdout.split(),
            left=int(submit.run("voms-proxy-info -file %s -actimeleft", PLACE).stdout or 0),
            lcmaps=worker.run("python3 -I -c %s %s", LCMAPS, PLACE),
        )

    yield ask
    for node in (submit, worker):
        node.run("rm -f %s", PLACE)


def genuine(submit, walker):
    """A user's proxy by voms-proxy-init."""
    made = f"voms-proxy-init --quiet --voms {walker.voms} --out ~/attributes.pem"
    code, said = as_user(submit, walker.account, f"{made} && cat ~/attributes.pem && rm ~/attributes.pem")
    assert code == 0, said
    return said[said.index("-----BEGIN") :]


@pytest.mark.parametrize("who", ["alice", "bob", "pilot"])
def test_genuine_attributes_are_read_as_voms_and_lcmaps_read_them(grid, submit, verdicts, request, who):
    if who == "pilot":
        pem = ok(grid.node("frontend"), "cat %s", PILOT_PROXY)
    else:
        pem = genuine(submit, request.getfixturevalue(who))
    said = verdicts(pem)
    assert said.ours.rc == said.info.rc == said.lcmaps.rc == 0, said
    assert said.ours.stdout.split() == list(map(normalised, said.fqans))
    assert said.ours.stdout.split()[0] == normalised(said.lcmaps.stdout.strip())
    assert said.left > 0


@pytest.fixture(scope="module")
def parts(grid, submit, alice, bob, tmp_path_factory):
    """What forgers would like to have: users' credentials, a genuine AC, the VOMS server's key."""
    directory = tmp_path_factory.mktemp("parts")

    def credential(node, name, *paths):
        files = [directory / f"{name}.{kind}" for kind in ("cert", "key")]
        for file, path in zip(files, paths, strict=True):
            file.touch(0o600)
            file.write_text(ok(node, "cat %s", path))
        return load_pem(*files)

    def user(walker):
        place = ok(submit, "getent passwd %s", walker.account).split(":")[5] + "/.globus"
        return credential(submit, walker.account, f"{place}/usercert.pem", f"{place}/userkey.pem")

    place, name = "/etc/grid-security", grid.names("voms_server")[0]
    key = credential(host(name), "voms", f"{place}/hostcert.pem", f"{place}/hostkey.pem")
    carried = Chain.from_pem(genuine(submit, alice).encode()).leaf.extensions
    return SimpleNamespace(
        alice=user(alice), bob=user(bob), fqan=alice.fqan,
        genuine=carried.get_extension_for_oid(voms.ACSEQ).value.public_bytes(),
        server=lambda credential=key, node=name: pki.VomsServer(directory, credential, grid.vo, grid.fqdn(node)),
    )  # fmt: skip


def made(parts, *, server=None, fqan=None, **options):
    """Alice's proxy with an AC of our making."""
    server = server or parts.server()
    return pki.with_attributes(parts.alice, server.attribute_certificate(parts.alice, fqan or parts.fqan, **options))


def critical(parts):
    server = parts.server()
    changed = server.extensions(other=("1.3.6.1.4.1.99999.1", True, b"\5\0"))
    return made(parts, server=server, edit=lambda info: info.__setitem__("extensions", changed))


CASES = {
    "made with the server's key": (made, None, 0, True),
    "genuine AC moved to a new proxy": (lambda parts: pki.carrying(parts.alice, parts.genuine), None, 0, True),
    "forged": (
        lambda parts: pki.carrying(parts.alice, parts.genuine[:-1] + bytes([parts.genuine[-1] ^ 1])),
        "bad signature", 1, False,
    ),
    "expired": (lambda parts: made(parts, hours=(-2, -1)), "attribute certificate expired", 0, False),
    "in the future": (lambda parts: made(parts, hours=(1, 2)), "not valid before", 0, False),
    "another's": (lambda parts: pki.carrying(parts.bob, parts.genuine), "attributes of somebody else", 0, False),
    "another's key": (lambda parts: made(parts, server=parts.server(parts.bob)), "is not who may speak for", 1, False),
    "unknown server": (lambda parts: made(parts, server=parts.server(node="voms2")), "unknown server", 1, False),
    "another VO": (lambda parts: made(parts, fqan="/other/Role=pilot"), "is not of VO", 1, False),
    "critical extension": (critical, "critical extension", 1, False),
    "expired three minutes ago": (lambda parts: made(parts, hours=(-2, -0.05)), "certificate expired", 0, True),
    "weak hash": (lambda parts: made(parts, algorithm="sha1_rsa"), "weak signature algorithm sha1", 0, True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_forged_attributes_are_refused_with_the_reason(parts, verdicts, case):
    make, reason, info, mapped = CASES[case]
    said = verdicts(make(parts).pem().decode())
    assert (said.ours.rc == 0) is (reason is None), said
    assert (reason or "") in said.ours.stderr
    assert said.info.rc == info, said
    assert (said.lcmaps.rc == 0) is mapped, said
    if "expired" in case:
        assert said.left == 0
    if reason is None:
        assert said.ours.stdout.split() == list(map(normalised, said.fqans))
    else:
        assert said.ours.stdout == ""
