"""What came home of pilots, and what of it is shown; their accounts wrote it."""

from __future__ import annotations

import base64
import gzip
import os
from pathlib import Path

import pytest
from pilotbed.factory import pilot_log
from pilotbed.factory.parts import Part, Store
from pilotbed.factory.pilot_log import MOST, main, of, outputs

OUT = """2026-11-30 08:00:00 pilot glidein_7_123 of vo.main for entry alpha on wn1 as pilot001 in /tmp/glide_x
=== Glidein ending Mon Nov 30 ===
<status>{status}</status><metric name="TestID">check.sh</metric><detail>no software</detail>
"""


def packed(name: str, content: bytes) -> str:
    return (f"{name}\n======== gzip | uuencode =============\nbegin-base64 644 -\n"
            f"{base64.encodebytes(gzip.compress(content)).decode()}====\n\n")  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Three pilots: one that failed, one that ended, one that was killed and left no summary."""
    for number, (entry, out, err) in enumerate([
        ("alpha", OUT.format(status="ERROR"), "glidein: check.sh: no software\n"),
        ("alpha", OUT.replace("_7_123", "_8_124").format(status="OK"), packed("StartLog", b"line 1\n\x1b[2Jline 2\n")),
        ("beta", "2026-11-30 pilot glidein_9_125 of vo.main\n", ""),
    ]):  # fmt: skip
        path = tmp_path / "log" / f"entry_{entry}" / f"vo_vo.main.{number + 1}.0.out"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(out)
        path.with_suffix(".err").write_text(err)
        os.utime(path, (1_800_000_000 + number, 1_800_000_000 + number))
    return tmp_path


@pytest.fixture
def ask(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    class Known:
        directory = home
        entries = ("alpha", "beta", "gamma")

    monkeypatch.setattr(pilot_log, "load", lambda *_: Known)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_an_entrys_pilots_are_a_line_each_the_latest_last(ask) -> None:
    code, said, _ = ask("alpha")
    first, second = said.splitlines()
    assert code == 0
    assert "1.0  alpha  failed in check.sh: no software" in first
    assert "2.0  alpha  ended" in second
    assert ask("alpha", "--last", "1")[1].splitlines() == [second]
    assert "has not come home, or only in part" in ask("beta")[1]


@pytest.mark.parametrize("which", ["2.0", "glidein_8_124"])
def test_a_single_one_is_all_that_it_said(ask, which: str) -> None:
    code, said, _ = ask(which)
    assert code == 0
    assert "(packed: StartLog)" in said
    assert "logs, for --log: StartLog" in said
    assert ask(which, "--log", "StartLog")[1].endswith("line 1\n?[2Jline 2\n\n")
    assert ask(which, "--log", "MasterLog")[0] == 1


def test_of_a_pilot_that_was_killed_there_is_what_it_had_sent(ask, home: Path) -> None:
    store = Store(home / "sent", 1 << 20, 1 << 20)
    for number, said in enumerate((b"line 1\n", b"\x1b[2Jline 2\n")):
        store.take(Part("gamma", "7.0", "glidein_5_6", "StartLog", number), "/DC=test/CN=pilot\n", gzip.compress(said))
    store.take(Part("alpha", "2.0", "glidein_8_124", "StartLog", 0), "/DC=test/CN=pilot", gzip.compress(b"before\n"))
    (line,) = ask("gamma")[1].splitlines()
    assert "7.0  gamma  has not come home; glidein_5_6 had sent logs until then" in line
    for which in ("7.0", "glidein_5_6"):
        code, said, _ = ask(which)
        assert code == 0
        assert said.splitlines()[1:] == ["sent by /DC=test/CN=pilot", "", "logs, for --log: StartLog"]
        assert ask(which, "--log", "StartLog")[1].endswith("line 1\n?[2Jline 2\n\n")
        assert ask(which, "--log", "MasterLog")[0] == 1
    assert len(ask("alpha")[1].splitlines()) == 2, "what came home of 2.0 has all that it had sent"


@pytest.mark.parametrize(
    ("which", "why"),
    [
        ("9.0", "nothing has come home of 9.0"),
        ("glidein_1_1", "nothing has come home of glidein_1_1"),
        ("gamma", "nothing has come home of gamma"),
        ("../x", "is no job (3.0), no pilot (glidein_568_468728786) and none of the entries alpha, beta, gamma"),
    ],
)
def test_what_there_is_not_is_said(ask, which: str, why: str) -> None:
    code, _, said = ask(which)
    assert code == 1
    assert why in said


def test_what_a_pilots_account_wrote_cannot_fill_the_memory(home: Path) -> None:
    (one,) = of(outputs(home / "log"), "1.0")
    head = "= gzip | uuencode =\nbegin-base64 644 -\n"
    one.path.with_suffix(".err").write_text(
        packed("Bomb", b"0" * (MOST + 9)) + packed("Good", b"good") + f"Torn\n{head}H4sI\n====\n"
        + f"Worse\n{head}AAAA\n====\n" + f"Open\n{head}" * 9
    )  # fmt: skip
    logs = dict(one.logs())
    assert len(logs["Bomb"]) == MOST
    assert logs["Good"] == "good"
    assert logs["Worse"].startswith("(damaged: ")
    assert set(logs) == {"Bomb", "Good", "Torn", "Worse"}
