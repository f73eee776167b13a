"""``make test``: the parts of the whole test suite, side by side where they wait; ``make molecule``: all scenarios so.

Parts of one lane run one after the other: those on the grid share a lab and mostly wait for it, those of single sites
wait for theirs, and the others compute, and leave the processors to them. Each part writes to
``var/log/test-PART.log``; the end of it is shown when the part fails. A part that runs alone writes to the screen.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import IO
from xml.etree import ElementTree

from . import CHECKOUT

#: Lines of a failed part's log that are shown.
SHOWN = 150
#: Of what a failed test says at the very end: of a part's first one, twice (why, and the end of all of it), and of each
#: other; it may be all that is kept.
TOLD = (900, 160)
#: Of the column of parts' names.
WIDTH = 26
#: Lanes whose parts leave the processors to the others, by so much (nice(1)). A whole site does not belong there: its
#: daemons, behind two other labs, miss their deadlines.
NICE = {"host": 5}


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Args:
        name: as `make` knows it.
        lane: parts of the same lane wait for each other.
        commands: what is run, one after the other, until one fails; ``pytest`` among them is this Python's.
        sees: files and directories of the checkout that can make a difference to its outcome.
        environment: set for its commands.
    """

    name: str
    lane: str
    commands: tuple[tuple[str, ...], ...]
    sees: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """Where its commands write."""
        return CHECKOUT / f"var/log/test-{self.name}.log"

    @property
    def report(self) -> Path:
        """Where pytest leaves its report."""
        return CHECKOUT / f"var/log/test-{self.name}.xml"

    @property
    def stamp(self) -> Path:
        """What it saw when it passed last."""
        return CHECKOUT / f"var/log/test-{self.name}.passed"

    def digest(self) -> str:
        """Return the digest of all files that it sees; "" where git does not say which there are."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *self.sees],
            cwd=CHECKOUT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if listed.returncode:
            return ""
        digest = hashlib.sha256(repr(self).encode())
        for name in sorted(filter(None, listed.stdout.split("\0"))):
            path = CHECKOUT / name
            if path.is_symlink():
                content = str(path.readlink()).encode()
            else:
                content = path.read_bytes() if path.is_file() else b""
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()


def _tests(*places: str) -> tuple[str, ...]:
    return ("pytest", *places)


#: On its own lab, which `mini` shares.
_MINI = {"ANSIBLE_INVENTORY": "inventory/common,inventory/mini", "LAB": "mini"}
#: Of the lessons, those that are tried in every run.
_LESSONS = tuple(
    f"tests/training/test_lessons.py::test_lesson[{name}]"
    for name in ("02-proxy-anatomy", "03-expired-crl", "07-banned-user")
)
_UP, _DESTROY = ((sys.executable, "-m", "pilotbed_lab", command) for command in ("up", "destroy"))
_LAB = ("lab", "suite", "pyproject.toml", "requirements.txt")
_DEPLOYED = ("ansible.cfg", "inventory", "playbooks", "plugins", "roles", "services", "bootstrap")
#: These need a site and no more: they are tried on the grid that fits a laptop.
_ANY_SITE = tuple(f"tests/grid/test_{name}.py" for name in ("batch", "removal", "starter", "stock", "users"))
#: Molecule's.
SCENARIOS = CHECKOUT / "extensions/molecule"


def scenarios() -> list[str]:
    """Return the names of molecule's scenarios that are parts of the suite."""
    lines = (SCENARIOS / "make-test").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _scenario(name: str, lane: str) -> Part:
    """Return the part that runs one of molecule's scenarios, in the lane's own lab."""
    lab = f"molecule{lane}"
    part = Part(
        name, lane, ((str(Path(sys.executable).with_name("molecule")), "test", "--scenario-name", name),),
        ("extensions", "galaxy.yml", "tests/grid", "tests/upgrade", *_DEPLOYED, *_LAB),
    )  # fmt: skip
    return replace(part, environment={
        "PYTEST_ADDOPTS": f"--junit-xml={part.report}",  # molecule calls pytest by itself
        "MOLECULE_LAB": lab, "MOLECULE_EPHEMERAL_DIRECTORY": str(CHECKOUT / "var/molecule" / lab),
    })  # fmt: skip


def every_scenario(lanes: int) -> list[Iterator[Part]]:
    """Return so many lanes for molecule's scenarios: each goes on with the next one that no other has begun."""
    found = {path.parent.name for path in SCENARIOS.glob("*/molecule.yml")} - {"default"}  # it makes the others' nodes
    names = iter(sorted(found))

    def lane(number: int) -> Iterator[Part]:
        for name in names:
            yield _scenario(name, str(number))

    return [lane(number + 1) for number in range(lanes)]


PARTS = (
    Part("lint", "host", (("tests/lint",),), (".",)),
    Part("unit", "host", (_tests("--numprocesses", "2", "tests/unit"),), (".",)),
    Part(
        "services", "host", (_tests("--numprocesses", "3", "--dist", "loadfile", "tests/services"),),
        ("services", "tests/services", "tests/pki.py", *_LAB),
    ),
    Part("lab", "host", (_tests("tests/lab"),), ("roles", "tests/lab", *_LAB)),
    Part("glexec", "host", (_tests("tests/glexec"),), ("tests/glexec", "tests/pki.py", "docs", *_DEPLOYED, *_LAB)),
    *(_scenario(name, "site") for name in scenarios()),
    Part(
        "mini", "site", (_UP, _tests("tests/mini", *_ANY_SITE, "tests/planted", *_LESSONS), _DESTROY),
        (
            "tests/mini", "tests/planted", "tests/certification", "tests/training", "training", *_ANY_SITE,
            "tests/grid/conftest.py", "tests/grid/desk.py",
            *_DEPLOYED, *_LAB,
        ),
        _MINI,
    ),
    Part(
        "grid", "grid", (_UP, _tests("tests/grid", *(f"--ignore={each}" for each in _ANY_SITE))),
        ("tests/grid", *_DEPLOYED, *_LAB),
    ),
    Part(
        "traversal", "grid", (_UP, _tests("tests/traversal")), ("tests/traversal", "docs", "bench", *_DEPLOYED, *_LAB),
        {"ANSIBLE_INVENTORY": "inventory/common,inventory/lab,inventory/traversal"},
    ),
)

#: Only when they are asked for.
ON_DEMAND = (
    Part(
        "certification", "host", (_UP, _tests("tests/planted")),
        ("tests/planted", "tests/certification", *_DEPLOYED, *_LAB), {"PLANTED": "all"},
    ),
    Part("training", "host", (_UP, _tests("tests/training")), ("tests/training", "training", *_DEPLOYED, *_LAB), _MINI),
)


@dataclass
class Outcome:
    """How a part went: ``ok``, ``FAILED`` or ``unchanged``, how many tests, and seconds."""

    part: Part
    verdict: str = "FAILED"
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


class Runner:
    """Runs parts, each lane in a thread of its own, and ends all of them when it is told to stop."""

    def __init__(self, changed: bool) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._to_screen = False
        self.outcomes: dict[str, Outcome] = {}

    def run(self, lanes: Iterable[Iterable[Part]], to_screen: bool = False) -> None:
        """Run the parts of each lane one after the other; their outcomes are in ``outcomes`` then."""
        self._to_screen = to_screen
        threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # in slices, so that a signal is handled meanwhile

    def stop(self) -> None:
        """End what runs; nothing else is started."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)

    def _lane(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if self._stopped:
                return
            self._part(part)

    def _part(self, part: Part) -> None:
        outcome = self.outcomes[part.name] = Outcome(part)
        digest = part.digest()
        if self._changed and digest and part.stamp.exists() and part.stamp.read_text() == digest:
            outcome.verdict = "unchanged"
            self._say(f"  {part.name:<{WIDTH}} nothing that it can see has changed since it passed")
            return
        begun = time.monotonic()
        self._say(f"  {part.name:<{WIDTH}} begins")
        part.stamp.unlink(missing_ok=True)
        part.report.unlink(missing_ok=True)
        if self._to_screen:
            passed = self._commands(part, None)
        else:
            part.log.parent.mkdir(parents=True, exist_ok=True)
            with part.log.open("wb") as log:
                passed = self._commands(part, log)
        outcome.seconds = time.monotonic() - begun
        if self._stopped:
            return
        _count(outcome)
        if passed:
            outcome.verdict = "ok"
            part.stamp.write_text(digest)
        elif not self._to_screen:
            self._show(part)
        self._say(f"  {part.name:<{WIDTH}} {_line(outcome)}")

    def _commands(self, part: Part, log: IO[bytes] | None) -> bool:
        for words in part.commands:
            command = list(words)
            if words[0] == "pytest":
                command = [sys.executable, "-m", "pytest", *words[1:], f"--junit-xml={part.report}"]
            with self._lock:
                if self._stopped:
                    return False
                process = subprocess.Popen(
                    command, cwd=CHECKOUT, env={**os.environ, **part.environment}, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                if log:
                    _leave_processors(process.pid, NICE.get(part.lane, 0))
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
            if code:
                return False
        return True

    def _show(self, part: Part) -> None:
        lines = part.log.read_text(errors="replace").splitlines()
        cut = [f"… {len(lines) - SHOWN} lines more in {part.log.relative_to(CHECKOUT)}"] if len(lines) > SHOWN else []
        self._say("\n".join(f"    {line}" for line in [*cut, *lines[-SHOWN:]]))

    def _say(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)


def _leave_processors(session: int, nice: int) -> None:
    """Give the processes of a session less of the processors.

    Where the kernel shares them out by sessions, a process' own nice value counts within its session only: sched(7).
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PGRP, session, nice)
        Path(f"/proc/{session}/autogroup").write_text(str(nice))


def _count(outcome: Outcome) -> None:
    """Take the numbers of tests from pytest's report, if there is one."""
    if not outcome.part.report.exists():
        return
    for suite in ElementTree.parse(outcome.part.report).getroot().iter("testsuite"):  # noqa: S314 (our own file)
        number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        outcome.failed += number["failures"] + number["errors"]
        outcome.skipped += number["skipped"]
        outcome.passed += number["tests"] - number["failures"] - number["errors"] - number["skipped"]


def failures(report: Path, log: Path) -> list[str]:
    """Return what failed in a part, one text a reason; the end of its log where no test says so.

    Args:
        report: pytest's, which need not be there.
        log: what the part wrote.
    """
    reasons: dict[str, list[str]] = {}
    first = ""
    cases = ElementTree.parse(report).getroot().iter("testcase") if report.exists() else ()  # noqa: S314 (our own)
    for case in cases:
        for what in (*case.iter("failure"), *case.iter("error")):
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            reasons.setdefault(what.get("message", ""), []).append(name)
            first = first or (what.text or "").strip()
    told: list[str] = []
    for reason, (name, *others) in reasons.items():
        # Tests that share a fixture fail with it, all of them.
        more = f" (and {len(others)} more, with the same words)" if others else ""
        told.append(f"{name}{more}: {reason[: TOLD[bool(told)]]}")
    if first:  # what a test asks when it fails comes last
        told[0] += f"\n{first[-TOLD[0] :]}"
    if not told and log.exists():
        told.append(log.read_text(errors="replace").strip()[-TOLD[0] :])
    return told


def _line(outcome: Outcome) -> str:
    total = outcome.passed + outcome.failed + outcome.skipped
    tests = f"{total} tests" if total else ""
    return f"{tests:<12} {outcome.seconds:7.1f} s  {outcome.verdict}"


@contextlib.contextmanager
def _told_to_stop(runner: Runner) -> Iterator[None]:
    def stop(number: int, _frame: FrameType | None) -> None:
        runner.stop()
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; return 0 only if all of them passed."""
    parser = argparse.ArgumentParser(prog="pilotbed_suite.parts", description=__doc__)
    names = [part.name for part in PARTS]
    further = [part.name for part in ON_DEMAND]
    known = ", ".join([*names, *further])
    told = f"of {known}; default: all but {', '.join(further)}"
    parser.add_argument("parts", nargs="*", metavar="PART", help=told)
    parser.add_argument("--changed", action="store_true", help="skip parts that passed and see no change since")
    parser.add_argument("--scenarios", type=int, metavar="N", help="instead: every scenario of molecule, N at a time")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.parts if name not in [*names, *further]]:
        parser.error(f"there is no part {unknown[0]}; there is {known}")
    if arguments.scenarios is not None and arguments.scenarios < 1:
        parser.error(f"{arguments.scenarios} scenarios at a time are none: 1 or more")
    chosen = [part for part in (*PARTS, *ON_DEMAND) if part.name in (arguments.parts or names)]
    lanes: Sequence[Iterable[Part]] = (
        every_scenario(arguments.scenarios) if arguments.scenarios
        else [[part for part in chosen if part.lane == lane] for lane in dict.fromkeys(one.lane for one in chosen)]
    )  # fmt: skip
    runner = Runner(arguments.changed)
    begun = time.monotonic()
    with _told_to_stop(runner):
        runner.run(lanes, len(chosen) == 1)
    outcomes = list(runner.outcomes.values())
    broken = [one.part.name for one in outcomes if one.verdict == "FAILED"]
    if len(chosen) == 1:
        return 1 if broken else 0
    print(f"\n  {'part':<{WIDTH}} {'':<12} {'time':>9}")
    for outcome in outcomes:
        print(f"  {outcome.part.name:<{WIDTH}} {_line(outcome)}")
    print(f"  {'all':<{WIDTH}} {'':<12} {time.monotonic() - begun:7.1f} s\n")
    passed, failed, skipped = (sum(getattr(one, name) for one in outcomes) for name in ("passed", "failed", "skipped"))
    for part in (one.part for one in outcomes if one.part.name in broken):
        print(f"failed: {part.name}")
        for what in failures(part.report, part.log):
            print(textwrap.indent(what, "    "))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
