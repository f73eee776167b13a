"""pilotbed-ban, which playbooks/ban.yml runs on every computing element and worker: it counts from the next call on."""

import contextlib
import json
import random
import shlex

import pki
import pytest
from cryptography import x509
from glexecbed import CHECKOUT, GLEXEC, PEOPLE, until
from pilotbed.x509 import Credential

ALICE, BOB = f"{PEOPLE}Alice", f"{PEOPLE}Bob"
LISTS = "/etc/grid-security/ban_users.db /etc/grid-security/ban_fqans.db"


def ban(bed, *words):
    """Call the program as the playbook does; return what it printed."""
    return bed.root(f"/usr/bin/pilotbed-ban {shlex.join(words)}")


@contextlib.contextmanager
def banned(bed, kind, name):
    assert ban(bed, kind, "--", name) == "changed\n"
    try:
        yield
    finally:
        assert ban(bed, "--lift", kind, "--", name) == "changed\n"


#: A ban; the FQANs of proxies that it hits, and of some that it leaves alone.
CASES = {
    "a DN": (("dn", ALICE), [["/gridlab"], ["/gridlab/Role=production"]], []),
    "another DN": (("dn", BOB), [], [["/gridlab"]]),
    "a group": (("fqan", "/gridlab/analysis"), [["/gridlab/analysis", "/gridlab"], ["/gridlab", "/gridlab/analysis"]],
                [["/gridlab"], ["/gridlab/analysis2"], ["/gridlab/analysis/Role=x"]]),
    "a role": (("fqan", "/gridlab/Role=production/Capability=NULL"), [["/gridlab/Role=production", "/gridlab"]],
               [["/gridlab"]]),
    "a VO": (("vo", "gridlab"), [["/gridlab"], ["/gridlab/analysis"], ["/gridlab/Role=production"]], []),
    "a VO whose name begins like this": (("vo", "grid"), [], [["/gridlab"]]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_ban_counts_at_the_next_call_until_it_is_lifted(name, pilot):
    given, hit, spared = CASES[name]
    proxies = {
        str(fqans): pilot.bed.write(f"{pilot.work}/proxy{number}", pilot.bed.proxy(fqans=fqans))
        for number, fqans in enumerate([*hit, *spared])
    }

    def codes():
        return {fqans: pilot.glexec(GLEXEC_CLIENT_CERT=proxy).code for fqans, proxy in proxies.items()}

    before = codes()
    assert set(before.values()) == {0}
    with banned(pilot.bed, *given):
        assert ban(pilot.bed, given[0], "--", given[1]) == "", "a second ban changes nothing"
        assert codes() == {str(fqans): 203 for fqans in hit} | {str(fqans): 0 for fqans in spared}
    assert codes() == before


#: A name that a certificate may have; forms in which it may be given to the ban, LCMAPS's own first.
NAMES = {
    "Robot/Alice": [r"/CN=Robot\/Alice", "/CN=Robot/Alice", "/commonName=Robot/Alice"],
    "C++": [r"/CN=C\+\+", "/CN=C++"],
    "Jürgen Groß": [r"/CN=J\xC3\xBCrgen Gro\xC3\x9F", "/CN=Jürgen Groß", r"/CN=J\xc3\xbcrgen Gro\xc3\x9f"],
    "*.[a]?": ["/CN=*.[a]?"],
    'the "boss"': ['/CN=the "boss"'],
    "a\\": ["/CN=a\\"],
}


@pytest.fixture
def named(pilot):
    """Make a proxy of somebody of this name; return its path."""
    def make(name):
        common = x509.NameAttribute(x509.NameOID.COMMON_NAME, name)
        subject, key = x509.Name([*pki.name("/DC=test/DC=grid"), common]), pki.rsa_key()
        ca, usage = pilot.bed.ca, pki.usage(digital_signature=True, key_encipherment=True)
        certificate = pki.sign(subject, ca.name, key, ca.key, extensions=[(usage, True)])
        holder = Credential(pki.Chain((certificate,)), key)
        attributes = pilot.bed.voms.attribute_certificate(holder, "/gridlab/Role=NULL/Capability=NULL")
        return pilot.bed.write(f"{pilot.work}/named", pki.with_attributes(holder, attributes).pem())

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_ban_hits_its_user_in_whatever_form_it_is_given(name, pilot, named):
    proxy = named(name)
    assert pilot.glexec(GLEXEC_CLIENT_CERT=proxy).code == 0
    for form in NAMES[name]:
        with banned(pilot.bed, "dn", f"/DC=test/DC=grid{form}"):
            assert pilot.glexec(GLEXEC_CLIENT_CERT=proxy).code == 203, form
            assert pilot.glexec().code == 0, "everybody is refused"
        assert pilot.glexec(GLEXEC_CLIENT_CERT=proxy).code == 0, form


#: In the bed, as root: says for each DN and its neighbours (a line of JSON) whom LCMAPS refuses for our entry of it.
ASK = """
import json, sys
sys.path.insert(0, "/usr/lib/pilotbed")
from pathlib import Path
from pilotbed.glexec import ban
from pilotbed.lcmaps import Lcmaps
database = Path(ban.DATABASE).read_text().replace(str(ban.FILES["dn"]), "/run/ban")
Path("/run/ban.db").write_text(database)
lcmaps = Lcmaps("/run/ban.db", ban.POLICY, 0)
for line in sys.stdin:
    name, *others = json.loads(line)
    Path("/run/ban").write_text(f"{ban._entry(name)}\\n")
    print(json.dumps([one for one in (name, *others) if lcmaps.run_with_fqans(one, ("/x",)) is None]))
"""


def test_lcmaps_reads_an_entry_as_this_name_and_no_other(bed):
    """LCMAPS is the judge: of texts made of all that is special to fnmatch, to gridmapfiles and to one-line forms."""
    draw = random.Random(1)
    special = [*" /*?[]!^-\"'#,=~ab\\", "\\/", "\\+", "\\xC3", "[*]", "CN=", "/CN=", "[[:blank:]]"]
    asked = []
    for _ in range(500):
        name = "/CN=" + "".join(draw.choices(special, k=draw.randint(0, 7)))
        cuts = (draw.randrange(4, len(name) + 1) for _ in range(4))
        others = {name[:cut] + draw.choice(["", *special]) + name[cut + draw.randint(0, 1) :] for cut in cuts}
        asked.append([name, *(others - {name})])
    done = bed.run("/usr/bin/python3", "-I", "-c", ASK, user="root", input="".join(f"{json.dumps(a)}\n" for a in asked))
    assert done.code == 0, done.err
    answers = [json.loads(line) for line in done.out.splitlines()]
    wrong = [(names, refused) for names, refused in zip(asked, answers, strict=True) if refused != names[:1]]
    assert wrong == []


def faulty_entries(bed):
    return bed.patched("ban", """f'"{literal}"'""", """f'"{literal} "'""")


def deaf_lcmaps(bed):
    return bed.changed("/etc/lcmaps/lcmaps-ban.db", lambda text: text.replace("ban_dn -> ban_fqan\n", ""))


@pytest.mark.parametrize("broken", [faulty_entries, deaf_lcmaps])
def test_a_ban_that_does_not_count_is_not_called_fine(broken, bed):
    with broken(bed):
        done = bed.run("/usr/bin/pilotbed-ban", "dn", "--", "/CN=x", user="root")
    bed.root("sed -i '\\#/CN=x#d' /etc/grid-security/ban_users.db")
    assert done.code == 1
    assert "lets /CN=x in all the same" in done.err


def test_a_pattern_that_bans_everybody_is_told(bed):
    with bed.changed("/etc/grid-security/ban_users.db", lambda text: f'{text}"/CN=nobody*"\n'):
        done = bed.run("/usr/bin/pilotbed-ban", "dn", "--", "/CN=x", user="root")
    assert (done.code, "refuses everybody" in done.err) == (1, True)


def test_a_lift_tells_of_what_still_bans(bed):
    with banned(bed, "vo", "gridlab"):
        assert ban(bed, "fqan", "--", "/gridlab/a") == "changed\n"
        done = bed.run("/usr/bin/pilotbed-ban", "--lift", "fqan", "--", "/gridlab/a", user="root")
        assert (done.code, "still banned by other lines" in done.err) == (0, True)


@pytest.mark.parametrize("kind", ["dn", "fqan", "vo"])
@pytest.mark.parametrize("cgroups", ["writable", "absent"])
def test_payloads_of_the_banned_end_on_request_and_no_others(kind, cgroups, pilot):
    """bob's payload, of another group, runs on."""
    bed = pilot.bed
    fqans = {"alice": ["/gridlab/analysis"], "bob": ["/gridlab"]}
    others = bed.write(f"{pilot.work}/bob", bed.proxy("bob", fqans=fqans["bob"]))
    pilot.proxy = bed.write(f"{pilot.work}/alice", bed.proxy(fqans=fqans["alice"]))
    since = len(bed.log())
    calls = {
        proxy: bed.start(GLEXEC, "/bin/sh", "-c", "trap '' TERM HUP; echo up; setsid sleep 1000 & read -r _",
                         cgroups=cgroups, env={"GLEXEC_CLIENT_CERT": proxy})
        for proxy in (pilot.proxy, others)
    }  # fmt: skip
    for call in calls.values():
        assert call.stdout.readline() == "up\n", bed.finish(call)
    given = {"dn": ALICE, "fqan": "/gridlab/analysis", "vo": "gridlab"}[kind]
    ended = ban(bed, "--end-payloads", kind, "--", given).splitlines()
    ban(bed, "--lift", kind, "--", given)
    assert ended[0] == "changed"
    assert len(ended) == (3 if kind == "vo" else 2), ended
    done = bed.finish(calls[pilot.proxy])
    assert done.code == 137
    line = next(line for line in bed.log()[since:] if "glexec[" in line and "CN=Alice" in line)
    assert 'reason="the site has ended it"' in line
    assert 'ended="killed"' in line
    assert bed.finish(calls[others], input="\n").code == (137 if kind == "vo" else 0)


@pytest.mark.parametrize(
    "words",
    [
        ["dn", "CN=Alice"],
        ["dn", '/CN=a"\n"/CN=b'],
        ["dn", "/DC=test/*"],
        ["dn", ""],
        ["fqan", "gridlab"],
        ["fqan", "/gridlab/*"],
        ["fqan", "/gridlab/Role="],
        ["vo", "/gridlab"],
        ["vo", "*"],
    ],
)
def test_what_cannot_be_meant_changes_nothing(words, bed):
    before = bed.root(f"cat {LISTS}")
    done = bed.run("/usr/bin/pilotbed-ban", words[0], "--", words[1], user="root")
    assert (done.code, bed.root(f"cat {LISTS}")) == (1, before)
    assert any(remedy in done.err for remedy in ("such as", "no patterns", "is written"))


@pytest.mark.parametrize("path", LISTS.split())
def test_without_a_list_nobody_gets_in(path, pilot):
    pilot.bed.root(f"mv {path} {path}.kept")
    try:
        assert pilot.glexec().code == 203
    finally:
        pilot.bed.root(f"mv {path}.kept {path}")


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ({"ban_dn": ALICE}, 0, "changed=1"),
        ({"ban_dn": ALICE}, 0, "changed=0"),
        ({"ban_dn": ALICE, "ban_state": "absent"}, 0, "changed=1"),
        ({"ban_dn": ALICE, "ban_vo": "gridlab"}, 2, "say one of"),
        ({}, 2, "say one of"),
        ({"ban_vo": "gridlab", "ban_state": "gone"}, 2, "say one of"),
        ({"ban_fqan": "gridlab"}, 2, "such as /gridlab/analysis"),
        ({"ban_vo": "--lift"}, 2, "is no VO"),
    ],
)
def test_the_playbook_bans_lifts_and_refuses(given, code, words, bed):
    done = bed.play(CHECKOUT / "playbooks/ban.yml", "-e", json.dumps(given))
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout


def test_a_banned_user_stays_so_when_the_node_is_deployed_again(pilot):
    with banned(pilot.bed, "dn", ALICE):
        pilot.bed.deploy("worker", "--skip-tags", "worker_timer")
        assert pilot.glexec().code == 203
    until("the ban is lifted", lambda: pilot.glexec().code == 0)
