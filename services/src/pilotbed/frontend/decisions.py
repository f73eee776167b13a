"""Constant pressure: how many pilots to ask for at each entry. glideinWMS 3.10's algorithm, without any I/O.

Where jobs wait, a few pilots are kept queued; when a pilot starts, the next one is asked for; when no job waits, none.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import or_

from pilotbed.pool.expression import Match, against
from pilotbed.pool.values import LARGEST, AbsurdValue, Ad, Value, number, shown, text
from pilotbed.protocol.ads import Offer, Removal

from .config import REMOVE_TYPES, Pressure

#: Keeps what goes wrong with one entry or one class of jobs from the others.
Guard = Callable[[str], AbstractContextManager[None]]

#: JobStatus. A job that hands back its output, or is suspended, still needs its pilot.
_IDLE, _RUNNING, _OUTPUT, _SUSPENDED = 1, 2, 6, 7
#: A time or a size that 2**31 is too small for.
_LARGE = 2**53

#: What a pilot has of each core at most, where neither its entry nor a pilot that was there says it: MB.
ASSUMED_MEMORY = 1 << 16
ASSUMED_DISK = 1 << 20
#: Seconds that an entry is left in peace for at most.
LONGEST_PAUSE = 3600
#: Seconds of a queue's limit that a pilot keeps for its own end (condor_startup.sh).
KEPT = 220
#: GLIDEIN_CPUS that leave it to the node (glideinWMS), and the cores of such a pilot before one was there.
WHOLE_NODE = ("auto", "node", "slot")
ASSUMED_CORES = 1024


@dataclass(frozen=True)
class Size:
    """Cores, memory and disk (MB), GPUs and seconds of time: what a job needs, or what a pilot has."""

    cpus: int = 1
    memory: int = 0
    disk: int = 0
    gpus: int = 0
    seconds: int = 0

    @classmethod
    def of_job(cls, ad: Ad) -> Size:
        """Return what a job needs.

        Raises:
            AbsurdValue: it asks for what no machine can have.
        """
        return cls(
            cpus=number(ad, "RequestCpus", 1, strings=False),
            memory=number(ad, "RequestMemory", 0, strings=False),
            disk=number(ad, "RequestDisk", 0, strings=False, most=_LARGE) // 1024,  # KiB
            gpus=number(ad, "RequestGPUs", 0, strings=False),
            seconds=60 * number(ad, "MaxWallTimeMins", 0, strings=False, most=LARGEST // 60),
        )

    @classmethod
    def of_slot(cls, ad: Ad, notes: list[str]) -> Size:
        """Return what a slot had before jobs took their parts."""
        return cls(
            cpus=number(ad, "TotalSlotCpus", 0, notes=notes),
            memory=number(ad, "TotalSlotMemory", 0, notes=notes),
            disk=number(ad, "TotalSlotDisk", 0, most=_LARGE, notes=notes) // 1024,
            gpus=number(ad, "TotalSlotGPUs", 0, notes=notes),
        )

    @classmethod
    def of_pilots(cls, attributes: Ad, seen: Size | None, notes: list[str]) -> Size:
        """Return what the pilots of an entry have at most: as it says, else as they were ``seen``, else a guess.

        ``notes`` takes what is odd in the entry's ``attributes``.
        """
        seen = seen or cls(0)
        if str(attributes.get("GLIDEIN_CPUS", "")).lower() in WHOLE_NODE:
            cpus = number(attributes, "GLIDEIN_ESTIMATED_CPUS", 0, notes=notes) or seen.cpus or ASSUMED_CORES
        else:
            cpus = max(number(attributes, "GLIDEIN_CPUS", 1, notes=notes), 1)
        # glideinWMS: "GPUs,2,type=main;..."
        resources = text(attributes, "GLIDEIN_Resource_Slots", "", notes=notes).split(";")
        gpus = [words[1] for one in resources if (words := one.split(","))[0].strip().lower() == "gpus" and words[1:]]
        return cls(
            cpus=cpus,
            memory=number(attributes, "GLIDEIN_MaxMemMBs", 0, notes=notes) or seen.memory or cpus * ASSUMED_MEMORY,
            disk=number(attributes, "GLIDEIN_MaxDiskMBs", 0, notes=notes) or seen.disk or cpus * ASSUMED_DISK,
            gpus=number({"GLIDEIN_Resource_Slots": gpus[0]} if gpus else {}, "GLIDEIN_Resource_Slots", seen.gpus,
                        notes=notes),
            seconds=max(number(attributes, "GLIDEIN_Max_Walltime", LARGEST, notes=notes) - KEPT, 0),
        )  # fmt: skip

    def or_larger(self, other: Size) -> Size:
        """Return the larger one in everything."""
        return Size(*(max(pair) for pair in zip(self.parts(), other.parts(), strict=True)))

    def lacks(self, needed: Size) -> str:
        """Return what of ``needed`` is more than this; empty if a job of that size fits."""
        names = ("RequestCpus {} > {}", "RequestMemory {} > {} MB", "RequestDisk {} > {} MB", "RequestGPUs {} > {}",
                 "MaxWallTimeMins, in all {} > {} s")  # fmt: skip
        triples = zip(names, needed.parts(), self.parts(), strict=True)
        return next((name.format(need, have) for name, need, have in triples if need > have), "")

    def parts(self) -> tuple[int, ...]:
        """Return them all."""
        return self.cpus, self.memory, self.disk, self.gpus, self.seconds


@dataclass(frozen=True)
class JobClass:
    """Jobs that no match can tell apart, since their ``attributes`` and ``size`` are equal."""

    attributes: Mapping[str, Value]
    idle: int = 0
    old_idle: int = 0
    running: int = 0
    size: Size = Size()
    #: One of them, for who wants to look.
    example: str = field(default="", compare=False)


@dataclass(frozen=True)
class Job:
    """What of a job counts: its state, since when (seconds, Unix), where it runs and what the match looks at.

    ``entry`` is its pilot's entry as the job itself has it, ``name`` is for people.
    """

    idle: bool
    since: float
    slot: str
    attributes: Mapping[str, Value]
    size: Size = Size()
    entry: str = ""
    name: str = ""

    #: Of every job, besides what the match looks at. Where its owner says no memory and no disk, HTCondor writes
    #: expressions: what they are made of has to come, too. MachineAttr...0 is what SYSTEM_JOB_MACHINE_ATTRS leaves in
    #: it of the pilot that it runs in (role submit); not every schedd does.
    ATTRIBUTES = (
        "ClusterId", "ProcId", "Owner", "JobStatus", "EnteredCurrentStatus", "QDate", "RemoteHost",
        "MachineAttrGLIDEIN_Entry_Name0", "RequestCpus", "RequestMemory", "RequestDisk", "RequestGPUs",
        "MaxWallTimeMins", "MemoryUsage", "ResidentSetSize", "ImageSize", "ExecutableSize", "DiskUsage",
    )  # fmt: skip
    #: Which jobs these are.
    STATES = f"member(JobStatus, {{{_IDLE}, {_RUNNING}, {_OUTPUT}, {_SUSPENDED}}})"

    @classmethod
    def from_ad(cls, ad: Ad, attributes: Iterable[str], notes: list[str]) -> Job | None:
        """Return the job of an ad; None if it is neither idle nor running. ``notes`` takes what is odd in it.

        Raises:
            AbsurdValue: it is idle, and what it asks for no pilot can have.
        """
        status = ad.get("JobStatus")
        if status not in (_IDLE, _RUNNING, _OUTPUT, _SUSPENDED):
            return None
        try:
            size = Size.of_job(ad)
        except AbsurdValue:
            if status == _IDLE:
                raise
            size = Size()
        # What has no proper time has just come.
        queued = number(ad, "QDate", _LARGE, most=_LARGE, notes=notes)
        return cls(
            idle=status == _IDLE,
            since=number(ad, "EnteredCurrentStatus", queued, most=_LARGE, notes=notes),
            slot=text(ad, "RemoteHost", "", notes=notes),
            attributes={name: ad[name] for name in attributes if name in ad},
            size=size,
            entry=text(ad, "MachineAttrGLIDEIN_Entry_Name0", "", notes=notes),
            name=name_of(ad),
        )


def name_of(ad: Ad) -> str:
    """Return a job's name for people, such as ``12.0 (alice)``, whatever its ad has become."""
    return f"{ad.get('ClusterId', '?')}.{ad.get('ProcId', '?')} ({ad.get('Owner', '?')})"


def classify(jobs: Iterable[Job], now: float, old_idle: int) -> list[JobClass]:
    """Group ``jobs`` into classes; one is old when it has been idle for ``old_idle`` seconds at ``now``."""
    classes: dict[object, list[Job]] = {}
    for job in jobs:
        # With the types: 1 and true are equal in Python, and not to a match.
        key = job.size, frozenset((name, type(value), value) for name, value in job.attributes.items())
        classes.setdefault(key, []).append(job)
    found = []
    for alike in classes.values():
        idle = [job for job in alike if job.idle]
        found.append(
            JobClass(
                attributes=alike[0].attributes,
                idle=len(idle),
                old_idle=sum(now - job.since >= old_idle for job in idle),
                running=len(alike) - len(idle),
                size=alike[0].size,
                example=idle[0].name if idle else "",
            )
        )
    return found


@dataclass(frozen=True)
class Slot:
    """A slot of one of our pilots."""

    name: str
    entry: str
    idle: bool
    running: bool
    #: The shell of a partitionable slot that holds dynamic ones: it is not a place for a job of its own.
    shell: bool
    size: Size = Size(0)
    #: ``FRONTEND.GROUP`` that asked for the pilot.
    client: str = ""
    #: Digests that the pilot was given of the frontend's stage area, its own and its group's.
    stage: tuple[str, str] = ("", "")

    @property
    def place(self) -> bool:
        """Whether it is a place for a job: a partitionable pilot with one shows itself and the dynamic slot."""
        return self.idle or not self.shell

    #: What has to be asked of the collector.
    ATTRIBUTES = (
        "Name", "State", "Activity", "PartitionableSlot", "TotalSlots", "Cpus", "Memory", "GLIDEIN_Entry_Name",
        "GLIDEIN_Name", "GLIDEIN_Factory", "TotalSlotCpus", "TotalSlotMemory", "TotalSlotDisk", "TotalSlotGPUs",
        "GLIDECLIENT_Name", "GLIDECLIENT_Signature", "GLIDECLIENT_Group_Signature",
    )  # fmt: skip

    @classmethod
    def from_ad(cls, ad: Ad, least_memory: int, notes: list[str]) -> Slot:
        """Return the slot of a machine ad; a partitionable one needs a core and ``least_memory`` MB to be idle.

        ``notes`` takes what is odd in it.
        """
        partitionable = ad.get("PartitionableSlot") is True
        whole = number(ad, "TotalSlots", 1, notes=notes) == 1
        room = number(ad, "Cpus", 1, notes=notes) > 0 and number(ad, "Memory", 0, notes=notes) >= least_memory
        unused = ad.get("State") == "Unclaimed" and ad.get("Activity") == "Idle"
        parts = ("Entry_Name", "Name", "Factory")
        return cls(
            name=text(ad, "Name", "", notes=notes),
            entry="@".join(text(ad, f"GLIDEIN_{part}", "", notes=notes) for part in parts),
            idle=unused and (not partitionable or whole or room),
            running=not partitionable and ad.get("State") == "Claimed",
            shell=partitionable and not whole,
            size=Size.of_slot(ad, notes),
            client=text(ad, "GLIDECLIENT_Name", "", notes=notes),
            stage=(text(ad, "GLIDECLIENT_Signature", "", notes=notes),
                   text(ad, "GLIDECLIENT_Group_Signature", "", notes=notes)),
        )  # fmt: skip


@dataclass(frozen=True)
class Whereabouts:
    """Where jobs run: how many at each entry, by its full name; and how many of which nobody knows where."""

    running: Mapping[str, int] = field(default_factory=dict)
    astray: int = 0


def whereabouts(jobs: Iterable[Job], slots: Iterable[Slot], offers: Iterable[Offer]) -> Whereabouts:
    """Return where ``jobs`` run: by the slot, or where that is out of sight (its site's uplink is down, say) by what
    the job itself says.
    """
    entry_of = {slot.name: slot.entry for slot in slots}
    called: dict[str, list[str]] = {}
    for offer in offers:
        called.setdefault(offer.entry, []).append(offer.full_name)
    running: Counter[str] = Counter()
    astray = 0
    for job in jobs:
        if job.idle:
            continue
        if job.slot in entry_of:
            running[entry_of[job.slot]] += 1
        elif job.entry:
            running.update(called.get(job.entry, ()))
        else:
            astray += 1
    return Whereabouts(running, astray)


@dataclass(frozen=True)
class History:
    """What an entry has looked like for how many turns on end; the daemon keeps one for each entry.

    ``size`` is that of the largest pilot that was seen there, ``size_age`` how many turns ago the last one was;
    ``maximum`` what was asked for last.
    """

    without_idle_jobs: int = 0
    all_slots_idle: int = 0
    no_slots: int = 0
    size: Size | None = None
    size_age: int = 0
    maximum: int = 0

    def after(self, idle_jobs: int, slots: int, idle_slots: int) -> History:
        """Return the history after one more turn."""
        return replace(
            self,
            without_idle_jobs=0 if idle_jobs else self.without_idle_jobs + 1,
            all_slots_idle=self.all_slots_idle + 1 if slots and idle_slots == slots else 0,
            no_slots=0 if slots else self.no_slots + 1,
        )

    def with_sizes(self, sizes: Sequence[Size], remember: int) -> History:
        """Return the history with what the pilots that are seen now have; ``remember`` turns after them it is lost."""
        if not sizes:
            lost = self.size_age >= remember
            return replace(self, size=None if lost else self.size, size_age=self.size_age + 1)
        size = self.size or Size(0)
        for one in sizes:
            size = size.or_larger(one)
        return replace(self, size=size, size_age=0)

    def asked_removal(self, pressure: Pressure, running: int, blind: bool) -> tuple[Removal, int]:
        """Return how much of what was asked for may be taken back, and how many pilots above that are left.

        That is what time brings about, or what the configuration asks for, if that is more. Arguments as below.
        """
        by_time, asked = self.removal(pressure, running, blind), "NO"
        if blind or pressure.remove_type == "DISABLE":
            return Removal.NO, 0
        if pressure.requests_tracking or self.without_idle_jobs > pressure.remove_wait:
            asked = pressure.remove_type
        if REMOVE_TYPES.index(by_time.value) > REMOVE_TYPES.index(asked):
            return by_time, 0
        return Removal(asked), pressure.remove_margin if pressure.requests_tracking else 0

    def removal(self, pressure: Pressure, running: int, blind: bool) -> Removal:
        """Return how much of what was asked for may be taken back for the time in which nothing was wanted.

        Args:
            pressure: after how many turns.
            running: jobs that run there, or may. While they do no pilot that has started is to go, seen or not.
            blind: whether there may be jobs that are not seen: nothing is to go.
        """
        if blind or self.without_idle_jobs < pressure.wait_after:
            return Removal.NO
        if self.no_slots >= pressure.idle_after and not running:
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
    #: Pilots above the request that stay whatever ``removal`` says.
    margin: int = 0


@dataclass
class Share:
    """An entry's share of the jobs: proportional ones, and those that match it alone.

    ``matching`` counts all idle ones that match and ``matching_cores`` what they ask for, ``cores`` what the entry's
    share of them asks for. ``too_large`` counts those that would match but for their size, ``lack`` says what is too
    large of one of them.
    """

    idle: float = 0
    old_idle: float = 0
    running: float = 0
    unique: int = 0
    matching: int = 0
    matching_cores: int = 0
    cores: float = 0
    too_large: int = 0
    lack: str = ""

    def cpus(self, by_share: bool) -> float:
        """Return the mean cores of its idle jobs, of those that match or ``by_share``; 1 without any."""
        cores, jobs = (self.cores, self.idle) if by_share else (self.matching_cores, self.matching)
        return cores / jobs if jobs else 1.0


@dataclass
class _Alike:
    """Jobs, of many classes, that fit at the same entries; ``first`` is the size of the first class."""

    first: Size
    idle: int = 0
    old_idle: int = 0
    running: int = 0
    cores: int = 0

    def add(self, jobs: JobClass) -> None:
        self.idle += jobs.idle
        self.old_idle += jobs.old_idle
        self.running += jobs.running
        self.cores += jobs.idle * jobs.size.cpus


@dataclass(frozen=True)
class LeftOut:
    """Idle jobs for which no pilot is asked anywhere, one of them, and why."""

    jobs: int
    example: str
    why: str


def merged(left_out: Iterable[LeftOut]) -> list[LeftOut]:
    """Return one for each reason, that with the most jobs first."""
    found: dict[str, LeftOut] = {}
    for one in left_out:
        known = found.get(one.why, LeftOut(0, one.example, one.why))
        found[one.why] = replace(known, jobs=known.jobs + one.jobs)
    return sorted(found.values(), key=lambda one: (-one.jobs, one.why))


def split(
    classes: Iterable[JobClass], offers: Sequence[Offer], match: Match, sizes: Mapping[str, Size], guard: Guard
) -> tuple[dict[str, Share], list[LeftOut]]:
    """Give each entry its share: jobs that match n entries count 1/n at each of them.

    Args:
        classes: of the jobs.
        offers: the entries.
        match: whether a job matches an entry, by their attributes.
        sizes: what a pilot there has, by full name.
        guard: around each class of jobs.

    Returns:
        The shares by full name, and the jobs that have none.
    """
    have = [sizes[offer.full_name] for offer in offers]
    matching = against(match, [offer.attributes for offer in offers])
    roomy = _Roomy(have)
    shares = [Share() for _ in offers]
    fitting: dict[int, _Alike] = {}
    larger: dict[int, _Alike] = {}
    left_out = []
    for jobs in classes:
        matched = 0
        with guard(f"jobs like {jobs.example}"):
            matched = matching(jobs.attributes)
        fits = matched & roomy(jobs.size)
        small = matched & ~fits
        if fits:
            fitting.setdefault(fits, _Alike(jobs.size)).add(jobs)
        if small and jobs.idle:
            larger.setdefault(small, _Alike(jobs.size)).add(jobs)
        if jobs.idle and offers and not fits:
            wants = ", ".join(f"{name} = {shown(value)}" for name, value in sorted(jobs.attributes.items()))
            why = f"match no entry: {wants or 'no attributes'}"
            if small:
                places = list(_bits(small))
                where = ", ".join(offers[at].entry for at in places[:3]) + (", ..." if places[3:] else "")
                why = f"larger than any pilot at {where}: {have[places[0]].lacks(jobs.size)}"
            left_out.append(LeftOut(jobs.idle, jobs.example, why))
    for entries, alike in fitting.items():
        count = entries.bit_count()
        idle, old_idle, running, cores = (
            number / count for number in (alike.idle, alike.old_idle, alike.running, alike.cores)
        )
        for at in _bits(entries):
            share = shares[at]
            share.idle += idle
            share.old_idle += old_idle
            share.running += running
            share.cores += cores
            share.matching += alike.idle
            share.matching_cores += alike.cores
        if count == 1:
            share.unique += alike.idle
    for entries, alike in larger.items():
        for at in _bits(entries):
            shares[at].too_large += alike.idle
            shares[at].lack = shares[at].lack or have[at].lacks(alike.first)
    return {offer.full_name: share for offer, share in zip(offers, shares, strict=True)}, left_out


def _bits(number: int) -> Iterator[int]:
    """Return which bits of ``number`` are set."""
    if number.bit_count() * 64 > number.bit_length():
        yield from (at for at, bit in enumerate(bin(number)[:1:-1]) if bit == "1")
        return
    while number:  # a few of many
        at = (number & -number).bit_length() - 1
        yield at
        number ^= 1 << at


class _Roomy:
    """Tells at which entries a pilot is large enough for a size, as a number: bit n stands for entry n."""

    def __init__(self, have: Sequence[Size]) -> None:
        self.all = (1 << len(have)) - 1
        #: For each part of a size: what there is, in order, and which entries have that much or more.
        self.parts: list[tuple[list[int], list[int]]] = []
        for part in zip(*(one.parts() for one in have), strict=True):
            where: dict[int, int] = {}
            for at, amount in enumerate(part):
                where[amount] = where.get(amount, 0) | 1 << at
            amounts = sorted(where)
            more = list(accumulate((where[amount] for amount in reversed(amounts)), or_))
            self.parts.append((amounts, [*reversed(more), 0]))

    def __call__(self, needed: Size) -> int:
        found = self.all
        for need, (amounts, more) in zip(needed.parts(), self.parts, strict=bool(self.parts)):
            found &= more[bisect_left(amounts, need)]
        return found


def _ceil(number: float) -> int:
    """Round up, but not for what floating point adds: three thirds are one."""
    return math.ceil(number - 1e-9)


@dataclass(frozen=True)
class Level:
    """Places for jobs of some pilots, and those idle."""

    slots: int = 0
    idle: int = 0

    @classmethod
    def of(cls, slots: Iterable[Slot]) -> Level:
        """Count them."""
        places = [slot.idle for slot in slots if slot.place]
        return cls(len(places), sum(places))


@dataclass(frozen=True)
class View:
    """What a turn sees.

    Args:
        classes: jobs, idle and running.
        offers: entries of the trusted factory.
        slots: our pilots' slots.
        places: where jobs run.
        history: by full name, as the last turn's decisions left it.
        stopped: why nothing may be asked for at all; empty in good times.
        blind: whether the jobs of some schedd are not known: then no turn counts as one without idle jobs, and nothing
            is taken back.
        frontend: of the slots of all groups of the frontend.
        everybody: of those of all pilots in the pool, whoever asked for them.
        unused: by full name of an entry: how many of its pilots in a row no job wanted, and for how many seconds the
            last one has been over.
        untried: whether no pilot with the stage area of now has come into the pool yet.
    """

    classes: Sequence[JobClass]
    offers: Sequence[Offer]
    slots: Sequence[Slot]
    places: Whereabouts = Whereabouts()
    history: Mapping[str, History] = field(default_factory=dict)
    stopped: str = ""
    blind: bool = False
    untried: bool = False
    frontend: Level = Level()
    everybody: Level = Level()
    unused: Mapping[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Places for jobs: at one entry, those idle there, jobs that run there or may; and of more than the entry.

    ``levels`` by what the names of their limits begin with: of the group (nothing), ``frontend_`` and ``global_``.
    """

    here: int
    idle: int
    running: int
    astray: int
    levels: Mapping[str, Level]


def decide(
    view: View, pressure: Pressure, match: Match, guard: Guard = lambda _: nullcontext()
) -> tuple[list[Decision], list[LeftOut]]:
    """Return one decision for each entry, and the jobs that had no part in any.

    Args:
        view: what this turn sees.
        pressure: parameters of the formulas.
        match: whether a job's attributes (MY) match an entry's (TARGET).
        guard: around each class of jobs and each entry; an entry where it stops an exception has no decision.
    """
    levels = {"": Level.of(view.slots), "frontend_": view.frontend, "global_": view.everybody}
    slots = [slot for slot in view.slots if slot.place]
    total, idle = Counter(slot.entry for slot in slots), Counter(slot.entry for slot in slots if slot.idle)
    seen: dict[str, list[Size]] = {}
    for slot in view.slots:
        seen.setdefault(slot.entry, []).append(slot.size)
    histories, sizes, offers = {}, {}, []
    for offer in view.offers:
        name = offer.full_name
        with guard(f"entry {name}"):
            history = view.history.get(name, History()).with_sizes(seen.get(name, ()), pressure.remember_size)
            histories[name], sizes[name] = history, Size.of_pilots(offer.attributes, history.size, [])
            offers.append(offer)
    shares, left_out = split(view.classes, offers, match, sizes, guard)
    decisions = []
    for offer in offers:
        name = offer.full_name
        running = view.places.running.get(name, 0)
        places = Places(total[name], idle[name], running, view.places.astray, levels)
        stopped = view.stopped or ("entry is in downtime" if offer.in_downtime else "")
        with guard(f"entry {name}"):
            stopped = stopped or _back_off(shares[name], *view.unused.get(name, (0, 0.0)), pressure)
            decisions.append(_decide(offer, shares[name], places, histories[name], pressure, stopped=stopped,
                                     blind=view.blind, cpus=sizes[name].cpus))  # fmt: skip
    return _canaries(decisions, pressure.canaries) if view.untried else decisions, left_out


def _back_off(share: Share, unused: int, ago: float, pressure: Pressure) -> str:
    """Return why an entry is left in peace for a while: its pilots match, and yet no job starts in them; empty if not.

    Jobs that have come since may be others: they are tried.
    """
    pause = min(pressure.backoff * 2 ** min(unused - 1, 10), LONGEST_PAUSE) if unused else 0
    if ago >= pause or not share.old_idle or share.old_idle < share.idle:
        return ""
    return f"no job started in the last {unused} pilots that matched: the next one in {pause - ago:.0f} s"


def _canaries(decisions: Sequence[Decision], most: int) -> list[Decision]:
    """Return the decisions with no more than ``most`` pilots asked for in all, first where pilots do well.

    They are spread: an entry where nothing works must not keep the others from trying. The maximum goes down with what
    is asked for, as a pilot that has failed keeps its node for a while, and is no idle one then.
    """
    asking = [one for one in decisions if one.idle]
    asking.sort(key=lambda one: (-one.counts["GlideinsTotal"], one.offer.full_name))
    asks: dict[str, int] = {}
    for at, one in enumerate(asking):
        asks[one.offer.full_name] = min(one.idle, -(-most // (len(asking) - at)))
        most -= asks[one.offer.full_name]

    def fewer(one: Decision) -> Decision:
        ask = asks.get(one.offer.full_name, 0)
        if ask == one.idle:
            return one
        maximum = min(one.maximum, one.counts["GlideinsTotal"] + ask)
        counts = dict(one.counts) | {"GlideinsRequestIdle": ask, "GlideinsRequestMaxRun": maximum}
        why = f"{one.why}; the stage area is new: {ask} of {one.idle} try it first"
        return replace(one, idle=ask, maximum=maximum, why=why, counts=counts)

    return [fewer(one) for one in decisions]


def _decide(
    offer: Offer, share: Share, places: Places, history: History, pressure: Pressure, *, stopped: str, blind: bool,
    cpus: int,
) -> Decision:  # fmt: skip
    mean = share.cpus(pressure.cores_by_share)
    wanted = max(_ceil(share.idle * mean / cpus), pressure.min_running)
    effective = max(wanted - places.idle, 0)
    old_effective = max(_ceil(share.old_idle * mean / cpus) - places.idle, 0)
    after = history if blind and not share.idle else history.after(_ceil(share.idle), places.here, places.idle)
    removal = after.removal(pressure, places.running + places.astray, blind)
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
    if share.too_large:
        why += f"; {share.too_large} larger than a pilot: {share.lack}"
    # Where nothing more is wanted the maximum is what runs: never less than what may run unseen, or is busy in any way.
    maximum = max(places.running + places.astray, places.here - places.idle)
    if blind:
        maximum = max(maximum, history.maximum, 1)
    if wanted and not stopped:
        maximum = max(maximum, int((effective + places.running) * pressure.relative_to_queue + 1))
    after = replace(after, maximum=maximum)
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
    asked, margin = after.asked_removal(pressure, places.running + places.astray, blind)
    return Decision(offer, ask, maximum, asked, why, after, counts, margin)


def _hard_limit(places: Places, pressure: Pressure) -> str:
    """Return the limit that has been reached; empty if none."""
    for name, count in _counted(places, "max"):
        if count >= (limit := getattr(pressure, name)):
            return f"limit {name}: {count} of {limit}"
    return ""


def _counted(places: Places, what: str) -> Iterator[tuple[str, int]]:
    """Yield the names of limits (``max``) or curbs (``curb``), of the entry and of each level, and what they limit."""
    if what == "max":
        yield "entry_max_slots", places.here
    yield f"entry_{what}_idle", places.idle
    for prefix, level in places.levels.items():
        yield f"{prefix}{what}_slots", level.slots
        yield f"{prefix}{what}_idle", level.idle


def _ask(effective: int, old_effective: int, places: Places, pressure: Pressure) -> tuple[int, str]:
    """Return how many idle pilots to ask for when ``effective`` jobs wait and no limit is reached."""
    # The head-room of slots, not of idle ones: a real frontend asked for 37 pilots for 111 jobs, with at most 100 idle.
    slots = [(name, count) for name, count in _counted(places, "max") if name.endswith("_slots")]
    room = min(effective, *(getattr(pressure, name) - count for name, count in slots))
    ask = int(room / pressure.attenuation) + min(old_effective // 3, pressure.reserve)
    ask = min(ask, pressure.max_request)
    why = f"jobs without a slot: {effective}"
    for name, count in _counted(places, "curb"):
        if count >= getattr(pressure, name):
            ask //= 2
            why += f", halved by {name}"
    return max(ask, 1), why
