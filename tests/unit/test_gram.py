"""Submission to GRAM: requests, what globusrun says, and a job's way, with a globusrun that says what it is told to."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shlex
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.factory import gram, gridtypes
from pilotbed.factory.gram import Gram, GramError
from pilotbed.gridtools import ToolError
from pilotbed.pool.text import quote

RESOURCE = "ce.grid.test:2119/jobmanager-batch"
CONTACT = "https://ce.grid.test:20000/16001/17001/"
TEXT = st.text(st.characters(exclude_characters="\0\r\n", codec="utf-8"))


def unquoted(request: str) -> dict[str, list[str]]:
    """The attributes of a request, read as GRAM's grammar says: literals in quotes, doubled inside."""
    found: dict[str, list[str]] = {}
    rest = request.removeprefix("&")
    while rest:
        name, rest = rest.removeprefix("(").split("=", 1)
        found[name] = []
        while not rest.startswith(")"):
            assert rest[0] == '"'
            value, at = "", 1
            while rest[at] != '"' or rest[at + 1] == '"':
                value, at = value + rest[at], at + (2 if rest[at] == '"' else 1)
            found[name].append(value)
            rest = rest[at + 1 :].removeprefix(" ")
        rest = rest[1:]
    return found


@given(st.lists(TEXT, min_size=1))
def test_no_word_gets_out_of_a_request(words: list[str]) -> None:
    assert unquoted(gram.rsl(executable="/bin/sh", arguments=words)) == {"executable": ["/bin/sh"], "arguments": words}


@given(st.lists(TEXT))
def test_arguments_are_read_as_htcondor_writes_them(words: list[str]) -> None:
    assert gram.arguments(" ".join("'" + word.replace("'", "''") + "'" for word in words)) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  a  b ", ["a", "b"]),
        ("a'b c'd", ["ab cd"]),
        ("''", [""]),
        ("'it''s'", ["it's"]),
        ('a "b', ["a", '"b']),
    ],
)
def test_arguments(text: str, words: list[str]) -> None:
    assert gram.arguments(text) == words


@pytest.mark.parametrize("text", ["'", "a 'b", "'''"])
def test_an_apostrophe_alone_is_refused(text: str) -> None:
    with pytest.raises(GramError, match="apostrophe"):
        gram.arguments(text)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, str]:
    """A pilot's ad, as the gridmanager sends it."""
    script = tmp_path / "start.sh"
    script.write_text('#!/bin/sh\nfor word; do echo "[$word]"; done\necho wrong >&2\nexit 7\n')
    return {
        "Cmd": str(script), "Arguments": "-v std 'a b$HOME`id`\"'", "Iwd": str(tmp_path), "Out": "p.out",
        "Err": str(tmp_path / "p.err"), "x509userproxy": "/proxy.pem", "Queue": "grid", "GramResource": RESOURCE,
    }  # fmt: skip


def ad(values: dict[str, str]) -> str:
    return "[ " + "; ".join(f"{name} = {quote(value)}" for name, value in values.items()) + " ]"


def test_an_ad_is_read(values: dict[str, str]) -> None:
    assert gram.parsed(ad(values)) == values
    assert (
        gram.parsed(ad({"GRAMRESOURCE" if name == "GramResource" else name: v for name, v in values.items()})) == values
    )


@pytest.mark.parametrize("name", ["Cmd", "Iwd", "x509userproxy", "Queue", "GramResource"])
def test_an_ad_without_what_is_needed_is_refused(values: dict[str, str], name: str) -> None:
    with pytest.raises(GramError, match=f"has no {name}"):
        gram.parsed(ad({other: value for other, value in values.items() if other != name}))


@pytest.mark.parametrize(
    "resource", ["", "ce", "ce:2119", "ce:2119/jobmanager-batch/x", "ce:2119/jobmanager-x -k", "-h:1/jobmanager-x\n"]
)
def test_what_is_no_gatekeeper_is_refused(values: dict[str, str], resource: str) -> None:
    with pytest.raises(GramError, match="gatekeeper"):
        gram.parsed(ad(values | {"GramResource": resource}))


@given(TEXT)
def test_what_is_no_ad_is_refused(text: str) -> None:
    with pytest.raises(GramError):
        gram.parsed(text)


def test_the_batch_job_runs_the_script_and_leaves_how_it_ended(values: dict[str, str], tmp_path: Path) -> None:
    """The request's own shell script, run here, and what the fetching job says of it."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    name = "0" * 32
    command = unquoted(gram.request(values, name))
    done = subprocess.run([*command["executable"], *command["arguments"]], env=environment, check=False)
    assert done.returncode == 7
    fetch = ["/bin/sh", "-c", gram._FETCH.format(name=name, output=gram.OUTPUT, mark=gram._MARK)]
    said = subprocess.run(fetch, env=environment, capture_output=True, text=True, check=True).stdout
    assert gram.unpacked("a banner\n" + said) == (7, b'[-v]\n[std]\n[a b$HOME`id`"]\n', b"wrong\n")
    assert (home / f".pilotbed-gram/{name}").stat().st_mode & 0o777 == 0o700
    subprocess.run(["/bin/sh", "-c", gram._CLEAR.format(name=name)], env=environment, check=True)
    assert list((home / ".pilotbed-gram").iterdir()) == []
    said = subprocess.run(fetch, env=environment, capture_output=True, text=True, check=False).stdout
    assert gram.unpacked(said) is None


def test_a_request_that_no_gatekeeper_takes_is_refused(values: dict[str, str]) -> None:
    with pytest.raises(GramError, match="GRAM takes"):
        gram.request(values | {"Arguments": "x" * gram.LARGEST}, "0" * 32)
    with pytest.raises(GramError, match="No such file"):
        gram.request(values | {"Cmd": "/nosuch"}, "0" * 32)


def packed(**files: bytes) -> str:
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name.replace("_", "."))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return f"{gram._MARK}{base64.b64encode(buffer.getvalue()).decode()}\n"


@pytest.mark.parametrize(
    "said",
    [gram._MARK, f"{gram._MARK}\n", f"{gram._MARK}####\n", f"{gram._MARK}{base64.b64encode(b'x').decode()}",
     packed(), packed(code=b"0", out_tail=b""), packed(code=b"x", out_tail=b"", err_tail=b""),
     packed(code=b"0", out_tail=b"a" * 90, err_tail=b"")[:-40]],
    ids=range(8),
)  # fmt: skip
def test_damaged_output_is_named(said: str) -> None:
    with pytest.raises(GramError, match="damaged"):
        gram.unpacked(said)


@given(st.text())
def test_nothing_that_a_computing_element_says_is_more_than_damaged(said: str) -> None:
    for text in (said, gram._MARK + said):
        with contextlib.suppress(GramError):
            gram.unpacked(text)
    with pytest.raises(GramError):
        gram.contact_in(said)
    assert gram.code_of(ToolError(said)) >= 0


@pytest.mark.parametrize(
    ("said", "code"),
    [("globusrun failed (79): Error canceling job", 79), ("globusrun failed (1): failed (79)", 1),
     ("globusrun: it took longer than 60 seconds", 0), ("grid-proxy-info failed (79)", 0)],
)  # fmt: skip
def test_the_code_of_an_error(said: str, code: int) -> None:
    assert gram.code_of(ToolError(said)) == code


class Globusrun:
    """A globusrun in PATH: answers the option that it is called with from ``says``, and notes the call."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        program = directory / "globusrun"
        program.write_text(
            "#!/bin/sh\n"
            f"cd {shlex.quote(str(directory))}\n"
            'printf "%s\\n" "$X509_USER_PROXY $*" | head -1 >>calls\n'
            'case "$*" in *restart=*) what=restart;; *-status*) what=status;; *-k*) what=cancel;;'
            " *-refresh*) what=refresh;;"
            " *-o*jobmanager-fork*) what=fetch;; *jobmanager-fork*) what=clear;; *) what=submit;; esac\n"
            "cat $what 2>/dev/null\n"
            "test -e $what.then && . ./$what.then\n"
            "test -e $what.error || exit 0\n"
            "cat $what.error >&2\n"
            "exit $(sed -n 's/.*error code \\([0-9]*\\).*/\\1/p' $what.error)\n"
        )
        program.chmod(0o755)
        self.say("submit", f"{CONTACT}\n")

    def say(self, what: str, text: str = "", error: str = "") -> None:
        (self.directory / what).write_text(text)
        (self.directory / f"{what}.error").unlink(missing_ok=True)
        if error:
            (self.directory / f"{what}.error").write_text(error)

    def calls(self) -> list[str]:
        path = self.directory / "calls"
        found = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return found


@pytest.fixture
def globusrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Globusrun:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Globusrun(directory)


@pytest.fixture
def jobs(tmp_path: Path, globusrun: Globusrun) -> Gram:
    (tmp_path / "state").mkdir()
    return Gram(tmp_path / "state")


@pytest.fixture
def job(jobs: Gram, values: dict[str, str], globusrun: Globusrun) -> str:
    code, _, name = jobs.submit(ad(values))
    assert code == "0"
    (call,) = globusrun.calls()
    assert call.startswith(f"/proxy.pem -F -D -r {RESOURCE} &(executable=")
    return name


def record(jobs: Gram, name: str) -> dict[str, Any]:
    return dict(json.loads((jobs.state / f"{name}.json").read_text()))


UNREACHABLE = "connecting to the job manager failed (error code 79)"
NO_STATE = "the job state file doesn't exist (error code 121)"
ALIVE = "old job manager is still alive (error code 124)"
UNKNOWN = "the job contact string does not match any which the job manager is handling (error code 156)"
#: Of a globusrun whose job manager has its port again.
FREE = "rm -f cancel.error restart.error"


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("UNSUBMITTED", "1"),
        ("PENDING", "1"),
        ("STAGE_IN", "1"),
        ("ACTIVE", "2"),
        ("SUSPENDED", "2"),
        ("STAGE_OUT", "2"),
    ],
)
def test_grams_words(jobs: Gram, job: str, globusrun: Globusrun, word: str, status: str) -> None:
    globusrun.say("status", f"{word}\n")
    assert jobs.status(job) == ["0", "", status, "[  ]"]
    # What the gridmanager does with it is the factory's: HTCondor's own words.
    assert set(gridtypes.load("batch").states) == {"IDLE", "RUNNING", "COMPLETED"}


@pytest.mark.parametrize("word", ["DONE", "FAILED"])
def test_the_end(jobs: Gram, job: str, globusrun: Globusrun, tmp_path: Path, word: str) -> None:
    globusrun.say("status", f"{word}\n")
    globusrun.say("fetch", packed(out_tail=b"said\n", err_tail=b"wrong\n", code=b"7\n"))
    expected = ["0", "", "4", "[ ExitCode = 7; ExitBySignal = false ]"]
    assert jobs.status(job) == expected
    assert ((tmp_path / "p.out").read_text(), (tmp_path / "p.err").read_text()) == ("said\n", "wrong\n")
    assert any("jobmanager-fork" in call and "-F" in call for call in globusrun.calls()), "cleared away"
    assert jobs.status(job) == expected, "asked again, as by a gridmanager that died"
    assert globusrun.calls() == []


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on after the time that a job's end may take to be seen."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + gram.PATIENCE + 1)


@pytest.mark.parametrize(
    ("what", "text", "error"),
    [
        ("status", "", UNREACHABLE),
        ("status", "", "authentication failed (error code 7)"),
        ("fetch", "", "the connection to the server failed (error code 12)"),
        ("fetch", f"{gram._MARK}xxxx\n", ""),
        ("restart", "", "the connection to the server failed (error code 12)"),
        ("restart", "", ALIVE),
        ("restart", f"{CONTACT}\n", ""),
    ],
)
def test_a_computing_element_that_is_away_changes_nothing(
    jobs: Gram, job: str, globusrun: Globusrun, monkeypatch: pytest.MonkeyPatch, what: str, text: str, error: str
) -> None:
    """globusrun says DONE where it reaches nobody. Held or with an error, a job would be cancelled and forgotten."""
    globusrun.say("status", "ACTIVE\n")
    jobs.status(job)
    globusrun.say("status", "DONE\n")
    globusrun.say("restart", "", NO_STATE)
    globusrun.say(what, text, error)
    assert jobs.status(job)[2] == "2"
    later(monkeypatch)
    assert jobs.status(job)[2] == "2"


def test_a_job_that_is_gone_is_held_after_a_while(
    jobs: Gram, job: str, globusrun: Globusrun, monkeypatch: pytest.MonkeyPatch
) -> None:
    globusrun.say("status", "DONE\n")
    globusrun.say("restart", "", NO_STATE)
    assert jobs.status(job)[2] == "1", "its end may not be in the shared directory yet"
    later(monkeypatch)
    assert jobs.status(job)[2:] == ["5", '[ HoldReason = "GRAM: the batch job is gone and has left no exit code" ]']
    globusrun.calls()
    jobs.cancel(job)
    assert not any("-k" in call.split() for call in globusrun.calls())


def test_cancel(jobs: Gram, job: str, globusrun: Globusrun) -> None:
    for error in ("the network is down (error code 12)", UNREACHABLE):
        globusrun.say("cancel", "", error)
        with pytest.raises(ToolError):
            jobs.cancel(job)
    jobs.tidy()
    assert record(jobs, job)["cancel"], "tried in vain, and remembered"
    globusrun.say("cancel")
    globusrun.calls()
    jobs.tidy()
    assert f"/proxy.pem -k {CONTACT}" in globusrun.calls()
    with pytest.raises(GramError, match="nothing is known"):
        jobs.status(job)


@pytest.mark.parametrize(("asked", "word"), [("status", "ACTIVE"), ("refresh", "")])
def test_an_answer_on_its_way_does_not_bring_a_cancelled_job_back(
    jobs: Gram, job: str, globusrun: Globusrun, asked: str, word: str
) -> None:
    globusrun.say(asked, f"{word}\n")
    (globusrun.directory / f"{asked}.then").write_text("touch begun; while ! test -e go; do sleep 0.05; done\n")
    ask = {"status": lambda: jobs.status(job), "refresh": lambda: jobs.refresh(job, "/newer.pem")}[asked]
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(ask)
        while not (globusrun.directory / "begun").exists():
            time.sleep(0.05)
        cancelled = threads.submit(jobs.cancel, job)
        time.sleep(0.3)
        (globusrun.directory / "go").touch()
        assert answer.result()[0] == cancelled.result()[0] == "0"
    assert not list(jobs.state.iterdir())
    assert jobs.cancel(job) == ["0", ""], "asked again, as the first answer was lost"


@pytest.mark.parametrize("error", [UNKNOWN, UNREACHABLE])
def test_a_job_that_is_over_is_cancelled(jobs: Gram, job: str, globusrun: Globusrun, error: str) -> None:
    globusrun.say("cancel", "", error)
    globusrun.say("restart", "", NO_STATE)
    assert jobs.cancel(job) == ["0", ""]


def test_a_job_manager_that_is_gone_is_started_for_its_job(jobs: Gram, job: str, globusrun: Globusrun) -> None:
    """By the request to take the job up; it says that it has done so already."""
    globusrun.say("cancel", "", UNREACHABLE)
    globusrun.say("restart", "", ALIVE)
    (globusrun.directory / "restart.then").write_text("rm -f cancel.error\n")
    jobs.cancel(job)
    asked = [call.split()[1] if "restart=" not in call else "restart" for call in globusrun.calls()]
    assert asked[:3] == ["-k", "restart", "-k"]


def test_a_job_that_its_manager_does_not_know_is_not_gone(jobs: Gram, job: str, globusrun: Globusrun) -> None:
    """It is taken up, and asked for again; if it is not known then, it may run all the same."""
    globusrun.say("cancel", "", UNKNOWN)
    globusrun.say("restart", "", ALIVE)
    with pytest.raises(ToolError, match="156"):
        jobs.cancel(job)
    assert record(jobs, job)["cancel"]
    (globusrun.directory / "restart.then").write_text("rm -f cancel.error\n")
    jobs.tidy()
    with pytest.raises(GramError, match="nothing is known"):
        jobs.status(job)


def test_cancel_waits_for_the_port_of_a_job_manager_that_was_killed(
    jobs: Gram, job: str, globusrun: Globusrun, monkeypatch: pytest.MonkeyPatch
) -> None:
    globusrun.say("cancel", "", UNREACHABLE)
    globusrun.say("restart", "", "an I/O operation failed (error code 3)")
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append, time=time.time)
    monkeypatch.setattr(gram, "time", clock)
    with pytest.raises(ToolError, match=r"\(3\)"):
        jobs.cancel(job)
    assert gram.HELD_UP < sum(slept) <= gram.HELD_UP + gram.PAUSE, "and no longer"
    assert record(jobs, job)["cancel"]
    slept.clear()
    (globusrun.directory / "restart.then").write_text(f"echo x >>tries; test $(wc -l <tries) -lt 3 || {{ {FREE}; }}\n")
    assert jobs.cancel(job) == ["0", ""]
    assert slept == [gram.PAUSE] * 2


def test_submission_waits_for_it_too(
    jobs: Gram, values: dict[str, str], globusrun: Globusrun, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(gram, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    globusrun.say("submit", f"{CONTACT}\n", "an I/O operation failed (error code 3)")
    (globusrun.directory / "submit.then").write_text("test -e again && rm -f submit.error; touch again\n")
    assert jobs.submit(ad(values))[0] == "0"
    assert slept == [gram.PAUSE]


def test_a_line_break_is_refused(values: dict[str, str]) -> None:
    """A job manager could not take up the job again: its state file has a request in one line."""
    assert "\n" not in gram.request(values, "0" * 32)
    with pytest.raises(GramError, match="line break"):
        gram.request(values | {"Arguments": "'a\nb'"}, "0" * 32)


def test_a_newer_proxy_is_delegated_and_what_fails_is_tried_again(jobs: Gram, job: str, globusrun: Globusrun) -> None:
    globusrun.say("refresh", "", "(error code 12)")
    assert jobs.refresh(job, "/newer.pem") == ["0", ""], "an error would have the gridmanager cancel the pilot"
    globusrun.say("refresh")
    globusrun.say("status", "ACTIVE\n")
    globusrun.calls()
    jobs.status(job)
    assert globusrun.calls() == [f"/newer.pem -D -refresh-proxy {CONTACT}", f"/newer.pem -status {CONTACT}"]
    jobs.status(job)
    assert globusrun.calls() == [f"/newer.pem -status {CONTACT}"]


@pytest.mark.parametrize("name", ["", "../x", "0" * 31, "0" * 33, "NULL", "0" * 31 + "/"])
def test_a_name_is_no_path(jobs: Gram, name: str) -> None:
    with pytest.raises(GramError, match="no job"):
        jobs.status(name)


def test_old_ends_are_forgotten(jobs: Gram) -> None:
    for number, content in enumerate(
        [f'{{"ended": {time.time() - gram.REMEMBERED - 1}}}', '{"ended": 9e99}', "{}", "[", "[]"]
    ):
        (jobs.state / f"{number:032}.json").write_text(content)
    jobs.tidy()
    assert sorted(int(path.stem) for path in jobs.state.iterdir()) == [1, 2, 3, 4]
