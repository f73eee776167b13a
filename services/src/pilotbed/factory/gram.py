"""gram-gahp: HTCondor's gridmanager asks it, as it asks blahpd for a batch system, and it asks GRAM's gatekeepers.

HTCondor has no gt2 grid type any more. Of a job of the grid type ``batch gram`` it starts GRAM_GAHP, and speaks the
commands BLAH_* to it; ours run globusrun. What is not GRAM's but ours:

* The start-up script travels in the request, and the pilot's output stays in its account's home until it has ended.
  GRAM's own staging wants a server at the factory that reads and writes files for whoever has a pilot's proxy, which
  every site has.
* How a pilot has ended is asked of that directory, as GRAM tells no exit code of a job that nobody listens to.
"""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import re
import secrets
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pilotbed import gridtools
from pilotbed.files import replace_file
from pilotbed.pool.text import quote
from pilotbed.service import set_up_logging

from .gahp import Command, Server

_Said = TypeVar("_Said")
_Rest = ParamSpec("_Rest")

VERSION = "$GahpVersion: 1.0.0 Nov 28 2026 pilotbed gram-gahp (new_esc_format) $"
STATE = Path("/var/lib/pilotbed/factory/gram")
#: Where globusrun listens while it fetches what a pilot has written; the computing elements connect to it.
PORTS = "20000,20099"
#: JobStatus of HTCondor.
IDLE, RUNNING, COMPLETED, HELD = 1, 2, 4, 5
#: What GRAM's words for a job's state are to HTCondor; those that are missing say that it is over.
STATES = {
    **dict.fromkeys(("UNSUBMITTED", "STAGE_IN", "PENDING"), IDLE),
    **dict.fromkeys(("ACTIVE", "SUSPENDED", "STAGE_OUT"), RUNNING),
}
#: Seconds after GRAM says that a job is over until its end is in the shared directory, seen from the computing element.
PATIENCE = 60
#: Seconds that a job manager which was killed cannot be started for, as its connections hold its port (TIME_WAIT, 60);
#: and between two attempts.
HELD_UP, PAUSE = 90, 5
#: Seconds between attempts to end jobs that could not be reached.
AGAIN = 60
#: Seconds that a job is remembered after its end: the gridmanager may have died before it noted it.
REMEMBERED = 86400
#: Octets of a request that a gatekeeper takes (GLOBUS_GRAM_PROTOCOL_MAX_MSG_SIZE is 64000), less its other lines.
LARGEST = 60000
#: Octets of the end of each stream of a pilot that are fetched.
OUTPUT = 4 << 20

#: GRAM's errors, GLOBUS_GRAM_PROTOCOL_ERROR_…: CONTACTING_JOB_MANAGER, as there is none, or no network;
#: JOB_CONTACT_NOT_FOUND, by a manager that does not know the job; of one to be taken up, NO_STATE_FILE, as it is over,
#: and OLD_JM_ALIVE, as it has been taken up already; of a job manager to be started NO_RESOURCES ("an I/O operation
#: failed"), as its port is not free yet.
_UNREACHABLE, _UNKNOWN, _NO_STATE, _ALIVE, _NO_RESOURCES = 79, 156, 121, 124, 3
#: In the words of gridtools.run; globusrun ends with the number of GRAM's error.
_CODE = re.compile(r"globusrun failed \((\d+)\)")
_NAME = re.compile(r"[0-9a-f]{32}")
_RESOURCE = re.compile(r"([A-Za-z0-9.-]+:[0-9]+)/jobmanager-[a-z0-9_-]+")
_CONTACT = re.compile(r"https://[A-Za-z0-9.-]+:[0-9]+/\S+")
#: Begins what a fork job prints: HTTP's and the shell's own words may stand before it.
_MARK = "pilotbed-output:"

#: What the batch job is, for /bin/sh: unpack the script, run it with the arguments, leave output and exit code.
#: One line, as all of a request: see rsl.
_PILOT = """umask 077
d=$HOME/.pilotbed-gram/{name}
mkdir -p "$d" && exec >"$d/out" 2>"$d/err" </dev/null || exit 125
printf %s {script} | base64 -d | gunzip >"$d/script" && chmod u+x "$d/script" || exit 125
cd "${{TMPDIR:-/tmp}}"
"$d/script" "$@"
code=$?
rm -f "$d/script"
echo $code >"$d/code.new" && mv "$d/code.new" "$d/code"
exit $code""".replace("\n", "; ")
_FETCH = """cd "$HOME/.pilotbed-gram/{name}" && test -e code || exit 0
tail -c {output} out >out.tail; tail -c {output} err >err.tail
echo {mark}$(tar -cz out.tail err.tail code | base64 -w0)""".replace("\n", "; ")
# A pilot that is ending writes its exit code there: moved first, as rm would find the directory "not empty" otherwise.
_CLEAR = 'cd "$HOME/.pilotbed-gram" && mv {name} {name}.gone && rm -rf {name}.gone'


class GramError(Exception):
    """What cannot be done, and why."""


def rsl(**attributes: str | Sequence[str]) -> str:
    """Return a request in GRAM's language.

    It has no line break: a job manager keeps a request as one line of the job's state file, and one that is started
    again after it was killed would take what follows for other values, such as whose the job is ("old job manager is
    still alive"; globus_gram_job_manager_state_file_read).

    >>> print(rsl(executable="/bin/sh", arguments=["-c", 'echo "a" b']))
    &(executable="/bin/sh")(arguments="-c" "echo ""a"" b")

    Raises:
        GramError: a value has a line break.
    """

    def literal(value: str) -> str:
        if "\n" in value:
            raise GramError(f"a line break in {value[:80]!r}: GRAM cannot keep such a request")
        return '"' + value.replace('"', '""') + '"'

    words = {name: [value] if isinstance(value, str) else value for name, value in attributes.items()}
    return "&" + "".join(f"({name}={' '.join(map(literal, value))})" for name, value in words.items())


def arguments(text: str) -> list[str]:
    """Return the words of HTCondor's new syntax for arguments: apostrophes around a word, doubled inside one.

    >>> arguments("a 'b c' 'it''s' ''")
    ['a', 'b c', "it's", '']

    Raises:
        GramError: an apostrophe has no other.
    """
    words: list[str] = []
    # Words between blanks; inside apostrophes also blanks, and two apostrophes are one.
    rest = text.strip()
    while rest:
        match = re.match(r"(?:[^'\s]|'(?:[^']|'')*')+", rest)
        if not match:
            raise GramError(f"arguments {text!r}: an apostrophe has no other")
        words.append(re.sub(r"'((?:[^']|'')*)'", lambda part: part[1].replace("''", "'"), match[0]))
        rest = rest[match.end() :]
        if rest[:1] == "'":
            raise GramError(f"arguments {text!r}: an apostrophe has no other")
        rest = rest.lstrip()
    return words


def request(ad: dict[str, Any], name: str) -> str:
    """Return the request of a pilot.

    Raises:
        GramError: it cannot be sent.
    """
    try:
        script = base64.b64encode(gzip.compress(Path(ad["Cmd"]).read_bytes(), mtime=0)).decode()
    except OSError as error:
        raise GramError(f"{ad['Cmd']}: {error.strerror}") from None
    words = ["-c", _PILOT.format(name=name, script=script), "pilot", *arguments(ad.get("Arguments", ""))]
    # Of type multiple, GRAM's own, it would be a job in the background of another.
    found = rsl(executable="/bin/sh", arguments=words, job_type="single", queue=ad["Queue"], save_state="yes")
    if len(found.encode()) > LARGEST:
        raise GramError(f"{ad['Cmd']} and its arguments make a request of {len(found)} octets; GRAM takes {LARGEST}")
    return found


def parsed(text: str) -> dict[str, Any]:
    """Return the values of an ad that are texts; the names as a submit description writes them.

    Raises:
        GramError: it is none, or one that is needed is missing.
    """
    import classad2

    try:
        ad = classad2.ClassAd(text)
        named = {name.lower(): name for name in ad}
        found = {
            name: value
            for name in ("Cmd", "Arguments", "Iwd", "Out", "Err", "x509userproxy", "Queue", "GramResource")
            if isinstance(value := ad.get(named.get(name.lower(), name)), str)
        }
    except Exception as error:
        raise GramError(f"this is no ad: {text[:80]!r}: {error}") from None
    if missing := {"Cmd", "Iwd", "Queue", "GramResource", "x509userproxy"} - found.keys():
        raise GramError(f"the job's ad has no {', '.join(sorted(missing))}")
    if not _RESOURCE.fullmatch(found["GramResource"]):
        raise GramError(f"gatekeeper {found['GramResource']!r} is not of the form host:2119/jobmanager-batch")
    return found


def code_of(error: gridtools.ToolError) -> int:
    """Return GRAM's number of what went wrong; 0 if it says none."""
    found = _CODE.match(str(error))
    return int(found[1]) if found else 0


def contact_in(said: str) -> str:
    """Return the job's contact in what globusrun has printed.

    Raises:
        GramError: there is none.
    """
    for line in reversed(said.split()):
        if _CONTACT.fullmatch(line):
            return line
    raise GramError(f"globusrun tells no job: {said.strip()[:200]!r}")


def unpacked(said: str) -> tuple[int, bytes, bytes] | None:
    """Return exit code, output and error output in what the fetching job has printed; None if the pilot has not ended.

    Raises:
        GramError: it is damaged.
    """
    _, mark, text = said.partition(_MARK)
    if not mark:
        return None
    try:
        with tarfile.open(fileobj=io.BytesIO(base64.b64decode(text.split()[0])), mode="r:gz") as archive:
            files = {}
            for member in archive:
                content = archive.extractfile(member)
                files[member.name] = content.read(OUTPUT) if content else b""
        return int(files["code"]), files["out.tail"], files["err.tail"]
    except (ValueError, IndexError, KeyError, EOFError, OSError, tarfile.TarError) as error:
        raise GramError(f"what the computing element has sent of the pilot's output is damaged: {error!r}") from None


def _alone(do: Callable[Concatenate[Gram, str, _Rest], _Said]) -> Callable[Concatenate[Gram, str, _Rest], _Said]:
    """Have a job, the first argument, for oneself: an answer on its way would bring back the file of one forgotten."""

    @functools.wraps(do)
    def wrapped(self: Gram, name: str, /, *rest: _Rest.args, **more: _Rest.kwargs) -> _Said:
        self._path(name)
        with self._locks.setdefault(name, threading.RLock()):
            return do(self, name, *rest, **more)

    return wrapped


class Gram:
    """The jobs that the gridmanager knows by a name of ours, each a file in ``state``."""

    def __init__(self, state: Path = STATE) -> None:
        self.state = state
        self._locks: dict[str, threading.RLock] = {}

    def commands(self) -> dict[str, Command]:
        """Return what the gridmanager may ask."""
        return {
            "BLAH_PING": Command(1, lambda _: ["0", ""]),
            "BLAH_JOB_SUBMIT": Command(1, self.submit, failed=1),
            "BLAH_JOB_STATUS": Command(1, self.status, failed=2),
            "BLAH_JOB_CANCEL": Command(1, self.cancel),
            "BLAH_JOB_REFRESH_PROXY": Command(2, self.refresh),
        }

    def submit(self, text: str) -> list[str]:
        """Submit the job of an ad: code, reason, name."""
        ad, name = parsed(text), secrets.token_hex(16)
        record = {
            "resource": ad["GramResource"],
            "proxy": ad["x509userproxy"],
            **{key: str(Path(ad["Iwd"], ad[key])) for key in ("Out", "Err") if ad.get(key)},
            "status": IDLE,
        }
        # -F: it does not wait for a call of the job manager's. -D: a pilot's services take no limited proxy.
        words = ("-F", "-D", "-r", record["resource"], request(ad, name))
        said = self._patiently(lambda: self._globusrun(record, *words))
        self._keep(name, record | {"contact": contact_in(said)})
        return ["0", "", name]

    @_alone
    def status(self, name: str) -> list[str]:
        """Ask for a job: code, reason, JobStatus, ad."""
        record = self._record(name)
        if record["status"] == COMPLETED:
            return self._told(record)
        if proxy := record.get("refresh"):
            self.refresh(name, proxy)
            record = self._record(name)
        before = dict(record)
        try:
            word = "".join(self._globusrun(record, "-status", record["contact"]).split()[-1:])
        except gridtools.ToolError as error:
            record["said"] = str(error)
        else:
            # It also says DONE of a job whose manager it cannot reach.
            if word in STATES:
                record["status"] = STATES[word]
                record.pop("over", None)
            else:
                self._end(name, record)
        if record != before:
            self._keep(name, record)
        return self._told(record)

    def _end(self, name: str, record: dict[str, Any]) -> None:
        """Find out how a job has ended, if it has."""
        try:
            found = unpacked(self._fork(record, _FETCH.format(name=name, output=OUTPUT, mark=_MARK), "-o"))
            if not found:
                self._take_up(record)
                record.pop("over", None)
                return
        except (gridtools.ToolError, GramError) as error:
            record["said"] = str(error)
            if not isinstance(error, gridtools.ToolError) or code_of(error) != _NO_STATE:
                return  # the computing element is away, or a part of it: its jobs are what they were
            if time.time() - record.setdefault("over", time.time()) > PATIENCE:
                record["status"] = HELD
            return
        record["code"], *streams = found
        for key, content in zip(("Out", "Err"), streams, strict=True):
            if key in record:
                replace_file(Path(record[key]), content, 0o640)
        record["status"], record["ended"] = COMPLETED, time.time()
        self._clear(name, record)

    @_alone
    def cancel(self, name: str) -> list[str]:
        """End a job and forget it: code, reason. One that cannot be reached is ended later, by ``tidy``.

        What a job manager does not know may run all the same: gone is what GRAM has no state file of. A job that has
        been forgotten was ended before, and whoever asked did not hear of it.
        """
        if not self._path(name).exists():
            return ["0", ""]
        record = self._record(name)
        if record["status"] in (IDLE, RUNNING):
            try:
                self._patiently(lambda: self._ask(record, "-k"))
            except gridtools.ToolError as error:
                if code_of(error) != _NO_STATE:
                    self._keep(name, record | {"cancel": True})
                    raise
        self._clear(name, record)
        self._forget(name)
        return ["0", ""]

    @_alone
    def refresh(self, name: str, proxy: str) -> list[str]:
        """Delegate a newer proxy to a job: code, reason. What fails is tried again with the next question for it."""
        record = self._record(name)
        record["proxy"], record["refresh"] = proxy, proxy
        try:
            # What a job that is over would need no more is dropped: status finds out.
            self._ask(record, "-D", "-refresh-proxy")
            del record["refresh"]
        except gridtools.ToolError as error:
            record["said"] = str(error)
        self._keep(name, record)
        return ["0", ""]

    def tidy(self) -> None:
        """Forget jobs that have ended long ago; end those that could not be reached when HTCondor removed them.

        Whichever gatekeeper's they are: each has a GAHP, and to end or forget a job twice does no harm.
        """
        for path in self.state.glob("*.json"):
            try:
                record = json.loads(path.read_text())
                if time.time() - record.get("ended", time.time()) > REMEMBERED:
                    self._forget(path.stem)
                elif record.get("cancel"):
                    self.cancel(path.stem)
            except (OSError, ValueError, AttributeError, TypeError, KeyError, GramError, gridtools.ToolError):
                continue

    @staticmethod
    def _told(record: dict[str, Any]) -> list[str]:
        ad = ""
        if record["status"] == COMPLETED:
            ad = f"ExitCode = {record['code']}; ExitBySignal = false"
        elif record["status"] == HELD:
            ad = f"HoldReason = {quote('GRAM: the batch job is gone and has left no exit code')}"
        return ["0", "", str(record["status"]), f"[ {ad} ]"]

    def _clear(self, name: str, record: dict[str, Any]) -> None:
        try:
            self._fork(record, _CLEAR.format(name=name), "-F")
        except gridtools.ToolError as error:
            record["said"] = str(error)

    def _fork(self, record: dict[str, Any], script: str, option: str) -> str:
        """Run a script on the computing element itself, as the pilot's account; return what it prints (-o)."""
        match = _RESOURCE.fullmatch(record["resource"])
        assert match, record["resource"]
        job = rsl(executable="/bin/sh", arguments=["-c", script], job_type="single")
        return self._globusrun(record, option, "-D", "-r", f"{match[1]}/jobmanager-fork", job)

    @staticmethod
    def _patiently(ask: Callable[[], _Said]) -> _Said:
        """Ask again while a job manager cannot be started: its port is that of another, which was killed."""
        last = time.monotonic() + HELD_UP
        while True:
            try:
                return ask()
            except gridtools.ToolError as error:
                if code_of(error) != _NO_RESOURCES or time.monotonic() > last:
                    raise
            time.sleep(PAUSE)

    def _ask(self, record: dict[str, Any], *words: str) -> None:
        """Ask a job's manager, which may have to be started for it: it ends with its host, and between two jobs."""
        try:
            self._globusrun(record, *words, record["contact"])
        except gridtools.ToolError as error:
            if code_of(error) not in (_UNREACHABLE, _UNKNOWN):
                raise
            self._take_up(record)
            self._globusrun(record, *words, record["contact"])

    def _take_up(self, record: dict[str, Any]) -> None:
        """Have a job manager run that knows a job; it is the account's, and takes up all of its jobs when it starts."""
        try:
            self._globusrun(record, "-F", "-D", "-r", record["resource"], rsl(restart=record["contact"]))
        except gridtools.ToolError as error:
            if code_of(error) != _ALIVE:
                raise

    @staticmethod
    def _globusrun(record: dict[str, Any], *words: str) -> str:
        environment = {"X509_USER_PROXY": record["proxy"], "GLOBUS_TCP_PORT_RANGE": PORTS}
        return gridtools.run(["globusrun", *words], environment)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise GramError(f"{name[:40]!r} is no job of this GAHP")
        return self.state / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self._path(name).read_text())
        except (OSError, ValueError) as error:
            raise GramError(f"nothing is known of job {name}: {error}") from None
        return dict(found)

    def _forget(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)
        self._locks.pop(name, None)

    def _keep(self, name: str, record: dict[str, Any]) -> None:
        replace_file(self._path(name), json.dumps(record), 0o600, durable=True)


def main() -> int:
    """Serve the gridmanager that has started this program; return the exit code."""
    set_up_logging()
    gram = Gram()

    def tidy() -> None:
        while True:
            gram.tidy()
            time.sleep(AGAIN)

    threading.Thread(target=tidy, daemon=True).start()
    Server(VERSION, gram.commands(), sys.stdin.buffer, sys.stdout.buffer).serve()
    return 0
