"""What a daemon needs besides its work: structured log lines, a status file, a steady loop, systemd's notices."""

from __future__ import annotations

import array
import errno
import functools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pilotbed.files import replace_file

#: Seconds between two tries while the pool is down.
LONGEST_PAUSE = 60

_log = logging.getLogger("pilotbed")


def set_up_logging() -> None:
    """Log to stderr; without a time of day under systemd, whose journal has its own."""
    stamp = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=f"{stamp}%(levelname)s %(message)s")


def event(what: str, /, **fields: object) -> str:
    """Return one log line: ``what key=value key="value with spaces"`` (logfmt: easy to read and to grep)."""
    words = [what]
    for key, value in fields.items():
        text = str(value)
        plain = text and text.isprintable() and not set(text) & set(' "=')
        words.append(f"{key}={text if plain else json.dumps(text)}")
    return " ".join(words)


def write_status(path: Path, status: Mapping[str, Any]) -> None:
    """Write the status file for tools: JSON, readable by everybody, so nothing secret in it."""
    replace_file(path, json.dumps(status, indent=1, sort_keys=True) + "\n", 0o644)


def read_file(path: Path) -> str:
    """Return the text of a file that an operator may edit or drop.

    Raises:
        OSError: it cannot be read, or is no text; ``strerror`` says which.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, "is not UTF-8 text", str(path)) from error


def first_line(path: Path) -> str:
    """Return the first line of a file whose being there says the most, such as a downtime's; why it is, if it can tell.

    It may be half written, a directory, or not for us to read: it is there all the same.
    """
    try:
        return (read_file(path).strip().splitlines() or ["no reason given"])[0]
    except OSError as error:
        return f"no reason can be read: {path}: {error.strerror}"


def write_metrics(path: Path, prefix: str, metrics: Mapping[str, float]) -> None:
    """Write metrics as node_exporter's textfile collector reads them (Prometheus' text format).

    Args:
        path: the file, ``*.prom``.
        prefix: of each name.
        metrics: by name; one that ends in ``_total`` is a counter, the others are gauges.
    """
    lines = []
    for name, value in sorted(metrics.items()):
        kind = "counter" if name.endswith("_total") else "gauge"
        lines.append(f"# TYPE {prefix}_{name} {kind}\n{prefix}_{name} {value!r}\n")
    replace_file(path, "".join(lines), 0o644)


def notify(state: str, descriptors: Sequence[int] = ()) -> None:
    """Tell systemd ``state`` (``READY=1``, ``WATCHDOG=1``) and hand it descriptors; nothing happens elsewhere.

    See sd_notify(3), sd_pid_notify_with_fds(3).
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        _notices().sendmsg([state.encode()], rights, 0, "\0" + address[1:] if address.startswith("@") else address)


@functools.cache
def _notices() -> socket.socket:
    """One for all notices: a daemon that is out of descriptors still has some to send."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def inherited() -> dict[str, list[int]]:
    """Return the descriptors that systemd gave this process, by their names; once (sd_listen_fds_with_names(3))."""
    given = {name: os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    found: dict[str, list[int]] = {}
    if given["LISTEN_PID"] == str(os.getpid()) and given["LISTEN_FDS"]:
        names = given["LISTEN_FDNAMES"].split(":")
        for descriptor, name in zip(range(3, 3 + int(given["LISTEN_FDS"])), names, strict=True):
            os.set_inheritable(descriptor, False)
            found.setdefault(name, []).append(descriptor)
    return found


def run_loop(turn: Callable[[], None], delay: float, expected: tuple[type[Exception], ...]) -> None:
    """Call ``turn`` every ``delay`` seconds until SIGTERM or SIGINT; SIGHUP makes the next turn come at once.

    After a turn that raised ``expected`` (the pool is down) the delay doubles, up to LONGEST_PAUSE; also after one that
    raised anything else, which is a defect, and logged with its traceback when it is a new one. It ends nothing: what
    brought it about (an ad, a file) would be there after a restart, too.
    """
    wake = threading.Event()
    ended = threading.Event()

    def end(*_: object) -> None:
        ended.set()
        wake.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGHUP, lambda *_: wake.set())
    notify("READY=1")
    pause = delay
    last = ""
    while not ended.is_set():
        began = time.monotonic()
        try:
            turn()
            pause, last = delay, ""
        except Exception as error:
            pause = min(pause * 2, max(LONGEST_PAUSE, delay))
            what = "no-decision" if isinstance(error, expected) else "turn-failed"
            trace = what == "turn-failed" and repr(error) != last
            last = repr(error)
            _log.warning(event(what, why=str(error) or last, again_in=f"{pause:.0f}s"), exc_info=trace)
        notify("WATCHDOG=1")
        wake.wait(max(pause - (time.monotonic() - began), 0.1))
        wake.clear()
