"""pilotbed-ban: bans a user, a FQAN or a VO on this node, from the next call of LCMAPS on; playbooks/ban.yml runs it.

The files are those of LCMAPS's ban plugins, which read them at every call. They compare texts, by fnmatch(3), so that
a name in another form bans nobody: what has been written is proved by asking LCMAPS for it.
"""

from __future__ import annotations

import argparse
import os
import pwd
import re
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import dn
from ..lcmaps import Lcmaps, LcmapsError
from ..mapping import MAPPER_ACCOUNT
from . import journal, policy
from .apart import run_as

#: What LCMAPS reads (role pool_accounts).
FILES = {kind: Path(f"/etc/grid-security/ban_{name}.db") for kind, name in
         (("dn", "users"), ("fqan", "fqans"), ("vo", "fqans"))}  # fmt: skip
#: The lists alone, without accounts and proxies (role pool_accounts).
DATABASE, POLICY = "/etc/lcmaps/lcmaps-ban.db", "ban"
#: Whom LCMAPS has to let in, for its refusal of another one to mean something.
NOBODY = ("/CN=nobody whom pilotbed-ban knows", "/nobody-whom-pilotbed-ban-knows")
#: How often to look for payloads, and seconds between: LCMAPS may have said yes just before the ban.
LOOKS, PAUSE = 2, 1.0
#: Seconds that ended payloads get to disappear.
PATIENCE = 60.0

_FQAN = re.compile(r"(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+(/Role=[A-Za-z0-9_.-]+)?(/Capability=NULL)?")
_VO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def banned(kind: str, name: str) -> list[str]:
    """Return what LCMAPS is to refuse for ``name``, a DN, a FQAN or a VO as ``kind`` says, as LCMAPS gets to see it.

    A DN may be given as people write it (`dn.readings`). A FQAN without a role bans that group for whoever shows it;
    the groups below it and its roles are FQANs of their own. In an attribute certificate each ends with
    /Capability=NULL, and a group's has /Role=NULL, too. Of a VO these are two of all that there may be.

    Raises:
        ValueError: ``name`` is no such thing.
    """
    if kind == "dn":
        return dn.readings(name)
    form, example = {"fqan": (_FQAN, "/gridlab/analysis or /gridlab/Role=pilot"), "vo": (_VO, "gridlab")}[kind]
    if not form.fullmatch(name):
        raise ValueError(f"{name!r} is no {kind.upper()} such as {example}")
    if kind == "vo":
        return [f"/{name}", f"/{name}/group/Role=role/Capability=NULL"]
    short = _short(name)
    return [short, f"{short}/Capability=NULL" if "/Role=" in short else f"{short}/Role=NULL/Capability=NULL"]


def lines(kind: str, name: str) -> list[str]:
    """Return the entries of the ban file that ban ``name``. Raises ValueError."""
    found = banned(kind, name)
    return [f'"/{name}"', f'"/{name}/*"'] if kind == "vo" else list(map(_entry, found))


def _entry(text: str) -> str:
    """Return an entry of a gridmapfile, as LCMAPS 1.6 reads it, that is this text and no other.

    It has no escapes: in quotes a backslash stays one, and a quote ends the entry, as a blank does without quotes. With
    a backslash at an entry's end it cannot read the file, and refuses everybody.
    """
    literal = re.sub(r"[*?[]|\\$", r"[\g<0>]", text)
    return literal.replace(" ", "[[:blank:]]") if '"' in text else f'"{literal}"'


def prove(kind: str, name: str, present: bool) -> str:
    """Ask LCMAPS for ``name``. Return a warning where it is still refused, though its ban has been lifted.

    Raises:
        LcmapsError: it lets in whom it should refuse, or cannot tell.
    """
    found = banned(kind, name)
    subjects = [NOBODY, *((one, NOBODY[1]) if kind == "dn" else (NOBODY[0], one) for one in found)]
    answers = run_as(pwd.getpwnam(MAPPER_ACCOUNT), lambda: _refused(subjects))
    control, refused = answers[:1], answers[1:]
    if len(answers) != len(subjects) or any(control):
        raise LcmapsError(f"LCMAPS refuses everybody: see {FILES[kind]} for a pattern, and the node's log (lcmaps)")
    if present and not all(refused):
        passed = found[refused.index(0)]
        raise LcmapsError(f"LCMAPS lets {passed} in all the same: see {FILES[kind]} and {DATABASE}")
    return "" if present or not any(refused) else f"{name} is still banned by other lines of {FILES[kind]}"


def _refused(subjects: Sequence[tuple[str, str]]) -> bytes:
    """Tell, a byte each, whom LCMAPS refuses: DN and FQAN. For a process of its own."""
    lcmaps = Lcmaps(DATABASE, POLICY, debug_level=0)
    return bytes(lcmaps.run_with_fqans(name, (fqan,)) is None for name, fqan in subjects)


def _short(fqan: str) -> str:
    return fqan.removesuffix("/Capability=NULL").removesuffix("/Role=NULL")


def concerns(kind: str, name: str, log: Mapping[str, object]) -> bool:
    """Tell whether the payload of this log line is one of the banned: by its DN, or by its primary FQAN."""
    fqan = _short(str(log.get("fqan", "")))
    if kind == "dn":
        return log.get("dn") in dn.readings(name)
    return fqan == _short(name) if kind == "fqan" else fqan.split("/")[1:2] == [name]


def changed(text: str, entries: Sequence[str], present: bool) -> str:
    """Return the text of a ban file with or without ``entries``; other lines stay as they are."""
    kept = [line for line in text.splitlines() if line not in entries]
    return "".join(f"{line}\n" for line in ([*kept, *entries] if present else kept))


def has(text: str, entries: Sequence[str]) -> bool:
    """Tell whether the text of a ban file has one of ``entries``: lifting the ban would take it out."""
    return any(line in entries for line in text.splitlines())


def end_payloads(kind: str, name: str) -> list[str]:
    """End the running payloads of the banned and return their log lines. Raises TimeoutError."""
    ended, waiting = [], []
    for case in journal.under_way():
        if concerns(kind, name, case.log) and case.monitor:
            try:
                monitor = os.pidfd_open(case.monitor)
                signal.pidfd_send_signal(monitor, policy.END_SIGNAL)
            except ProcessLookupError:
                continue  # it is just ending
            waiting.append(monitor)
            ended.append(policy.record(case.log))
    deadline = time.monotonic() + PATIENCE
    for monitor in waiting:
        if not select.select([monitor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"payloads of {name} do not end in {PATIENCE:.0f} s: see /run/glexec")
        os.close(monitor)
    return ended


def main() -> int:
    """Run one command and return its exit code; print ``changed`` if a file was, and the payloads that were ended."""
    parser = argparse.ArgumentParser(prog="pilotbed-ban", description=__doc__)
    parser.add_argument("kind", choices=("dn", "fqan", "vo"))
    parser.add_argument("name")
    parser.add_argument("--lift", action="store_true", help="lift the ban")
    parser.add_argument("--end-payloads", action="store_true", help="end what the banned run on this node")
    parser.add_argument("--check", action="store_true", help="only see whether the arguments can be meant")
    parser.add_argument("--state", action="store_true", help="only say `banned` or `free`: whether this ban is there")
    asked = parser.parse_args()
    if asked.lift and asked.end_payloads:
        parser.error("--end-payloads goes with a ban, not with its end")
    try:
        entries = lines(asked.kind, asked.name)
        if asked.kind == "dn" and (meant := dn.readings(asked.name)) != [asked.name]:
            print(f"pilotbed-ban: to LCMAPS {asked.name} is {' or '.join(meant)}", file=sys.stderr)
        if asked.kind == "dn" and set("*?") & set(asked.name):
            print(f"pilotbed-ban: {asked.name} is one name: a ban knows no patterns", file=sys.stderr)
        if asked.check:
            return 0
        file = FILES[asked.kind]
        before = file.read_text()
        if asked.state:
            print("banned" if has(before, entries) else "free")
            return 0
        after = changed(before, entries, not asked.lift)
        if after != before:
            partial = file.with_suffix(".new")
            partial.write_text(after)
            partial.chmod(0o644)
            partial.replace(file)
            print("changed")
        if warning := prove(asked.kind, asked.name, not asked.lift):
            print(f"pilotbed-ban: {warning}", file=sys.stderr)
        for _ in range(LOOKS if asked.end_payloads else 0):
            for line in end_payloads(asked.kind, asked.name):
                print(f"ended {line}")
            time.sleep(PAUSE)
    except (OSError, ValueError, LookupError, LcmapsError, policy.Refusal) as error:
        print(f"pilotbed-ban: {error}", file=sys.stderr)
        return 1
    return 0
