"""A daemon of the pool: turn for turn it looks, decides and acts, and at its end takes its ads back.

Factory and frontend are such daemons; here is what is the same in both, so that neither touches the other's insides.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pilotbed.pool import PoolError
from pilotbed.service import event, run_loop, set_up_logging, write_status
from pilotbed.settings import SettingsError, load

_log = logging.getLogger("pilotbed.daemon")

Settings = TypeVar("Settings")


class NotReady(Exception):
    """Something that a turn needs is missing; the message says what and how to get it."""


class Daemon(ABC):
    """What a daemon remembers from turn to turn.

    Args:
        status: the status file, for tools.
        loop_delay: seconds from one turn to the next.
    """

    def __init__(self, status: Path, loop_delay: float) -> None:
        self.turns = 0
        self.said: dict[str, str] = {}
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

    def say(self, about: str, what: str, **fields: object) -> None:
        """Log a line about something unless the last one about it was the same."""
        line = event(what, **fields)
        if self.said.get(about) != line:
            _log.info(line)
        self.said[about] = line

    def turn(self) -> None:
        """Do one turn; its outcome, an error too, is in the status file afterwards.

        Raises:
            PoolError, NotReady: as ``work``.
        """
        began = time.time()
        self.turns += 1
        error = ""
        try:
            self.work()
        except (PoolError, NotReady) as reason:
            error = str(reason)
            raise
        finally:
            now = time.time()
            own = {
                "time": int(now), "turn": self.turns, "seconds": round(now - began, 3),
                "loop_delay": self.loop_delay, "error": error,
            }  # fmt: skip
            write_status(self.status_file, own | dict(self.status(now)))


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
