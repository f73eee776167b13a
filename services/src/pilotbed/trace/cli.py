"""The command pilotbed-trace: reads the records; what to make of them is in ``records``."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from .. import batch, dn
from ..glexec import journal
from . import records
from .records import Payload

T = TypeVar("T")

_HISTORY = "GlobalJobId,Owner,x509userproxysubject,ExitCode,JobStatus,RemoteUserCpu,RemoteSysCpu,RemoteWallClockTime"

#: A directory of this name in a directory of journals is of one machine, whichever (sd_journal_open_directory(3)).
_MACHINE_ID = re.compile("[0-9a-f]{32}")


def moment(text: str) -> float:
    """Return the seconds since 1970 of an ISO date or time (local, if it does not say), or of @SECONDS."""
    found = float(text[1:]) if text.startswith("@") else datetime.fromisoformat(text).astimezone().timestamp()
    if not math.isfinite(found):
        raise ValueError(f"{text} is no moment")
    return found


class LeftOut:
    """Records that cannot be read: they are left out and counted, and do not keep the others from being found."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""

    def read(self, record: Callable[[T], Payload | None], values: Iterable[T]) -> Iterator[Payload]:
        """Yield the payloads that ``record`` makes of ``values``."""
        for value in values:
            try:
                one = record(value)
            except records.Unreadable as error:
                self.count += 1
                self.first = self.first or str(error)
            else:
                if one:
                    yield one


def places(directory: Path | None, node: str) -> list[tuple[Path | None, str]]:
    """Return each directory with journals, and whose they are, if it is said there; those of ``node`` alone, if given.

    Where journals are collected each node has a directory of its name, in which nobody else can write (docs/logs.md):
    of which host a record says it is, is its sender's word.

    Raises:
        OSError: there is no such directory.
    """
    if directory is None:
        return [(None, "")]
    whole = directory.resolve()
    if (whole / f"{whole.name}.journal").exists():
        return [(directory, whole.name)]
    found = [path for path in sorted(directory.iterdir())
             if path.is_dir() and not _MACHINE_ID.fullmatch(path.name) and any(path.glob("*.journal"))]  # fmt: skip
    if not found:
        return [(directory, "")]
    return [(path, path.name) for path in found if not node or path.name == node.partition(".")[0]]


def read_journal(
    directory: Path | None, since: float, left_out: LeftOut, *matches: str, node: str = ""
) -> Iterator[Payload]:
    """Yield the payloads that ended after ``since``, as the journal has them; on ``node``, if given.

    Raises:
        OSError: journalctl says that it cannot read it.
        ValueError: what it shows ends within an entry.
    """
    fields = ",".join(["_UID", "_HOSTNAME", "SYSLOG_IDENTIFIER", *(f"GLEXEC_{name}" for name in records.FIELDS)])
    command = ["journalctl", "--quiet", "--no-pager", "--output=export", f"--output-fields={fields}",
               f"--since=@{int(since)}", *([f"--directory={directory}"] if directory else []),
               *records.MATCHES, *matches]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        entries = records.exported(process.stdout)  # type: ignore[arg-type]
        yield from left_out.read(lambda entry: records.payload(entry, node), entries)
    if process.returncode:
        raise OSError(f"journalctl ended with {process.returncode}")


def read_running(left_out: LeftOut) -> list[Payload]:
    """Return the payloads that run on this node now; none for who is not root, as only root may see them."""
    if os.geteuid() or not Path(journal.DIRECTORY).is_dir():
        return []
    node = socket.gethostname()
    logs = (case.log for case in journal.under_way() if case.monitor)
    return list(left_out.read(lambda log: records.running(log, node), logs))


def read_batch(file: Path | None, found: Sequence[Payload]) -> dict[str, dict[str, str]]:
    """Return, by name, the batch systems' records of the payloads' jobs: those in ``file``, or those that they tell.

    Raises:
        OSError: the file cannot be read.
        ValueError: a payload ran under a batch system that is not known here.
    """
    jobs: dict[str, set[str]] = {}
    for system, _, number in (one.batch.partition(" ") for one in found if one.batch):
        jobs.setdefault(system, set()).add(number)
    records: dict[str, dict[str, str]] = {}
    for system, numbers in jobs.items():
        module = batch.load(system)
        said = module.parse(file.read_text(errors="replace")) if file else module.recorded(numbers)
        records |= {f"{system} {number}": record for number, record in said.items()}
    return records


def read_condor() -> list[dict[str, Any]]:
    """Return the history of this submit host. Raises OSError."""
    command = ["condor_history", "-json", "-attributes", _HISTORY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"condor_history: {done.stderr.strip()}")
    ads = json.loads(done.stdout or "[]")
    return [ad for ad in ads if isinstance(ad, dict)] if isinstance(ads, list) else []


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's meaning."""
    parser = argparse.ArgumentParser(prog="pilotbed-trace", description="Who ran on a node, and where a user ran.")
    parser.add_argument("--node", default="", help="what ran on this node")
    parser.add_argument("--dn", default="", help="what ran for this user (end-entity DN)")
    parser.add_argument("--account", default="", help="what ran under this pool account")
    parser.add_argument("--at", type=moment, metavar="TIME", help="at this time, such as 2026-11-21T02:47:38+00:00")
    parser.add_argument("--since", type=moment, metavar="TIME", help="not before (default: a day ago)")
    parser.add_argument("--until", type=moment, metavar="TIME", help="not after (default: now)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--directory", type=Path, help="collected journals, one a node; default: this node's own"
    )
    source.add_argument("--records", type=argparse.FileType(), help="what --json has printed elsewhere; - is stdin")
    parser.add_argument("--batch", type=Path, metavar="FILE", help="records of the batch system; default: asks it")
    parser.add_argument("--condor", action="store_true", help="join this submit host's condor_history")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked = parser.parse_args(argv)
    if not (asked.node or asked.dn or asked.account):
        parser.error("say a --node, a --dn or an --account")
    if asked.at is not None and (asked.since is not None or asked.until is not None):
        parser.error("--at is one moment, --since and --until are a span: say one of both")
    try:
        asked.dn = asked.dn and dn.canonical(asked.dn)
    except dn.NotADn as error:
        parser.error(str(error))
    now = datetime.now().timestamp()
    asked.until = now if asked.until is None else asked.until
    asked.since = asked.until - 86400 if asked.since is None else asked.since
    if asked.at is not None:
        asked.since = asked.until = asked.at
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question; return the exit code: 0, or 1 where the records cannot be read."""
    asked = arguments(argv)
    named = {"TARGET": asked.account, "DN": asked.dn}
    matches = [f"GLEXEC_{name}={value}" for name, value in named.items() if value]
    left_out, code = LeftOut(), 0
    try:
        if asked.records:
            given = json.load(asked.records)
            if not isinstance(given, list):
                raise ValueError(f"{asked.records.name}: not what --json prints, a list")
            found = list(left_out.read(records.from_json, given))
        else:
            found = []
            for place, node in places(asked.directory, asked.node):
                try:
                    found += read_journal(place, asked.since, left_out, *matches, node=node)
                except (OSError, ValueError) as error:
                    if not node:
                        raise
                    print(f"pilotbed-trace: not all of {node}, in {place}: {error}", file=sys.stderr)
                    code = 1
            found += [] if asked.directory else read_running(left_out)
        found = records.chosen(
            found, node=asked.node, dn=asked.dn, account=asked.account, since=asked.since, until=asked.until
        )
        jobs = {} if asked.records and not asked.batch else read_batch(asked.batch, found)
        found = records.joined(found, jobs, read_condor() if asked.condor else ())
    except (OSError, ValueError, RecursionError) as error:
        print(f"pilotbed-trace: {error}", file=sys.stderr)
        return 1
    if left_out.count:
        print(f"pilotbed-trace: {left_out.count} records left out; of the first, {left_out.first}", file=sys.stderr)
    print(json.dumps(records.as_json(found), indent=1) if asked.json else records.table(found))
    return code
