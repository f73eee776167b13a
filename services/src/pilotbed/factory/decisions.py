"""How many pilots to submit, release and remove: the queue management of glideinWMS 3.10, without any I/O.

The daemon reads requests and the queue, calls ``manage`` and ``tend``, and does what they say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeVar

from pilotbed.pool.values import Ad, Value, number, text
from pilotbed.protocol.ads import Removal

from . import gridtypes
from .config import Entry
from .states import State
from .trust import CredentialName, Trusted

#: Keeps what goes wrong with one request from the others.
Guard = Callable[[str], AbstractContextManager[None]]
_Key = TypeVar("_Key")


_IDLE, _RUNNING, _TRANSFERRING, _HELD = 1, 2, 6, 5
#: Later than any time (seconds, Unix).
_NEVER = 2**53


def state_of(status: int, grid_status: str, grid_id: str) -> State | None:
    """Return a pilot's state from JobStatus, GridJobStatus and GridJobId; None for one that has ended."""
    if status == _HELD:
        return State.HELD
    kind = gridtypes.of(grid_id)
    said = kind.states.get(grid_status) if kind else None
    if status in (_RUNNING, _TRANSFERRING):
        ending = status == _TRANSFERRING or said is State.STAGE_OUT
        return State.STAGE_OUT if ending else State.RUNNING
    if status != _IDLE:
        return None
    # A GridJobId has further words, the CE's own name of the job, once the CE has taken it: "arc URL - NAME".
    if not grid_status and len(grid_id.split()) < 3:
        return State.UNSUBMITTED
    return said or State.OTHER


@dataclass(frozen=True)
class Pilot:
    """A pilot in the factory's queue. Times in seconds, Unix."""

    job: str
    entry: str
    client: str
    security: str
    credential: str
    state: State
    since: float
    holds: int = 0
    hold_reason: str = ""
    #: By what its computing element knows it (GridJobId), and when the proxy ends that it was submitted with.
    grid_id: str = ""
    proxy_ends: int = 0

    #: What has to be asked of the schedd.
    ATTRIBUTES = (
        "ClusterId", "ProcId", "JobStatus", "GridJobStatus", "GridJobId", "GlideinEntryName", "GlideinClient",
        "GlideinFrontendName", "GlideinCredentialIdentifier", "EnteredCurrentStatus", "NumHolds", "HoldReason",
        "GlideinProxyEnds",
    )  # fmt: skip

    @classmethod
    def from_job(cls, job: Ad, notes: list[str]) -> Pilot | None:
        """Return the pilot of a job ad; None if it has ended. ``notes`` takes what is odd in it.

        A pilot that is odd is a pilot: who does not count it submits one more, turn for turn.

        Raises:
            AbsurdValue: it has no number.
        """
        grid_status, grid_id = text(job, "GridJobStatus", "", notes=notes), text(job, "GridJobId", "", notes=notes)
        state = state_of(number(job, "JobStatus", _IDLE, notes=notes), grid_status, grid_id)
        if state is None:
            return None
        return cls(
            job=f"{number(job, 'ClusterId')}.{number(job, 'ProcId')}",
            entry=text(job, "GlideinEntryName", "", notes=notes),
            client=text(job, "GlideinClient", "", notes=notes),
            security=text(job, "GlideinFrontendName", "", notes=notes),
            credential=text(job, "GlideinCredentialIdentifier", "", notes=notes),
            state=state,
            # Without a time it is not stale.
            since=number(job, "EnteredCurrentStatus", _NEVER, most=_NEVER, notes=notes),
            holds=number(job, "NumHolds", 0, notes=notes),
            hold_reason=text(job, "HoldReason", "", notes=notes),
            grid_id=grid_id,
            proxy_ends=number(job, "GlideinProxyEnds", 0, most=_NEVER, notes=notes),
        )


def grouped(pilots: Iterable[Pilot], key: Callable[[Pilot], _Key]) -> dict[_Key, list[Pilot]]:
    """Return ``pilots`` by what ``key`` says of each."""
    found: dict[_Key, list[Pilot]] = {}
    for pilot in pilots:
        found.setdefault(key(pilot), []).append(pilot)
    return found


@dataclass
class Tally:
    """Pilots by group, as they are and as they will be after what this turn has decided.

    Each decision is counted at once, so that two requests of one turn cannot together pass a limit that each of
    them keeps (glideinWMS issue 397).
    """

    idle: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, pilots: Iterable[Pilot]) -> Tally:
        """Count ``pilots`` for their entries and for their classes at the entry; those staged out are done."""
        tally = cls()
        for pilot in pilots:
            for group in (pilot.entry, f"{pilot.entry} {pilot.security}"):
                tally.held[group] += pilot.state is State.HELD
                tally.idle[group] += pilot.state.idle
                tally.total[group] += pilot.state.idle or pilot.state is State.RUNNING
        return tally

    def add(self, entry: str, security: str, count: int) -> None:
        """Count ``count`` new pilots."""
        for group in (entry, f"{entry} {security}"):
            self.idle[group] += count
            self.total[group] += count


@dataclass(frozen=True)
class Decision:
    """What to do about one request, and why: ``why`` is one line for the log and for ``make status``."""

    trusted: Trusted
    idle: int
    running: int
    held: int
    submit: int = 0
    remove: tuple[str, ...] = ()
    why: str = ""
    #: Since when (seconds, Unix) the oldest of those that wait at the computing element does, how many the computing
    #: element has not taken yet, and why one is held.
    waits_since: int = 0
    unsubmitted: int = 0
    hold_reason: str = ""

    def monitor(self) -> dict[str, Value]:
        """Return the GlideinMonitor attributes of the answer."""
        return {
            "StatusUnsubmitted": self.unsubmitted,
            "StatusIdleSince": self.waits_since,
            "HoldReason": self.hold_reason,
            "StatusIdle": self.idle,
            "StatusRunning": self.running,
            "StatusHeld": self.held,
            "RequestedIdle": self.trusted.request.idle,
            "RequestedMaxGlideins": self.trusted.request.maximum,
            "Submitted": self.submit,
            "Removed": len(self.remove),
            "Why": self.why,
        }


def manage(
    requests: Sequence[Trusted],
    entries: Mapping[str, Entry],
    pilots: Sequence[Pilot],
    proxy_left: Mapping[CredentialName, int],
    least_proxy_life: int,
    guard: Guard = lambda _: nullcontext(),
) -> list[Decision]:
    """Return one decision for each request.

    Args:
        requests: those that passed every check.
        entries: as configured.
        pilots: all of this factory's in the queue.
        proxy_left: seconds that each stored credential lives on.
        least_proxy_life: seconds below which it submits nothing.
        guard: around each request; one where it stops an exception has no decision.
    """
    tally = Tally.of(pilots)
    whose = grouped(pilots, attrgetter("entry", "client", "security", "credential"))
    decisions = []
    for trusted in requests:
        entry = trusted.request.entry_short
        mine = whose.get((entry, str(trusted.request.client), trusted.security, trusted.credential.credential), [])
        left = proxy_left.get(trusted.credential, 0)
        why_not = f"credential lives only {max(left, 0)} s more (least {least_proxy_life} s)"
        with guard(f"request {trusted.request.name}"):
            decision = _decide(trusted, entries[entry], mine, tally, why_not if left < least_proxy_life else "")
            tally.add(entry, trusted.security, decision.submit)
            decisions.append(decision)
    return decisions


def _decide(trusted: Trusted, entry: Entry, mine: Sequence[Pilot], tally: Tally, no_credential: str) -> Decision:
    request = trusted.request
    idle = sum(pilot.state.idle for pilot in mine)
    running = sum(pilot.state is State.RUNNING for pilot in mine)
    stuck = [pilot for pilot in mine if pilot.state is State.HELD]
    held = len(stuck)
    waiting = [pilot.since for pilot in mine if pilot.state.idle and pilot.state is not State.UNSUBMITTED]
    unsubmitted = sum(pilot.state is State.UNSUBMITTED for pilot in mine)

    def decision(submit: int = 0, remove: tuple[str, ...] = (), why: str = "") -> Decision:
        return Decision(trusted, idle, running, held, submit, remove, why, int(min(waiting, default=0)), unsubmitted,
                        stuck[-1].hold_reason if stuck else "")  # fmt: skip

    add = request.idle - idle
    short_of = "idle"
    if idle + running + add > request.maximum:
        add, short_of = request.maximum - idle - running, "max"
    if trusted.closed_why:
        # A closed entry gets nothing new, but nothing is taken away from what the frontend still wants.
        add = min(add, 0)
    if add <= 0:
        remove = _excess(trusted, mine, idle, running, entry.limits.remove_per_turn)
        why = trusted.closed_why or ("enough" if request.idle else "nothing asked for")
        return decision(remove=remove, why=f"{why}; {request.removal.value} excess" if remove else why)
    if no_credential:
        return decision(why=no_credential)
    room, limit = _room(entry, request.entry_short, trusted.security, tally)
    if room <= 0:
        return decision(why=f"limit {limit}")
    if room < add:
        return decision(room, why=f"{room} of {add}, then limit {limit}")
    return decision(add, why=f"asked {request.idle} idle, max {request.maximum}; short of {short_of}")


def _room(entry: Entry, name: str, security: str, tally: Tally) -> tuple[int, str]:
    """Return how many pilots the limits let in, and which limit is the tightest."""
    limits, group = entry.limits, f"{name} {security}"
    room = {
        "max_idle": limits.max_idle - tally.idle[name],
        "max_pilots": limits.max_pilots - tally.total[name],
        "class_max_idle": limits.class_max_idle - tally.idle[group],
        "class_max_pilots": limits.class_max_pilots - tally.total[group],
        "submit_per_turn": limits.submit_per_turn,
        "max_held": 0 if tally.held[name] >= limits.max_held else limits.submit_per_turn,
        "class_max_held": 0 if tally.held[group] >= limits.class_max_held else limits.submit_per_turn,
    }
    tightest = min(room, key=lambda limit: room[limit])
    return max(room[tightest], 0), tightest


#: What each ReqRemoveExcess lets go of among waiting pilots, in this order.
_REMOVABLE = {
    Removal.NO: (),
    Removal.WAIT: (State.UNSUBMITTED,),
    Removal.UNREG: (State.UNSUBMITTED, State.STAGE_IN, State.PENDING, State.OTHER),
    Removal.IDLE: (State.UNSUBMITTED, State.STAGE_IN, State.PENDING, State.OTHER),
    Removal.ALL: (State.UNSUBMITTED, State.STAGE_IN, State.PENDING, State.OTHER),
}


def _excess(trusted: Trusted, mine: Sequence[Pilot], idle: int, running: int, most: int) -> tuple[str, ...]:
    """Return the pilots above the request that it lets go of, the youngest first."""
    request = trusted.request
    ranks = {state: rank for rank, state in enumerate(_REMOVABLE[request.removal])}
    waiting = sorted((pilot for pilot in mine if pilot.state in ranks), key=lambda p: (ranks[p.state], -p.since))
    excess = max(idle - request.idle - request.margin, 0)
    gone = [pilot for pilot in waiting if pilot.state is State.UNSUBMITTED][:excess]
    # What a CE has taken may run already, with a user's job in it, and the CE have told nothing yet (ARC did not for a
    # minute, after a "500"): so many as the frontend has work for stay.
    taken = [pilot for pilot in waiting if pilot.state is not State.UNSUBMITTED]
    gone += taken[: min(excess - len(gone), max(idle + running - len(gone) - request.maximum, 0))]
    if request.removal is Removal.ALL:
        active = sorted((pilot for pilot in mine if pilot.state is State.RUNNING), key=lambda p: -p.since)
        gone += active[: max(running - request.maximum - request.margin, 0)]
        gone += [pilot for pilot in mine if pilot.state is State.HELD]
    return tuple(pilot.job for pilot in gone[:most])


@dataclass(frozen=True)
class Care:
    """What the pilots of one entry need whether or not somebody asks: releases, removals, forced removals."""

    release: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    force: tuple[str, ...] = ()


#: A pilot held more often than this is removed without waiting for its CE.
FORCE_AFTER_HOLDS = 20


@dataclass(frozen=True)
class Patience:
    """When a held or old pilot is given up. Seconds; see the configuration's keys of the same names."""

    recoverable: tuple[str, ...]
    hold_wait: int
    max_releases: int
    stale_idle: int
    stale_running: int


def tend(entry: Entry, pilots: Iterable[Pilot], patience: Patience, now: float) -> Care:
    """Return what the ``pilots`` of ``entry`` need at ``now`` (seconds, Unix)."""
    release: list[str] = []
    remove: list[str] = []
    force: list[str] = []
    for pilot in pilots:
        age = now - pilot.since
        if pilot.state is State.HELD:
            recoverable = any(re.search(pattern, pilot.hold_reason) for pattern in patience.recoverable)
            if not recoverable or pilot.holds > patience.max_releases:
                (force if pilot.holds > FORCE_AFTER_HOLDS else remove).append(pilot.job)
            elif age >= patience.hold_wait * max(pilot.holds, 1):
                release.append(pilot.job)
        elif age > (patience.stale_idle if pilot.state.idle else patience.stale_running):
            remove.append(pilot.job)
    limits = entry.limits
    return Care(
        tuple(release[: limits.release_per_turn]),
        tuple(remove[: limits.remove_per_turn]),
        tuple(force[: limits.remove_per_turn]),
    )
