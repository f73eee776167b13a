"""The nodes' journals: which files there are, and a digest of every record in them.

Every byte of them may be an enemy's: the records are the nodes', which may be taken over, and a file may be broken. A
record is never held in memory as a whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

#: Names of directories that are nodes'.
NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: The first fields of a journal's header, little-endian (systemd.io/JOURNAL_FILE_FORMAT): signature, compatible and
#: incompatible flags, state, file, machine and boot id, seqnum_id, sizes and offsets, n_entries, tail and head seqnum.
HEADER = struct.Struct("<8sIIB7x16s16s16s16s8Q3Q")
_SIGNATURE = b"LPKSHHRH"

#: Bytes that are read at a time.
_PIECE = 1 << 16
#: Seconds for all the records of one file; a broken one may keep journalctl busy for ever.
DEADLINE = 1800.0

_CURSOR = re.compile(rb"__CURSOR=s=([0-9a-f]{32});i=([0-9a-f]{1,16});")
#: What of journalctl's own words about a record counts; newer ones may add others.
_TIMES = (b"__REALTIME_TIMESTAMP=", b"__MONOTONIC_TIMESTAMP=")


class Broken(Exception):
    """What cannot be read; the message says what and why."""


@dataclass(frozen=True)
class File:
    """A journal file: its records are ``head`` to ``tail`` of ``source``, in the order in which they came."""

    path: Path
    source: str  # seqnum_id: whoever has numbered the records
    head: int
    tail: int


@dataclass(frozen=True)
class Record:
    """A record: by whose number, and the SHA-256 of all its fields."""

    source: str
    number: int
    digest: bytes


def nodes(top: Path) -> list[str]:
    """Return the nodes that have a directory in ``top``. Raises OSError."""
    return sorted(path.name for path in top.iterdir() if NODE.fullmatch(path.name) and path.is_dir())


def files(directory: Path) -> tuple[list[File], list[str]]:
    """Return a node's journal files by source and number, and what is wrong with others. Raises OSError."""
    found, wrong = [], []
    for path in sorted(directory.iterdir()):
        if path.name.endswith((".journal", ".journal~")):
            try:
                if file := header(path):
                    found.append(file)
            except Broken as error:
                wrong.append(str(error))
    return sorted(found, key=lambda file: (file.source, file.head)), wrong


def header(path: Path) -> File | None:
    """Return what a journal file says of itself; None if it has no records, or is gone. Raises Broken."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            data = stream.read(HEADER.size)
    except FileNotFoundError:  # it has just been rotated, and is there by another name
        return None
    except OSError as error:
        raise Broken(f"{path} cannot be read: {error.strerror}") from error
    if len(data) < HEADER.size or not data.startswith(_SIGNATURE):
        raise Broken(f"{path} is no journal")
    said = HEADER.unpack(data)
    source, (entries, tail, head) = said[7].hex(), said[-3:]
    if not entries and not tail:
        return None
    if not 0 < head <= tail:
        raise Broken(f"{path} says that its records are {head} to {tail}")
    return File(path, source, head, tail)


def records(file: File, after: int = 0) -> Iterator[Record]:
    """Yield the records of a file with numbers above ``after``, by number.

    The file is on the disk before: what is in the chain must not be lost when the power goes.

    Raises:
        Broken: it cannot be read any further.
    """
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:  # as in `header`
        return
    except OSError as error:
        raise Broken(f"{file.path} cannot be read: {error.strerror}") from error
    try:
        os.fsync(descriptor)
        yield from _shown(file, descriptor, after)
    except OSError as error:
        raise Broken(f"{file.path} cannot be read: {error}") from error
    finally:
        os.close(descriptor)


def _shown(file: File, descriptor: int, after: int) -> Iterator[Record]:
    """Yield what journalctl shows of a file that is open, and so may be renamed meanwhile. Raises Broken, OSError."""
    command = ["journalctl", "--quiet", "--no-pager", "--all", "--output=export", f"--file=/proc/self/fd/{descriptor}"]
    if after >= file.head:
        command.append(f"--after-cursor=s={file.source};i={after:x}")
    environment = {**os.environ, "SYSTEMD_LOG_LEVEL": "err", "LC_ALL": "C"}
    last = after
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, pass_fds=[descriptor]
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        watch = threading.Timer(DEADLINE, process.kill)
        watch.start()
        try:
            for record in exported(process.stdout):
                # journalctl finds the nearest record where there is none of that number.
                if record.source == file.source and record.number > last:
                    last = record.number
                    yield record
            said = process.stderr.read(_PIECE).decode(errors="replace").strip()
            code = process.wait()
        except Broken as error:
            raise Broken(f"{file.path} cannot be read after record {last}: {error}") from error
        finally:
            watch.cancel()
            process.kill()
    # The last one may be just being written: its number is in the header first.
    if code or last < file.tail - 1:
        why = said.splitlines()[-1][:200] if said else f"journalctl ended with {code}" if code else "no more is shown"
        raise Broken(f"{file.path} cannot be read after record {last} of {file.tail}: {why}")


def inconsistent(file: File) -> str:
    """Return what journalctl finds wrong with a file's own tables; nothing if all is well, or it is gone.

    By them it searches: a record that they do not lead to is there when all are read, and is not found by a field. What
    a crash has left (``~``) may lack its end. A file that is being written is asked again. In one whose times go back,
    as when records were sent twice, journalctl looks no further.
    """
    if file.path.name.endswith("~"):
        return ""
    command = ["journalctl", "--verify", "--quiet", "--no-pager", f"--file={file.path}"]
    environment = {**os.environ, "SYSTEMD_LOG_LEVEL": "err", "LC_ALL": "C"}
    said = ""
    for pause in (0, 1, 4):
        time.sleep(pause)
        try:
            done = subprocess.run(command, capture_output=True, env=environment, timeout=DEADLINE, check=False)
        except subprocess.TimeoutExpired:
            return f"not looked through in {DEADLINE:.0f} s"
        said = done.stderr.decode(errors="replace").strip() or f"journalctl ended with {done.returncode}"
        if not done.returncode or not file.path.exists() or "timestamp out of synchronization" in said:
            return ""
    return said.splitlines()[0][:300]


def exported(stream: IO[bytes]) -> Iterator[Record]:
    """Yield the records of a stream in the journal's export format (systemd.io/JOURNAL_EXPORT_FORMATS).

    A record's digest is that of the sorted digests of its fields, so that it does not depend on how and in which order
    they are shown. The cursor, which names the record, is no part of it.

    Raises:
        Broken: the stream ends within a record, or is none.
    """
    digests: set[bytes] = set()
    cursor: re.Match[bytes] | None = None
    while line := stream.readline(_PIECE):
        if line == b"\n":
            if digests:
                if not cursor:
                    raise Broken("a record has no cursor")
                digest = hashlib.sha256(b"".join(sorted(digests))).digest()
                yield Record(cursor[1].decode(), int(cursor[2], 16), digest)
            digests, cursor = set(), None
        elif b"=" not in line:
            digests.add(_binary(line, stream))
        elif not line.startswith(b"__") or line.startswith(_TIMES):
            digests.add(_text(line, stream))
        elif not line.endswith(b"\n"):
            raise Broken("a record is cut off")
        elif line.startswith(b"__CURSOR="):
            cursor = _CURSOR.match(line)
    if digests or cursor:
        raise Broken("a record is cut off")


def _text(line: bytes, stream: IO[bytes]) -> bytes:
    found = hashlib.sha256()
    while line and not line.endswith(b"\n"):
        found.update(line)
        line = stream.readline(_PIECE)
    if not line:
        raise Broken("a field is cut off")
    found.update(line[:-1])
    return found.digest()


def _binary(line: bytes, stream: IO[bytes]) -> bytes:
    """Return the digest of a field that comes as its name, eight bytes of length, and so many."""
    size = stream.read(8)
    if not line.endswith(b"\n") or len(size) < 8:
        raise Broken("a field is cut off")
    found = hashlib.sha256(line[:-1] + b"=")
    left = int.from_bytes(size, "little")
    while left:
        piece = stream.read(min(left, _PIECE))
        if not piece:
            raise Broken("a field is cut off")
        found.update(piece)
        left -= len(piece)
    if stream.read(1) != b"\n":
        raise Broken("a field is longer than it says")
    return found.digest()
