"""Entries of LCMAPS's ban lists. That LCMAPS reads them so is asked of it in tests/glexec/test_ban.py."""

import pytest
from pilotbed.glexec import ban

PEOPLE = "/DC=test/DC=grid/O=Gridlab/OU=People/CN="


@pytest.mark.parametrize(("name", "entries"), [
    (f"{PEOPLE}Alice Adams", [f'"{PEOPLE}Alice Adams"']),
    ("/CN=Robot/Alice", [r'"/CN=Robot\/Alice"']),
    (r"/CN=Robot\/Alice", [r'"/CN=Robot\/Alice"']),
    ("/CN=C++", [r'"/CN=C\+\+"']),
    ("/CN=Jürgen", [r'"/CN=J\xC3\xBCrgen"']),
    (r"/CN=J\xC3\xBCrgen", [r'"/CN=J\xC3\xBCrgen"']),
    (r"/CN=a\xc3", [r'"/CN=a\xC3"', r'"/CN=a\xc3"']),
    ("/CN=a+OU=b", ['"/CN=a+OU=b"']),
    ("/1.2.3=a/emailAddress=a@b", ['"/1.2.3=a/emailAddress=a@b"']),
    ("/CN=*.grid.test", ['"/CN=[*].grid.test"']),
    ("/CN=[a]?", ['"/CN=[[]a][?]"']),
    ('/CN=the "boss" *', ['/CN=the[[:blank:]]"boss"[[:blank:]][*]']),
    ("/CN=a\\", ['"/CN=a[\\]"']),
])  # fmt: skip
def test_an_entry_is_what_lcmaps_compares_with(name: str, entries: list[str]) -> None:
    assert ban.lines("dn", name) == entries


@pytest.mark.parametrize("name", ["", "Alice", "CN=Alice", "/DC=test/*", '/CN=a"\n"/CN=b"', "/CN=a/foo=b", "/XN=a"])
def test_what_would_ban_nobody_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"such as|no patterns|is written|no type"):
        ban.lines("dn", name)


@pytest.mark.parametrize(("kind", "name", "entries", "asked"), [
    ("fqan", "/gridlab/a", ['"/gridlab/a"', '"/gridlab/a/Role=NULL/Capability=NULL"'], None),
    ("fqan", "/gridlab/Role=pilot/Capability=NULL", ['"/gridlab/Role=pilot"', '"/gridlab/Role=pilot/Capability=NULL"'],
     None),
    ("vo", "gridlab", ['"/gridlab"', '"/gridlab/*"'], ["/gridlab", "/gridlab/group/Role=role/Capability=NULL"]),
])  # fmt: skip
def test_groups_and_vos(kind: str, name: str, entries: list[str], asked: list[str] | None) -> None:
    assert ban.lines(kind, name) == entries
    assert ban.banned(kind, name) == (asked or [entry.strip('"') for entry in entries])


@pytest.mark.parametrize(("kind", "name", "concerned"), [
    ("dn", "/CN=Robot/Jürgen", True),
    ("dn", r"/CN=Robot\/J\xc3\xBCrgen", True),
    ("dn", "/CN=Robot", False),
    ("fqan", "/gridlab/a", True),
    ("fqan", "/gridlab", False),
    ("vo", "gridlab", True),
    ("vo", "grid", False),
])  # fmt: skip
def test_whose_payloads_are_ended(kind: str, name: str, concerned: bool) -> None:
    log = {"dn": r"/CN=Robot\/J\xC3\xBCrgen", "fqan": "/gridlab/a/Role=NULL/Capability=NULL"}
    assert ban.concerns(kind, name, log) is concerned


def test_a_list_says_whether_it_has_a_ban() -> None:
    entries = ban.lines("dn", r"/CN=a\xc3")
    assert len(entries) == 2
    assert ban.has(f"# {entries[0]}\n{entries[1]}\n", entries)
    assert not ban.has(f'# {entries[0]}\n"/CN=a"\n', entries)
    assert not ban.has("", entries)


def test_a_list_keeps_its_other_lines() -> None:
    before = '# kept\n"/CN=a"\n"/CN=b"\n'
    assert ban.changed(before, ['"/CN=a"'], False) == '# kept\n"/CN=b"\n'
    assert ban.changed(before, ['"/CN=a"'], True) == '# kept\n"/CN=b"\n"/CN=a"\n'
