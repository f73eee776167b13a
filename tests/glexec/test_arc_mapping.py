"""A-REX's mapping plug-in with the real LCMAPS, and ARC's own as the control."""

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from glexecbed import CHECKOUT, GRIDMAPDIR

SERVICES = "/DC=test/DC=grid/O=Gridlab/OU=Services/CN="
PLUGIN = "/usr/libexec/pilotbed/arc-mapping"
ARCS = ("/usr/lib/arc/arc-lcmaps", "%D", "%P", "/usr/lib/x86_64-linux-gnu/liblcmaps.so", "/usr/lib/lcmaps",
        "/etc/lcmaps/lcmaps-arc.db", "voms")  # fmt: skip
OURS = (PLUGIN, "%D", "%P", GRIDMAPDIR)


@pytest.fixture
def mapped(bed):
    """Map a client as A-REX does: ``mapped(dn, chain)``; it keeps what the client sent in a file of root's."""
    bed.people |= {name: bed.ca.issue(SERVICES + name) for name in ("pilot", "other") if name not in bed.people}
    bed.write(PLUGIN, (CHECKOUT / f"roles/ce_arc/files{PLUGIN}").read_text(), "root", 0o755)

    def call(dn, chain, command=OURS):
        there = {"%D": dn, "%P": bed.write("/srv/work/chain", chain, "root", 0o600)}
        return bed.run(*(there.get(word, word) for word in command), user="root")

    return call


@pytest.fixture
def own(bed, mapped):
    """What a pilot sends."""
    return bed.proxy("pilot", fqans=["/gridlab/Role=pilot"])


@pytest.fixture
def foreign(bed, own):
    """The same, and behind it the certificate of another pilot."""
    return own + bed.people["other"].chain.leaf.public_bytes(Encoding.PEM)


def test_pilot_gets_its_account_and_keeps_it(mapped, own):
    first, second = mapped(f"{SERVICES}pilot", own), mapped(f"{SERVICES}pilot", own)
    assert first.code == 0, first
    assert first.out.startswith("pilot0")
    assert first.out.endswith(":glpilot")
    assert second.out == first.out


def test_lcmaps_does_not_run_as_root(bed, mapped, own):
    bed.root(f"rm -f {GRIDMAPDIR}/.lock")
    assert mapped(f"{SERVICES}pilot", own).code == 0
    assert bed.root(f"stat -c %U {GRIDMAPDIR}/.lock").strip() == "glexec"


def test_another_pilots_certificate_behind_ones_own_gives_no_account(mapped, foreign):
    done = mapped(f"{SERVICES}pilot", foreign)
    assert (done.code, done.out) == (1, "")
    assert "not of one chain" in done.err


def test_control_arcs_own_plugin_gives_the_other_pilots_account(mapped, own, foreign):
    mine = mapped(f"{SERVICES}pilot", own)
    other = mapped(f"{SERVICES}pilot", foreign, ARCS)
    assert other.code == 0, other
    assert other.out.startswith("pilot0")
    assert other.out != mine.out


@pytest.mark.parametrize(("dn", "chain", "why"), [
    (f"{SERVICES}other", None, "has sent the certificates of /DC=test/DC=grid/O=Gridlab/OU=Services/CN=pilot"),
    (f"{SERVICES}pilot", b"rubbish", "no certificate chain"),
])  # fmt: skip
def test_what_a_rex_has_not_verified_gives_no_account(mapped, own, dn, chain, why):
    done = mapped(dn, chain or own)
    assert (done.code, done.out) == (1, "")
    assert why in done.err
