r"""The server's side of a GAHP: HTCondor's gridmanager starts it, and asks it by lines.

GAHP, the Grid ASCII Helper Protocol, 1.0: a request is a line of words, in which a backslash takes the meaning from the
character after it. The answer comes at once: S and more words, or E for what is not understood. Commands that take time
are answered later: they bring a number, and RESULTS shows what has become of those that are done. Between
ASYNC_MODE_ON and the next RESULTS, an R of its own line says that there is something to be seen.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

from pilotbed.service import event

_log = logging.getLogger("gahp")

#: How an empty word is written.
NULL = "NULL"
#: Octets of the longest line that is taken; an ad is a line, and a submit description has no limit in HTCondor.
LONGEST = 1 << 20


def split(line: str) -> list[str]:
    r"""Return the words of a line.

    >>> split(r"BLAH_JOB_CANCEL 4 a\ b\\c")
    ['BLAH_JOB_CANCEL', '4', 'a b\\c']
    """
    words, word, characters = [], "", iter(line)
    for character in characters:
        if character == "\\":
            word += next(characters, "")
        elif character == " ":
            words.append(word)
            word = ""
        else:
            word += character
    return [word for word in [*words, word] if word]


def join(words: Sequence[str]) -> str:
    r"""Return words as a line without its end.

    >>> join(["S", "no such job", ""])
    'S no\\ such\\ job NULL'
    """
    table = {ord(character): f"\\{character}" for character in "\\ \t"} | dict.fromkeys(map(ord, "\r\n\0"), "\\ ")
    return " ".join(word.translate(table) or NULL for word in words)


@dataclass(frozen=True)
class Command:
    """A command that takes time.

    Args:
        words: how many it has besides its number.
        run: is called with them, in a thread; returns the words of the result.
        failed: how many words of a result come after its code and the reason, when ``run`` raises an exception.
    """

    words: int
    run: Callable[..., Sequence[str]]
    failed: int = 0


class Server:
    """Answers a gridmanager.

    Args:
        version: what it is.
        commands: by name.
        reader, writer: of lines.
        threads: how many commands are worked at at a time.
    """

    def __init__(
        self, version: str, commands: Mapping[str, Command], reader: BinaryIO, writer: BinaryIO, threads: int = 8
    ) -> None:
        self.version, self.commands = version, commands
        self._reader, self._writer = reader, writer
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads)
        self._results: list[str] = []
        self._tell = False  # an R is wanted, and was not written since the last RESULTS
        self._async = False

    def serve(self) -> None:
        """Answer until QUIT or the end of the input; then wait for what is being worked at."""
        self._write(self.version)
        while line := self._reader.readline(LONGEST):
            if not line.endswith(b"\n"):
                if len(line) < LONGEST:
                    break  # the gridmanager died while it wrote
                while line and not line.endswith(b"\n"):
                    line = self._reader.readline(LONGEST)
                self._write("E")
                continue
            words = split(line.rstrip(b"\r\n").decode("utf-8", "replace"))
            self._answer(words)
            if [word.upper() for word in words] == ["QUIT"]:
                break
        self._pool.shutdown(cancel_futures=True)

    def _answer(self, words: Sequence[str]) -> None:
        name, *rest = words or [""]
        name = name.upper()
        with self._lock:
            if command := self.commands.get(name):
                if len(rest) != command.words + 1 or not (rest[0].isascii() and rest[0].isdigit()):
                    self._write("E")
                    return
                self._write("S")
                self._pool.submit(self._work, name, command, rest)
            elif rest:
                self._write("E")
            elif name == "RESULTS":
                self._write("\n".join([f"S {len(self._results)}", *self._results]))
                self._results, self._tell = [], self._async
            elif name in ("ASYNC_MODE_ON", "ASYNC_MODE_OFF"):
                self._async = self._tell = name == "ASYNC_MODE_ON"
                self._write("S")
            elif name == "COMMANDS":
                own = ("ASYNC_MODE_OFF", "ASYNC_MODE_ON", "COMMANDS", "QUIT", "RESULTS", "VERSION")
                self._write(join(["S", *own, *self.commands]))
            elif name == "VERSION":
                self._write(join(["S", self.version]))
            else:
                self._write("S" if name == "QUIT" else "E")

    def _work(self, name: str, command: Command, words: Sequence[str]) -> None:
        number, *rest = words
        try:
            result = command.run(*rest)
        except Exception as error:  # one job's trouble must not end all others'
            _log.warning(event("failed", command=name, error=error), exc_info=not str(error))
            result = ["1", str(error) or type(error).__name__, *[""] * command.failed]
        with self._lock:
            self._results.append(join([number, *result]))
            if self._tell:
                self._tell = False
                self._write("R")

    def _write(self, line: str) -> None:
        try:
            self._writer.write(line.encode("utf-8", "replace") + b"\n")
            self._writer.flush()
        except (BrokenPipeError, ValueError):
            pass  # nobody reads; the end of the input is next
