"""The command pilotbed-log: ``upload`` on every node; on the collector ``chain``, by a timer, and ``verify``."""

from __future__ import annotations

import argparse
import errno
import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pilotbed.service import event, set_up_logging
from pilotbed.settings import SettingsError, load

from . import chain as chains
from . import journals, upload
from .chain import Chain, Verdict
from .journals import Broken, File, Record

CONFIG = Path("/etc/pilotbed/log.toml")
DAY = 86400
#: Seconds in which a record comes into the chain, if that is being written.
PATIENCE = 300

_log = logging.getLogger("pilotbed.log")


@dataclass(frozen=True)
class Settings:
    """The configuration file. ``verify`` does without, on a copy."""

    journals: Path = Path("/var/log/journal/remote")
    chain: Path = Path("/var/lib/pilotbed-log")
    days: int = 90
    node_mib: int = 4096
    free_mib: int = 1024


def readable(records: Iterable[Record], wrong: list[str]) -> Iterator[Record]:
    """Yield records as far as they can be read; what ends that is added to ``wrong``."""
    try:
        yield from records
    except Broken as error:
        wrong.append(str(error))


# -- chain


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Wait until nobody else writes the chain: the lines of two would stand among each other.

    Raises:
        OSError: it is not this account's, which would leave files that its owner cannot write.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            why = "is another account's; say systemctl start pilotbed-log-chain"
            raise PermissionError(errno.EPERM, why, str(directory))
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write(settings: Settings, now: float) -> list[str]:
    """Bring into the chain what has come since the last time; return what went wrong with one node or file.

    Raises:
        OSError: the chain cannot be written or the journals' directory not be read.
    """
    with alone(settings.chain):
        return _write(settings, now)


def _write(settings: Settings, now: float) -> list[str]:
    chain = Chain(settings.chain)
    if chain.mended:
        _log.warning(event("mended", why=f"{chain.mended} bytes behind the chain's last whole line were taken away"))
    wrong: list[str] = []
    nodes = journals.nodes(settings.journals)
    try:
        for node in nodes:
            wrong += _extend(chain, settings.journals / node, node, int(now))
    finally:
        chain.remember()
        _limit(settings, nodes)
    for path in chain.forget(now - (settings.days + 1) * DAY):
        _log.info(event("forgotten", file=path.name, why=f"older than {settings.days} days"))
    return wrong


def _extend(chain: Chain, directory: Path, node: str, now: int) -> list[str]:
    """Write lines for a node's new records; return what cannot be read. Raises OSError: the chain cannot be written."""
    try:
        found, wrong = journals.files(directory)
    except OSError as error:
        return [f"{directory} cannot be read: {error.strerror}"]
    for file in found:
        after = chain.position(node, file.source)
        if file.tail > after:
            chain.add(readable(journals.records(file, after), wrong), node, now)
    return wrong


def _limit(settings: Settings, nodes: Sequence[str]) -> None:
    """Tell nginx, by a file each, from which nodes it is to take nothing more. Raises OSError."""
    there = os.statvfs(settings.journals)
    scarce = there.f_bavail * there.f_frsize < settings.free_mib << 20
    directory = settings.chain / "full"
    directory.mkdir(exist_ok=True)
    for node in nodes:
        used = _used(settings.journals / node) >> 20
        flag = directory / node
        if scarce or used >= settings.node_mib:
            if not flag.exists():
                why = f"less than {settings.free_mib} MiB are free" if scarce else f"it may have {settings.node_mib}"
                _log.error(event("refused", node=node, mib=used, why=why))
                flag.touch()
        elif flag.exists():
            flag.unlink()
            _log.warning(event("taken-again", node=node, mib=used))


def _used(directory: Path) -> int:
    """Return how many bytes of disk the files of a directory take."""
    total = 0
    for path in directory.iterdir():
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:  # just rotated
            continue
    return total


# -- verify


def verify(settings: Settings, chosen: Sequence[str], seen: dict[int, str], now: float) -> Verdict:
    """Compare chain and journals of all nodes, or of those chosen.

    Raises:
        OSError: either cannot be read.
        ValueError: a node is chosen that neither knows.
    """
    oldest = now - settings.days * DAY
    verdict = Verdict()
    chains.links(settings.chain, seen, oldest, verdict)
    known = sorted({*journals.nodes(settings.journals), *verdict.nodes})
    if strangers := sorted(set(chosen) - set(known)):
        raise ValueError(f"there is no node {', '.join(strangers)}; there is {', '.join(known) or 'none'}")
    verdict.nodes = set(chosen or known)
    for node in sorted(verdict.nodes):
        _verify(settings, node, oldest, now, verdict)
    return verdict


def _verify(settings: Settings, node: str, oldest: float, now: float, verdict: Verdict) -> None:
    lines = chains.lines_of(settings.chain, node)
    directory = settings.journals / node
    found, wrong = journals.files(directory) if directory.is_dir() else ([], [])
    verdict.wrong += [f"{node}: {what}" for what in wrong]
    for file in found:
        if what := journals.inconsistent(file):
            verdict.wrong.append(f"{node}: {file.path} was changed, a search in it may miss records: {what}")
    for source in sorted({*lines, *(file.source for file in found)}):
        here = [file for file in found if file.source == source]
        broken: list[str] = []
        first = chains.compare(node, lines.get(source, []), _all(here, broken), oldest, verdict)
        verdict.wrong += [f"{node}: {what}" for what in broken]
        # Of what is older than the chain's beginning there may be files, but no lines.
        since = oldest if verdict.begin else 0
        late = [file for file in here if first and file.tail >= first and since <= _changed(file) < now - PATIENCE]
        if late:
            what = "have been there for a while, and never came into the chain"
            verdict.wrong.append(f"{node}: records from {first} on, of {late[0].path}, {what}")


def _all(files: Iterable[File], broken: list[str]) -> Iterator[Record]:
    for file in files:
        yield from readable(journals.records(file), broken)


def _changed(file: File) -> float:
    try:
        return file.path.stat().st_mtime
    except FileNotFoundError:  # just rotated
        return time.time()


# -- the command


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's meaning."""
    parser = argparse.ArgumentParser(prog="pilotbed-log", description="Shows that logs are as they came in.")
    parser.add_argument("--config", type=Path, default=CONFIG, help="configuration file")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("chain", help="bring into the chain what has come; a timer does")
    sending = commands.add_parser("upload", help="send this node's journal to the collector")
    sending.add_argument("--to", required=True, metavar="HOST:PORT", help="the collector")
    sending.add_argument("--cert", type=Path, required=True, help="this host's certificate")
    sending.add_argument("--key", type=Path, required=True, help="its key")
    sending.add_argument("--capath", type=Path, required=True, help="CAs and revocation lists")
    sending.add_argument("--state", type=Path, required=True, help="file that says how far the journal has been taken")
    sending.add_argument("--witness", type=float, default=600.0, metavar="SECONDS",
                         help="between two looks at the chain's head")  # fmt: skip
    sending.add_argument("--watch", type=Path, required=True, metavar="FILE", help="end when it changes")
    asked = commands.add_parser("verify", help="find what was changed or removed")
    asked.add_argument("nodes", nargs="*", metavar="NODE", help="of these alone, but of the whole chain")
    asked.add_argument("--journals", type=Path, help="the journals, a directory a node")
    asked.add_argument("--chain", type=Path, help="the chain")
    asked.add_argument("--seen", type=argparse.FileType(errors="replace"), metavar="FILE",
                       help="heads that another host remembers (journalctl -u pilotbed-log-upload -o cat)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 1 where something is wrong, 2 where it could not be found out."""
    asked = arguments(argv)
    set_up_logging()
    if asked.command == "upload":
        host, _, port = asked.to.rpartition(":")
        sender = upload.Uploader(host, int(port), asked.cert, asked.key, asked.capath, asked.state, asked.witness)
        upload.run(sender, asked.watch)
        return 0
    try:
        settings = load(asked.config, Settings) if asked.config.exists() or asked.config != CONFIG else Settings()
        if asked.command == "chain":
            wrong = write(settings, time.time())
            for what in wrong:
                _log.error(event("unreadable", why=what))
            return 1 if wrong else 0
        settings = Settings(asked.journals or settings.journals, asked.chain or settings.chain, settings.days)
        seen = chains.heads(asked.seen.read()) if asked.seen else {}
        verdict = verify(settings, asked.nodes, seen, time.time())
    except (OSError, ValueError, SettingsError) as error:
        print(f"pilotbed-log: {error}", file=sys.stderr)
        return 2
    for what in verdict.wrong:
        print("".join(sign if sign.isprintable() else "?" for sign in what))
    counted = (
        f"{verdict.lines} lines, {verdict.records} records of {len(verdict.nodes)} nodes",
        f"{verdict.waiting} more wait for a line",
        f"{verdict.older} are older than the chain",
        f"{len(seen)} heads seen elsewhere",
        f"{len(verdict.wrong) or 'nothing'} wrong",
    )
    print("; ".join(counted))
    return 1 if verdict.wrong else 0
