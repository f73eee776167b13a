"""Records of payloads: what counts as one, which are chosen, what they are joined with."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.glexec import policy
from pilotbed.trace import cli, records
from pilotbed.trace.records import Payload

ALICE = "/DC=test/CN=Alice"
ENTRY = {
    "_UID": "0", "_HOSTNAME": "wn1.grid.test", "SYSLOG_IDENTIFIER": "glexec", "GLEXEC_DN": ALICE,
    "GLEXEC_FQAN": "/gridlab", "GLEXEC_ID": "submit#22.0#1", "GLEXEC_CALLER": "pilot009", "GLEXEC_TARGET": "gl016",
    "GLEXEC_PILOT": "/cn=pilot", "GLEXEC_BATCH": "slurm 6", "GLEXEC_STARTED": "1000.5", "GLEXEC_WALL": "10.0",
    "GLEXEC_CPU": "9.5", "GLEXEC_MEMORY": "1048576", "GLEXEC_EXIT": "0", "GLEXEC_ENDED": "exit 0",
}  # fmt: skip


def made(**changes: Any) -> Payload:
    one = records.payload(ENTRY)
    assert one is not None
    return Payload(**{**vars(one), **changes})


def test_entry_is_a_record() -> None:
    assert made() == Payload(
        node="wn1.grid.test", account="gl016", dn=ALICE, fqan="/gridlab", id="submit#22.0#1", pilot_account="pilot009",
        pilot="/cn=pilot", batch="slurm 6", start=1000.5, end=1010.5, cpu=9.5, memory=1 << 20, exit=0, ended="exit 0",
        reason="",
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"_UID": "21016"},
        {"_UID": ""},
        {"SYSLOG_IDENTIFIER": "glexec2"},
        {"GLEXEC_STARTED": ""},
        {"GLEXEC_ENDED": ""},  # refused: nothing ran
    ],
)
def test_what_is_no_record_of_roots_is_none(changes: dict[str, Any]) -> None:
    assert records.payload(ENTRY | changes) is None


def test_export_format_is_read() -> None:
    forged = b"a\n\n_UID=0\n"
    stream = b"_UID=0\nID\n" + len(forged).to_bytes(8, "little") + forged + b"\nDN=/CN=x\nDN=/CN=y\n\n\n_UID=21016\n"
    assert list(records.exported(io.BytesIO(stream))) == [
        {"_UID": "0", "ID": forged.decode(), "DN": "/CN=x"},
        {"_UID": "21016"},
    ]
    for end in range(12, 12 + len(forged)):
        with pytest.raises(ValueError, match="cut off"):
            list(records.exported(io.BytesIO(stream[: len(b"_UID=0\n") + end])))


@given(st.dictionaries(st.from_regex(r"[A-Z_]{1,9}", fullmatch=True), st.text(), max_size=5))
def test_what_glexec_sends_comes_back(fields: dict[str, str]) -> None:
    """The native protocol's fields are the export format's."""
    entry = policy.journal_entry(fields) + b"\n"
    expected = [fields] if fields else []
    assert list(records.exported(io.BytesIO(entry))) == expected


@pytest.mark.parametrize(
    ("since", "until", "found"),
    [(0, 999, False), (0, 1000.5, True), (1005, 1005, True), (1010.5, 2000, True), (1011, 2000, False)],
)
def test_a_payload_is_there_from_start_to_end(since: float, until: float, found: bool) -> None:
    assert bool(records.chosen([made()], node="wn1", since=since, until=until)) is found
    assert bool(records.chosen([made(end=None)], since=since, until=until)) is (until >= 1000.5)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"node": "wn1"}, True),
        ({"node": "wn1.grid.test"}, True),
        ({"node": "wn"}, False),
        ({"dn": ALICE}, True),
        ({"dn": "/DC=test/CN=Ali"}, False),
        ({"account": "gl016"}, True),
        ({"account": "gl01"}, False),
        ({"node": "wn1", "account": "gl017"}, False),
    ],
)
def test_choice_by_node_user_and_account(asked: dict[str, str], found: bool) -> None:
    assert bool(records.chosen([made()], since=0, until=2000, **asked)) is found


JOB = {"user": "pilot009", "state": "COMPLETED", "start": "2026-11-21T02:43:17", "end": "2026-11-21T02:50:00",
       "nodes": "wn1"}  # fmt: skip


def test_join_by_batch_job_and_global_job_id() -> None:
    ad = {"GlobalJobId": "submit#22.0#1", "Owner": "alice"}
    (one,) = records.joined([made()], {"slurm 6": JOB}, [ad, {"GlobalJobId": "submit#2.0#1"}])
    assert (one.job, one.condor) == (JOB, ad)
    assert [records.from_json(value) for value in json.loads(json.dumps(records.as_json([one])))] == [one]


@pytest.mark.parametrize("changes", [{"batch": ""}, {"batch": "slurm 7"}, {"pilot_account": "pilot001"}])
def test_what_does_not_fit_is_not_joined(changes: dict[str, str]) -> None:
    (one,) = records.joined([made(**changes)], {"slurm 6": JOB})
    assert one.job == {}


def test_table_has_nothing_for_a_terminal_to_obey() -> None:
    shown = records.table([made(id="a\x1b[2J\nb"), made(end=None, ended="")])
    assert len(shown.splitlines()) == 3
    assert "\x1b" not in shown
    assert "a?[2J?b" in shown
    assert "1970-01-01 00:16:40" in shown
    assert "running" in shown


NUMBERS = ("STARTED", "WALL", "CPU", "MEMORY", "EXIT")


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", ["soon", "nan", "inf", "1e300", "-1e300", "9" * 5000, "0x10", "1 2"])
def test_a_record_whose_numbers_are_none_says_which(field: str, value: str) -> None:
    with pytest.raises(records.Unreadable, match=f"^{field} is "):
        records.payload(ENTRY | {f"GLEXEC_{field}": value})


@given(st.dictionaries(st.sampled_from(sorted(ENTRY)), st.text(max_size=30)))
def test_any_entry_is_a_record_or_none_or_refused(changes: dict[str, str]) -> None:
    try:
        one = records.payload(ENTRY | changes)
    except records.Unreadable:
        return
    if one:
        records.table(records.chosen([one], since=0, until=2**40))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(vars(made()))), ANYTHING, min_size=1), ANYTHING)
def test_any_json_is_a_record_or_refused(changes: dict[str, object], instead: object) -> None:
    (good,) = records.as_json([made()])
    left_out = cli.LeftOut()
    found = list(left_out.read(records.from_json, [good | changes, instead, good]))
    assert found[-1] == made()
    assert left_out.count == 3 - len(found)
    records.table(records.chosen(records.joined(found, {}), since=0, until=2**40))


@given(st.sampled_from(["target", "dn", "fqan", "id", "caller", "batch", "started"]), ANYTHING)
def test_any_call_that_is_under_way_is_a_record_or_refused(field: str, value: object) -> None:
    log = {"target": "gl016", "dn": ALICE, "fqan": "", "id": "x", "caller": "pilot", "batch": "", "started": 1.5}
    with pytest.raises(records.Unreadable, match=f"{field} is missing"):
        records.running({name: said for name, said in log.items() if name != field}, "wn1")
    with contextlib.suppress(records.Unreadable):
        records.table([records.running(log | {field: value}, "wn1")])


@given(st.binary(max_size=200))
def test_any_bytes_are_entries_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        list(records.exported(io.BytesIO(data)))


def test_records_that_are_none_do_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (good,) = records.as_json([made()])
    file = tmp_path / "records.json"
    file.write_text(json.dumps([good | {"start": "soon"}, good, 7]))
    words = ["--account", "gl016", "--since", "@0", "--records", str(file)]
    assert cli.main([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == [good]
    assert said.err == "pilotbed-trace: 2 records left out; of the first, start is 'soon'\n"
    file.write_text('{"start": 1}')
    assert cli.main(words) == 1
    assert "not what --json prints" in capsys.readouterr().err


#: Shows the entries of the directory that it is asked for.
JOURNALCTL = """#!/bin/sh
for word; do case $word in --directory=*) exec cat "${word#--directory=}/entries";; esac; done
exit 1
"""


@pytest.fixture
def collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Collected journals of two nodes, with a record each that says it is wn1's."""
    (tmp_path / "journalctl").write_text(JOURNALCTL)
    (tmp_path / "journalctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    text = "".join(f"{name}={value}\n" for name, value in {**ENTRY, "GLEXEC_BATCH": ""}.items())
    for node in ("wn1", "wn2"):
        directory = tmp_path / "remote" / node
        directory.mkdir(parents=True)
        (directory / f"{node}.journal").touch()
        (directory / "entries").write_text(f"{text}\n".replace("gl016", f"gl-{node}"))
    (tmp_path / "remote/empty").mkdir()
    return tmp_path / "remote"


def asked(*words: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> list[tuple[str, str]]:
    """Return node and account of each payload that the command names."""
    assert cli.main([*words, "--since", "@0", "--json"]) == code
    return [(one["node"], one["account"]) for one in json.loads(capsys.readouterr().out)]


def test_a_collected_record_is_of_the_node_whose_directory_it_is_in(
    collected: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--directory", str(collected))
    assert asked("--dn", ALICE, *where, capsys=capsys) == [("wn1", "gl-wn1"), ("wn2", "gl-wn2")]
    assert asked("--node", "wn1.grid.test", *where, capsys=capsys) == [("wn1", "gl-wn1")]
    assert asked("--node", "wn2", "--directory", str(collected / "wn2"), capsys=capsys) == [("wn2", "gl-wn2")]
    assert asked("--node", "wn1", "--directory", str(collected / "wn2"), capsys=capsys) == []


def test_a_node_that_cannot_be_read_hides_no_other(collected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (collected / "wn1/entries").unlink()
    assert asked("--dn", ALICE, "--directory", str(collected), capsys=capsys, code=1) == [("wn2", "gl-wn2")]


def test_a_machines_own_journals_are_read_as_they_are(collected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for node in ("wn1", "wn2"):
        (collected / node / f"{node}.journal").unlink()
    machine = collected / ("0" * 32)
    machine.mkdir()
    (machine / "system.journal").touch()
    (collected / "entries").write_text((collected / "wn1/entries").read_text())
    assert asked("--dn", ALICE, "--directory", str(collected), capsys=capsys) == [("wn1.grid.test", "gl-wn1")]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--node", "x", "--at", "@1", "--since", "@0"],
        ["--node", "x", "--at", "noon"],
        ["--node", "x", "--at", "@inf"],
        ["--node", "x", "--since", "@nan"],
        ["--dn", "Alice"],
    ],
)
def test_command_line_that_cannot_be_meant_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.arguments(words)
    assert "pilotbed-trace: error" in capsys.readouterr().err


def test_a_dn_is_looked_for_as_the_records_have_it() -> None:
    assert cli.arguments(["--dn", "/CN=Robot/Jürgen"]).dn == r"/CN=Robot\/J\xC3\xBCrgen"


def test_a_time_is_read_as_seconds_or_as_iso() -> None:
    assert cli.moment("@12.5") == 12.5
    assert cli.moment("1970-01-01T01:00:00+01:00") == 0
