"""Constant pressure: how many pilots to ask for at each entry. glideinWMS 3.10's algorithm, without any I/O.

Where jobs wait, a few pilots are kept queued; when a pilot starts, the next one is asked for; when no job waits, none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pilotbed.protocol.ads import Ad, Offer, Removal, Value

from .config import Pressure

Match = Callable[[Ad, Ad], bool]

_IDLE, _RUNNING = 1, 2


@dataclass(frozen=True)
class JobClass:
    """Jobs that no match can tell apart, since their ``attributes`` are equal."""

    attributes: Mapping[str, Value]
    idle: int = 0
    old_idle: int = 0
    running: int = 0
    #: Cores that one of them asks for.
    cpus: int = 1


@dataclass(frozen=True)
class Job:
    """What of a job counts: its state, since when (seconds, Unix), where it runs and what the match looks at."""

    idle: bool
    since: float
    slot: str
    attributes: Mapping[str, Value]

    @classmethod
    def from_ad(cls, ad: Ad, attributes: Iterable[str]) -> Job | None:
        """Return the job of an ad; None if it is neither idle nor running."""
        status = ad.get("JobStatus")
        if status not in (_IDLE, _RUNNING):
            return None
        return cls(
            idle=status == _IDLE,
            since=float(ad.get("EnteredCurrentStatus", ad.get("QDate", 0))),
            slot=str(ad.get("RemoteHost", "")),
            attributes={name: ad[name] for name in attributes if name in ad},
        )


def classify(jobs: Iterable[Job], now: float, old_idle: int) -> list[JobClass]:
    """Group ``jobs`` into classes; one is old when it has been idle for ``old_idle`` seconds at ``now``."""
    classes: dict[tuple[tuple[str, Value], ...], JobClass] = {}
    for job in jobs:
        key = tuple(sorted(job.attributes.items()))
        found = classes.get(key) or JobClass(job.attributes, cpus=int(job.attributes.get("RequestCpus", 1)))
        classes[key] = replace(
            found,
            idle=found.idle + job.idle,
            old_idle=found.old_idle + (job.idle and now - job.since >= old_idle),
            running=found.running + (not job.idle),
        )
    return list(classes.values())


@dataclass(frozen=True)
class Slot:
    """A slot of one of our pilots."""

    name: str
    entry: str
    idle: bool
    running: bool
    #: The shell of a partitionable slot that holds dynamic ones: it is not a place for a job of its own.
    shell: bool

    #: What has to be asked of the collector.
    ATTRIBUTES = (
        "Name", "State", "Activity", "PartitionableSlot", "TotalSlots", "Cpus", "Memory", "GLIDEIN_Entry_Name",
        "GLIDEIN_Name", "GLIDEIN_Factory",
    )  # fmt: skip

    @classmethod
    def from_ad(cls, ad: Ad, least_memory: int) -> Slot:
        """Return the slot of a machine ad; a partitionable one needs a core and ``least_memory`` MB to be idle."""
        partitionable = ad.get("PartitionableSlot") is True
        whole = int(ad.get("TotalSlots", 1)) == 1
        room = int(ad.get("Cpus", 1)) > 0 and int(ad.get("Memory", 0)) >= least_memory
        unused = ad.get("State") == "Unclaimed" and ad.get("Activity") == "Idle"
        return cls(
            name=str(ad.get("Name", "")),
            entry="@".join(str(ad.get(f"GLIDEIN_{part}", "")) for part in ("Entry_Name", "Name", "Factory")),
            idle=unused and (not partitionable or whole or room),
            running=not partitionable and ad.get("State") == "Claimed",
            shell=partitionable and not whole,
        )


@dataclass(frozen=True)
class History:
    """What an entry has looked like for how many turns on end; the daemon keeps one for each entry."""

    without_idle_jobs: int = 0
    all_slots_idle: int = 0
    no_slots: int = 0

    def after(self, idle_jobs: int, slots: int, idle_slots: int) -> History:
        """Return the history after one more turn."""
        return History(
            0 if idle_jobs else self.without_idle_jobs + 1,
            self.all_slots_idle + 1 if slots and idle_slots == slots else 0,
            0 if slots else self.no_slots + 1,
        )

    def removal(self, pressure: Pressure) -> Removal:
        """Return how much of what was asked for may be taken back."""
        if self.without_idle_jobs < pressure.wait_after:
            return Removal.NO
        if self.no_slots >= pressure.idle_after:
            return Removal.ALL
        if self.all_slots_idle >= pressure.idle_after:
            return Removal.IDLE
        return Removal.WAIT


@dataclass(frozen=True)
class Decision:
    """What is asked of one entry, and from what: ``why`` is one line for the log and for ``make status``."""

    offer: Offer
    idle: int
    maximum: int
    removal: Removal
    why: str
    history: History
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """An entry's share of the jobs: proportional ones, those that match it alone, and mean cores per job."""

    idle: float = 0
    old_idle: float = 0
    running: float = 0
    unique: int = 0
    matching: int = 0
    cores: float = 0

    def cpus(self) -> float:
        """Return the mean cores of its idle jobs; 1 without any."""
        return self.cores / self.idle if self.idle else 1.0


def split(classes: Iterable[JobClass], offers: Sequence[Offer], match: Match) -> dict[str, Share]:
    """Give each entry its share: jobs that match n entries count 1/n at each of them."""
    targets = {offer.full_name: dict(offer.attributes) for offer in offers}
    shares = {name: Share() for name in targets}
    for jobs in classes:
        matching = [name for name, attributes in targets.items() if match(jobs.attributes, attributes)]
        for name in matching:
            share, part = shares[name], 1 / len(matching)
            shares[name] = Share(
                share.idle + jobs.idle * part,
                share.old_idle + jobs.old_idle * part,
                share.running + jobs.running * part,
                share.unique + (jobs.idle if len(matching) == 1 else 0),
                share.matching + jobs.idle,
                share.cores + jobs.idle * part * jobs.cpus,
            )
    return shares


def _ceil(number: float) -> int:
    """Round up, but not for what floating point adds: three thirds are one."""
    return math.ceil(number - 1e-9)


@dataclass(frozen=True)
class View:
    """What a turn sees.

    Args:
        classes: jobs, idle and running.
        offers: entries of the trusted factory.
        slots: our pilots' slots.
        running: jobs that run at an entry, by its full name.
        history: by full name, as the last turn's decisions left it.
        stopped: why nothing may be asked for at all; empty in good times.
        blind: whether the jobs of some schedd are not known: then no turn counts as one without idle jobs.
    """

    classes: Sequence[JobClass]
    offers: Sequence[Offer]
    slots: Sequence[Slot]
    running: Mapping[str, int] = field(default_factory=dict)
    history: Mapping[str, History] = field(default_factory=dict)
    stopped: str = ""
    blind: bool = False


@dataclass(frozen=True)
class Places:
    """Places for jobs: at one entry, those idle there, jobs running there; and of the whole group."""

    here: int
    idle: int
    running: int
    all: int
    all_idle: int


def decide(view: View, pressure: Pressure, match: Match) -> list[Decision]:
    """Return one decision for each entry; ``match`` says whether a job's attributes (MY) match an entry's (TARGET)."""
    shares = split(view.classes, view.offers, match)
    # A partitionable pilot with one job shows two slots, itself and the dynamic one: count places for jobs.
    slots = [slot for slot in view.slots if slot.idle or not slot.shell]
    total, idle = Counter(slot.entry for slot in slots), Counter(slot.entry for slot in slots if slot.idle)
    decisions = []
    for offer in view.offers:
        name = offer.full_name
        places = Places(total[name], idle[name], view.running.get(name, 0), len(slots), idle.total())
        history = view.history.get(name, History())
        stopped = view.stopped or ("entry is in downtime" if offer.in_downtime else "")
        share = shares[name]
        after = history if view.blind and not share.idle else history.after(_ceil(share.idle), places.here, places.idle)
        decisions.append(_decide(offer, share, places, after, pressure, stopped=stopped))
    return decisions


def _decide(
    offer: Offer, share: Share, places: Places, after: History, pressure: Pressure, *, stopped: str
) -> Decision:
    cpus = max(int(offer.attributes.get("GLIDEIN_CPUS", 1)), 1)
    wanted = max(_ceil(share.idle * share.cpus() / cpus), pressure.min_running)
    effective = max(wanted - places.idle, 0)
    old_effective = max(_ceil(share.old_idle * share.cpus() / cpus) - places.idle, 0)
    removal = after.removal(pressure)
    closed = stopped or _hard_limit(places, pressure)
    if closed:
        ask, why = 0, closed
    elif removal is not Removal.NO:
        ask, why = 0, "no idle job for many turns"
    elif not effective:
        ask = 0
        why = f"{places.idle} idle slots for {wanted} jobs" if wanted else "no idle job matches"
    else:
        ask, why = _ask(effective, old_effective, places, pressure)
    maximum = places.running
    if wanted and not stopped:
        maximum = int((effective + places.running) * pressure.relative_to_queue + 1)
    counts = {
        "JobsIdle": _ceil(share.idle),
        "JobsIdleMatching": share.matching,
        "JobsIdleEffective": effective,
        "JobsIdleOld": _ceil(share.old_idle),
        "JobsIdleUnique": share.unique,
        "JobsRunning": _ceil(share.running),
        "JobsRunningHere": places.running,
        "GlideinsTotal": places.here,
        "GlideinsIdle": places.idle,
        "GlideinsRequestIdle": ask,
        "GlideinsRequestMaxRun": maximum,
    }
    return Decision(offer, ask, maximum, removal, why, after, counts)


def _hard_limit(places: Places, pressure: Pressure) -> str:
    """Return the limit that has been reached; empty if none."""
    for name, count, limit in (
        ("entry_max_slots", places.here, pressure.entry_max_slots),
        ("entry_max_idle", places.idle, pressure.entry_max_idle),
        ("max_slots", places.all, pressure.max_slots),
        ("max_idle", places.all_idle, pressure.max_idle),
    ):
        if count >= limit:
            return f"limit {name}: {count} of {limit}"
    return ""


def _ask(effective: int, old_effective: int, places: Places, pressure: Pressure) -> tuple[int, str]:
    """Return how many idle pilots to ask for when ``effective`` jobs wait and no limit is reached."""
    room = min(effective, pressure.entry_max_slots - places.here, pressure.max_slots - places.all)
    ask = int(room / pressure.attenuation) + min(old_effective // 3, pressure.reserve)
    ask = min(ask, pressure.max_request)
    why = f"jobs without a slot: {effective}"
    for name, count, curb in (
        ("entry_curb_idle", places.idle, pressure.entry_curb_idle),
        ("curb_slots", places.all, pressure.curb_slots),
        ("curb_idle", places.all_idle, pressure.curb_idle),
    ):
        if count >= curb:
            ask //= 2
            why += f", halved by {name}"
    return max(ask, 1), why
