"""The command pilotbed-incident."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from pilotbed.trace.cli import moment

from .. import PATIENCE, GridError, inventory
from .. import record as place_of
from ..inventory import Inventory
from . import archive, blocks, found, hunt, nodes, record, who
from .blocks import KINDS
from .nodes import NodeError, side_by_side
from .record import Record, Step

#: Seconds that a held job's payload gets to end by itself, as HTCondor ends it; then glexec ends it.
LEAVE = 8


def incidents() -> Path:
    """Return the directory of all incidents of this grid."""
    return place_of("incidents")


@contextmanager
def alone(top: Path) -> Iterator[None]:
    """Keep other calls out meanwhile. Raises GridError."""
    top.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(top / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise GridError("another pilotbed-incident is at work on this grid: wait until it has ended") from None
    finally:
        os.close(descriptor)


def say(text: str = "") -> None:
    """Print a line at once; who reads no further, as head(1), does not stop what is under way."""
    try:
        print(found.plain(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- freeze


def block(one: Record, step: Step) -> None:
    """Put a block, and note what was there before, and then what it came to."""
    kind = KINDS[step.kind]
    try:
        before = kind.asked(step)
        if before is None and step.before is None:
            one.end(step, "nothing to do")
            return
        one.begin(step, before)
        kind.put(step, one)
        one.end(step, "done")
    except NodeError as error:
        one.end(step, f"failed: {error}")


def all_blocks(one: Record, known: Inventory, user: str, dns: Sequence[str]) -> None:
    """Put every block that is wanted, those of different nodes side by side."""
    steps = list(blocks.wanted(known, one, user, dns))

    def at(node: str) -> None:
        for step in steps:
            if step.node == node:
                block(one, step)

    side_by_side((step.node for step in steps), at)
    for step in steps:
        say(f"  {step.outcome.partition(':')[0]:<14} {step.node:<14} {KINDS[step.kind].shown(step)}")


def end(one: Record, known: Inventory, dns: Sequence[str]) -> list[str]:
    """End what the user runs on every site: by the schedds, then by glexec; return what could not be done."""
    left = []
    for step in one.steps:
        if step.kind == "jobs":
            try:
                blocks.hold(step, one, [*blocks.WAITING, *blocks.RUNNING])
                one.act(f"hold of jobs that run, by {step.node}", "done")
            except NodeError as error:
                left.append(f"jobs that run were not held: {error}")
    # A job that the schedd holds stays in its queue; a payload that glexec ends first is a job that has failed.
    deadline = time.monotonic() + LEAVE * PATIENCE
    while time.monotonic() < deadline:
        runs, _ = hunt.payloads(known, dns, time.time())
        if not any(run.end is None for run in runs):
            break
        time.sleep(0.5)

    def ended(node: str) -> list[str]:
        said = [nodes.ok(node, "pilotbed-ban dn --end-payloads -- %s", dn, deadline=90).text for dn in dns]
        return [line for text in said for line in text.splitlines() if line.startswith("ended ")]

    for node, answer in side_by_side(known.names("worker"), ended).items():
        if isinstance(answer, NodeError):
            left.append(f"payloads on {node} may run still: {answer}")
            said = f"failed: {answer}"
        else:
            said = f"done: {len(answer)}" + "".join(f"; {line}" for line in answer)
        one.act(f"payloads ended by glexec on {node}", said)
        say(f"  {said.partition(':')[0]:<14} {node:<14} payloads ended:{said.partition(':')[2][:60]}")
    runs, _ = hunt.payloads(known, dns, time.time())
    left += [f"payload of job {run.id} runs still on {run.node}, as {run.account}" for run in runs if run.end is None]
    return left


def collect(one: Record, known: Inventory, since: float, until: float) -> list[str]:
    """Fetch the logs of all nodes that have not sent them yet, and make the archive; return what could not be done."""
    top = one.directory / archive.EVIDENCE
    wanted = [name for name in known.hosts() if name not in archive.have(one.directory, known.hosts())]
    left = []
    for node, answer in side_by_side(wanted, lambda name: archive.collect(known, name, since, until, top)).items():
        one.act(f"logs of {node}", str(answer))
        if isinstance(answer, NodeError):
            left.append(f"logs of {node} are not in the archive: {answer}")
        say(f"  {'failed' if isinstance(answer, NodeError) else 'done':<14} {node:<14} logs: {answer}")
    done = json.loads(one.text())
    del done["found"]
    archive.evidence(one.directory, {"found": one.found, "done": done | {"not done": left}})
    try:
        archive.sign(known, one.directory, archive.pack(one.directory, one.id))
        one.act(archive.ARCHIVE, "signed and verified")
    except GridError as error:
        one.act(archive.ARCHIVE, f"not signed: {error}")
        left.append(f"the archive is not signed: {error}")
    return left


def begin(known: Inventory, text: str, reason: str) -> tuple[Record, str, str, dict[str, Any], dict[str, Any]]:
    """Return the incident of a job with submit host, cluster.proc, ad and user.

    An incident that is known already goes on without the schedd.

    Raises:
        GridError: nobody knows the job.
    """
    node, job = found.job_of(text, known.names("submit"))
    top = incidents()
    try:
        ad, user = hunt.identify(known, node, job)
    except NodeError as error:
        one = record.unfinished(top, f"{node}#{job}")
        if not one or "ad" not in one.found:
            raise GridError(f"{error}; whose job {job} is, only it can say: if you know, playbooks/ban.yml") from error
        return one, node, job, one.found["ad"], one.found["user"]
    queued = int(hunt.queued(ad))
    return record.open_one(top, f"{node}-{job}-{queued}", f"{node}#{job}#{queued}", reason), node, job, ad, user


def freeze(options: argparse.Namespace) -> int:
    """Block the user of a payload everywhere, end what he runs, keep the logs."""
    begun, known = time.monotonic(), inventory.load()
    one, node, job, ad, user = begin(known, options.job, options.reason)
    say(f"incident {one.id}: job {job} of {user['account']}, {', '.join(user['dns'])}")
    one.state = "freezing"
    one.found = {**one.found, "user": user, "ad": ad}
    one.save()

    all_blocks(one, known, user["user"], user["dns"])
    left = [f"{KINDS[step.kind].shown(step)}, on {step.node}: {step.outcome}"
            for step in one.steps if step.outcome.startswith("failed")]  # fmt: skip
    blocked = time.monotonic() - begun

    one.found, runs, silent = hunt.look(known, node, job, ad, user, one.found)
    one.save()
    left += [f"not looked at: {said}" for said in silent]
    left += end(one, known, user["dns"])
    ended = time.monotonic() - begun

    since, until = found.span(ad, runs, hunt.queued(ad), time.time())
    left += collect(one, known, since, until)
    one.state = "frozen, not all" if left else "frozen"
    one.save()
    say()
    for line in found.lines(one.found):
        say(line)
    say()
    say(f"blocked after {blocked:.0f} s, ended after {ended:.0f} s, all after {time.monotonic() - begun:.0f} s; "
        f"{one.directory}: {archive.ARCHIVE}, signed in {archive.SIGNED}")  # fmt: skip
    return _left(left, f"pilotbed-incident freeze {options.job}")


def _left(left: Sequence[str], command: str) -> int:
    for said in dict.fromkeys(left):
        print(f"pilotbed-incident: not done: {found.plain(said)}", file=sys.stderr)
    if left:
        print(f"pilotbed-incident: {command}: the same command goes on", file=sys.stderr)
    return 1 if left else 0


# -- thaw


def unblock(one: Record, step: Step, others: Sequence[Record]) -> None:
    """Take a block back, or leave it to another incident that needs it."""
    if heir := one.heir(step, others):
        one.hand_over(step, *heir)
        return
    try:
        KINDS[step.kind].lifted(step, one)
        one.undid(step, "lifted")
    except NodeError as error:
        one.undid(step, f"failed: {error}")


def thaw(options: argparse.Namespace) -> int:
    """Take back what freeze has done."""
    begun, top = time.monotonic(), incidents()
    if not record.ID.fullmatch(options.id):
        raise GridError(f"{options.id[:80]!r} is no incident: pilotbed-incident list has those that there are")
    one = record.load(top / options.id)
    if one.state == "thawed":
        say(f"incident {one.id} is thawed already")
        return 0
    one.state = "thawing"
    one.save()
    others = [other for other in record.every(top) if other.state in ("freezing", "frozen", "frozen, not all")]
    for step in one.to_undo():
        unblock(one, step, others)
        say(f"  {step.undone.partition(':')[0]:<14} {step.node:<14} {KINDS[step.kind].shown(step)}")
    left = [f"{KINDS[step.kind].shown(step)}, on {step.node}: {step.undone}" for step in one.to_undo()]
    if not left:
        one.state, one.closed = "thawed", time.time()
        one.save()
        say(f"incident {one.id} is thawed after {time.monotonic() - begun:.0f} s; its archive stays in {one.directory}")
    return _left(left, f"pilotbed-incident thaw {one.id}")


# -- who, list


def _clock(when: float | None) -> str:
    return "-" if when is None else datetime.fromtimestamp(when).astimezone().isoformat(timespec="seconds")


def show(told: dict[str, Any]) -> None:
    """Print who ran behind an address."""
    say(f"{told['place']}, at {_clock(told['time'])}")
    for one in told["leases"]:
        say(f"  port {one.get('port')}: pilot {one.get('pilot')} of {one.get('dn')}, from {one.get('peer')}")
    for one in told["payloads"]:
        ran = f"{_clock(one['start'])} to {_clock(one['end'])}"
        say(f"  {one['node']}  {one['account']}  {one['dn']}  {one['fqan']}  job {one['job']}  "
            f"pilot {one['pilot account']}, {one['batch job']}  {ran}")  # fmt: skip
    if not told["payloads"]:
        say("  no payload ran there then")


def ask_who(options: argparse.Namespace) -> int:
    """Say which payloads ran behind an address at a time."""
    told = who.who(inventory.load(), options.address, options.time)
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        show(told)
    for said in told["silent"]:
        print(f"pilotbed-incident: not asked: {found.plain(said)}", file=sys.stderr)
    return 1 if told["silent"] else 0


def listing(options: argparse.Namespace) -> int:
    """Print a line for every incident."""
    broken: list[str] = []
    for one in record.every(incidents(), broken):
        user = one.found.get("user", {})
        say(f"{one.id}  {one.state}  {_clock(one.opened)}  {user.get('account', '-')}  {one.reason}")
    for said in broken:
        print(f"pilotbed-incident: {found.plain(said)}", file=sys.stderr)
    return 1 if broken else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's meaning."""
    parser = argparse.ArgumentParser(prog="pilotbed-incident", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("freeze", help="block a payload's user everywhere, end what he runs, keep the logs")
    one.add_argument("job", metavar="JOBID", help="cluster.proc, such as 22.0; submit#22.0 where there are several")
    one.add_argument("--reason", type=_line, default="no reason given", help="one line, which the user sees, too")
    one.set_defaults(work=freeze)
    one = verbs.add_parser("thaw", help="take back what freeze has done")
    one.add_argument("id", metavar="ID", help="of pilotbed-incident list")
    one.set_defaults(work=thaw)
    one = verbs.add_parser("who", help="which payloads ran behind an address at a time")
    one.add_argument("--address", required=True, help="a router's, a worker's, or a relay's with :PORT")
    one.add_argument("--time", required=True, type=moment, help="such as 2026-11-21T02:47:38+00:00, or @SECONDS")
    one.add_argument("--json", action="store_true", help="JSON instead of lines")
    one.set_defaults(work=ask_who)
    one = verbs.add_parser("list", help="the incidents that there are")
    one.set_defaults(work=listing)
    return parser.parse_args(argv)


def _line(text: str) -> str:
    said = "".join(sign if sign.isascii() and sign.isprintable() else "?" for sign in " ".join(text.split()))
    return said or "no reason given"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 if all of it was done, 1 if not, 2 for what cannot be meant."""
    options = arguments(argv)
    os.umask(0o077)
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # what it raises is told; it would print a traceback, too
    work: Callable[[], int] = partial(options.work, options)
    try:
        if options.work in (freeze, thaw):
            with alone(incidents()):
                return work()
        return work()
    except GridError as error:
        print(f"pilotbed-incident: {found.plain(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"pilotbed-incident: {found.plain(error)}: mend it, and the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npilotbed-incident: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
