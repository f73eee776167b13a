"""Asking nodes, some of which may not answer: with a deadline, several side by side."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .. import PATIENCE, GridError
from ..reach import host

T = TypeVar("T")

#: Programs that are sent to nodes as text: these need not have been deployed with them.
PROGRAMS = Path(__file__).parent / "onnode"
#: Seconds for a command and for the node's own answer besides, and how many nodes are asked at the same time.
DEADLINE, MORE, AT_ONCE = 30.0, 5.0, 8
#: Nodes that did not answer, and why: they are not waited for again.
_silent: dict[str, str] = {}


class NodeError(GridError):
    """A node did not answer, or a command failed there; the message names both."""


@dataclass(frozen=True)
class Answer:
    """What a command came to."""

    node: str
    code: int
    output: bytes
    error: str

    @property
    def text(self) -> str:
        """What it printed; octets that are no UTF-8 as ``\\xHH``."""
        return self.output.decode(errors="backslashreplace")


def ask(node: str, command: str, *args: str, deadline: float = DEADLINE) -> Answer:
    """Run one program on a node, with ``args`` quoted in place of each ``%s``.

    Args:
        node: its name in the inventory.
        command: a program and its arguments; no pipe, as timeout(1) goes before it.
        args: anything.
        deadline: seconds; the program is killed then, and a node that has not answered MORE later is given up.

    Raises:
        NodeError: no answer.
    """
    if node in _silent:
        raise NodeError(f"{node} does not answer: {_silent[node]}")
    deadline *= PATIENCE
    answers: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            done = host(node).run(f"timeout --kill-after 5 {deadline:.0f} {command}", *args)
            answers.put(Answer(node, done.rc, done.stdout_bytes, done.stderr))
        except Exception as error:  # paramiko's and testinfra's are of many kinds
            answers.put(error)

    # A thread of its own, as nothing else comes back from a node that has stopped in the middle of a command.
    threading.Thread(target=run, daemon=True).start()
    try:
        found = answers.get(timeout=deadline + MORE * PATIENCE)
    except queue.Empty:
        found = TimeoutError(f"nothing within {deadline:.0f} s")
    if isinstance(found, Exception):
        _silent[node] = str(found) or type(found).__name__
        raise NodeError(f"{node} does not answer: {_silent[node]}") from found
    if found.code in (124, 137):
        raise NodeError(f"{node}: {command.split(maxsplit=1)[0]} was not done within {deadline:.0f} s")
    return found


def ok(node: str, command: str, *args: str, deadline: float = DEADLINE) -> Answer:
    """Run a program that must succeed. Raises NodeError."""
    done = ask(node, command, *args, deadline=deadline)
    if done.code:
        said = (done.error or done.text).strip().splitlines() or [f"exit code {done.code}"]
        raise NodeError(f"{node}: {command.split(maxsplit=1)[0]}: {said[-1][:300]}")
    return done


def program(node: str, name: str, asked: Mapping[str, Any], deadline: float = DEADLINE) -> Answer:
    """Run one of PROGRAMS on a node, with ``asked`` as its argument. Raises NodeError."""
    text = (PROGRAMS / f"{name}.py").read_text()
    return ok(node, "python3 -I -c %s %s", text, json.dumps(asked), deadline=deadline)


def listed(node: str, answer: Answer) -> list[dict[str, Any]]:
    """Return the list of tables that a command printed as JSON; nothing printed is an empty one. Raises NodeError."""
    try:
        found = json.loads(answer.text or "[]")
    except ValueError as error:
        raise NodeError(f"{node}: what it printed is no JSON: {error}") from error
    if not isinstance(found, list):
        raise NodeError(f"{node}: what it printed is no list: {answer.text[:80]!r}")
    return [one for one in found if isinstance(one, dict)]


def side_by_side(names: Iterable[str], work: Callable[[str], T]) -> dict[str, T | NodeError]:
    """Return, by name, what ``work`` returns for each, or why it could not."""

    def one(name: str) -> T | NodeError:
        try:
            return work(name)
        except NodeError as error:
            return error

    names = list(dict.fromkeys(names))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
