"""A daemon of the pool: turn for turn it looks, decides and acts, and at its end takes its ads back.

Factory and frontend are such daemons; here is what is the same in both, so that neither touches the other's insides.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pilotbed.pool import PoolError
from pilotbed.service import event, run_loop, set_up_logging, write_metrics, write_status
from pilotbed.settings import SettingsError, load

_log = logging.getLogger("pilotbed.daemon")

Settings = TypeVar("Settings")

#: Most absurd ads of a kind that one turn names in the log.
NAMED = 50


class NotReady(Exception):
    """Something that a turn needs is missing; the message says what and how to get it."""


class Daemon(ABC):
    """What a daemon remembers from turn to turn.

    Args:
        name: ``pilotbed-NAME``'s.
        status: the status file, for tools; metrics.prom is beside it.
        loop_delay: seconds from one turn to the next.
    """

    def __init__(self, name: str, status: Path, loop_delay: float) -> None:
        self.name = name
        self.turns = 0
        self.said: dict[str, str] = {}
        self.touched: set[str] = set()
        #: Of this turn: ads that were left out, values that became something else, by whose they were.
        self.absurd: Counter[str] = Counter()
        #: Since the start: what went wrong with one entry, request ..., and whole turns.
        self.errors = self.failed = 0
        self.status_file = status
        self.loop_delay = loop_delay

    @abstractmethod
    def work(self) -> None:
        """Do one turn's work.

        Raises:
            PoolError: the pool is down.
            NotReady: something is missing.
        """

    @abstractmethod
    def withdraw(self) -> None:
        """Take back what was advertised.

        Raises:
            PoolError: the pool is down.
        """

    @abstractmethod
    def status(self, now: float) -> Mapping[str, Any]:
        """Return what the status file says beyond the turn itself; nothing secret."""

    def metrics(self) -> Mapping[str, float]:
        """Return the daemon's own metrics (``service.write_metrics``)."""
        return {}

    def say(self, about: str, what: str, **fields: object) -> None:
        """Log a line about something unless the last one about it was the same."""
        line = event(what, **fields)
        if self.said.get(about) != line:
            _log.info(line)
        self.said[about] = line
        self.touched.add(about)

    def once(self, about: str, what: str, **fields: object) -> None:
        """Log a line about something that is so for a while, as it was in the first turn."""
        if about not in self.said:
            _log.info(event(what, **fields))
            self.said[about] = ""
        self.touched.add(about)

    def leave_out(self, kind: str, name: object, why: object) -> None:
        """Count an ad or a file of somebody else's that does not count, and say why, but not in every turn."""
        if self._counted(f"{kind}_left_out"):
            self.say(f"{kind} {name}", "left-out", **{kind: name}, why=why)

    def odd(self, kind: str, name: object, notes: Iterable[str]) -> None:
        """The same of an ad that counts, with defaults for what is absurd in it."""
        for note in notes:
            if self._counted(f"{kind}_values_replaced"):
                self.say(f"{kind} {name} {note.partition(' ')[0]}", "odd-value", **{kind: name}, why=note)

    def _counted(self, what: str) -> bool:
        """Count what is absurd; return whether it is to be named, too: the log is not for somebody else to fill."""
        self.absurd[what] += 1
        return self.absurd[what] <= NAMED

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Do something about one entry, one request ..., so that what goes wrong with it is its own affair.

        It is logged with its traceback when it is new. Only what every one of them needs ends the turn: PoolError and
        NotReady.
        """
        try:
            yield
        except (PoolError, NotReady):
            raise
        except Exception as error:
            self.errors += 1
            about, line = f"failed {what}", event("failed", what=what, why=repr(error))
            if self.said.get(about) != line:
                _log.exception(line)
            self.said[about] = line
            self.touched.add(about)

    def turn(self) -> None:
        """Do one turn; its outcome, an error too, is in the status file afterwards.

        Raises:
            PoolError, NotReady: as ``work``. Anything else is a defect.
        """
        began = time.time()
        self.turns += 1
        self.absurd.clear()
        self.touched.clear()
        error = ""
        try:
            self.work()
            # What was not said again is over; it may be new another time.
            self.said = {about: line for about, line in self.said.items() if about in self.touched}
        except Exception as reason:
            error = str(reason) if isinstance(reason, PoolError | NotReady) else repr(reason)
            self.failed += 1
            raise
        finally:
            now = time.time()
            own = {
                "time": int(now), "turn": self.turns, "seconds": round(now - began, 3),
                "loop_delay": self.loop_delay, "error": error, "absurd": dict(self.absurd), "errors": self.errors,
            }  # fmt: skip
            write_status(self.status_file, own | dict(self.status(now)))
            metrics = {
                "turns_total": self.turns, "turns_failed_total": self.failed, "errors_total": self.errors,
                **self.absurd, **self.metrics(),
            }  # fmt: skip
            write_metrics(self.status_file.with_name("metrics.prom"), f"pilotbed_{self.name}", metrics)


def run(
    name: str,
    description: str,
    settings: type[Settings],
    start: Callable[[Settings], Daemon],
    argv: Sequence[str] | None,
) -> int:
    """Run the daemon ``pilotbed-NAME`` until it is told to stop; return its exit code.

    Args:
        name: NAME; its configuration is /etc/pilotbed/NAME.toml unless ``--config`` says otherwise.
        description: for ``--help``.
        settings: what the configuration is read into.
        start: opens the pool's door and returns the daemon.
        argv: arguments of the command line.
    """
    parser = argparse.ArgumentParser(prog=f"pilotbed-{name}", description=description)
    default = Path(f"/etc/pilotbed/{name}.toml")
    parser.add_argument("--config", type=Path, default=default, help="configuration file")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    options = parser.parse_args(argv)
    set_up_logging()
    os.umask(0o027)
    try:
        config = load(options.config, settings)
        if options.check:
            return 0
        daemon = start(config)
    except (SettingsError, PoolError) as error:
        _log.error("%s", error)
        return 2
    run_loop(daemon.turn, daemon.loop_delay, (PoolError, NotReady))
    try:
        daemon.withdraw()
    except PoolError as error:
        _log.warning(event("withdraw-failed", why=error))
    return 0
