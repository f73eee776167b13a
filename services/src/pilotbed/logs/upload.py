"""A node's side: sends what is new in its journal to the collector, again and again until it is taken.

systemd-journal-upload does not do: its peer takes 1024 fields a record, journald 1024 and its own. With one record of
1023 fields any user of a node ends that node's audit trail ("Entry with more fields than the maximum of 1024, aborting
connection"): the uploader comes back, and sends the same again for ever. Nor does it look at revocation lists.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pilotbed.files import replace_file
from pilotbed.service import event, run_loop

from . import chain

#: Fields of a record that are sent; journald's own ("_…"), which nobody else can write, are always.
FIELDS = 900
#: Bytes of a field and of a record that are sent; a user's record has 32 MiB at most, one of root's 770.
LARGEST_FIELD, LARGEST_RECORD = 24 << 20, 48 << 20
#: Bytes and records of one request, about: what is sent again when it is not answered.
REQUEST, RECORDS = 8 << 20, 10_000
#: Seconds between two looks at the journal, and for an answer.
PAUSE, DEADLINE = 5.0, 120.0

_PIECE = 1 << 16
_log = logging.getLogger("pilotbed.log")


class Refused(Exception):
    """What was sent is not with the collector, or it could not be asked; the message says why."""


@dataclass(frozen=True)
class Outgoing:
    """A record as it is sent, and what journalctl calls its place."""

    cursor: str
    data: bytes


def outgoing(stream: IO[bytes]) -> Iterator[Outgoing]:
    """Yield the records of a stream in the journal's export format, without what the collector would not take.

    Such a record says how many fields are left out, in PILOTBED_LEFT_OUT. One that the stream ends in is left out.
    """
    parts: list[bytes] = []
    cursor, fields, size, left_out = "", 0, 0, 0
    while line := stream.readline(_PIECE):
        if line == b"\n":
            if cursor and len(parts) > 1:
                note = b"PILOTBED_LEFT_OUT=%d\n" % left_out if left_out else b""
                yield Outgoing(cursor, b"".join([*parts, note, b"\n"]))
            parts, cursor, fields, size, left_out = [], "", 0, 0, 0
            continue
        own = line.startswith(b"_")
        fields += not own
        most = min(LARGEST_FIELD, LARGEST_RECORD - size) if own or fields <= FIELDS else 0
        whole = _field(line, stream, most)
        if whole:
            parts.append(whole)
            size += len(whole)
            if line.startswith(b"__CURSOR="):
                cursor = whole[len(b"__CURSOR=") :].decode(errors="replace").strip()
        else:
            left_out += 1


def _field(line: bytes, stream: IO[bytes], most: int) -> bytes:
    """Return a field as it stands in the stream, of which ``line`` is the beginning; nothing if it is longer."""
    parts, size = [line], len(line)
    if b"=" in line:
        while line and not line.endswith(b"\n"):
            line = stream.readline(_PIECE)
            size += len(line)
            parts = [*parts, line] if size <= most else []
        return b"".join(parts) if size <= most and line else b""
    length = stream.read(8)
    left = int.from_bytes(length, "little") + 1  # and a newline
    parts.append(length)
    size += left + len(length)
    while left:
        piece = stream.read(min(left, _PIECE))
        if not piece:
            return b""
        left -= len(piece)
        if size <= most:
            parts.append(piece)
    return b"".join(parts) if size <= most else b""


@dataclass
class Uploader:
    """What the node remembers from turn to turn.

    Args:
        host, port: the collector.
        cert, key: PEM files that this node shows.
        capath: CAs and revocation lists by which the collector is known.
        state: the file that says how far the journal has been taken.
        witness: seconds between two looks at the head of the collector's chain.
    """

    host: str
    port: int
    cert: Path
    key: Path
    capath: Path
    state: Path
    witness: float
    looked: float = field(default=0.0, init=False)

    def turn(self) -> None:
        """Send what is new, and look at the chain's head if it is time. Raises Refused."""
        while self._send():
            pass
        if time.monotonic() - self.looked >= self.witness or not self.looked:
            said = self._ask("GET", "/head").decode(errors="replace")
            self.looked = time.monotonic()
            for n, head in chain.heads(said).items():
                _log.info(event("seen", n=n, head=head))

    def _send(self) -> bool:
        """Send records, if there are new ones; return whether there may be more."""
        command = ["journalctl", "--quiet", "--no-pager", "--all", "--output=export"]
        if self.state.exists():
            command.append(f"--after-cursor={self.state.read_text().strip()}")
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                records = outgoing(process.stdout)
                if not (first := next(records, None)):
                    if code := process.wait():
                        raise Refused(f"journalctl ended with {code}: see above, or its own log")
                    return False
                batch = Batch(first, records)
                self._ask("POST", "/upload", batch)
            finally:
                process.kill()
        replace_file(self.state, f"{batch.cursor}\n", 0o600, durable=True)
        return batch.full

    def _ask(self, method: str, path: str, body: Batch | None = None) -> bytes:
        """Return the collector's answer. Raises Refused."""
        try:
            context = ssl.create_default_context(capath=str(self.capath))
            # A new one each time: it has read this one's list.
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
            context.load_cert_chain(self.cert, self.key)
            connection = http.client.HTTPSConnection(self.host, self.port, context=context, timeout=DEADLINE)
            headers = {"Content-Type": "application/vnd.fdo.journal"} if body else {}
            try:
                connection.connect()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have said why
                    connection.request(method, path, body, headers, encode_chunked=body is not None)
                answer = connection.getresponse()
                said = answer.read(4096)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"https://{self.host}:{self.port}{path}: {error or type(error).__name__}") from error
        if not http.client.OK <= answer.status < http.client.MULTIPLE_CHOICES:
            raise Refused(f"https://{self.host}:{self.port}{path}: {answer.status} {answer.reason}")
        return said


class Batch:
    """The body of one request: records until there are enough; then it knows the last one's cursor."""

    def __init__(self, first: Outgoing, others: Iterator[Outgoing]) -> None:
        self._first, self._others = first, others
        self.cursor = ""
        self.full = False

    def __iter__(self) -> Iterator[bytes]:
        waiting = bytearray()
        size = count = 0
        record: Outgoing | None = self._first
        while record:
            waiting += record.data
            self.cursor = record.cursor
            size += len(record.data)
            count += 1
            self.full = size >= REQUEST or count >= RECORDS
            record = None if self.full else next(self._others, None)
            if len(waiting) >= _PIECE or not record:
                yield bytes(waiting)
                waiting.clear()


def run(uploader: Uploader, watched: Path) -> None:
    """Send until told to stop, or until ``watched`` changes, the host's certificate: a new process gets the new one."""
    before = _changed(watched)

    def turn() -> None:
        if _changed(watched) != before:
            _log.info(event("ends", why=f"{watched} has changed"))
            os.kill(os.getpid(), 15)
            return
        uploader.turn()

    run_loop(turn, PAUSE, (Refused,))


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
