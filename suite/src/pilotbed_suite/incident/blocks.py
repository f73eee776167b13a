"""The blocks of a user, each with its place: whether it is there, how it is put, how it is lifted."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pilotbed.pool.text import any_of, equals

from .. import PATIENCE
from ..inventory import Inventory
from . import nodes
from .nodes import NodeError, ok
from .record import Record, Step

#: Hosts with a ban list that LCMAPS reads, as in playbooks/ban.yml.
MAPPERS = ("computing_element", "mapping_service", "worker")
_VOMS = "/usr/libexec/pilotbed/voms-database"
#: JobStatus of what a hold stops: idle; running, transferring output, suspended.
WAITING, RUNNING = (1,), (2, 6, 7)
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*@[A-Za-z0-9][A-Za-z0-9.-]*")


@dataclass(frozen=True)
class Block:
    """How one kind of block is dealt with; each function takes the step, and the incident where it is named.

    Args:
        shown: what it is called, with the step's subject.
        asked: returns whether it is there, None where there is nothing to block.
        put: puts it.
        lifted: lifts it.
    """

    shown: Callable[[Step], str]
    asked: Callable[[Step], bool | None]
    put: Callable[[Step, Record], None]
    lifted: Callable[[Step, Record], None]


def mark(incident: str) -> str:
    """Return how a reason begins that an incident gives to others."""
    return f"incident {incident}: "


def told(record: Record) -> str:
    """Return the reason as VOMS and HTCondor keep it, and show it to the user."""
    return (mark(record.id) + record.reason)[:200]


def _answer(step: Step, said: str, meanings: dict[str, bool | None]) -> bool | None:
    if said not in meanings:
        raise NodeError(f"{step.node}: it says {said[:80]!r} and not one of {', '.join(meanings)}: "
                        "deploy this release there")  # fmt: skip
    return meanings[said]


# -- the VO: no attributes


def _vo(step: Step) -> tuple[str, str]:
    vo, _, dn = step.subject.partition(" ")
    return vo, dn


def _suspended(step: Step) -> bool | None:
    vo, dn = _vo(step)
    said = ok(step.node, f"{_VOMS} %s state %s", vo, dn).text.strip()
    return _answer(step, said, {"suspended": True, "member": False, "no member": None})


def _suspend(step: Step, record: Record) -> None:
    vo, dn = _vo(step)
    ok(step.node, f"{_VOMS} %s suspend %s %s", vo, dn, told(record))


def _resume(step: Step, record: Record) -> None:
    vo, dn = _vo(step)
    ok(step.node, f"{_VOMS} %s resume %s", vo, dn)


# -- a site: no account


def _banned(step: Step) -> bool | None:
    said = ok(step.node, "pilotbed-ban dn --state -- %s", step.subject).text.strip()
    return _answer(step, said, {"banned": True, "free": False})


def _ban(step: Step, record: Record) -> None:
    ok(step.node, "pilotbed-ban dn -- %s", step.subject)


def _lift(step: Step, record: Record) -> None:
    ok(step.node, "pilotbed-ban dn --lift -- %s", step.subject)


# -- the schedd: no new jobs, and none of those that are there

#: Not condor_qusers -disable: who is disabled cannot submit, but release his held jobs, edit their ads and remove them.
_DENIED = "/etc/condor/config.d/95-pilotbed-incident-{}.conf"
_WRITE = 'umask 022; printf "%s" "$2" > "${1%/*}/.pilotbed-incident" && mv "${1%/*}/.pilotbed-incident" "$1"'
#: The schedd reads it by itself, soon.
_SOON = 20.0


def _file(step: Step) -> str:
    if not _USER.fullmatch(step.subject):
        raise NodeError(f"{step.node}: {step.subject!r} is no user of a schedd such as alice@grid.test")
    return _DENIED.format(step.subject)


def _denied(step: Step) -> bool | None:
    return nodes.ask(step.node, "test -e %s", _file(step)).code == 0


def _deny(step: Step, record: Record) -> None:
    line = f"# incident {record.id}\nSCHEDD.DENY_WRITE = $(SCHEDD.DENY_WRITE) {step.subject}\n"
    ok(step.node, "sh -c %s write %s %s", _WRITE, _file(step), line)
    _reread(step, True)


def _allow(step: Step, record: Record) -> None:
    ok(step.node, "rm -f %s", _file(step))
    _reread(step, False)


def _reread(step: Step, denied: bool) -> None:
    """Have the schedd read its configuration, and wait until it denies a user, or no longer."""
    ok(step.node, "condor_reconfig -schedd")
    end = time.monotonic() + _SOON * PATIENCE
    while (step.subject in nodes.ask(step.node, "condor_config_val -schedd SCHEDD.DENY_WRITE").text.split()) != denied:
        if time.monotonic() > end:
            raise NodeError(f"{step.node}: the schedd has not read {_file(step)}: condor_reconfig -schedd")
        time.sleep(0.3)


def his_jobs(user: str, dns: Sequence[str]) -> str:
    """Return the constraint of a user's jobs: those that he submitted, and those with his proxy, whoever did."""
    return f"({equals(User=user)} || {any_of('x509userproxysubject', dns)})"


def hold(step: Step, record: Record, states: Sequence[int]) -> None:
    """Hold the jobs of a step that are in one of ``states``. Raises NodeError."""
    wanted = f"({step.subject}) && member(JobStatus, {{{', '.join(map(str, states))}}})"
    done = nodes.ask(step.node, "condor_hold -constraint %s -reason %s", wanted, told(record))
    if done.code and jobs(step, wanted):
        raise NodeError(f"{step.node}: condor_hold: {(done.error or done.text).strip()[-300:]}")


def jobs(step: Step, constraint: str) -> list[str]:
    """Return the ids of the jobs in the queue that are of a constraint. Raises NodeError."""
    attributes = ("ClusterId", "ProcId")
    asked = "condor_q -allusers -json -attributes %s -constraint %s"
    found = nodes.listed(step.node, ok(step.node, asked, ",".join(attributes), constraint))
    return [".".join(str(ad.get(name)) for name in attributes) for ad in found]


def held_by(record: Record, step: Step) -> str:
    """Return the constraint of the jobs that are held for an incident: a job held for another reason is not its own."""
    marks = [mark(name) for name in (record.id, *step.also)]
    begins = (f"substr(HoldReason ?: \"\", 0, {len(one)}) == \"{one}\"" for one in marks)
    return f"JobStatus == 5 && ({' || '.join(begins)})"


def _release(step: Step, record: Record) -> None:
    theirs = held_by(record, step)
    done = nodes.ask(step.node, "condor_release -constraint %s", theirs)
    if done.code and jobs(step, theirs):
        raise NodeError(f"{step.node}: condor_release: {(done.error or done.text).strip()[-300:]}")


KINDS = {
    "vo": Block(lambda step: "VO {}: {} suspended".format(*_vo(step)), _suspended, _suspend, _resume),
    "ban": Block(lambda step: f"LCMAPS: {step.subject} banned", _banned, _ban, _lift),
    "user": Block(lambda step: f"schedd: {step.subject} denied", _denied, _deny, _allow),
    "jobs": Block(lambda step: "schedd: jobs held", lambda step: False,
                  lambda step, record: hold(step, record, WAITING), _release),
}  # fmt: skip


def wanted(known: Inventory, record: Record, user: str, dns: Sequence[str]) -> Iterator[Step]:
    """Yield the steps that block a user everywhere, those of an earlier attempt as they are in the record.

    Args:
        known: the inventory.
        record: the incident's.
        user: as the schedds know him, ``alice@grid.test``.
        dns: his names.
    """
    for node in known.names("submit"):
        yield record.step("user", node, user)
        yield record.step("jobs", node, his_jobs(user, dns))
    for dn in dns:
        for node in dict.fromkeys(name for group in MAPPERS for name in known.names(group)):
            yield record.step("ban", node, dn)
        for node in known.names("voms_server")[:1]:  # whom the others follow
            for vo in known.variable("grid_vos"):
                yield record.step("vo", node, f"{vo['name']} {dn}")
