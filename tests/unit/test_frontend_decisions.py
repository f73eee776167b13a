"""Constant pressure: what is asked of which entry, against figures worked out by hand from the documented formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from pilotbed.frontend.config import DEFAULT_MATCH, Pressure
from pilotbed.frontend.daemon import credential_id
from pilotbed.frontend.decisions import Decision, History, Job, JobClass, Slot, View, classify, decide, split
from pilotbed.protocol.ads import Ad, FactoryName, Offer, Removal

FACTORY = FactoryName("v1", "factory")
NOW = Pressure(attenuation=1)


def entry(name: str, **attributes: str | int) -> Offer:
    return Offer(FACTORY, name, {"GLIDEIN_Site": name} | attributes, {}, False, "", "")


ALPHA, BETA = entry("alpha"), entry("beta")


def by_site(my: Ad, target: Ad) -> bool:
    """The default match in Python, for machines without classad2."""
    return "DESIRED_Sites" not in my or target["GLIDEIN_Site"] in str(my["DESIRED_Sites"]).split(",")


def jobs(idle: int, sites: str = "", **more: int) -> JobClass:
    return JobClass({"DESIRED_Sites": sites} if sites else {}, idle, **more)


def slots(idle: int, busy: int = 0, where: str = "alpha") -> list[Slot]:
    full = FACTORY.entry(where)
    return [Slot(f"i{i}@{where}", full, True, False, False) for i in range(idle)] + [
        Slot(f"b{i}@{where}", full, False, True, False) for i in range(busy)
    ]


def ask(*classes: JobClass, offers: tuple[Offer, ...] = (ALPHA,), have: list[Slot] | None = None,
        running: Mapping[str, int] | None = None, history: Mapping[str, History] | None = None,
        pressure: Pressure = NOW, stopped: str = "", blind: bool = False) -> dict[str, Decision]:  # fmt: skip
    view = View(classes, offers, have or [], running or {}, history or {}, stopped, blind)
    return {one.offer.entry: one for one in decide(view, pressure, by_site)}


# -- which entry


def test_jobs_are_split_over_the_entries_that_they_match() -> None:
    shares = split([jobs(3), jobs(2, "beta")], [ALPHA, BETA], by_site)
    assert shares["alpha@v1@factory"].idle == 1.5
    assert shares["beta@v1@factory"].idle == 3.5
    assert (shares["alpha@v1@factory"].unique, shares["beta@v1@factory"].unique) == (0, 2)
    assert (shares["alpha@v1@factory"].matching, shares["beta@v1@factory"].matching) == (3, 5)


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
    assert ask(jobs(6, cpus=2), offers=(entry("alpha", GLIDEIN_CPUS=4),))["alpha"].idle == 3
    assert ask(jobs(3, cpus=2))["alpha"].idle == 6


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


# -- reading jobs and slots


def test_jobs_become_classes() -> None:
    ads: list[Ad] = [
        {"JobStatus": 1, "EnteredCurrentStatus": 100, "DESIRED_Sites": "alpha", "RequestCpus": 2, "Owner": "alice"},
        {"JobStatus": 1, "EnteredCurrentStatus": 900, "DESIRED_Sites": "alpha", "RequestCpus": 2, "Owner": "bob"},
        {"JobStatus": 2, "EnteredCurrentStatus": 900, "DESIRED_Sites": "alpha", "RequestCpus": 2, "RemoteHost": "s"},
        {"JobStatus": 1, "EnteredCurrentStatus": 900},
        {"JobStatus": 5, "EnteredCurrentStatus": 900},
    ]
    found = [job for one in ads if (job := Job.from_ad(one, ("DESIRED_Sites", "RequestCpus")))]
    assert classify(found, now=1000, old_idle=600) == [
        JobClass({"DESIRED_Sites": "alpha", "RequestCpus": 2}, idle=2, old_idle=1, running=1, cpus=2),
        JobClass({}, idle=1),
    ]


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
    slot = Slot.from_ad(dict(PILOT) | dict(changes), least_memory=128)
    assert (slot.idle, slot.running, slot.shell) == (idle, running, shell)
    assert slot.entry == "alpha@v1@factory"


def test_a_used_up_pilot_is_one_place_not_two() -> None:
    shell = Slot.from_ad(dict(PILOT) | {"TotalSlots": 2, "Cpus": 0}, 128)
    dynamic = Slot.from_ad(dict(PILOT) | {"PartitionableSlot": False, "State": "Claimed", "Activity": "Busy"}, 128)
    assert ask(jobs(1), have=[shell, dynamic])["alpha"].counts["GlideinsTotal"] == 1


def test_a_credential_keeps_its_name_when_it_is_renewed() -> None:
    from pathlib import Path

    first = credential_id(Path("/p.pem"), "/CN=pilot")
    assert first == credential_id(Path("/p.pem"), "/CN=pilot") != credential_id(Path("/p.pem"), "/CN=other")
    assert len(first) == 8 and first.isalnum()


# -- the match expression, by HTCondor's own ClassAds


@pytest.mark.parametrize(
    ("job", "matches"),
    [
        ({}, True),
        ({"DESIRED_Sites": "beta, Alpha"}, True),
        ({"DESIRED_Sites": "beta"}, False),
        ({"DESIRED_Sites": ""}, False),
    ],
)
def test_the_default_match(job: Ad, matches: bool) -> None:
    from pilotbed.pool import Expression

    assert Expression(DEFAULT_MATCH)(job, {"GLIDEIN_Site": "alpha"}) is matches


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
    assert seen.removal(NOW) is not Removal.NO
    assert blind.removal(NOW) is Removal.NO
    assert ask(jobs(3), blind=True)["alpha"].idle > 0
