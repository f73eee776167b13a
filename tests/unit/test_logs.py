"""The chain over collected journals: what it finds, and that neither odd input nor an end in the middle harms it."""

from __future__ import annotations

import http.client
import http.server
import io
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.logs import chain as chains
from pilotbed.logs import cli, journals, upload
from pilotbed.logs.chain import Chain, Verdict
from pilotbed.logs.cli import Settings
from pilotbed.logs.journals import HEADER, Broken, Record

SOURCE = "0123456789abcdef0123456789abcdef"
NOW = 1_800_000_000.0
DAY = 86400

#: Shows what stands behind the header of a journal as these tests write it; the file is open, and named by descriptor.
JOURNALCTL = f"""#!/bin/sh
for word; do case $word in --file=*) file=${{word#--file=}};; esac; done
case "$* $(tail -c +{HEADER.size + 1} "$file" | tail -c 8 | tr -d '\\0')" in
*--verify*TABLES*) echo "FAIL: $file (Bad message)" >&2; exit 1;;
*--verify*TWICE*) echo "7: Entry timestamp out of synchronization (9 > 8)" >&2; exit 1;;
*--verify*) exit 0;;
esac
case $(tail -c +{HEADER.size + 1} "$file" | head -c 6 | tr -d '\\0') in
BROKEN) echo Failed to iterate through journal: Bad message >&2; exit 1;;
esac
exec tail -c +{HEADER.size + 1} "$file"
"""


@pytest.fixture(autouse=True)
def journalctl(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path_factory.mktemp("bin")
    (directory / "journalctl").write_text(JOURNALCTL)
    (directory / "journalctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def entry(number: int, message: bytes = b"", source: str = SOURCE, others: str = "") -> bytes:
    message = message or b"message %d" % number
    if message.isascii() and b"\n" not in message:
        field = b"MESSAGE=" + message + b"\n"
    else:
        field = b"MESSAGE\n" + len(message).to_bytes(8, "little") + message + b"\n"
    cursor = f"__CURSOR=s={source};i={number:x};b=0;m=0;t=0;x=0\n__REALTIME_TIMESTAMP={number}\n__SEQNUM={number}\n"
    return cursor.encode() + field + others.encode() + b"\n"


def journal(path: Path, entries: list[bytes], head: int = 1, source: str = SOURCE, tail: int = 0) -> Path:
    """Write a file whose header is a journal's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tail = tail or head + len(entries) - 1
    data = HEADER.pack(
        b"LPKSHHRH", 0, 0, 0, *[bytes(16)] * 3, bytes.fromhex(source), *[0] * 8, len(entries), tail, head
    )  # fmt: skip
    path.write_bytes(data + b"".join(entries))
    os.utime(path, (NOW, NOW))
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("j/wn1", "c"):
        (tmp_path / name).mkdir(parents=True)
    return Settings(tmp_path / "j", tmp_path / "c", node_mib=64, free_mib=0)


@pytest.fixture
def filled(settings: Settings) -> Settings:
    """Two nodes; ten records of wn1 in three lines, five of submit in one."""
    path = settings.journals / "wn1/wn1.journal"
    for end in (3, 7, 10):
        journal(path, [entry(number) for number in range(1, end + 1)])
        assert cli.write(settings, NOW + end) == []
    source = "ab" * 16
    journal(settings.journals / "submit/submit.journal", [entry(n, source=source) for n in range(1, 6)], source=source)
    assert cli.write(settings, NOW + 20) == []
    return settings


def wrong(settings: Settings, *nodes: str, now: float = NOW + 60, seen: dict[int, str] | None = None) -> list[str]:
    return cli.verify(settings, nodes, seen or {}, now).wrong


def change(settings: Settings, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Have somebody change wn1's records."""
    journal(settings.journals / "wn1/wn1.journal", change([entry(number) for number in range(1, 11)]), tail=10)


def rewrite(settings: Settings, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Have somebody change the chain's lines."""
    (path,) = chains.segments(settings.chain)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


# -- what it finds


def test_what_came_in_is_as_it_came(filled: Settings) -> None:
    verdict = cli.verify(filled, (), {}, NOW + 60)
    assert (verdict.wrong, verdict.lines, verdict.records, verdict.waiting) == ([], 4, 15, 0)
    assert verdict.nodes == {"wn1", "submit"}


def test_a_second_run_writes_nothing(filled: Settings) -> None:
    before = [path.read_bytes() for path in chains.segments(filled.chain)]
    assert cli.write(filled, NOW + 60) == []
    assert [path.read_bytes() for path in chains.segments(filled.chain)] == before


def test_a_changed_record_is_named(filled: Settings) -> None:
    change(filled, lambda all: [*all[:4], entry(5, b"message S"), *all[5:]])
    assert wrong(filled) == ["wn1: record 5 is changed (received by 2027-01-15 08:00:07 UTC, line 1)"]
    assert wrong(filled, "submit") == []


@pytest.mark.parametrize("field", ["_HOSTNAME", "PRIORITY"])
def test_a_field_that_was_added_is_found(filled: Settings, field: str) -> None:
    change(filled, lambda all: [*all[:4], entry(5, others=f"{field}=1\n"), *all[5:]])
    assert len(wrong(filled)) == 1


def test_removed_records_are_named(filled: Settings) -> None:
    change(filled, lambda all: [*all[:1], *all[4:9]])
    assert wrong(filled) == [
        "wn1: records 2 to 3 are missing (received by 2027-01-15 08:00:03 UTC, line 0)",
        "wn1: record 4 is missing (received by 2027-01-15 08:00:07 UTC, line 1)",
        "wn1: record 10 is missing (received by 2027-01-15 08:00:10 UTC, line 2)",
    ]


def test_a_removed_directory_is_named(filled: Settings) -> None:
    (filled.journals / "wn1/wn1.journal").unlink()
    (filled.journals / "wn1").rmdir()
    assert len(wrong(filled)) == 3


def test_records_that_were_put_in_are_named(filled: Settings) -> None:
    path = filled.journals / "wn1/old.journal"
    journal(path, [entry(1, source="cd" * 16)], source="cd" * 16)
    assert wrong(filled, now=NOW + 60) == []  # it may have just come
    (said,) = wrong(filled, now=NOW + 3600)
    assert said.startswith(f"wn1: records from 1 on, of {path}, have been there for a while")


def test_exchanged_records_are_named(filled: Settings) -> None:
    change(filled, lambda all: [entry(1, b"message 2"), entry(2, b"message 1"), *all[2:]])
    assert len(wrong(filled)) == 1


def test_a_changed_line_is_named(filled: Settings) -> None:
    rewrite(filled, lambda lines: [lines[0], lines[1].replace(b'"count":4', b'"count":4 '), *lines[2:]])
    assert wrong(filled) == ["line 1 of the chain was changed: line 2 (000000000000.chain) followed another one"]


def test_a_line_that_is_none_any_more_is_named(filled: Settings) -> None:
    rewrite(filled, lambda lines: [lines[0], b"x" + lines[1][1:], *lines[2:]])
    assert "line 1 of the chain (000000000000.chain) was changed: it is no line of a chain" in wrong(filled)


def test_a_removed_line_is_named(filled: Settings) -> None:
    rewrite(filled, lambda lines: [lines[0], *lines[2:]])
    assert wrong(filled) == [
        "line 1 is missing in the chain (000000000000.chain)",
        "wn1: records 4 to 7 are in no line of the chain: put in later",
    ]


def test_a_removed_beginning_is_named(filled: Settings) -> None:
    rewrite(filled, lambda lines: lines[1:])
    assert wrong(filled)[0].startswith(
        "the chain begins with line 1 of 2027-01-15 08:00:07 UTC: those before are missing"
    )


def rebuilt(settings: Settings) -> None:
    """Have an intruder with all rights change a record, and make a chain that fits."""
    change(settings, lambda all: [*all[:4], entry(5, b"nothing of note"), *all[5:]])
    for path in settings.chain.glob("*.*"):
        path.unlink()
    assert cli.write(settings, NOW + 30) == []


def test_a_whole_new_chain_is_found_by_what_another_host_has_seen(filled: Settings) -> None:
    seen = chains.heads((filled.chain / "head").read_text())
    assert set(seen) == {4}
    assert wrong(filled, seen=seen) == []
    rebuilt(filled)
    assert wrong(filled) == []  # by itself it cannot tell
    assert wrong(filled, seen=seen) == ["the chain ends with line 1; line 3 was seen elsewhere"]
    assert "seen elsewhere" in wrong(filled, seen={2: seen[4]})[0]


def test_heads_are_read_among_other_lines() -> None:
    head = f"n=12 head={'a' * 64}"
    assert chains.heads(f"curl: (7) no\n{head}\nn=x head=y\nn={'9' * 5000} head={'a' * 64}\n-- No entries --") == {
        12: "a" * 64
    }


# -- retention


def test_old_records_may_be_gone_and_young_ones_may_not(filled: Settings) -> None:
    journal(filled.journals / "wn1/wn1.journal", [entry(number) for number in range(6, 11)], head=6)
    (filled.journals / "submit/submit.journal").unlink()
    assert wrong(filled, now=NOW + 91 * DAY) == []
    assert len(wrong(filled, now=NOW + 89 * DAY)) == 3


def test_of_old_records_none_may_be_missing_between_others(filled: Settings) -> None:
    change(filled, lambda all: [*all[:4], *all[5:]])
    assert len(wrong(filled, now=NOW + 91 * DAY)) == 1


def test_the_chain_itself_is_forgotten(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "SEGMENT", 1)
    path = settings.journals / "wn1/wn1.journal"
    for day in range(6):
        journal(path, [entry(number) for number in range(1, day + 2)])
        assert cli.write(settings, NOW + day * 30 * DAY) == []
    assert [path.stem for path in chains.segments(settings.chain)] == [f"{n:012}" for n in (1, 2, 3, 4, 5)]
    path.unlink()
    journal(path, [entry(number) for number in range(2, 7)], head=2)
    assert wrong(settings, now=NOW + 150 * DAY) == []
    journal(path, [entry(number) for number in range(1, 7)])  # an old record's file may be there
    verdict = cli.verify(settings, (), {}, NOW + 150 * DAY)
    assert (verdict.wrong, verdict.records, verdict.older) == ([], 5, 1)
    chains.segments(settings.chain)[0].unlink()
    (said,) = wrong(settings, now=NOW + 149 * DAY)
    assert said.startswith("the chain begins with line 2")


def test_who_has_used_up_his_share_is_not_taken(settings: Settings) -> None:
    path = settings.journals / "wn1/wn1.journal"
    journal(path, [entry(1, b"x" * (2 << 20))])
    flag = settings.chain / "full/wn1"
    for mib, refused in ((1, True), (1, True), (64, False), (64, False)):
        assert cli.write(Settings(settings.journals, settings.chain, node_mib=mib, free_mib=0), NOW) == []
        assert flag.exists() is refused
    cli.write(Settings(settings.journals, settings.chain, free_mib=1 << 40), NOW)
    assert flag.exists()


# -- odd input


ODD = [b"\0\n\xff", b"a\nMESSAGE=b\n\n", b"x" * (3 << 20), b"\n" * (3 << 20), "ü".encode()]


@pytest.mark.parametrize("message", ODD)
def test_records_of_any_size_and_kind_are_taken(settings: Settings, message: bytes) -> None:
    path = settings.journals / "wn1/wn1.journal"
    journal(path, [entry(1), entry(2, message), entry(3)])
    assert cli.write(settings, NOW) == []
    assert wrong(settings) == []
    journal(path, [entry(1), entry(2, message[:-1] + b"?"), entry(3)])
    assert len(wrong(settings)) == 1


def test_a_digest_does_not_depend_on_how_fields_are_shown() -> None:
    plain = b"__CURSOR=s=%s;i=1;b=0\nA=1\nB=2\n\n" % SOURCE.encode()
    other = b"__CURSOR=s=%s;i=1;b=9\n__NEWER=x\nB\n%sB2\nA=1\nA=1\n\n".replace(b"B2", b"2") % (
        SOURCE.encode(), (1).to_bytes(8, "little"))  # fmt: skip
    (one,), (two,) = (list(journals.exported(io.BytesIO(text))) for text in (plain, other))
    assert one == two


@given(st.binary(max_size=300))
def test_any_bytes_are_records_or_refused(data: bytes) -> None:
    whole = entry(1) + data
    try:
        found = list(journals.exported(io.BytesIO(whole)))
    except Broken:
        return
    assert all(isinstance(record, Record) for record in found)


@pytest.mark.parametrize("end", range(1, len(entry(1, b"\xff" * 5)), 3))
def test_a_record_that_is_cut_off_is_said_to_be(end: int) -> None:
    with pytest.raises(Broken):
        list(journals.exported(io.BytesIO(entry(1, b"\xff" * 5)[:-1][:end])))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no journal"),
        (b"LPKSHHRH", "is no journal"),
        (b"\xff" * 4096, "is no journal"),
        (b"LPKSHHRH" + b"\xff" * 4096, "cannot be read"),
        (b"LPKSHHRH" + b"\1" * 152 + b"\0" * 8 + b"\1" * 8, "says that its records are"),
    ],
)
def test_a_broken_file_hides_no_other(filled: Settings, content: bytes, said: str) -> None:
    (filled.journals / "submit/a.journal").write_bytes(content)
    journal(filled.journals / "wn1/wn1.journal", [entry(number) for number in range(1, 13)])
    (problem,) = cli.write(filled, NOW + 40)
    assert said in problem
    verdict = cli.verify(filled, (), {}, NOW + 60)
    assert len(verdict.wrong) == 1
    assert verdict.wrong[0].startswith("submit: ")
    assert verdict.records == 17


def test_what_cannot_be_read_is_named_with_its_file(filled: Settings) -> None:
    path = journal(filled.journals / "wn1/wn1.journal", [b"BROKEN"], tail=12)
    assert cli.write(filled, NOW + 40) == [f"{path} cannot be read after record 10 of 12: Failed to iterate through "
                                           "journal: Bad message"]  # fmt: skip
    assert f"wn1: {path} cannot be read after record 0 of 12" in "\n".join(wrong(filled))


@pytest.mark.parametrize(("tables", "found"), [("TABLES", True), ("TWICE", False)])
def test_a_file_whose_own_tables_were_changed_is_named(
    filled: Settings, monkeypatch: pytest.MonkeyPatch, tables: str, found: bool
) -> None:
    """journalctl would find nothing of a record that they do not lead to, though it is there."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    path = filled.journals / "wn1/wn1.journal"
    path.write_bytes(path.read_bytes() + f"\n{tables:>7}\n".encode())
    said = f"wn1: {path} was changed, a search in it may miss records: FAIL: {path} (Bad message)"
    assert [what for what in wrong(filled) if "search" in what] == ([said] if found else [])


def test_what_comes_before_a_broken_record_is_chained(settings: Settings) -> None:
    journal(settings.journals / "wn1/wn1.journal", [entry(1), entry(2), b"__CURSOR=x\nA=1"], tail=3)
    (problem,) = cli.write(settings, NOW)
    assert "cut off" in problem
    assert cli.verify(settings, (), {}, NOW).records == 2


def test_links_and_pipes_are_not_followed(filled: Settings, tmp_path: Path) -> None:
    (filled.journals / "wn1/link.journal").symlink_to(tmp_path / "j/submit/submit.journal")
    os.mkfifo(filled.journals / "wn1/pipe.journal")
    assert len(cli.write(filled, NOW + 40)) == 2
    assert len(wrong(filled)) == 2


def test_directories_that_are_no_nodes_are_left_alone(filled: Settings) -> None:
    for name in (".hidden", "a\nb", "-x"):
        journal(filled.journals / name / "a.journal", [entry(1)])
    assert cli.write(filled, NOW + 40) == []
    assert wrong(filled, now=NOW + 3600) == []


def test_numbers_with_gaps_and_several_sources_are_taken(settings: Settings) -> None:
    journal(settings.journals / "wn1/a.journal", [entry(1), entry(5), entry(6)], tail=6)
    journal(settings.journals / "wn1/b.journal~", [entry(1, source="ef" * 16)], source="ef" * 16)
    assert cli.write(settings, NOW) == []
    verdict = cli.verify(settings, (), {}, NOW + 3600)
    assert (verdict.wrong, verdict.lines, verdict.records) == ([], 3, 4)


@given(st.binary(max_size=200))
def test_any_line_is_one_or_refused(text: bytes) -> None:
    try:
        line = chains.parse(text)
    except chains.Damaged:
        return
    assert chains.parse(line.written()) == line


# -- an end in the middle


@pytest.mark.parametrize("left", [1, 40, 5000, 70000])
def test_a_line_that_was_cut_off_is_taken_away(filled: Settings, left: int) -> None:
    (path,) = chains.segments(filled.chain)
    whole = path.read_bytes()
    path.write_bytes(whole + (b'{"n":4,' + b"x" * 70000)[:left])
    assert wrong(filled) == []
    journal(filled.journals / "wn1/wn1.journal", [entry(number) for number in range(1, 12)])
    assert cli.write(filled, NOW + 40) == []
    assert path.read_bytes().startswith(whole + b'{"n":4,"time"')
    assert wrong(filled) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"n": 99}', '{"n": 4, "hash": "", "size": 1, "positions": 7}'])
def test_without_its_state_the_chain_is_read(filled: Settings, content: str) -> None:
    (filled.chain / "state.json").write_text(content)
    assert Chain(filled.chain).position("wn1", SOURCE) == 10
    assert cli.write(filled, NOW + 40) == []
    assert cli.verify(filled, (), {}, NOW + 60).lines == 4


def test_an_old_state_is_not_believed(filled: Settings) -> None:
    """Killed between line and state: the line counts."""
    old = (filled.chain / "state.json").read_bytes()
    journal(filled.journals / "wn1/wn1.journal", [entry(number) for number in range(1, 12)])
    cli.write(filled, NOW + 40)
    (filled.chain / "state.json").write_bytes(old)
    assert Chain(filled.chain).position("wn1", SOURCE) == 11
    assert cli.write(filled, NOW + 41) == []
    assert wrong(filled) == []


def test_after_a_damaged_line_the_chain_goes_on(filled: Settings) -> None:
    rewrite(filled, lambda lines: [*lines[:3], b"\xff damaged\n"])
    journal(filled.journals / "wn1/wn1.journal", [entry(number) for number in range(1, 12)])
    assert cli.write(filled, NOW + 40) == []
    assert any("line 3 of the chain" in what for what in wrong(filled))
    assert cli.verify(filled, ["wn1"], {}, NOW + 60).records == 11


def test_a_full_disk_leaves_a_whole_chain(filled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = chains.segments(filled.chain)
    before = path.read_bytes()
    journal(filled.journals / "wn1/wn1.journal", [entry(number) for number in range(1, 12)])
    write = os.write
    for part in (0, 7, 100):
        monkeypatch.setattr(os, "write", lambda descriptor, text, part=part: write(descriptor, text[:part]))
        with pytest.raises(OSError, match="no space"):
            cli.write(filled, NOW + 40)
        assert path.read_bytes() == before
    monkeypatch.setattr(os, "write", write)
    assert wrong(filled) == []
    assert cli.write(filled, NOW + 50) == []
    assert cli.verify(filled, (), {}, NOW + 60).records == 16


def killed_in_the_middle(settings: Settings) -> Iterator[None]:
    """Start the program again and again, and kill it at once, or when it has written something more."""
    program = "import sys; from pilotbed.logs.cli import main; sys.exit(main())"
    config = settings.chain.parent / "log.toml"
    config.write_text(f'journals = "{settings.journals}"\nchain = "{settings.chain}"\nfree_mib = 0\n')

    def size() -> int:
        return sum(path.stat().st_size for path in settings.chain.rglob("*") if path.is_file())

    for turn in range(8):
        before = size()
        command = [sys.executable, "-c", program, "--config", str(config), "chain"]
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while turn % 2 and running.poll() is None and size() == before and time.monotonic() < deadline:
            time.sleep(0.001)
        running.send_signal(signal.SIGKILL)
        running.wait()
        yield
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


def test_killed_at_any_moment_the_chain_is_whole(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    journal(settings.journals / "wn1/wn1.journal", [entry(number) for number in range(1, 10_001)])
    lines = set()
    for _ in killed_in_the_middle(settings):
        lines.add(sum(1 for _ in chains.read(settings.chain)))
        verdict = Verdict()
        chains.links(settings.chain, {}, 0, verdict)
        assert verdict.wrong == []
    verdict = cli.verify(settings, (), {}, NOW)
    assert (verdict.wrong, verdict.records) == ([], 10_000)
    assert len(lines) > 1, "no run was killed while it wrote"


def test_two_runs_at_once_write_one_chain(settings: Settings) -> None:
    journal(settings.journals / "wn1/wn1.journal", [entry(number) for number in range(1, 10_001)])
    program = (
        f"from pilotbed.logs.cli import *; write(Settings(Path('{settings.journals}'), Path('{settings.chain}')), 9)"
    )
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [one.wait() for one in started] == [0] * 4
    verdict = cli.verify(settings, (), {}, NOW)
    assert (verdict.wrong, verdict.lines, verdict.records) == ([], 10, 10_000)


def test_a_chain_of_another_account_is_not_written(filled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="systemctl start pilotbed-log-chain"):
        cli.write(filled, NOW)


# -- the command


def test_the_command_says_what_is_wrong_by_its_exit_code(filled: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--journals", str(filled.journals), "--chain", str(filled.chain)]
    config = filled.chain.parent / "log.toml"
    config.write_text(json.dumps(str(filled.journals)).join(["journals = ", "\n"]))
    assert cli.main(["--config", str(config), "verify", *where]) == 0
    assert "4 lines, 15 records of 2 nodes; 0 more wait for a line" in capsys.readouterr().out
    change(filled, lambda all: all[:5])
    assert cli.main(["--config", str(config), "verify", *where, "wn1"]) == 1
    assert "wn1: records 6 to 7 are missing" in capsys.readouterr().out
    assert cli.main(["--config", str(config), "verify", *where, "wn9"]) == 2
    assert "there is no node wn9; there is submit, wn1" in capsys.readouterr().err
    assert cli.main(["--config", str(config.with_name("none.toml")), "verify"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_verdict_starts_with_nothing_wrong() -> None:
    assert Verdict() == Verdict([])


# -- what a node sends


def sent(*entries: bytes) -> list[upload.Outgoing]:
    return list(upload.outgoing(io.BytesIO(b"".join(entries))))


def test_records_are_sent_as_they_are() -> None:
    odd = [entry(1), entry(2, b"\0\n\xff"), entry(3, b"x" * 200_000), entry(4, b"\n" * 200_000)]
    found = sent(*odd)
    assert [record.data for record in found] == odd
    assert [record.cursor for record in found] == [f"s={SOURCE};i={n};b=0;m=0;t=0;x=0" for n in (1, 2, 3, 4)]


def test_of_a_record_with_too_many_fields_the_collector_gets_what_it_takes() -> None:
    """journald takes 1024 of a user's, and adds its own; systemd-journal-remote takes 1024 in all."""
    many = "".join(f"F{n}=v\n" for n in range(1023)) + "_UID=0\n_HOSTNAME=wn1\n"
    one, other = sent(entry(1, others=many), entry(2))
    lines = one.data.splitlines()
    assert len(lines) < 1000
    assert {b"MESSAGE=message 1", b"_UID=0", b"_HOSTNAME=wn1", b"PILOTBED_LEFT_OUT=124"} <= set(lines)
    assert other.data == entry(2)


@pytest.mark.parametrize("letter", [b"x", b"\n"])
def test_a_field_that_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch, letter: bytes) -> None:
    monkeypatch.setattr(upload, "LARGEST_FIELD", 1 << 17)
    one, other = sent(entry(1, letter * (1 << 20), others="_UID=0\n"), entry(2))
    assert one.data.endswith(b"\n_UID=0\nPILOTBED_LEFT_OUT=1\n\n")
    assert other.data == entry(2)


def test_a_record_that_is_too_large_lacks_its_last_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "LARGEST_RECORD", 1 << 20)
    (one,) = sent(entry(1, b"x" * 600_000, others=f"A={'y' * 600_000}\nB=z\n"))
    assert one.data.endswith(b"xx\nB=z\nPILOTBED_LEFT_OUT=1\n\n")


@given(st.binary(max_size=200))
def test_any_bytes_are_sent_or_left_out(data: bytes) -> None:
    for record in sent(entry(1) + data):
        assert record.cursor
        assert record.data.endswith(b"\n\n")


def test_a_request_ends_with_a_whole_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "RECORDS", 3)
    records = iter(sent(*(entry(number) for number in range(1, 6))))
    for expected, full in (([1, 2, 3], True), ([4, 5], False)):
        batch = upload.Batch(next(records), records)
        assert b"".join(batch) == b"".join(map(entry, expected))
        assert (batch.full, f";i={expected[-1]};" in batch.cursor) == (full, True)


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes what is sent, or answers otherwise."""

    taken: ClassVar[list[bytes]] = []
    code: ClassVar[int] = 202

    def do_POST(self) -> None:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        if self.code == 202:
            self.taken.append(body)
        self.send_response(self.code)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"n=7 head={'a' * 64}\n".encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def uploader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[upload.Uploader]:
    """One whose collector is here, without TLS, and whose journal is a file."""
    Collector.taken, Collector.code = [], 202
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    plain = http.client.HTTPConnection

    def connection(host: str, port: int, context: ssl.SSLContext, timeout: float) -> http.client.HTTPConnection:
        return plain(host, port, timeout=timeout)

    monkeypatch.setattr(http.client, "HTTPSConnection", connection)
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", lambda *_: None)
    (tmp_path / "journalctl").write_text(f"""#!{sys.executable}
import sys
after = [int(word.split(";i=")[1].split(";")[0], 16) for word in sys.argv if word.startswith("--after")]
data = open("{tmp_path}/own", "rb").read().split(b"\\n\\n")[:-1]
sys.stdout.buffer.write(b"".join(one + b"\\n\\n" for one in data[(after or [0])[0]:]))
sys.exit({"1" if "broken" in str(tmp_path) else "0"})
""")
    (tmp_path / "journalctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    port = server.server_address[1]
    yield upload.Uploader("127.0.0.1", port, tmp_path, tmp_path, tmp_path, tmp_path / "cursor", 600.0)
    server.shutdown()
    server.server_close()


def test_nothing_is_lost_and_nothing_sent_twice(uploader: upload.Uploader) -> None:
    own = uploader.state.with_name("own")
    own.write_bytes(entry(1) + entry(2))
    Collector.code = 502
    for _ in range(2):
        with pytest.raises(upload.Refused, match="502"):
            uploader.turn()
    assert not uploader.state.exists()
    Collector.code = 202
    uploader.turn()
    uploader.turn()
    own.write_bytes(b"".join(map(entry, range(1, 12))))
    uploader.turn()
    assert b"".join(Collector.taken) == own.read_bytes()


def test_who_is_away_is_asked_again(uploader: upload.Uploader) -> None:
    uploader.state.with_name("own").write_bytes(entry(1))
    port, uploader.port = uploader.port, 1
    with pytest.raises(upload.Refused, match="refused"):
        uploader.turn()
    uploader.port = port
    uploader.turn()
    assert Collector.taken == [entry(1)]


def test_the_chains_head_is_remembered(uploader: upload.Uploader, caplog: pytest.LogCaptureFixture) -> None:
    uploader.state.with_name("own").write_bytes(b"")
    caplog.set_level("INFO")
    for _ in range(3):
        uploader.turn()
    assert [chains.heads(line) for line in caplog.messages] == [{7: "a" * 64}]


def test_a_journal_that_is_broken_is_said_to_be(uploader: upload.Uploader) -> None:
    uploader.state.with_name("own").write_bytes(b"")
    with pytest.raises(upload.Refused, match="journalctl ended with 1"):
        uploader.turn()
