"""The GAHP through which HTCondor submits to GRAM: its lines, and that nothing that is said to it ends it."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Sequence
from typing import BinaryIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.factory import gahp
from pilotbed.factory.gahp import Command, Server

WORDS = st.lists(st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8"), min_size=1))


@given(WORDS)
def test_words_survive_a_line(words: list[str]) -> None:
    line = gahp.join(words)
    assert "\n" not in line
    assert gahp.split(line) == words


def test_a_word_cannot_end_its_line() -> None:
    """A site's own words are in the reason of a failure."""
    assert gahp.split(gahp.join(["1", "a\r\n2 0 NULL\0b", ""])) == ["1", "a  2 0 NULL b", "NULL"]


class Talk:
    """A server with pipes, as the gridmanager has it."""

    def __init__(self, **commands: Command) -> None:
        theirs, self.to = os.pipe()
        self.frm, ours = os.pipe()
        self.answers = os.fdopen(self.frm, "rb")
        reader, writer = os.fdopen(theirs, "rb"), os.fdopen(ours, "wb")
        self.server = Server("$GahpVersion: 1 $", commands, reader, writer)

        def serve() -> None:
            self.server.serve()
            writer.close()

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        assert self.line() == "$GahpVersion: 1 $"

    def line(self) -> str:
        return self.answers.readline().decode().rstrip("\n")

    def say(self, line: str | bytes) -> str:
        os.write(self.to, (line if isinstance(line, bytes) else line.encode()) + b"\n")
        return self.line()

    def results(self) -> list[str]:
        word, count = self.say("RESULTS").split()
        assert word == "S"
        return [self.line() for _ in range(int(count))]

    def result(self) -> str:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if found := self.results():
                return found[0]
            time.sleep(0.01)
        raise AssertionError("no result")

    def close(self) -> None:
        os.close(self.to)
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.answers.close()


def echo(*words: str) -> Sequence[str]:
    return ["0", "", *words]


def test_a_command_is_answered_later() -> None:
    talk = Talk(ECHO=Command(1, echo))
    assert talk.say("ECHO 7 a\\ b") == "S"
    assert talk.result() == "7 0 NULL a\\ b"
    assert talk.results() == []
    assert talk.say("COMMANDS") == "S ASYNC_MODE_OFF ASYNC_MODE_ON COMMANDS QUIT RESULTS VERSION ECHO"
    assert talk.say("version") == "S $GahpVersion:\\ 1\\ $"
    talk.close()


def test_a_result_is_told_once_until_it_is_fetched() -> None:
    talk = Talk(ECHO=Command(1, echo))
    assert talk.say("ASYNC_MODE_ON") == "S"
    for number in "12":
        os.write(talk.to, f"ECHO {number} x\n".encode())
    assert sorted(talk.line() for _ in range(3)) == ["R", "S", "S"]
    time.sleep(0.1)
    assert sorted(talk.results()) == ["1 0 NULL x", "2 0 NULL x"]
    assert talk.say("ECHO 3 x") == "S"
    assert talk.line() == "R", "told anew"
    talk.close()


def test_a_command_that_fails_says_why_in_as_many_words_as_ever() -> None:
    def fail(word: str) -> Sequence[str]:
        raise ValueError(f"no {word}\nS 0")

    talk = Talk(FAIL=Command(1, fail, failed=2))
    assert talk.say("FAIL 1 job") == "S"
    assert talk.result() == "1 1 no\\ job\\ S\\ 0 NULL NULL"
    talk.close()


@pytest.mark.parametrize(
    "line",
    ["", " ", "\\", "NOSUCH", "ECHO", "ECHO 1", "ECHO 1 2 3", "ECHO x y", "ECHO -1 y", "ECHO \u0661 y", "RESULTS 1",
     "QUIT now", b"\xff\xfe", b"\0", "COMMANDS x", b"ECHO 1 " + b"x" * (gahp.LONGEST + 1)],
    ids=lambda line: repr(line[:12]),
)  # fmt: skip
def test_what_is_not_understood_is_refused_and_ends_nothing(line: str | bytes) -> None:
    talk = Talk(ECHO=Command(1, echo))
    data = line if isinstance(line, bytes) else line.encode()
    writer = threading.Thread(target=lambda: os.write(talk.to, data + b"\n"))  # a pipe holds less
    writer.start()
    assert talk.line() == "E"
    writer.join(60)
    assert talk.say("ECHO 7 a") == "S"
    assert talk.result() == "7 0 NULL a"
    talk.close()


@given(st.lists(st.binary(max_size=60)))
def test_no_input_raises(lines: list[bytes]) -> None:
    written = io.BytesIO()
    Server("v", {"ECHO": Command(1, echo)}, io.BytesIO(b"\n".join(lines)), cast(BinaryIO, written), threads=1).serve()
    assert written.getvalue().startswith(b"v\n")


def test_quit_and_the_end_of_the_input_end_it() -> None:
    talk = Talk()
    assert talk.say("QUIT") == "S"
    talk.thread.join(60)
    assert not talk.thread.is_alive()
    talk.close()
