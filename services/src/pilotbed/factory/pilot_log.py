"""pilotbed-pilot-log: what a pilot said, and the logs of its HTCondor, from what came home with its job.

Of a pilot that was killed nothing may come home but what it had sent before (`parts`).

A pilot's output ends with a summary (OSGTestResult), its error output holds its logs, packed by gzip and base64 as
glideinWMS does. Its account wrote both, so nothing in them is believed: sizes are bounded, and what is shown is text.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import re
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pilotbed.settings import SettingsError, load

from .config import Config
from .endings import OUTPUT, read
from .parts import Sent, sent

#: Octets of one log that are unpacked, and of a stream that are read: a pilot packs 500,000 of each log.
MOST = 4 << 20
STREAM = 32 << 20

_JOB = re.compile(r"[0-9]+\.[0-9]+")
_PILOT = re.compile(r"glidein_[0-9]+_[0-9]+")
_PACKED = re.compile(
    r"^([A-Za-z0-9_.-]{1,80})\n=+ gzip \| uuencode =+\nbegin-base64 644 -\n([A-Za-z0-9+/=\n]*?)\n====$", re.MULTILINE
)


@dataclass(frozen=True)
class Output:
    """The two streams of one pilot's job, by the first one's path ``...CLUSTER.PROC.out``."""

    path: Path

    @property
    def job(self) -> str:
        """``CLUSTER.PROC`` in the factory's queue."""
        found = OUTPUT.fullmatch(self.path.name)
        return found[2] if found else ""

    @property
    def entry(self) -> str:
        """The entry's name."""
        return self.path.parent.name.removeprefix("entry_")

    def text(self, suffix: str) -> str:
        """Return the stream ``out`` or ``err``, as far as it is there and not too long."""
        try:
            with self.path.with_suffix(f".{suffix}").open("rb") as file:
                return file.read(STREAM).decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def logs(self) -> Iterator[tuple[str, str]]:
        """Yield the logs that came with it, name and text; what is damaged as far as it can be read."""
        for name, packed in _PACKED.findall(self.text("err")):
            try:
                content = zlib.decompressobj(wbits=31).decompress(base64.b64decode(packed), MOST)
                yield name, content.decode("utf-8", "replace")
            except (binascii.Error, zlib.error, ValueError) as error:
                yield name, f"(damaged: {error})\n"

    def line(self) -> str:
        """Return one line about it."""
        when = self.path.stat().st_mtime
        ending = read(self.path, when)
        if ending is None:
            ended = "has not come home, or only in part"
        elif ending.test:
            ended = f"failed in {ending.test}: {ending.why}"
        else:
            ended = "ended" if ending.jobs is None else f"ended, after {ending.jobs} jobs"
        return line(when, self.job, self.entry, printable(ended))


def line(when: float, job: str, entry: str, what: str) -> str:
    """Return the line that says what has become of a pilot, and when (seconds, Unix)."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))}  {job}  {entry}  {what}"


def printable(text: str) -> str:
    """Return text that does nothing to a terminal."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in text)


def outputs(directory: Path, entry: str = "") -> list[Output]:
    """Return the pilots' outputs below a factory's log directory, the latest last."""
    found = [Output(path) for path in directory.glob(f"entry_{entry or '*'}/*.out") if OUTPUT.fullmatch(path.name)]
    return sorted(found, key=lambda one: (one.path.stat().st_mtime, one.path))


def of(known: Sequence[Output], which: str) -> list[Output]:
    """Return those of a factory's job, of a pilot by its name in the pool, or of an entry."""
    if _JOB.fullmatch(which):
        return [one for one in known if one.job == which]
    if _PILOT.fullmatch(which):
        return [one for one in known if re.search(rf"\b{which}\b", one.text("out"))]
    return [one for one in known if one.entry == which]


def sent_by(known: Sequence[Sent], which: str) -> list[Sent]:
    """Return what was sent by a factory's job, by a pilot of that name in the pool, or by all of an entry."""
    return [one for one in known if which in (one.job, one.pilot, one.entry)]


def line_of(one: Sent) -> str:
    """Return one line about what a pilot has sent whose job has not come home."""
    return line(one.when, one.job, one.entry, f"has not come home; {one.pilot} had sent logs until then")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``pilotbed-pilot-log``."""
    parser = argparse.ArgumentParser(
        prog="pilotbed-pilot-log", description="What came home of a pilot: one line each; of a single one all it said."
    )
    parser.add_argument("which", metavar="JOB|PILOT|ENTRY",
                        help="CLUSTER.PROC of the factory's queue, glidein_N_N of the pool, or an entry")  # fmt: skip
    parser.add_argument("--log", default="", metavar="NAME", help="one of its logs, such as StartLog")
    parser.add_argument("--last", type=int, default=20, metavar="N", help="of an entry, no more than the last N (20)")
    parser.add_argument("--config", type=Path, default=Path("/etc/pilotbed/factory.toml"), metavar="FILE.toml")
    options = parser.parse_args(argv)
    try:
        config = load(options.config, Config)
        directory = config.directory / "log"
        entry = "" if _JOB.fullmatch(options.which) or _PILOT.fullmatch(options.which) else options.which
        if entry and entry not in config.entries:
            raise ValueError(f"{entry!r} is no job (3.0), no pilot (glidein_568_468728786) and none of the entries "
                             f"{', '.join(sorted(config.entries))}")  # fmt: skip
        found = of(outputs(directory, entry), options.which)
        home = {one.job for one in found}
        parts = [one for one in sent_by(sent(config.directory / "sent", entry or "*"), options.which)
                 if one.job not in home]  # fmt: skip
        if not found and not parts:
            raise ValueError(f"nothing has come home of {options.which}, in {directory}")
    except (SettingsError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if entry:
        lines = sorted([one.line() for one in found] + [line_of(one) for one in parts])  # each begins with its time
        print(*lines[-max(options.last, 1) :], sep="\n")
        return 0
    for one in found:
        print(one.line())
        if not options.log:
            print(printable(one.text("out")), printable(_PACKED.sub(r"(packed: \1)", one.text("err"))), sep="\n")
        if not _show(dict(one.logs()), options.log):
            return 1
    for part in parts:
        print(line_of(part), f"sent by {printable(part.sender)}", sep="\n")
        if not _show(part.logs(MOST), options.log):
            return 1
    return 0


def _show(logs: Mapping[str, str], wanted: str) -> bool:
    """Print the log that is wanted, or which ones there are; false if there is no such."""
    if not wanted:
        print(f"logs, for --log: {', '.join(logs) or 'none'}")
    elif wanted in logs:
        print(printable(logs[wanted]))
    else:
        came = ", ".join(logs) or "its logs, none came"
        print(f"pilotbed-pilot-log: {wanted} is not among {came}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
