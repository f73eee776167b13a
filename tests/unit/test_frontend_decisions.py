"""Constant pressure: what is asked of which entry, against figures worked out by hand from the documented formulas."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import classad2
import htcondor2  # noqa: F401 (brings the functions on string lists into ClassAds)
import pytest
import yaml
from pilotbed.frontend.config import DEFAULT_MATCH, Config, Factory, Pressure
from pilotbed.frontend.daemon import credential_id
from pilotbed.frontend.decisions import (
    ASSUMED_MEMORY,
    Decision,
    History,
    Job,
    JobClass,
    LeftOut,
    Level,
    Size,
    Slot,
    View,
    Whereabouts,
    classify,
    decide,
    merged,
    split,
    whereabouts,
)
from pilotbed.pool.values import AbsurdValue, Ad
from pilotbed.protocol.ads import FactoryName, Offer, Removal

FACTORY = FactoryName("v1", "factory")
NOW = Pressure(attenuation=1)
SMALL = Size()


def entry(name: str, **attributes: str | int) -> Offer:
    return Offer(FACTORY, name, {"GLIDEIN_Site": name} | attributes, {}, False, "", "")


ALPHA, BETA = entry("alpha"), entry("beta")


def by_site(my: Ad, target: Ad) -> bool:
    """The default match in Python, for machines without classad2."""
    return "DESIRED_Sites" not in my or target["GLIDEIN_Site"] in str(my["DESIRED_Sites"]).split(",")


def jobs(idle: int, sites: str = "", size: Size = SMALL, **more: int) -> JobClass:
    return JobClass({"DESIRED_Sites": sites} if sites else {}, idle, size=size, **more)


def slots(idle: int, busy: int = 0, where: str = "alpha") -> list[Slot]:
    full = FACTORY.entry(where)
    return [Slot(f"i{i}@{where}", full, True, False, False) for i in range(idle)] + [
        Slot(f"b{i}@{where}", full, False, True, False) for i in range(busy)
    ]


def ask(*classes: JobClass, offers: tuple[Offer, ...] = (ALPHA,), have: list[Slot] | None = None,
        running: Mapping[str, int] | None = None, history: Mapping[str, History] | None = None,
        pressure: Pressure = NOW, stopped: str = "", blind: bool = False,
        astray: int = 0) -> dict[str, Decision]:  # fmt: skip
    view = View(classes, offers, have or [], Whereabouts(running or {}, astray), history or {}, stopped, blind)
    return {one.offer.entry: one for one in decide(view, pressure, by_site)[0]}


def left_out(*classes: JobClass, offers: tuple[Offer, ...] = (ALPHA,), have: list[Slot] | None = None) -> list[LeftOut]:
    return decide(View(classes, offers, have or []), NOW, by_site)[1]


# -- a stage area that nobody has tried


def test_a_new_stage_area_is_tried_by_a_few_pilots() -> None:
    """A script that no worker passes costs so many, not every pilot of every entry."""
    offers = [entry(f"e{at}") for at in range(4)]
    busy = slots(0, 3, "e2")
    view = View([jobs(100)], offers, busy, untried=True)
    few = {one.offer.entry: one for one in decide(view, replace(NOW, canaries=6), by_site)[0]}
    assert {name: one.idle for name, one in few.items()} == {"e0": 2, "e1": 1, "e2": 2, "e3": 1}
    assert few["e0"].why == "jobs without a slot: 25; the stage area is new: 2 of 25 try it first"
    assert (few["e0"].maximum, few["e2"].maximum) == (2, 3 + 2)
    assert few["e0"].counts["GlideinsRequestIdle"] == 2
    whole = {one.offer.entry: one for one in decide(replace(view, untried=False), NOW, by_site)[0]}
    assert [one.idle for one in whole.values()] == [25] * 4


def test_fewer_canaries_than_entries_go_where_pilots_do_well() -> None:
    offers = [entry(f"e{at}") for at in range(4)]
    view = View([jobs(100)], offers, slots(0, 3, "e2"), untried=True)
    found = decide(view, replace(NOW, canaries=1), by_site)[0]
    assert [one.idle for one in found] == [0, 0, 1, 0]


def test_who_asks_for_no_more_than_the_canaries_is_not_held_back() -> None:
    view = View([jobs(2)], [ALPHA, BETA], [], untried=True)
    assert decide(view, NOW, by_site) == decide(replace(view, untried=False), NOW, by_site)


# -- pilots that match, and that no job wants


@pytest.mark.parametrize(
    ("unused", "ago", "idle", "old", "asks"),
    [
        (0, 0, 9, 9, True),
        (1, 299, 9, 9, False),
        (1, 300, 9, 9, True),
        (2, 599, 9, 9, False),
        (2, 600, 9, 9, True),
        (9, 3599, 9, 9, False),
        (90, 3600, 9, 9, True),
        (1, 10, 9, 8, True),  # one has come since: it may be another kind
        (1, 10, 0, 0, True),
    ],
)
def test_an_entry_whose_pilots_no_job_wants_is_left_in_peace(
    unused: int, ago: float, idle: int, old: int, asks: bool
) -> None:
    view = View([jobs(idle, old_idle=old)], [ALPHA], [], unused={ALPHA.full_name: (unused, ago)})
    (one,), _ = decide(view, NOW, by_site)
    if asks:
        assert (one.idle > 0) == (idle > 0)
        assert "in peace" not in one.why
    else:
        assert (one.idle, one.why) == (
            0, f"no job started in the last {unused} pilots that matched: the next one in "
               f"{min(300 * 2 ** (unused - 1), 3600) - ago:.0f} s"
        )  # fmt: skip
    never, _ = decide(view, replace(NOW, backoff=0), by_site)
    assert never == decide(replace(view, unused={}), NOW, by_site)[0]


# -- which entry


def test_jobs_are_split_over_the_entries_that_they_match() -> None:
    sizes = {ALPHA.full_name: Size(), BETA.full_name: Size()}
    shares, nowhere = split([jobs(3), jobs(2, "beta")], [ALPHA, BETA], by_site, sizes, lambda _: nullcontext())
    assert nowhere == []
    assert shares["alpha@v1@factory"].idle == 1.5
    assert shares["beta@v1@factory"].idle == 3.5
    assert (shares["alpha@v1@factory"].unique, shares["beta@v1@factory"].unique) == (0, 2)
    assert (shares["alpha@v1@factory"].matching, shares["beta@v1@factory"].matching) == (3, 5)


def test_cores_of_a_share_are_the_mean_of_all_that_match_or_the_shares_own() -> None:
    """glideinWMS's, by default: (10 * 8 + 10 * 1) / 20 of 15 jobs; by share 5 * 8 + 10 * 1."""
    classes = [jobs(10, size=Size(8)), jobs(10, "alpha", size=Size(1))]
    big = {offer.full_name: Size(8) for offer in (ALPHA, BETA)}
    shares, _ = split(classes, [ALPHA, BETA], by_site, big, lambda _: nullcontext())
    alpha, beta = (shares[offer.full_name] for offer in (ALPHA, BETA))
    assert (alpha.idle * alpha.cpus(by_share=False), beta.idle * beta.cpus(by_share=False)) == (67.5, 40)
    assert (alpha.idle * alpha.cpus(by_share=True), beta.idle * beta.cpus(by_share=True)) == (50, 40)
    whole = View(classes, [replace(one, attributes={**one.attributes, "GLIDEIN_CPUS": 8}) for one in (ALPHA, BETA)], [])
    for by_share, wanted in ((False, [9, 5]), (True, [7, 5])):
        found, _ = decide(whole, replace(NOW, cores_by_share=by_share), by_site)
        assert [one.counts["JobsIdleEffective"] for one in found] == wanted


def test_a_job_goes_only_where_it_wants() -> None:
    found = ask(jobs(1, "beta"), offers=(ALPHA, BETA))
    assert (found["alpha"].idle, found["beta"].idle) == (0, 1)
    assert found["alpha"].why == "no idle job matches"


def test_a_job_that_matches_nothing_asks_for_nothing() -> None:
    assert ask(jobs(4, "gamma"))["alpha"].idle == 0


def test_thirds_of_a_job_make_whole_jobs() -> None:
    """1/3 + 1/3 + 1/3 in floating point must not ask for a second pilot."""
    found = ask(*[jobs(1, f"alpha,beta,gamma,{i}") for i in range(3)], offers=(ALPHA, BETA, entry("gamma")))
    assert [one.idle for one in found.values()] == [1, 1, 1]


# -- how many


@pytest.mark.parametrize("count", [1, 2])
def test_a_lab_asks_one_pilot_per_job_at_once(count: int) -> None:
    assert ask(jobs(count))["alpha"].idle == count


def test_the_documented_example() -> None:
    """111 jobs at one entry, default parameters: a real frontend asked for 37 in its first loop."""
    decision = ask(jobs(111), pressure=Pressure())["alpha"]
    assert decision.idle == 37
    assert decision.maximum == int(111 * 1.15 + 1)


def test_idle_slots_are_used_first() -> None:
    found = ask(jobs(3), have=slots(2))["alpha"]
    assert (found.idle, found.counts["JobsIdleEffective"]) == (1, 1)
    assert ask(jobs(3), have=slots(3))["alpha"].idle == 0


def test_slots_elsewhere_do_not_help() -> None:
    assert ask(jobs(2, "alpha"), offers=(ALPHA, BETA), have=slots(5, where="beta"))["alpha"].idle == 2


def test_old_jobs_draw_on_the_reserve() -> None:
    assert ask(jobs(9), pressure=Pressure())["alpha"].idle == 3
    assert ask(jobs(9, old_idle=9), pressure=Pressure())["alpha"].idle == 3 + 3
    assert ask(jobs(90, old_idle=90), pressure=Pressure())["alpha"].idle == 30 + 5


def test_many_core_jobs_need_fewer_or_more_pilots() -> None:
    assert ask(jobs(6, size=Size(2)), offers=(entry("alpha", GLIDEIN_CPUS=4),))["alpha"].idle == 3
    assert ask(jobs(6, size=Size(3)), offers=(entry("alpha", GLIDEIN_CPUS=4),))["alpha"].idle == 5


def test_the_maximum_follows_jobs_and_what_runs() -> None:
    found = ask(jobs(2), have=slots(0, 4), running={"alpha@v1@factory": 4})["alpha"]
    assert found.maximum == int((2 + 4) * 1.15 + 1)
    done = ask(jobs(0, running=4), have=slots(0, 4), running={"alpha@v1@factory": 4})["alpha"]
    assert (done.idle, done.maximum) == (0, 4)


def test_a_minimum_is_kept_without_jobs() -> None:
    assert ask(pressure=replace(NOW, min_running=2))["alpha"].idle == 2


@pytest.mark.parametrize(
    ("pressure", "limit"),
    [
        (replace(NOW, entry_max_slots=3), "entry_max_slots"),
        (replace(NOW, entry_max_idle=1), "entry_max_idle"),
        (replace(NOW, max_slots=3), "max_slots"),
        (replace(NOW, max_idle=1), "max_idle"),
    ],
)
def test_a_limit_that_is_reached_stops_the_asking(pressure: Pressure, limit: str) -> None:
    found = ask(jobs(9), have=slots(1, 2), pressure=pressure)["alpha"]
    assert found.idle == 0
    assert limit in found.why
    assert ask(jobs(9), have=slots(1, 2))["alpha"].idle == 8


@pytest.mark.parametrize("level", ["frontend", "global"])
def test_limits_and_curbs_hold_at_every_level(level: str) -> None:
    """glideinWMS's running_glideins_total (100000, curb 90000) and idle_vms_total (1000, 200), ..._global."""
    def asked(slots: int, idle: int) -> Decision:
        name = "everybody" if level == "global" else level
        view = replace(View([jobs(40)], [ALPHA], []), **{name: Level(slots, idle)})
        return decide(view, NOW, by_site)[0][0]

    assert asked(89999, 199).idle == 40
    for slots, idle, curb in ((90000, 0, "curb_slots"), (10, 200, "curb_idle")):
        assert (asked(slots, idle).idle, f"halved by {level}_{curb}" in asked(slots, idle).why) == (20, True)
    assert asked(99995, 0).idle == 5 // 2
    for slots, idle, limit in ((100000, 0, "max_slots: 100000 of 100000"), (10, 1000, "max_idle: 1000 of 1000")):
        assert (asked(slots, idle).idle, asked(slots, idle).why) == (0, f"limit {level}_{limit}")


def test_a_limit_leaves_only_its_head_room() -> None:
    assert ask(jobs(9), have=slots(0, 2), pressure=replace(NOW, entry_max_slots=5))["alpha"].idle == 3
    assert ask(jobs(900))["alpha"].idle == 100


def test_each_curb_halves_but_leaves_one() -> None:
    assert ask(jobs(13), have=slots(5))["alpha"].idle == 4
    found = ask(jobs(13), have=slots(5), pressure=replace(NOW, curb_slots=5, curb_idle=5))["alpha"]
    assert (found.idle, "curb_slots" in found.why) == (1, True)


# -- when nothing is asked


def test_downtimes_stop_the_asking() -> None:
    assert ask(jobs(5), offers=(replace(ALPHA, in_downtime=True),))["alpha"].why == "entry is in downtime"
    found = ask(jobs(5), stopped="pilot proxy lives only 5 s more")["alpha"]
    assert (found.idle, found.maximum, found.why) == (0, 0, "pilot proxy lives only 5 s more")


def test_excess_is_taken_back_step_by_step() -> None:
    history: Mapping[str, History] = {}
    seen = []
    for _ in range(12):
        found = ask(have=slots(1), history=history)["alpha"]
        history = {"alpha@v1@factory": found.history}
        seen.append(found.removal)
    assert seen == [Removal.NO] * 5 + [Removal.WAIT] * 5 + [Removal.IDLE] * 2
    again = ask(jobs(2), have=slots(1), history=history)["alpha"]
    assert (again.removal, again.idle) == (Removal.NO, 1)


def test_all_goes_when_no_pilot_ever_came() -> None:
    long_ago = {"alpha@v1@factory": History(without_idle_jobs=10, no_slots=10)}
    assert ask(history=long_ago)["alpha"].removal is Removal.ALL
    assert ask(have=slots(0, 1), history=long_ago)["alpha"].removal is Removal.WAIT


# -- a lost view takes nothing away


#: What the configuration asks for, turns without idle jobs, and what is sent to the factory: glideinWMS's, 3.10.
REMOVALS: list[tuple[dict[str, Any], int, tuple[Removal, int]]] = [
    ({}, 0, (Removal.NO, 0)), ({}, 6, (Removal.WAIT, 0)), ({"remove_type": "DISABLE"}, 99, (Removal.NO, 0)),
    ({"remove_type": "DISABLE", "requests_tracking": True}, 0, (Removal.NO, 0)),
    ({"remove_type": "IDLE"}, 0, (Removal.NO, 0)), ({"remove_type": "IDLE"}, 1, (Removal.IDLE, 0)),
    ({"remove_type": "IDLE", "remove_wait": 3, "remove_margin": 5}, 3, (Removal.NO, 0)),
    ({"remove_type": "IDLE", "remove_wait": 3, "remove_margin": 5}, 4, (Removal.IDLE, 0)),
    ({"remove_type": "ALL", "requests_tracking": True}, 0, (Removal.ALL, 0)),
    ({"remove_type": "UNREG", "requests_tracking": True, "remove_margin": 5}, 0, (Removal.UNREG, 5)),
    ({"remove_type": "WAIT", "requests_tracking": True, "remove_margin": 5}, 99, (Removal.ALL, 0)),
    ({"remove_type": "ALL", "requests_tracking": True, "remove_margin": 5}, 99, (Removal.ALL, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("configured", "turns", "sent"), REMOVALS)
def test_the_configuration_may_ask_for_more_removal_than_time(
    configured: dict[str, Any], turns: int, sent: tuple[Removal, int]
) -> None:
    long_ago = History(without_idle_jobs=turns, no_slots=turns if turns == 99 else 0)
    pressure = Pressure(**configured)
    assert long_ago.asked_removal(pressure, running=0, blind=False) == sent
    assert long_ago.asked_removal(pressure, running=0, blind=True) == (Removal.NO, 0)


def test_with_tracking_what_is_more_than_wanted_goes_while_more_is_wanted_elsewhere() -> None:
    pressure = Pressure(attenuation=1, remove_type="IDLE", requests_tracking=True, remove_margin=2)
    found = ask(jobs(3), pressure=pressure)["alpha"]
    assert (found.idle, found.removal, found.margin) == (3, Removal.IDLE, 2)


@pytest.mark.parametrize(("wrong", "why"), [({"remove_type": "SOME"}, "SOME"), ({"remove_margin": -1}, "negative")])
def test_a_removal_that_cannot_be_meant_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Pressure(**wrong)


def lost_view(turns: int, running: list[Job], slots_seen: list[Slot], blind: bool = False) -> list[Decision]:
    """Return what is decided in ``turns`` turns in which these jobs run, those slots are seen, and none is idle."""
    history: Mapping[str, History] = {}
    found = []
    for _ in range(turns):
        view = View(classify(running, 1000, 600), [ALPHA, BETA], slots_seen, whereabouts(running, slots_seen,
                    [ALPHA, BETA]), history, "", blind)  # fmt: skip
        decisions = decide(view, NOW, by_site)[0]
        history = {one.offer.full_name: one.history for one in decisions}
        found.append(decisions[0])
    return found


def on(entry_name: str, count: int) -> list[Job]:
    """Return running jobs that say where they run, as those of our own schedds do."""
    return [Job(False, 0, f"slot1@glidein_{i}@wn", {}, entry=entry_name) for i in range(count)]


def test_forty_jobs_whose_slots_are_out_of_sight_keep_their_pilots() -> None:
    for decision in lost_view(30, on("alpha", 40), []):
        assert decision.removal in (Removal.NO, Removal.WAIT)
        assert decision.maximum == 40
        assert decision.counts["JobsRunningHere"] == 40


def test_jobs_of_which_nobody_knows_where_they_run_keep_every_pilot() -> None:
    """A schedd without SYSTEM_JOB_MACHINE_ATTRS, and a frontend that was restarted while the slots are out of sight."""
    for decision in lost_view(30, on("", 40), []):
        assert decision.removal in (Removal.NO, Removal.WAIT)
        assert decision.maximum >= 40


def test_jobs_elsewhere_do_not_keep_the_pilots_that_never_came() -> None:
    decision = lost_view(30, on("beta", 40), [])[-1]
    assert (decision.removal, decision.maximum) == (Removal.ALL, 0)


@pytest.mark.parametrize("running", [0, 40])
def test_a_blind_frontend_takes_nothing_back(running: int) -> None:
    for decision in lost_view(30, on("alpha", running), [], blind=True):
        assert decision.removal is Removal.NO
        assert decision.maximum >= max(running, 1)


def test_a_frontend_that_goes_blind_keeps_to_what_it_asked_for() -> None:
    """The schedd of 38 of 40 jobs is restarted after many turns without an idle job."""
    before = lost_view(30, on("alpha", 40), [])[-1]
    found = ask(running={ALPHA.full_name: 2}, history={ALPHA.full_name: before.history}, blind=True)["alpha"]
    assert (found.removal, found.maximum) == (Removal.NO, 40)


def test_claimed_slots_without_a_job_in_sight_are_not_below_the_maximum() -> None:
    assert ask(have=slots(1, 7))["alpha"].maximum == 7


@pytest.mark.parametrize("status", [2, 6, 7])
def test_a_job_that_hands_back_its_output_or_is_suspended_still_runs(status: int) -> None:
    job = Job.from_ad({"JobStatus": status, "RemoteHost": "s", "MachineAttrGLIDEIN_Entry_Name0": "alpha"}, (), [])
    assert job is not None
    assert whereabouts([job], [], [ALPHA, BETA]) == Whereabouts({ALPHA.full_name: 1})


def test_the_slot_says_more_than_the_job() -> None:
    job = Job(False, 0, "b0@beta", {}, entry="alpha")
    assert whereabouts([job], slots(0, 1, "beta"), [ALPHA, BETA]) == Whereabouts({BETA.full_name: 1})


# -- the size of a job


@pytest.mark.parametrize(
    ("offer", "job", "lack"),
    [
        ({}, Size(1), ""),
        ({}, Size(2), "RequestCpus 2 > 1"),
        ({"GLIDEIN_CPUS": 8}, Size(8), ""),
        ({"GLIDEIN_CPUS": "8"}, Size(9), "RequestCpus 9 > 8"),
        ({"GLIDEIN_CPUS": 0}, Size(1), ""),
        ({"GLIDEIN_CPUS": "auto"}, Size(64), ""),
        ({"GLIDEIN_CPUS": "auto", "GLIDEIN_ESTIMATED_CPUS": 16}, Size(64), "RequestCpus 64 > 16"),
        ({"GLIDEIN_MaxMemMBs": 2000}, Size(memory=2000), ""),
        ({"GLIDEIN_MaxMemMBs": 2000}, Size(memory=2001), "RequestMemory 2001 > 2000 MB"),
        ({}, Size(memory=999_999), f"RequestMemory 999999 > {ASSUMED_MEMORY} MB"),
        ({"GLIDEIN_CPUS": 16}, Size(memory=999_999), ""),
        ({"GLIDEIN_MaxDiskMBs": 500}, Size(disk=501), "RequestDisk 501 > 500 MB"),
        ({}, Size(gpus=1), "RequestGPUs 1 > 0"),
        ({"GLIDEIN_Resource_Slots": "ioslot,2;GPUs,2,type=main"}, Size(gpus=2), ""),
        ({"GLIDEIN_Resource_Slots": "GPUs,2"}, Size(gpus=3), "RequestGPUs 3 > 2"),
        ({"GLIDEIN_Max_Walltime": 7200}, Size(seconds=6980), ""),
        ({"GLIDEIN_Max_Walltime": 7200}, Size(seconds=6981), "MaxWallTimeMins, in all 6981 > 6980 s"),
        ({}, Size(seconds=10**8), ""),
    ],
)
def test_a_job_asks_for_pilots_only_where_it_fits(offer: dict[str, str | int], job: Size, lack: str) -> None:
    one = entry("alpha", **offer)
    found = ask(jobs(3, size=job), offers=(one,))["alpha"]
    nowhere = left_out(jobs(3, size=job), offers=(one,))
    if lack:
        assert (found.idle, found.counts["JobsIdle"]) == (0, 0)
        assert found.why == f"no idle job matches; 3 larger than a pilot: {lack}"
        assert nowhere == [LeftOut(3, "", f"larger than any pilot at alpha: {lack}")]
    else:
        assert found.idle > 0
        assert nowhere == []


def test_a_large_job_goes_where_pilots_are_large() -> None:
    large = entry("beta", GLIDEIN_CPUS=8)
    found = ask(jobs(2, size=Size(8)), offers=(ALPHA, large))
    assert (found["alpha"].idle, found["beta"].idle) == (0, 2)
    assert left_out(jobs(2, size=Size(8)), offers=(ALPHA, large)) == []


def test_pilots_that_were_there_say_what_the_entry_does_not() -> None:
    seen = [replace(one, size=Size(1, memory=2000, disk=9000)) for one in slots(1)]
    job = jobs(1, size=Size(1, memory=3000))
    (one,) = left_out(job, have=seen)
    assert one.why == "larger than any pilot at alpha: RequestMemory 3000 > 2000 MB"
    history = {ALPHA.full_name: ask(have=seen)["alpha"].history}
    for _ in range(NOW.remember_size):
        found = ask(job, history=history)["alpha"]
        assert found.idle == 0
        history = {ALPHA.full_name: found.history}
    # Another worker may be larger: once in so many turns one is tried.
    assert ask(job, history=history)["alpha"].idle == 1


def test_jobs_that_match_nothing_are_named() -> None:
    assert left_out(replace(jobs(4, "gamma"), example="12.0 (alice)"), jobs(1, "alpha")) == [
        LeftOut(4, "12.0 (alice)", 'match no entry: DESIRED_Sites = "gamma"')
    ]
    many = [LeftOut(1, "1.0", "b"), LeftOut(1, "2.0", "a"), LeftOut(2, "3.0", "a")]
    assert merged(many) == [LeftOut(3, "2.0", "a"), LeftOut(1, "1.0", "b")]
    assert left_out(jobs(4, "gamma"), offers=()) == []  # a factory that is not there says nothing of the jobs


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("RequestCpus", "four", 'RequestCpus is "four", not a number'),
        ("RequestCpus", "4", 'RequestCpus is "4", not a number'),  # HTCondor's match does not take it for one, either
        ("RequestMemory", -1, "RequestMemory is -1, below 0"),
        ("RequestGPUs", float("nan"), "RequestGPUs is nan, not a number"),
        ("RequestDisk", True, "RequestDisk is true, not a number"),
    ],
)
def test_an_absurd_job_is_left_out_by_name(attribute: str, value: str | int, message: str) -> None:
    with pytest.raises(AbsurdValue, match=f"^{message}$"):
        Job.from_ad({"JobStatus": 1, attribute: value}, (), [])
    running = Job.from_ad({"JobStatus": 2, attribute: value}, (), [])
    assert running is not None and running.size == Size()  # it runs in some pilot, whatever its ad has become


# -- reading jobs and slots


def test_jobs_become_classes() -> None:
    ads: list[Ad] = [
        {"JobStatus": 1, "EnteredCurrentStatus": 100, "DESIRED_Sites": "alpha", "RequestCpus": 2, "Owner": "alice"},
        {"JobStatus": 1, "EnteredCurrentStatus": 900, "DESIRED_Sites": "alpha", "RequestCpus": 2, "Owner": "bob"},
        {"JobStatus": 2, "EnteredCurrentStatus": 900, "DESIRED_Sites": "alpha", "RequestCpus": 2, "RemoteHost": "s"},
        {"JobStatus": 1, "EnteredCurrentStatus": 900},
        {"JobStatus": 5, "EnteredCurrentStatus": 900},
    ]
    found = [job for one in ads if (job := Job.from_ad(one, ("DESIRED_Sites", "RequestCpus"), []))]
    assert classify(found, now=1000, old_idle=600) == [
        JobClass({"DESIRED_Sites": "alpha", "RequestCpus": 2}, idle=2, old_idle=1, running=1, size=Size(2)),
        JobClass({}, idle=1),
    ]


def test_jobs_that_a_match_can_tell_apart_are_two_classes() -> None:
    """To Python 1, 1.0 and true are equal."""
    ads: list[Ad] = [{"JobStatus": 1, "DESIRED_Sites": value} for value in (1, True, 1.0, "1")]
    found = [job for one in ads if (job := Job.from_ad(one, ("DESIRED_Sites",), []))]
    assert len(classify(found, 0, 0)) == 4


PILOT: Ad = {
    "Name": "slot1@p", "State": "Unclaimed", "Activity": "Idle", "GLIDEIN_Entry_Name": "alpha", "GLIDEIN_Name": "v1",
    "GLIDEIN_Factory": "factory", "PartitionableSlot": True, "TotalSlots": 1, "Cpus": 1, "Memory": 2000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "idle", "running", "shell"),
    [
        ({}, True, False, False),
        ({"TotalSlots": 2, "Cpus": 0}, False, False, True),
        ({"TotalSlots": 2, "Cpus": 3}, True, False, True),
        ({"TotalSlots": 2, "Cpus": 3, "Memory": 64}, False, False, True),  # no job fits: glideinWMS issue 405
        ({"PartitionableSlot": False, "TotalSlots": 2, "State": "Claimed", "Activity": "Busy"}, False, True, False),
    ],
)
def test_a_slot_is_idle_when_a_job_fits(
    changes: Mapping[str, str | int], idle: bool, running: bool, shell: bool
) -> None:
    slot = Slot.from_ad(dict(PILOT) | dict(changes), least_memory=128, notes=[])
    assert (slot.idle, slot.running, slot.shell) == (idle, running, shell)
    assert slot.entry == "alpha@v1@factory"


def test_a_used_up_pilot_is_one_place_not_two() -> None:
    shell = Slot.from_ad(dict(PILOT) | {"TotalSlots": 2, "Cpus": 0}, 128, [])
    dynamic = Slot.from_ad(dict(PILOT) | {"PartitionableSlot": False, "State": "Claimed", "Activity": "Busy"}, 128, [])
    assert ask(jobs(1), have=[shell, dynamic])["alpha"].counts["GlideinsTotal"] == 1


def test_a_credential_keeps_its_name_when_it_is_renewed() -> None:
    first = credential_id(Path("/p.pem"), "/CN=pilot")
    assert first == credential_id(Path("/p.pem"), "/CN=pilot") != credential_id(Path("/p.pem"), "/CN=other")
    assert len(first) == 8 and first.isalnum()


# -- the match expression, by HTCondor's own ClassAds


ROLE = Path(__file__).resolve().parents[2] / "roles/frontend/defaults/main.yml"


def pilot_takes(job: str) -> bool:
    """Return whether a pilot at alpha takes the job with this ad, by the frontend's part of its START expression."""
    import classad2

    machine = classad2.ClassAd({"GLIDEIN_Site": "alpha"})
    start = classad2.ExprTree(yaml.safe_load(ROLE.read_text())["frontend_start"])
    return start.eval(machine, classad2.ClassAd(job)) is True


@pytest.mark.parametrize(
    ("sites", "matches"),
    [
        ("undefined", True),
        ('"alpha"', True),
        ('"beta, Alpha"', True),
        ('"beta alpha"', True),
        ('" alpha ,beta"', True),
        ('"beta"', False),
        ('""', False),
        ('"alphabet"', False),
        ('{"alpha"}', True),
        ('{"beta","ALPHA"}', True),
        ('{"beta"}', False),
        ("{}", False),
        ('{"beta", 3, undefined, {"alpha"}}', False),
        ('split("beta alpha")', True),
        ("3", False),
        ("true", False),
        ("error", False),
        ('[ site = "alpha" ]', False),
        (r'"alpha\351"', False),  # not UTF-8
        (r'{"alpha\351", "alpha"}', True),
        ('strcat("al", "pha")', True),
        ("TARGET.GLIDEIN_Site", True),
    ],
)
def test_frontend_and_pilot_agree_which_sites_a_job_wants(sites: str, matches: bool) -> None:
    import classad2
    from pilotbed.pool import Expression
    from pilotbed.pool.door import plain

    for name in ("DESIRED_Sites", "desired_sites"):
        ad = f"[ JobStatus = 1; {name} = {sites} ]"
        job = Job.from_ad(plain(classad2.ClassAd(ad), ("DESIRED_Sites",)), ("DESIRED_Sites",), [])
        assert job is not None
        assert Expression(DEFAULT_MATCH)(job.attributes, {"GLIDEIN_Site": "alpha"}) is matches
        assert pilot_takes(ad) is matches


def test_an_expression_must_be_true_not_just_something() -> None:
    from pilotbed.pool import Expression, PoolError

    for text in ("undefined", "error", "2", "TARGET.Missing > 3", '"true"'):
        assert Expression(text)({}, {}) is False
    assert Expression("TARGET.X == MY.Y")({"Y": 1}, {"X": 1}) is True
    with pytest.raises(PoolError, match="not a ClassAd expression"):
        Expression("__import__('os').system('id') ==")


def test_pilots_are_not_taken_back_while_a_schedd_cannot_be_asked() -> None:
    """Its jobs may wait for them; what the others ask for goes on."""
    seen, blind = History(), History()
    for _ in range(NOW.wait_after + NOW.idle_after + 1):
        seen = ask(have=slots(2), history={ALPHA.full_name: seen})["alpha"].history
        blind = ask(have=slots(2), history={ALPHA.full_name: blind}, blind=True)["alpha"].history
    assert seen.removal(NOW, running=0, blind=False) is not Removal.NO
    assert blind.removal(NOW, running=0, blind=False) is Removal.NO
    assert ask(jobs(3), blind=True)["alpha"].idle > 0


# -- whose jobs, and where


def group(vo: str) -> Config:
    return Config(
        frontend="gridlab", group="main", vo=vo, identity="frontend@grid.test", certificate="", key="",
        security_name="gridlab", security_class="pilot", pool="central:9618", schedds=(),
        factories=(Factory("factory:9618", "factory@grid.test"),), proxy=Path("/nowhere"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("job", "counts"),
    [
        ({"x509UserProxyVOName": "cosmo"}, True),
        ({"x509UserProxyVOName": "gridlab"}, False),
        ({"x509UserProxyVOName": "Cosmo"}, False),
        ({"x509UserProxyVOName": ["cosmo"]}, False),
        ({}, False),
    ],
)
def test_only_the_jobs_of_a_groups_vo_count(job: dict[str, Any], counts: bool) -> None:
    ad = classad2.ClassAd({"JobUniverse": 5, "x509userproxy": "/tmp/x509up_u1", **job})
    assert (classad2.ExprTree(group("cosmo").which_jobs).simplify(ad).eval() is True) is counts
    assert classad2.ExprTree(group("").which_jobs).simplify(ad).eval() is True


@pytest.mark.parametrize(
    ("entry", "counts"),
    [
        ({"GLIDEIN_Supported_VOs": "gridlab,cosmo"}, True),
        ({"GLIDEIN_Supported_VOs": "cosmo"}, True),
        ({}, True),
        ({"GLIDEIN_Supported_VOs": "gridlab"}, False),
        ({"GLIDEIN_Supported_VOs": ""}, False),
        ({"GLIDEIN_Supported_VOs": 7}, False),
    ],
)
def test_only_entries_that_accept_the_vo_count(entry: dict[str, Any], counts: bool) -> None:
    ad = classad2.ClassAd(entry)
    assert (classad2.ExprTree(group("cosmo").which_entries).simplify(ad).eval() is True) is counts


def test_a_name_that_no_vo_has_is_refused() -> None:
    with pytest.raises(ValueError, match="vo"):
        group('x" || true || "')
