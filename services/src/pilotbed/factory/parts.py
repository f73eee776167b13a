"""Logs of pilots that run, as they come in parts: what there is of one that never came home with its job.

    DIRECTORY/ENTRY/CLUSTER.PROC/PILOT/sender           who sent the first part (DN), and so all others
                                      /StartLog.0007.gz

A pilot's account made each part, so nothing in it is believed: names are checked and sizes bounded, and private keys,
tokens and what lets somebody use an HTCondor claim are left out before anything is written.
"""

from __future__ import annotations

import gzip
import re
import shutil
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from pilotbed.files import replace_file

#: Octets of a part as it comes, and unpacked.
PACKED, UNPACKED = 256 << 10, 1 << 20

_PATH = re.compile(
    r"/(?P<entry>[A-Za-z0-9_][A-Za-z0-9_.-]{0,99})/(?P<job>[0-9]{1,9}\.[0-9]{1,6})/(?P<pilot>glidein_[0-9]{1,9}_[0-9]{1,12})"
    r"/(?P<log>[A-Za-z0-9_][A-Za-z0-9_.-]{0,79})/(?P<number>[0-9]{1,4})"
)
_FILE = re.compile(r"(.+)\.([0-9]{4})\.gz")

#: What is left out, and what stands there then. A key's lines are found without its first one, which may have been in
#: another part: long words of base64, and lines of nothing else. A digest in hexadecimal is no secret.
_SECRETS = (
    (re.compile(rb"(?<![A-Za-z0-9+/])(?![0-9a-fA-F]+(?![A-Za-z0-9+/]))[A-Za-z0-9+/]{60,}={0,2}"), b"[left out]"),
    (re.compile(rb"^(?![0-9a-fA-F]+$)[A-Za-z0-9+/]{20,}={0,2}$", re.MULTILINE), b"[left out]"),
    (re.compile(rb"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"), b"[token left out]"),
    # <address>#started#number#secret: HTCondor shows it as "...", where it does not say more than it should.
    (re.compile(rb"(>#[0-9]{1,12}#[0-9]{1,9}#)(?!\.\.\.)[^\s]+"), rb"\1[left out]"),
    (re.compile(rb"://[^\s/@:]{1,100}:[^\s/@]{1,200}@"), b"://[left out]@"),
)


class Refusal(Exception):
    """A part that is not taken, by an HTTP status and why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


def without_secrets(content: bytes) -> bytes:
    """Return a log's content without keys, tokens, passwords in addresses, and the secret parts of claims."""
    for secret, instead in _SECRETS:
        content = secret.sub(instead, content)
    return content


@dataclass(frozen=True)
class Part:
    """Which part of which log of which pilot."""

    entry: str
    job: str
    pilot: str
    log: str
    number: int

    @classmethod
    def of(cls, path: str) -> Part:
        """Return what a request's path names.

        Raises:
            Refusal: it is not /ENTRY/CLUSTER.PROC/PILOT/LOG/NUMBER.
        """
        found = _PATH.fullmatch(path)
        if not found:
            raise Refusal(HTTPStatus.NOT_FOUND, "the path is not /ENTRY/CLUSTER.PROC/PILOT/LOG/NUMBER")
        return cls(found["entry"], found["job"], found["pilot"], found["log"], int(found["number"]))

    @property
    def directory(self) -> Path:
        """The pilot's, below the store's."""
        return Path(self.entry, self.job, self.pilot)


class Store:
    """The parts on disk; of all pilots no more than ``most`` octets, the oldest go first.

    Args:
        directory: where they are.
        most: octets of all pilots.
        pilot: octets of one.
    """

    def __init__(self, directory: Path, most: int, pilot: int) -> None:
        self.directory, self.most, self.pilot = directory, most, pilot
        self._turn = threading.Lock()
        found = [(max(file.stat().st_mtime for file in path.iterdir()), path) for path in _pilots(directory)]
        #: Octets by pilot, the oldest first.
        self._sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for _, path in sorted(found)}

    def take(self, part: Part, sender: str, body: bytes) -> None:
        """Keep a part (gzip); one that is there already stays as it is, so that nobody rewrites what was said.

        Raises:
            Refusal: it is no gzip, too large, too much, or another one's pilot.
            OSError: it cannot be written.
        """
        if len(body) > PACKED:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a part is at most {PACKED} octets")
        packed = gzip.compress(without_secrets(_unpacked(body)))
        with self._turn:
            path = self.directory / part.directory
            self._opened(path, sender)
            file = path / f"{part.log}.{part.number:04}.gz"
            if file.exists():
                return
            size = self._sizes.get(path, 0) + len(packed)
            if size > self.pilot:
                raise Refusal(HTTPStatus.INSUFFICIENT_STORAGE, f"no more than {self.pilot} octets of one pilot")
            replace_file(file, packed, 0o640)
            self._sizes[path] = size
            self._make_room(path)

    def _opened(self, path: Path, sender: str) -> None:
        """Make a pilot's directory, or see that it is the sender's."""
        mark = path / "sender"
        try:
            known = mark.read_text()
        except FileNotFoundError:
            path.mkdir(0o750, parents=True, exist_ok=True)
            replace_file(mark, sender, 0o640)
            self._sizes.setdefault(path, len(sender))
            return
        if known != sender:
            raise Refusal(HTTPStatus.FORBIDDEN, "another one's pilot has this name")

    def _make_room(self, keep: Path) -> None:
        while sum(self._sizes.values()) > self.most and (oldest := next(iter(self._sizes))) != keep:
            shutil.rmtree(oldest, ignore_errors=True)
            del self._sizes[oldest]


def _pilots(directory: Path, entry: str = "*") -> Iterator[Path]:
    """Yield the directories of pilots, all or an entry's, that have something in them."""
    return (path for path in directory.glob(f"{entry}/*/glidein_*") if path.is_dir() and any(path.iterdir()))


def _unpacked(body: bytes) -> bytes:
    """Return what a gzip member holds. Raises: Refusal."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        content = unpacker.decompress(body, UNPACKED + 1)
    except zlib.error as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"a part is gzip: {error}") from None
    if not unpacker.eof or unpacker.unused_data or len(content) > UNPACKED:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"a part is one whole gzip member of at most {UNPACKED} octets, unpacked")
    return content


@dataclass(frozen=True)
class Sent:
    """What a pilot has sent: its directory of parts."""

    path: Path

    @property
    def job(self) -> str:
        """``CLUSTER.PROC`` in the factory's queue."""
        return self.path.parent.name

    @property
    def entry(self) -> str:
        """The entry's name."""
        return self.path.parent.parent.name

    @property
    def pilot(self) -> str:
        """The pilot's name in the pool."""
        return self.path.name

    @property
    def sender(self) -> str:
        """Who sent it (DN)."""
        try:
            return (self.path / "sender").read_text()
        except OSError:
            return "?"

    def logs(self, most: int) -> dict[str, str]:
        """Return the logs as far as they came, by name, each no longer than ``most`` octets; gaps are shown."""
        found: dict[str, str] = {}
        following: dict[str, int] = {}
        for file in sorted(self.path.iterdir()):
            name = _FILE.fullmatch(file.name)
            if not name:
                continue
            log, number = name[1], int(name[2])
            if number != following.get(log, 0):
                found[log] = found.get(log, "") + "(a part is missing)\n"
            following[log] = number + 1
            try:
                content = zlib.decompressobj(wbits=31).decompress(file.read_bytes(), UNPACKED)
            except (OSError, zlib.error) as error:
                content = f"(damaged: {error})\n".encode()
            found[log] = (found.get(log, "") + content.decode("utf-8", "replace"))[-most:]
        return found

    @property
    def when(self) -> float:
        """When the last part came (seconds, Unix)."""
        return max((file.stat().st_mtime for file in self.path.iterdir()), default=0.0)


def sent(directory: Path, entry: str = "*") -> list[Sent]:
    """Return what all pilots, or those of an entry, have sent, the latest last."""
    return sorted(map(Sent, _pilots(directory, entry)), key=lambda one: (one.when, one.path))
