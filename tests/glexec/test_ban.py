"""pilotbed-ban, which playbooks/ban.yml runs on every computing element and worker: it counts from the next call on."""

import contextlib
import json
import shlex

import pytest
from glexecbed import CHECKOUT, GLEXEC, PEOPLE, until

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
    assert "such as" in done.err


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
def test_playbook(given, code, words, bed):
    done = bed.play(CHECKOUT / "playbooks/ban.yml", "-e", json.dumps(given))
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout


def test_a_banned_user_stays_so_when_the_node_is_deployed_again(pilot):
    with banned(pilot.bed, "dn", ALICE):
        pilot.bed.deploy("worker", "--skip-tags", "worker_timer")
        assert pilot.glexec().code == 203
    until("the ban is lifted", lambda: pilot.glexec().code == 0)
