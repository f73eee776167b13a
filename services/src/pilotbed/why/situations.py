"""What keeps a job from its pilot, or an entry from its pilots: the first thing that does, in words. No I/O."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pilotbed.frontend.decisions import Size
from pilotbed.pool.values import LARGEST, AbsurdValue, Ad, Expr, Value, shown
from pilotbed.pool.values import number as read_number
from pilotbed.pool.values import text as read_text

#: JobStatus.
IDLE, RUNNING, REMOVED, COMPLETED, HELD, OUTPUT, SUSPENDED = range(1, 8)
#: Turns of a frontend without a word of it, after which it is taken for gone; and seconds that are not too long anyway.
SILENT_TURNS, PATIENCE = 5, 60
#: Seconds without an ad, after which a slot gets no jobs any more (central manager: NEGOTIATOR_SLOT_CONSTRAINT).
ALIVE = 100
#: Seconds after which a pilot that has started should be in the pool.
STARTS = 60

_RESOURCES = "condor_status -any -long -constraint 'MyType == \"glideresource\" && GLIDEIN_Site == \"{}\"'"
#: For commands of another host, as a comment of the shell's.
_ON = "  # on the {}'s host"
_GROUPS = "condor_status -any -long -constraint 'MyType == \"glidegroup\"'"


@dataclass(frozen=True)
class Answer:
    """One thing that is so: what, the command that shows it, and at which entry; of everything, where that is empty."""

    text: str
    command: str = ""
    entry: str = ""

    def __str__(self) -> str:
        """Return it for a terminal."""
        lines = [f"{self.entry}: {self.text}" if self.entry else self.text]
        return "\n".join(lines + [f"    see: {self.command}"] * bool(self.command))


@dataclass(frozen=True)
class Scene:
    """What can be seen from where the question is asked.

    Args:
        now: seconds, Unix.
        name: the job that is asked for, ``12.0``.
        job: its ad in the queue; None if there is none.
        ended: its ad in the history.
        schedd: what the pool's collector knows of its schedd.
        groups: glidegroup ads of the pool.
        resources: glideresource ads of the pool.
        slots: machine ads of pilots.
        matches: whether an expression is true of a MY and a TARGET.
    """

    now: float
    name: str = ""
    job: Ad | None = None
    ended: Ad | None = None
    schedd: Ad | None = None
    groups: Sequence[Ad] = ()
    resources: Sequence[Ad] = ()
    slots: Sequence[Ad] = ()
    matches: Callable[[str, Ad, Ad], bool] = field(default=lambda *_: True, repr=False)


def _number(ad: Ad, name: str, default: int = 0) -> int:
    return read_number(ad, name, default, notes=[])


def _text(ad: Ad, name: str) -> str:
    return read_text(ad, name, "", notes=[])


def span(seconds: float) -> str:
    """Return a time as people say it."""
    seconds = max(int(seconds), 0)
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _some(count: int, what: str) -> str:
    return f"{count} {what}" if count != 1 else f"1 {re.sub('ies$', 'ys', what).removesuffix('s')}"


def _names(ads: Sequence[Ad], name: str) -> str:
    found = sorted({_text(ad, name) for ad in ads})
    return ", ".join(found[:10]) + ", ..." * (len(found) > 10)


# --- a job ---------------------------------------------------------------------------------------------------------


def explain_job(scene: Scene) -> list[Answer]:
    """Return why the job does not run, what stops it first of all; then what holds at each entry that it matches."""
    if answer := next(_of_the_job(scene), None):
        return [answer]
    assert scene.job
    groups = [group for group in scene.groups if scene.matches(_text(group, "GlideClientJobs"), scene.job, {})]
    if answer := next(_of_the_frontend(scene, groups), None):
        return [answer]
    clients = {_text(group, "GlideClientName"): _text(group, "GlideClientMatch") for group in groups}
    resources = [one for one in scene.resources if _text(one, "GlideClientName") in clients]
    fitting, others = [], []
    needed = Size.of_job(scene.job)
    for one in resources:
        if not scene.matches(clients[_text(one, "GlideClientName")], scene.job, one):
            others.append((one, _wanted(scene.job)))
        elif lack := Size.of_pilots(one, None, []).lacks(needed):
            others.append((one, lack))
        else:
            fitting.append(one)
    found = []
    if others:
        whys = sorted({why for _, why in others})
        names = _names([one for one, _ in others], "GLIDEIN_Site")
        do = "does" if len(others) == 1 else "do"
        text = f"{len(others)} of {_some(len(resources), 'entries')} {do} not match: {names} ({'; '.join(whys[:3])})"
        found.append(Answer(text, f"condor_q {scene.name} -long; condor_status -any -long -constraint 'MyType == "
                                  "\"glideresource\"'"))  # fmt: skip
    here = [_of_the_entry(scene, one, scene.job) for one in sorted(fitting, key=lambda ad: _text(ad, "Name"))]
    return here + found if here else found


def _wanted(job: Ad) -> str:
    wanted = [f"{name} = {shown(job[name])}" for name in ("DESIRED_Sites",) if name in job]
    return ", ".join(wanted) or "the group's own match expression"


def _of_the_job(scene: Scene) -> Iterator[Answer]:
    """What the job's own ad, its proxy or its schedd says."""
    job, name = scene.job, scene.name
    if job is None:
        if scene.ended is None:
            yield Answer(f"there is no job {name}, in the queue or in the history", f"condor_q {name}")
            return
        ended = _number(scene.ended, "JobStatus")
        how = "was removed" if ended == REMOVED else f"has ended with code {shown(scene.ended.get('ExitCode', '?'))}"
        yield Answer(f"the job {how}", f"condor_history {name} -long")
        return
    status, since = _number(job, "JobStatus"), scene.now - _number(job, "EnteredCurrentStatus", int(scene.now))
    show = f"condor_q {name} -long"
    if status in (RUNNING, OUTPUT, SUSPENDED):
        what = {RUNNING: "runs", OUTPUT: "hands back its output", SUSPENDED: "is suspended by the site"}[status]
        where = _text(job, "MachineAttrGLIDEIN_Entry_Name0") or _text(job, "RemoteHost") or "a place it does not say"
        yield Answer(f"the job {what}, at {where}, for {span(since)}", show)
    if status == HELD:
        yield Answer(f"the job is held, for {span(since)}: {_text(job, 'HoldReason') or 'no reason given'}",
                     f"condor_q {name} -hold")  # fmt: skip
    if status in (REMOVED, COMPLETED):
        yield Answer("the job is over, and leaves the queue as soon as its pilot is heard of", show)
    if _number(job, "JobUniverse", 5) != 5:
        yield Answer(f"pilots run jobs of the vanilla universe (5); this one's is {shown(job['JobUniverse'])}", show)
    if "x509userproxy" not in job:
        yield Answer("the job has no proxy, and sites give payloads an account by it: x509userproxy in its submit file",
                     f"condor_q {name} -autoformat x509userproxy")  # fmt: skip
    ends = _number(job, "x509UserProxyExpiration", LARGEST)
    if ends < scene.now:
        yield Answer(f"the job's proxy ended {span(scene.now - ends)} ago: make a new one",
                     f"voms-proxy-info -timeleft -file {_text(job, 'x509userproxy')}")  # fmt: skip
    try:
        Size.of_job(job)
    except AbsurdValue as error:
        yield Answer(f"no pilot can be asked for: {error}", show)
    yield from _of_the_schedd(scene)


def _of_the_schedd(scene: Scene) -> Iterator[Answer]:
    show = "condor_status -schedd -long"
    if scene.schedd is None:
        yield Answer("the pool's collector does not know this schedd: nobody sees its jobs", show)
        return
    for count, most, what in (
        ("TotalRunningJobs", "MaxJobsRunning", "runs"),
        ("TransferQueueNumUploading", "TransferQueueMaxUploading", "sends the files of"),
    ):
        limit, has = _number(scene.schedd, most), _number(scene.schedd, count)
        if limit and has >= limit:
            yield Answer(f"the schedd {what} as many jobs as it may: {has} of {limit} ({most})", show)


def _of_the_frontend(scene: Scene, mine: Sequence[Ad]) -> Iterator[Answer]:
    """What keeps every frontend group of the pool from asking for the job; ``mine`` are those that take it."""
    assert scene.job
    if not scene.groups:
        yield Answer("no frontend shows itself in this pool: none runs, or none reaches it", _GROUPS)
    elif not mine:
        vo = scene.job.get("x509UserProxyVOName")
        whose = f"a job of VO {vo}" if isinstance(vo, str) else "a job whose proxy says of no VO"
        yield Answer(f"no frontend group takes {whose}: there is {_names(scene.groups, 'GlideClientName')}", _GROUPS)
    name = _text(scene.schedd or {}, "Name")
    asked = [group for group in mine if name in _text(group, "GlideClientSchedds").split(",")]
    if mine and not asked:
        yield Answer(f"{_names(mine, 'GlideClientName')} does not ask the schedd {name}", _GROUPS)
    silent = [group for group in asked if _silent(group, scene.now)]
    if asked and len(silent) == len(asked):
        last = max(_number(group, "LastHeardFrom") for group in silent)
        who, ago = _names(silent, "GlideClientName"), span(scene.now - last)
        yield Answer(f"the frontend group {who} was last heard of {ago} ago",
                     f"systemctl status 'pilotbed-frontend@*'{_ON.format('frontend')}")  # fmt: skip
    live = [group for group in asked if group not in silent]
    closed = [part for group in live for part in _text(group, "GlideClientScheddsClosed").split("; ") if
              part.startswith(f"{name}: ")]  # fmt: skip
    if live and len(closed) >= len(live):
        yield Answer(f"the frontend leaves out this schedd's idle jobs: {closed[0].removeprefix(f'{name}: ')}", _GROUPS)
    stopped = [why for group in live if (why := _text(group, "GlideClientStopped"))]
    if live and len(stopped) == len(live):
        yield Answer(f"the frontend asks for nothing: {stopped[0]}", _GROUPS)
    clients = {_text(group, "GlideClientName") for group in live}
    if live and not any(_text(one, "GlideClientName") in clients for one in scene.resources):
        who = ", ".join(sorted(clients))
        yield Answer(f"the frontend group {who} sees no entry: the factory is away, or offers none to its VO",
                     f"systemctl status pilotbed-factory{_ON.format('factory')}")  # fmt: skip


def _silent(group: Ad, now: float) -> bool:
    turn = max(_number(group, "GlideClientTurn", 60), 1)
    return now - _number(group, "LastHeardFrom", int(now)) > max(SILENT_TURNS * turn, PATIENCE)


# --- an entry ------------------------------------------------------------------------------------------------------


def explain_entry(scene: Scene, entry: str) -> list[Answer]:
    """Return why an entry (its name, or its site's) has no pilots, for each frontend group that sees it."""
    named = [one for one in scene.resources if entry in (_text(one, "GLIDEIN_Site"), entry_of(one))]
    if not named:
        known = sorted({entry_of(one) for one in scene.resources})
        return [Answer(f"no frontend sees an entry {entry}; there are {', '.join(known) or 'none'}", _GROUPS)]
    return [_of_the_entry(scene, one, None) for one in sorted(named, key=lambda ad: _text(ad, "Name"))]


def entry_of(resource: Ad) -> str:
    """Return the short name of a glideresource ad's entry."""
    return _text(resource, "GlideFactoryName").partition("@")[0]


def _of_the_entry(scene: Scene, resource: Ad, job: Ad | None) -> Answer:
    """Return what stops pilots there, the first thing; or, with ``job``, what keeps it from those that are there."""
    entry, site, client = entry_of(resource), _text(resource, "GLIDEIN_Site"), _text(resource, "GlideClientName")
    slots = [slot for slot in scene.slots if _text(slot, "GLIDEIN_Entry_Name") == entry
             and _text(slot, "GLIDECLIENT_Name") == client
             and scene.now - _number(slot, "LastHeardFrom", int(scene.now)) < ALIVE]  # fmt: skip
    for look in (_slots_for, _asked_for, _at_the_factory, _at_the_site):
        if answer := look(scene, resource, slots, job):
            text, command = answer
            label = entry if job is not None or client == "" else f"{entry} ({client})"
            return Answer(text, command or _RESOURCES.format(site), label)
    return Answer(f"{_some(len(slots), 'slots')} there, all with jobs; the next pilot comes when the site has room",
                  f"condor_status -constraint 'GLIDEIN_Entry_Name == \"{entry}\"'", entry)  # fmt: skip


_Found = tuple[str, str] | None


def _slots_for(scene: Scene, resource: Ad, slots: Sequence[Ad], job: Ad | None) -> _Found:
    """A slot that is free for the job, or why those that are free are not for it."""
    if job is None:
        return None
    free = [slot for slot in slots if slot.get("State") == "Unclaimed" and _number(slot, "Cpus", 1) > 0]
    if not free:
        return None
    refusals = [_refusal(scene, slot, job) for slot in free]
    name = _text(free[0], "Name")
    if "" in refusals:
        waits = scene.now - _number(job, "EnteredCurrentStatus", int(scene.now))
        late = "; it has waited long for that: is another user's share due?" if waits > 300 else ""
        return f"{_text(free[refusals.index('')], 'Name')} is free for it, in the negotiator's next cycle{late}", (
            "condor_userprio -all" if late else "condor_status -negotiator -long"
        )
    counts = {why: refusals.count(why) for why in refusals}
    why = max(counts, key=lambda one: counts[one])
    text = f"{_some(len(free), 'slots')} are free, and none takes the job: {why}".replace("1 slot are", "1 slot is")
    return (text, f"condor_q {scene.name} -better-analyze -machine {name}") if not _number(
        resource, "GlideClientMonitorGlideinsRequestIdle") else None  # fmt: skip


def _refusal(scene: Scene, slot: Ad, job: Ad) -> str:
    size = Size(_number(slot, "Cpus", 1), _number(slot, "Memory"), _number(slot, "Disk", LARGEST) // 1024,
                _number(slot, "GPUs"), LARGEST)  # fmt: skip
    if lack := size.lacks(Size.of_job(job)):
        return f"{lack} that are free there"
    if _number(slot, "GLIDEIN_ToRetire", LARGEST) <= scene.now:
        return "the pilot takes no new jobs, its time is over"
    left, needs = _number(slot, "GLIDEIN_ToDie", LARGEST) - scene.now, 60 * _number(job, "MaxWallTimeMins")
    if left < needs:
        return f"the job says that it needs {span(needs)}, the pilot has {span(left)} left"
    if slot.get("GLIDEIN_BlackHole") is True:
        return "jobs have failed too fast there, and the pilot takes no more"
    if slot.get("GLIDEIN_PS_OK") is False:
        return f"a periodic check has failed there: {_text(slot, 'GLIDEIN_PS_FAILED_LIST')}"
    for who, mine, other in (("the slot", slot, job), ("the job", job, slot)):
        wanted = mine.get("Requirements", True)
        if wanted is not True and not scene.matches(_expression(wanted), mine, other):
            return f"{who}'s Requirements are not true of {'the job' if who == 'the slot' else 'it'}"
    return ""


def _expression(value: Value) -> str:
    return value.text if isinstance(value, Expr) else shown(value)


def _asked_for(scene: Scene, resource: Ad, slots: Sequence[Ad], job: Ad | None) -> _Found:
    """Whether the frontend has asked for pilots there."""
    del scene, job
    if str(resource.get("GLIDEIN_In_Downtime", "False")).lower() == "true":
        why = _text(resource, "GlideFactoryMonitorWhy")
        return f"the entry is in downtime{f' ({why})' if 'downtime' in why else ''}", ""
    if _number(resource, "GlideClientMonitorGlideinsRequestIdle") or _waiting(resource) or (
            slots and not _number(resource, "GlideClientMonitorJobsIdle")):  # fmt: skip
        return None
    why = _text(resource, "GlideClientMonitorWhy")
    if "limit" in why:
        return f"the frontend asks for no more: {why}", ""
    if not _number(resource, "GlideClientMonitorJobsIdle"):
        return "no idle job asks for a pilot there, as of the frontend's last turn", ""
    return f"the frontend asks for none: {why}", ""


def _waiting(resource: Ad) -> int:
    return sum(_number(resource, f"GlideFactoryMonitorStatus{state}") for state in ("Idle", "Running", "Held"))


def _at_the_factory(scene: Scene, resource: Ad, slots: Sequence[Ad], job: Ad | None) -> _Found:
    """What the factory has made of the request."""
    del slots, job
    asked = _number(resource, "GlideClientMonitorGlideinsRequestIdle")
    if asked and "GlideFactoryMonitorWhy" not in resource:
        return (f"{_some(asked, 'pilots')} asked for, no answer of the factory: it is away, or refuses the request",
                f"journalctl -u pilotbed-factory -g refused{_ON.format('factory')}")  # fmt: skip
    why = _text(resource, "GlideFactoryMonitorWhy")
    if asked and not _waiting(resource) and not _number(resource, "GlideFactoryMonitorSubmitted"):
        return f"the factory submits none: {why}", f"journalctl -u pilotbed-factory -g decision{_ON.format('factory')}"
    failed, last = _number(resource, "GlideFactoryMonitorFailed"), _number(resource, "GlideFactoryMonitorFailedLast")
    if failed and scene.now - last < 900 and not _number(resource, "GlideFactoryMonitorStatusRunning"):
        return (f"{_some(failed, 'pilots')} failed within an hour, the last {span(scene.now - last)} ago: "
                f"{_text(resource, 'GlideFactoryMonitorFailedWhy')}",
                f"ls -t /var/lib/pilotbed/factory/log/entry_{entry_of(resource)}{_ON.format('factory')}")  # fmt: skip
    return None


def _at_the_site(scene: Scene, resource: Ad, slots: Sequence[Ad], job: Ad | None) -> _Found:
    """What the computing element and its batch system have made of the pilots."""
    del job
    count = {name: _number(resource, f"GlideFactoryMonitorStatus{name}") for name in
             ("Idle", "Running", "Held", "Unsubmitted")}  # fmt: skip
    queue = f"pilotbed-factory-pool condor_q -allusers{_ON.format('factory')}"
    if count["Held"] and not count["Idle"] and not count["Running"]:
        why = _text(resource, "GlideFactoryMonitorHoldReason")
        return f"{_some(count['Held'], 'pilots')} held: {why or 'no reason given'}", queue
    if count["Idle"] and count["Idle"] == count["Unsubmitted"]:
        element = _text(resource, "GLIDEIN_Gatekeeper") or "of the entry"
        text = f"{_some(count['Idle'], 'pilots')} submitted, the computing element ({element}) has taken none yet"
        return text, queue
    if count["Running"] and not slots:
        return (f"{_some(count['Running'], 'pilots')} started at the site, none in the pool yet: it looks at its node, "
                f"and should be there within {STARTS} s", queue)  # fmt: skip
    if count["Idle"]:
        since = _number(resource, "GlideFactoryMonitorStatusIdleSince")
        oldest = f", the oldest for {span(scene.now - since)}" if since else ""
        text = f"{_some(count['Idle'], 'pilots')} queued at the computing element{oldest}: "
        return f"{text}its batch system has no free slot", queue
    if not slots and _number(resource, "GlideClientMonitorGlideinsRequestIdle"):
        return "a pilot is just being submitted", queue
    return None


def as_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return them for programs."""
    return [vars(answer) for answer in answers]
