"""pilotbed-ban: bans a user, a FQAN or a VO on this node, from the next call of LCMAPS on; playbooks/ban.yml runs it.

The files are those of LCMAPS's ban plugins, which read them at every call.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import journal, policy

#: What LCMAPS reads (role pool_accounts).
FILES = {kind: Path(f"/etc/grid-security/ban_{name}.db") for kind, name in
         (("dn", "users"), ("fqan", "fqans"), ("vo", "fqans"))}  # fmt: skip
#: How often to look for payloads, and seconds between: LCMAPS may have said yes just before the ban.
LOOKS, PAUSE = 2, 1.0
#: Seconds that ended payloads get to disappear.
PATIENCE = 60.0

_DN = re.compile(r'(/[A-Za-z][A-Za-z0-9.]*=[^"\\\x00-\x1f\x7f*?\[]+)+')
_FQAN = re.compile(r"(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+(/Role=[A-Za-z0-9_.-]+)?(/Capability=NULL)?")
_VO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def lines(kind: str, name: str) -> list[str]:
    """Return the entries of the ban file that ban ``name``: a DN, a FQAN or a VO, as ``kind`` says.

    A FQAN without a role bans that group for whoever shows it; the groups below it and its roles are FQANs of their
    own. In an attribute certificate each ends with /Capability=NULL, and a group's has /Role=NULL, too.

    Raises:
        ValueError: ``name`` is no such thing.
    """
    form, example = {
        "dn": (_DN, "/DC=test/DC=grid/O=Gridlab/OU=People/CN=Some Body"),
        "fqan": (_FQAN, "/gridlab/analysis or /gridlab/Role=pilot"),
        "vo": (_VO, "gridlab"),
    }[kind]
    if not form.fullmatch(name):
        raise ValueError(f"{name!r} is no {kind.upper()} such as {example}")
    if kind == "dn":
        return [f'"{name}"']
    if kind == "vo":
        return [f'"/{name}"', f'"/{name}/*"']
    short = _short(name)
    long = [f"{short}/Capability=NULL"] if "/Role=" in short else [f"{short}/Role=NULL/Capability=NULL"]
    return [f'"{entry}"' for entry in (short, *long)]


def _short(fqan: str) -> str:
    return fqan.removesuffix("/Capability=NULL").removesuffix("/Role=NULL")


def concerns(kind: str, name: str, log: Mapping[str, object]) -> bool:
    """Tell whether the payload of this log line is one of the banned: by its DN, or by its primary FQAN."""
    fqan = _short(str(log.get("fqan", "")))
    if kind == "dn":
        return log.get("dn") == name
    return fqan == _short(name) if kind == "fqan" else fqan.split("/")[1:2] == [name]


def changed(text: str, entries: Sequence[str], present: bool) -> str:
    """Return the text of a ban file with or without ``entries``; other lines stay as they are."""
    kept = [line for line in text.splitlines() if line not in entries]
    return "".join(f"{line}\n" for line in ([*kept, *entries] if present else kept))


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
    asked = parser.parse_args()
    if asked.lift and asked.end_payloads:
        parser.error("--end-payloads goes with a ban, not with its end")
    try:
        entries = lines(asked.kind, asked.name)
        if asked.check:
            return 0
        file = FILES[asked.kind]
        before = file.read_text()
        after = changed(before, entries, not asked.lift)
        if after != before:
            partial = file.with_suffix(".new")
            partial.write_text(after)
            partial.chmod(0o644)
            partial.replace(file)
            print("changed")
        for _ in range(LOOKS if asked.end_payloads else 0):
            for line in end_payloads(asked.kind, asked.name):
                print(f"ended {line}")
            time.sleep(PAUSE)
    except (OSError, ValueError) as error:
        print(f"pilotbed-ban: {error}", file=sys.stderr)
        return 1
    return 0
