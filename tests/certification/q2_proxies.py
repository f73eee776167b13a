"""Question 2: where a user's proxy is while a job of hers runs."""

from dataclasses import dataclass

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, TESTS_OWN, ok

#: Every file with a private key where users, pilots, daemons and payloads may write: path, owner, mode, subject, and
#: the digest of its public key.
FIND = r"""
grep -rlsE -- '-----BEGIN ([A-Z]+ )?PRIVATE KEY-----' \
    /tmp /var/tmp /dev/shm /home /root /run /srv /var/lib /var/spool /etc |
while read -r f; do
    printf '%s\t%s\t%s\t%s\n' "$f" "$(stat -c '%U	%a' "$f")" \
        "$(openssl x509 -noout -subject -nameopt compat -in "$f" 2> /dev/null)" \
        "$(openssl pkey -in "$f" -pubout -passin pass: 2> /dev/null | sha256sum)"
done
"""


@dataclass(frozen=True)
class Key:
    """A file with a private key."""

    node: str
    path: str
    owner: str
    mode: str
    subject: str
    digest: str


@pytest.fixture(scope="module")
def keys(running):
    """Every private key of every node, while alice's job runs; but for those of other tests (G1 to G14 go on)."""
    said = ((name, ok(host(name), "sh -c %s", FIND)) for name in GRID.names("all"))
    found = [Key(name, *line.split("\t")) for name, lines in said for line in lines.splitlines()]
    return [key for key in found if not key.path.startswith(TESTS_OWN)]


@pytest.fixture(scope="module")
def dn(running):
    """Alice's name."""
    return running.job.ad()["x509userproxysubject"]


@pytest.mark.check("D2.1")
def test_a_users_proxies_are_readable_by_their_owners_only(keys, dn, running):
    proxies = [key for key in keys if f"{dn}/CN=" in key.subject]
    there = {key.node for key in proxies}
    worker = ok(running.worker, "uname -n").strip().partition(".")[0]
    assert {GRID.names("submit")[0], worker} <= there, "control: they are looked for where they are"
    assert [key for key in proxies if key.mode not in ("600", "400")] == []
    assert there <= {GRID.names("submit")[0], worker}, "nowhere else"


@pytest.mark.check("D2.1")
def test_a_users_own_key_has_not_left(keys, alice):
    own = {key for key in keys if key.path.endswith(f"/{alice.account}/.globus/userkey.pem")}
    assert own, "control: it is found where it belongs"
    digests = {key.digest for key in own}
    assert {(key.node, key.path) for key in keys if key.digest in digests} == {(key.node, key.path) for key in own}


@pytest.mark.check("D2.1")
def test_no_private_key_is_readable_by_others(keys):
    open_ones = [key for key in keys if int(key.mode, 8) & 0o007]
    assert not open_ones
