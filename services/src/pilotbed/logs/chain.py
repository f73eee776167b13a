"""The chain: lines, each of which has the hash of the one before, and stands for some records of a node.

It is in files named after the number of their first line (``000000000000.chain``), only ever written at the end. A line
that was cut off is taken away again; a line that is there stays, whatever it says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pilotbed.files import replace_file

from .journals import NODE, Record

#: Most records that one line stands for.
LONGEST = 1000
#: Bytes of a file of the chain, about: then the next one is begun.
SEGMENT = 16 << 20
#: What the first line follows.
NOTHING = "0" * 64
#: Hexadecimal digits of each record's digest in a line: they say which one was changed; that one was, the whole does.
PART = 8

Positions = dict[str, dict[str, int]]


class Damaged(Exception):
    """A line that is none; the message says which."""


@dataclass(frozen=True)
class Line:
    """A line: ``count`` records of ``node``, numbered by ``source`` from ``first`` on, as seen at ``time`` (1970 s)."""

    n: int
    time: int
    node: str
    source: str
    first: int
    count: int
    digest: str
    parts: str
    prev: str

    def written(self) -> bytes:
        """Return the line as it stands in the file."""
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"


@dataclass(frozen=True)
class Head:
    """Where the chain ends: the number of the next line, and what it will follow."""

    n: int = 0
    hash: str = NOTHING


def digest_of(line: bytes) -> str:
    """Return what the next line says it follows."""
    return hashlib.sha256(line).hexdigest()


def parse(text: bytes) -> Line:
    """Return the line that ``text`` is. Raises Damaged."""
    try:
        said = json.loads(text)
        line = Line(**said)
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged("it is no line of a chain") from error
    kinds = {"n": int, "time": int, "node": str, "source": str, "first": int, "count": int, "digest": str, "parts": str,
             "prev": str}  # fmt: skip
    if any(type(said[name]) is not kind for name, kind in kinds.items()):
        raise Damaged("it is no line of a chain")
    if not NODE.fullmatch(line.node):
        raise Damaged("it names no node")
    if not 0 < line.count <= LONGEST or line.first < 1 or len(line.parts) != line.count * PART:
        raise Damaged(f"it stands for {line.count} records")
    return line


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield records as lines have them: of one source, LONGEST at most, and without a gap in their numbers."""
    found: list[Record] = []
    for record in records:
        if found:
            last = found[-1]
            if len(found) == LONGEST or (record.source, record.number) != (last.source, last.number + 1):
                yield found
                found = []
        found.append(record)
    if found:
        yield found


def line_for(records: list[Record], node: str, now: int, head: Head) -> bytes:
    """Return the line that stands for a batch of a node's records, as it is written."""
    whole = hashlib.sha256(b"".join(record.digest for record in records)).hexdigest()
    parts = "".join(record.digest.hex()[:PART] for record in records)
    first = records[0]
    return Line(head.n, now, node, first.source, first.number, len(records), whole, parts, head.hash).written()


# -- its files


def segments(directory: Path) -> list[Path]:
    """Return the files of the chain, by the numbers of their first lines. Raises OSError."""
    found = [path for path in directory.glob("*.chain") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def read(directory: Path) -> Iterator[tuple[int, Path, bytes]]:
    """Yield number, file and text of every line; the number is by its place. Raises OSError."""
    for path in segments(directory):
        with path.open("rb") as stream:
            for n, text in enumerate(stream, int(path.stem)):
                yield n, path, text


class Chain:
    """The chain in a directory, to be written on.

    Args:
        directory: has the files; ``state.json`` beside them is where it ends, and can be made again from them.

    Raises:
        OSError: it cannot be read, or mended after a line that was cut off.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mended = 0  # bytes of a line that was cut off
        self.head = Head()
        self.positions: Positions = {}
        self._mend()
        if not self._remembered():
            self._read()

    def position(self, node: str, source: str) -> int:
        """Return the number of a node's last record that is in the chain; 0 for none."""
        return self.positions.get(node, {}).get(source, 0)

    def add(self, records: Iterable[Record], node: str, now: int) -> int:
        """Write lines for a node's records and return how many records these are.

        Raises:
            OSError: the disk is full; the chain ends with its last whole line.
        """
        count = 0
        for batch in batches(records):
            text = line_for(batch, node, now, self.head)
            self._append(text)
            self.head = Head(self.head.n + 1, digest_of(text))
            self.positions.setdefault(node, {})[batch[-1].source] = batch[-1].number
            count += len(batch)
        return count

    def remember(self) -> None:
        """Write down where the chain ends, for the next time and for nginx. Raises OSError."""
        state = {"n": self.head.n, "hash": self.head.hash, "size": self._size(), "positions": self.positions}
        replace_file(self.directory / "state.json", json.dumps(state), 0o644, durable=True)
        replace_file(self.directory / "head", f"n={self.head.n} head={self.head.hash}\n", 0o644)

    def forget(self, before: float) -> list[Path]:
        """Remove files whose lines are all from before ``before`` (1970 s), and the next file's first one; return them.

        So the first line that is left is always an old one, or the chain's very first.

        Raises:
            OSError: one cannot be removed.
        """
        found, gone = segments(self.directory), []
        for path, following in itertools.pairwise(found):
            with following.open("rb") as stream:
                text = stream.readline()
            try:
                if parse(text).time >= before:
                    break
            except Damaged:
                break
            path.unlink()
            gone.append(path)
        return gone

    def _last(self) -> Path | None:
        found = segments(self.directory)
        return found[-1] if found else None

    def _size(self) -> int:
        last = self._last()
        return last.stat().st_size if last else 0

    def _mend(self) -> None:
        """Take away what stands behind the last whole line: a run was killed, or the disk was full."""
        last = self._last()
        if not last:
            return
        with last.open("rb+") as stream:
            size = stream.seek(0, os.SEEK_END)
            end = size
            while end:
                begin = max(0, end - 65536)
                stream.seek(begin)
                at = stream.read(end - begin).rfind(b"\n")
                if at >= 0:
                    end = begin + at + 1
                    break
                end = begin
            if end != size:
                self.mended = size - end
                stream.truncate(end)
                os.fsync(stream.fileno())

    def _remembered(self) -> bool:
        """Take over what ``remember`` has written, if the chain ends there."""
        try:
            state = json.loads((self.directory / "state.json").read_text())
            head, size, positions = Head(int(state["n"]), str(state["hash"])), int(state["size"]), state["positions"]
            taken = {str(node): {str(source): int(number) for source, number in by_source.items()}
                     for node, by_source in positions.items()}  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        last = self._last()
        if not last or size != last.stat().st_size or self._last_hash(last) != head.hash:
            return False
        self.head, self.positions = head, taken
        return True

    @staticmethod
    def _last_hash(path: Path) -> str:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 65536))  # longer than any line
            whole = stream.read()
        return digest_of(whole[whole.rstrip(b"\n").rfind(b"\n") + 1 :])

    def _read(self) -> None:
        for n, _, text in read(self.directory):
            self.head = Head(n + 1, digest_of(text))
            try:
                line = parse(text)
            except Damaged:  # verify says so; what follows is not to suffer from it
                continue
            by_source = self.positions.setdefault(line.node, {})
            by_source[line.source] = max(by_source.get(line.source, 0), line.first + line.count - 1)

    def _append(self, text: bytes) -> None:
        last = self._last()
        if not last or last.stat().st_size >= SEGMENT:
            last = self.directory / f"{self.head.n:012}.chain"
        descriptor = os.open(last, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, text) != len(text):
                    raise OSError(28, "no space for a whole line", str(last))
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


# -- what does not fit


@dataclass
class Verdict:
    """What `verify` has found: a sentence for each thing that does not fit; and how much does."""

    wrong: list[str] = field(default_factory=list)
    begin: int = 0  # number of the chain's first line; those before have been forgotten
    lines: int = 0
    records: int = 0
    waiting: int = 0  # records that came too late for their line
    older: int = 0  # records whose lines have been forgotten
    nodes: set[str] = field(default_factory=set)


def links(directory: Path, seen: Mapping[int, str], oldest: float, verdict: Verdict) -> Head:
    """Look at every line for itself and for what it follows; return where the chain ends.

    Args:
        directory: has the chain.
        seen: hashes of the chain that were seen elsewhere, by the number of the line that would follow.
        oldest: what is younger (1970 s) must be there.
        verdict: gets what is wrong.

    Raises:
        OSError: the chain cannot be read.
    """
    head: Head | None = None
    for place, path, text in read(directory):
        whole = text.endswith(b"\n")
        try:
            line: Line | None = parse(text)
        except Damaged as error:
            line = None
            if whole:
                verdict.wrong.append(f"line {place} of the chain ({path.name}) was changed: {error}")
            else:
                continue  # it is being written, or was cut off
        n = line.n if line else place
        if head is None:
            verdict.begin = n
            if line and n and line.time > oldest:
                verdict.wrong.append(f"the chain begins with line {n} of {_when(line.time)}: those before are missing")
            if line and not n and line.prev != NOTHING:
                verdict.wrong.append("line 0 of the chain was changed: it follows another one")
        elif line and n < head.n:
            verdict.wrong.append(f"line {n} of the chain ({path.name}) comes after line {head.n - 1}")
        elif line and n > head.n:
            gone = f"line {head.n} is" if n == head.n + 1 else f"lines {head.n} to {n - 1} are"
            verdict.wrong.append(f"{gone} missing in the chain ({path.name})")
        elif line and line.prev != head.hash:
            verdict.wrong.append(f"line {n - 1} of the chain was changed: line {n} ({path.name}) followed another one")
        head = Head(n + 1, digest_of(text))
        if seen.get(head.n, head.hash) != head.hash:
            verdict.wrong.append(f"line {n} of the chain ({path.name}) is not the one that was seen elsewhere")
        verdict.lines += 1
        verdict.nodes |= {line.node} if line else set()
    end = head or Head()
    if missing := sorted(n for n in seen if n > end.n):
        verdict.wrong.append(f"the chain ends with line {end.n - 1}; line {missing[-1] - 1} was seen elsewhere")
    return end


def lines_of(directory: Path, node: str) -> dict[str, list[Line]]:
    """Return a node's lines by source, by the numbers of their records. Raises OSError."""
    found: dict[str, list[Line]] = {}
    wanted = json.dumps(node).encode()
    for _, _, text in read(directory):
        if wanted in text:
            try:
                line = parse(text)
            except Damaged:
                continue
            if line.node == node:
                found.setdefault(line.source, []).append(line)
    return {source: sorted(lines, key=lambda line: line.first) for source, lines in found.items()}


def compare(node: str, lines: list[Line], records: Iterable[Record], oldest: float, verdict: Verdict) -> int:
    """Compare records of one source with the lines that stand for them.

    Return the number of the first one behind them all, for which no line stands yet; 0 if there is none.

    Args:
        node: whose they are.
        lines: by the numbers of their records.
        records: what there is now, by number.
        oldest: what was seen before (1970 s) may be gone, if nothing older is there.
        verdict: gets what is wrong.
    """
    waiting = iter(records)
    record = next(waiting, None)
    begun = False  # something is there: what is older than the rest may be gone
    for line in lines:
        others = []
        while record and record.number < line.first:
            others.append(record.number)
            record = next(waiting, None)
        if others and verdict.begin and line is lines[0]:
            verdict.older += len(others)
        elif others:
            _say(verdict, node, others, "in no line of the chain: put in later")
        here: dict[int, bytes] = {}
        while record and record.number < line.first + line.count:
            here[record.number] = record.digest
            record = next(waiting, None)
        numbers = range(line.first, line.first + line.count)
        missing = [number for number in numbers if number not in here]
        gone = line.time < oldest and not begun
        begun = begun or bool(here)
        parts = {number: line.parts[at * PART : (at + 1) * PART] for at, number in enumerate(numbers)}
        changed = [number for number, digest in here.items() if digest.hex()[:PART] != parts[number]]
        when = f"received by {_when(line.time)}, line {line.n}"
        if missing and not (gone and missing == list(numbers)[: len(missing)]):
            _say(verdict, node, missing, f"missing ({when})")
        if changed:
            _say(verdict, node, changed, f"changed ({when})")
        whole = hashlib.sha256(b"".join(here[number] for number in sorted(here))).hexdigest()
        if not missing and not changed and whole != line.digest:
            _say(verdict, node, list(numbers), f"not all as they were ({when})")
        verdict.records += len(here)
    verdict.waiting += (record is not None) + sum(1 for _ in waiting)
    return record.number if record else 0


def _say(verdict: Verdict, node: str, numbers: list[int], what: str) -> None:
    """Name records; of one node and kind, those that follow each other in one sentence."""
    begin = numbers[0]
    for at, number in enumerate(numbers):
        if at + 1 == len(numbers) or numbers[at + 1] != number + 1:
            one = f"{node}: record {begin} is" if begin == number else f"{node}: records {begin} to {number} are"
            verdict.wrong.append(f"{one} {what}")
            begin = numbers[at + 1] if at + 1 < len(numbers) else 0


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"@{seconds}"


def heads(text: str) -> dict[int, str]:
    """Return the heads that another host has remembered, as `Chain.remember` writes them; other lines are left out."""
    found: dict[int, str] = {}
    for line in text.splitlines():
        words: dict[str, Any] = dict(word.partition("=")[::2] for word in line.split())
        n, said = words.get("n", ""), words.get("head", "")
        if n.isdecimal() and len(n) < 19 and len(said) == len(NOTHING):
            found[int(n)] = said
    return found
