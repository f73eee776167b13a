"""The certificate: its report, its page, what differs between two, and which tests answer which question."""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from pilotbed.certificate import cli
from pilotbed.certificate.page import page
from pilotbed.certificate.report import (
    Check,
    Evidence,
    Link,
    Report,
    ReportError,
    Socket,
    Trial,
    Verdict,
    differences,
    parse,
)
from pilotbed_suite import CHECKOUT, certify

EVIDENCE = Evidence("ce", "echo '<script>alert(1)</script>'", 1, "<script>alert(1)</script> & more", 0.1, 3)
CHECKS = (
    Check("D1.1", "Q1", "Which?", "all", (Trial("t::test_a[x]", Verdict.PASS, evidence=(0,), seconds=1),)),
    Check("D1.2", "Q1", "How?", "each", (Trial("t::b", Verdict.PASS), Trial("t::c", Verdict.FAIL, reason="no <b>"))),
    Check("P2", "policy", "Own?", "no", (Trial("t::test_d", Verdict.NOT_APPLICABLE, reason="one VO"),)),
    Check("P3", "policy", "All?", "no"),
)  # fmt: skip
SOCKET = Socket("ce", "tcp", "0.0.0.0", 443, "arched", "TLS")
REPORT = Report(
    "grid.test", "v1", "2026-11-29T08:00:00+00:00", 12.5, questions={"Q1": "Components", "policy": "Policy"},
    nodes={"ce": ["site_alpha", "ce_arc"], "relay": ["relay"]}, checks=CHECKS, evidence=(EVIDENCE,), sockets=(SOCKET,),
    links=(Link("ce", "relay", 9700),),
)  # fmt: skip


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ("", Verdict.NOT_TRIED),
        ("p", Verdict.PASS),
        ("pn", Verdict.PASS),
        ("nn", Verdict.NOT_APPLICABLE),
        ("pfn", Verdict.FAIL),
        ("pt", Verdict.NOT_TRIED),
    ],
)
def test_the_worst_of_its_tests_is_a_checks_verdict(verdicts: str, expected: Verdict) -> None:
    kinds = {"p": Verdict.PASS, "f": Verdict.FAIL, "n": Verdict.NOT_APPLICABLE, "t": Verdict.NOT_TRIED}
    check = Check("D1.1", "Q1", "?", "!", tuple(Trial(f"t{n}", kinds[one]) for n, one in enumerate(verdicts)))
    assert check.verdict is expected
    good = expected in (Verdict.PASS, Verdict.NOT_APPLICABLE)
    assert replace(REPORT, checks=(check,)).good == good, "what was not tried cannot be signed"


def test_a_report_is_read_as_it_was_written() -> None:
    assert parse(REPORT.text()) == REPORT
    said = json.loads(REPORT.text())
    assert said["schema"] == 1
    assert [(one["verdict"], one["nodes"]) for one in said["checks"]] == [
        ("pass", ["ce"]), ("fail", []), ("not applicable", []), ("not tried", []),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no JSON"),
        ("[]", "has schema None"),
        ('{"schema": 2}', "has schema 2; this program reads 1"),
        ('{"schema": 1}', "is no report of schema 1"),
        (re.sub(r'("evidence": \[\s+)0', r"\g<1>7", REPORT.text()), "is no report of schema 1"),
        (REPORT.text().replace('"not applicable"', '"fine"'), "is no report of schema 1"),
    ],
)
def test_what_is_no_report_is_refused_with_the_reason(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=re.escape(told)):
        parse(text)


def test_two_reports_differ_by_verdicts_nodes_and_sockets() -> None:
    assert differences(REPORT, REPORT) == []
    mended = replace(CHECKS[1], trials=CHECKS[1].trials[:1])
    new = replace(REPORT, release="v2", checks=(CHECKS[0], mended, *CHECKS[2:3]), nodes={"ce": []},
                  sockets=(SOCKET, replace(SOCKET, port=4242, program="nc", declared="")))  # fmt: skip
    assert differences(REPORT, new) == [
        "release: v1 → v2",
        "D1.2: fail → pass",
        "P3: not tried → not in the report",
        "node gone: relay",
        "socket new: ce tcp 0.0.0.0:4242 nc",
    ]
    assert "D1.2: pass → fail: no <b>" in differences(new, REPORT)


def test_the_command_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(REPORT.text())
    new.write_text(replace(REPORT, release="v2").text())
    assert cli.main(["diff", str(old), str(old)]) == 0
    assert cli.main(["diff", str(old), str(new)]) == 1
    assert capsys.readouterr().out == "no difference\nrelease: v1 → v2\n"
    assert cli.main(["diff", str(old), str(tmp_path / "none.json")]) == 2
    assert "none.json: No such file" in capsys.readouterr().err
    assert cli.main(["page", str(old)]) == 0
    assert "Certificate of the grid grid.test" in capsys.readouterr().out


def test_the_page_shows_what_was_said_as_text_and_fetches_nothing() -> None:
    shown = page(REPORT)
    assert "<script>" not in shown and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in shown
    assert "no &lt;b&gt;" in shown and "(3 times, until it said)" in shown
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)|url\((?!#)|@import", shown)
    assert "Not every check is passed." in shown
    assert "ce → relay: 9700" in shown
    good = page(replace(REPORT, checks=(CHECKS[0], CHECKS[2])))
    assert "Every check is passed, or does not apply" in good


def test_no_key_gets_into_a_report() -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIEsecret\n-----END PRIVATE KEY-----\n"
    assert certify.clean(f"a\n{key}b{key[:40]}", 1000) == "a\n[private key]\nb[private key]"
    long = certify.clean("x" * 5000 + "the end", 1000)
    assert len(long) < 1100 and long.endswith("the end") and "characters" in long


def test_what_is_asked_for_is_an_id_or_a_section() -> None:
    every = certify.chosen("")
    assert every[0] == "D1.1" and every[-1] == "G14" and len(every) == 63
    assert certify.chosen("policy, D1.2") == ["D1.2", *(f"P{number}" for number in range(1, 11))]
    with pytest.raises(ValueError, match=r"'Q9' is no check, no section; there is Q1, "):
        certify.chosen("Q1 Q9")


def marked() -> dict[str, list[str]]:
    """The tests of each check, as the files have it."""
    found = defaultdict(list)
    for name in certify._files():
        for node in ast.walk(ast.parse((CHECKOUT / name).read_text())):
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.check":
                        found[ast.literal_eval(mark.args[0])].append(f"{name}::{node.name}")
    return found


def test_every_mark_is_a_check_and_every_check_has_its_section() -> None:
    questions, checks = certify.catalogue()
    assert set(marked()) <= set(checks)
    assert all(set(one) == {"question", "asks", "proves"} and one["question"] in questions for one in checks.values())
