"""Downtimes: an entry, a security class or everything gets no more pilots for a while. Each is a file.

``DIRECTORY/downtime/NAME`` is a downtime by being there, so that an operator can make one with an editor; its first
line is the reason. ``pilotbed-entry`` adds ``until: TIME`` and ``remove: waiting`` or ``remove: all``; other lines are
notes.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pilotbed.files import replace_file
from pilotbed.service import first_line, read_file
from pilotbed.settings import SettingsError, load

from .config import Config
from .decisions import Pilot
from .states import State

#: What a downtime removes of the pilots that are there, from nothing to everything.
REMOVES = ("", "waiting", "all")


@dataclass(frozen=True)
class Downtime:
    """A downtime.

    Args:
        reason: for the log, for `make status` and for frontends.
        until: seconds, Unix; None: until it is taken away.
        remove: one of ``REMOVES``: which pilots are removed. Those that run go on to their end unless it is ``all``.
    """

    reason: str
    until: float | None = None
    remove: str = ""

    def over(self, now: float) -> bool:
        """Tell whether it is over at ``now`` (seconds, Unix)."""
        return self.until is not None and now >= self.until

    def text(self) -> str:
        """Return the file's text."""
        lines = [self.reason]
        if self.until is not None:
            lines.append(f"until: {dt.datetime.fromtimestamp(self.until, dt.UTC).isoformat()}")
        if self.remove:
            lines.append(f"remove: {self.remove}")
        return "".join(f"{line}\n" for line in lines)


def read(path: Path, notes: list[str]) -> Downtime:
    """Return the downtime of a file, whatever is in it; ``notes`` takes what is meant for us and means nothing.

    What cannot be read makes it longer rather than shorter, and removes nothing.
    """
    try:
        lines = read_file(path).splitlines()
    except OSError:
        return Downtime(first_line(path))
    said, until, remove = [], None, ""
    for line in lines:
        key, _, value = (word.strip() for word in line.partition(":"))
        if key == "until":
            try:
                until = instant(value)
            except ValueError as error:
                notes.append(f"until: {error}")
        elif key == "remove" and value in REMOVES:
            remove = value
        elif key == "remove":
            notes.append(f"remove: {value[:80]!r} is not {' or '.join(REMOVES[1:])}")
        elif line.strip():
            said.append(line.strip())
    return Downtime(said[0] if said else "no reason given", until, remove)


def instant(text: str) -> float:
    """Return a time as seconds (Unix): ISO 8601, without an offset in this host's time zone.

    Raises:
        ValueError: it is none; the message has an example.
    """
    try:
        when = dt.datetime.fromisoformat(text).timestamp()
        dt.datetime.fromtimestamp(when, dt.UTC)  # in the years that can be written
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"{text[:80]!r} is no time such as 2027-01-31T18:00 or 2027-01-31T18:00+00:00") from error
    return when


def names(config: Config) -> list[str]:
    """Return what a downtime can be of: ``ALL``, entries, ``SECURITYNAME:CLASS``."""
    classes = (f"{name}:{one}" for name, frontend in config.frontends.items() for one in frontend.classes)
    return ["ALL", *sorted(config.entries), *sorted(classes)]


def leaving(pilots: Iterable[Pilot], downtimes: Mapping[str, Downtime]) -> list[Pilot]:
    """Return the pilots that have to go where these downtimes hold."""
    found = []
    for pilot in pilots:
        what = {downtimes[name].remove for name in ("ALL", pilot.entry, pilot.security) if name in downtimes}
        if "all" in what or ("waiting" in what and pilot.state is not State.RUNNING):
            found.append(pilot)
    return found


def listed(directory: Path, known: Iterable[str], now: float) -> list[str]:
    """Return a line for every downtime that there is."""
    lines = []
    for name in known:
        if not os.path.lexists(directory / name):
            continue
        one = read(directory / name, [])
        until = "until it is taken away" if one.until is None else f"until {_shown(one.until)}"
        over = ", which is over" * one.over(now)
        what = {"": "pilots stay", "waiting": "waiting pilots are removed", "all": "all pilots are removed"}[one.remove]
        lines.append(f"{name}: {one.reason}; {until}{over}; {what}")
    return lines


def _shown(when: float) -> str:
    return dt.datetime.fromtimestamp(when).astimezone().isoformat(timespec="minutes")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``pilotbed-entry``."""
    parser = argparse.ArgumentParser(
        prog="pilotbed-entry", description="Give an entry of the factory no more pilots for a while, or again."
    )
    parser.add_argument("--config", type=Path, default=Path("/etc/pilotbed/factory.toml"), metavar="FILE.toml")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="the downtimes that there are")
    down = verbs.add_parser("downtime", help="no more pilots; those that wait are removed")
    up = verbs.add_parser("up", help="the end of a downtime")
    for verb in (down, up):
        verb.add_argument("name", help="an entry, SECURITYNAME:CLASS, or ALL")
    how = down.add_mutually_exclusive_group()
    how.add_argument("--drain", dest="remove", action="store_const", const="waiting", default="waiting",
                     help="pilots that run go on to their end; the default")  # fmt: skip
    how.add_argument("--now", dest="remove", action="store_const", const="all",
                     help="pilots that run are removed, too: their payloads end and start again elsewhere")  # fmt: skip
    down.add_argument("--until", metavar="TIME", help="2027-01-31T18:00, in this host's time zone; default: no end")
    down.add_argument("--reason", default="", help="one line, which frontends and users see")
    options = parser.parse_args(argv)
    try:
        config, now = load(options.config, Config), time.time()
        directory, known = config.directory / "downtime", names(config)
        if options.verb == "list":
            print("\n".join(listed(directory, known, now)) or "no downtime")
            return 0
        if options.name not in known:
            raise ValueError(f"{options.name!r} is none of {', '.join(known)}")
        path = directory / options.name
        if options.verb == "up":
            path.unlink(missing_ok=True)
            print(f"{options.name} gets pilots again, if nothing else stops it: pilotbed-entry list")
            return 0
        until = instant(options.until) if options.until else None
        if until is not None and until <= now:
            raise ValueError(f"--until {options.until} is over: it is {_shown(now)}")
        reason = " ".join(options.reason.split()) or "no reason given"
        replace_file(path, Downtime(reason, until, options.remove).text(), 0o644)
        print("\n".join(listed(directory, [options.name], now)))
    except (SettingsError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
