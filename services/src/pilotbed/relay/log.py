"""Log lines of the relay, its border mode and its agent: `event=NAME key=value …`. Standard library only."""

import json
import logging
import os
import re
import sys


def log_to_stderr() -> None:
    """One line an event; under systemd without a time of our own, the journal has it."""
    # What no format of ours shows need not be found out for each line (logging cookbook, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    stamp = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=stamp + "%(levelname)s %(message)s")


def event(log: logging.Logger, name: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log `event=NAME key=value …`; values that are not plain words are quoted as JSON, so a line stays a line."""
    plain = {key: str(value) for key, value in fields.items() if value is not None}
    text = (f"{key}={value if _plain(value) else json.dumps(value)}" for key, value in plain.items())
    log.log(level, "%s", " ".join([f"event={name}", *text]))


_plain = re.compile(r"""[!#-<>-\[\]-~]+""").fullmatch  # printable ASCII but blank, quote, equals sign and backslash
