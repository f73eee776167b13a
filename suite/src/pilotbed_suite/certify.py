"""``make certify``: runs the checks of the certificate, and writes the report.

A check is every test with ``@pytest.mark.check("D3.2")``, wherever it stands; its words are in
tests/certification/checks.toml. What a test and its fixtures ran on which node is its evidence. A test that is left out
because the inventory has not what it is about makes its check "not applicable", which is counted apart.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import re
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pilotbed.certificate.page import page
from pilotbed.certificate.report import Check, Evidence, Link, Report, Socket, Trial, Verdict

from . import CHECKOUT, inventory, reach
from .declared import RUNNING

PLACES = ("tests/grid", "tests/certification")
CATALOGUE = CHECKOUT / "tests/certification/checks.toml"
#: Where the report goes.
OUT = CHECKOUT / "var/certificate"
#: Characters of a command and of what it said that are kept.
KEPT = (400, 1600)
_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
#: Whose fixtures' commands are no evidence: they say what failed, not what was tried.
_MARK = "check"


def catalogue() -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return the sections' names, and the words of every check by its id."""
    found = tomllib.loads(CATALOGUE.read_text())
    return found["questions"], found["checks"]


def chosen(words: str) -> list[str]:
    """Return the ids that ``CHECKS`` means: ids, sections (``Q3``, ``policy``), or all.

    Raises:
        ValueError: one of its words is neither.
    """
    questions, checks = catalogue()
    found: list[str] = []
    for word in words.replace(",", " ").split():
        here = [name for name, one in checks.items() if word in (name, one["question"])]
        if not here:
            raise ValueError(f"CHECKS: {word!r} is no check, no section; there is {', '.join([*questions, *checks])}")
        found += here
    return [name for name in checks if not words.strip() or name in found]


def clean(text: str, most: int) -> str:
    """Return a text without private keys, and not longer than ``most`` characters."""
    text = _KEY.sub("[private key]", text)
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}\n… {len(text) - most} characters …\n{text[-half:]}"


class Certificate:
    """A plugin of pytest: runs the chosen checks, tells a line for each, keeps what they came to.

    D1.1 leaves here what listens and who is connected.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.questions, self.words = catalogue()
        self.ids = ids
        self.begun, self.made = time.monotonic(), dt.datetime.now().astimezone()
        self.trials: dict[str, list[Trial]] = defaultdict(list)
        self.sockets: list[Socket] = []
        self.links: list[Link] = []
        self._open: dict[str, set[str]] = defaultdict(set)
        self.evidence: list[Evidence] = []
        self._heard: list[list[int]] = []
        self._of_fixture: dict[str, list[int]] = {}
        self._said: dict[str, tuple[Verdict, str]] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._of_test: dict[str, list[int]] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        """Be found by D1.1."""
        config.stash[RUNNING] = self

    # -- evidence

    def witness(self, node: str, command: str, result: Any, seconds: float) -> None:
        """Keep what was run, for the fixture or the test that is under way; what is asked again and again, once."""
        if not self._heard:
            return
        said = clean(f"{result.stdout}{result.stderr}", KEPT[1])
        new = Evidence(node, clean(command, KEPT[0]), result.rc, said, round(seconds, 3))
        mine = self._heard[-1]
        last = self.evidence[mine[-1]] if mine else None
        if last and (last.node, last.command) == (new.node, new.command):
            both = round(last.seconds + new.seconds, 3)
            self.evidence[mine[-1]] = replace(new, seconds=both, times=last.times + 1)
        else:
            mine.append(len(self.evidence))
            self.evidence.append(new)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        """What a fixture runs is evidence of every test that has it."""
        self._heard.append([])
        try:
            return (yield)
        finally:
            self._of_fixture[fixturedef.argname] = self._heard.pop()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """What a test runs is its own."""
        self._heard.append([])
        try:
            return (yield)
        finally:
            names = getattr(item, "fixturenames", [])
            shared = [one for name in names for one in self._of_fixture.get(name, [])]
            self._of_test[item.nodeid] = shared + self._heard.pop()

    # -- which tests, and what they came to

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave the tests that carry a chosen id; ids that nobody knows are a mistake."""
        for item in items:
            if unknown := [name for name in _ids(item) if name not in self.words]:
                raise pytest.UsageError(f"{item.nodeid}: there is no check {unknown[0]} in {CATALOGUE.name}")
        wanted = [item for item in items if set(_ids(item)) & set(self.ids)]
        items[:] = wanted
        for item in wanted:
            for name in _ids(item):
                self._open[name].add(item.nodeid)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """What was left out since the inventory has not what it is about does not apply."""
        for item in items:
            flavour = item.get_closest_marker("flavour")
            why = f"the inventory has no {flavour.args[0]}" if flavour else "the batch system has not what it is about"
            for name in _ids(item):
                self._add(name, item, Verdict.NOT_APPLICABLE, why, [])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a phase's outcome; the worst of a test's counts."""
        self._seconds[report.nodeid] += report.duration
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash else str(report.longrepr)[-600:]
            if report.nodeid not in self._said:
                where = "" if report.when == "call" else f"in its {report.when}: "
                self._said[report.nodeid] = Verdict.FAIL, clean(where + said, 1500)
        elif report.skipped:
            why = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._said[report.nodeid] = Verdict.NOT_APPLICABLE, why.removeprefix("Skipped: ")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """Remember whose the next report is."""
        self._last = item

    def pytest_runtest_logfinish(self, nodeid: str, location: object) -> None:
        """A check is told when the last of its tests is over."""
        verdict, why = self._said.get(nodeid, (Verdict.PASS, ""))
        for name in _ids(self._last):
            self._add(name, self._last, verdict, why, self._of_test.get(nodeid, []))
            self._open[name].discard(nodeid)
            if name in self.ids and not self._open[name]:
                self._tell(name)

    def _add(self, name: str, item: pytest.Item, verdict: Verdict, why: str, evidence: Sequence[int]) -> None:
        control = any(mark.kwargs.get("control") for mark in item.iter_markers(_MARK) if mark.args[0] == name)
        seconds = round(self._seconds[item.nodeid], 1)
        self.trials[name].append(Trial(item.nodeid, verdict, control, why, seconds, tuple(evidence)))

    def _check(self, name: str) -> Check:
        return Check(name, **self.words[name], trials=tuple(self.trials[name]))

    def _tell(self, name: str) -> None:
        check = self._check(name)
        why = f": {check.reason.splitlines()[0][:160]}" if check.reason else ""
        print(f"  {name:<5} {check.verdict.value:<15} {check.seconds:6.1f} s  {check.asks}{why}", flush=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that cannot be read is not overlooked."""
        if report.failed:
            print(f"  {report.nodeid}: {report.longreprtext}", file=sys.stderr)

    def pytest_internalerror(self, excrepr: object) -> None:
        """Nor is an error of pytest's own."""
        print(excrepr, file=sys.stderr)

    # -- the report

    def report(self) -> Report:
        """Return the report of what was run."""
        here = inventory.load()
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=CHECKOUT, capture_output=True, text=True, check=False
        ).stdout.strip()
        nodes = {name: here.groups_of(name) for name in here.names("all")}
        return Report(
            grid=str(here.variable("grid_domain")), release=described or "unknown",
            made=self.made.isoformat(timespec="seconds"), seconds=round(time.monotonic() - self.begun, 1),
            chosen=() if len(self.ids) == len(self.words) else tuple(self.ids), questions=self.questions, nodes=nodes,
            checks=tuple(self._check(name) for name in self.ids), evidence=tuple(self.evidence),
            sockets=tuple(self.sockets), links=tuple(self.links),
        )  # fmt: skip


def _ids(item: pytest.Item) -> list[str]:
    return [str(mark.args[0]) for mark in item.iter_markers(_MARK)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; return 0 only if each is passed, or does not apply."""
    parser = argparse.ArgumentParser(prog="pilotbed_suite.certify", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checks", default="", metavar="Q3|D3.2|…", help="a part: ids and sections; default: all")
    parser.add_argument("--out", type=Path, default=OUT, help="directory of the report")
    options = parser.parse_args(argv)
    try:
        ids = chosen(options.checks)
    except ValueError as error:
        parser.error(str(error))
    certificate = Certificate(ids)
    reach.witnesses.append(certificate.witness)
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(CHECKOUT)
    code = pytest.main(
        [*_files(), "-p", "no:terminal", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider",
         f"--junit-xml={options.out / 'report.xml'}"],
        [certificate],
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        return int(code)
    report = certificate.report()
    (options.out / "report.json").write_text(report.text())
    (options.out / "report.html").write_text(page(report))
    counts = ", ".join(f"{number} {verdict.value}" for verdict, number in report.counts().items())
    print(f"\n{counts} in {report.seconds:.0f} s; {options.out / 'report.html'}, report.json and report.xml")
    return 0 if report.good else 1


def _files() -> list[str]:
    """Return every file with checks: those of tests/certification are called after their questions."""
    return [
        str(path.relative_to(CHECKOUT))
        for place in PLACES for path in sorted((CHECKOUT / place).glob("*.py"))
        if path.name.startswith("test_") or (place == PLACES[1] and path.name != "conftest.py")
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
