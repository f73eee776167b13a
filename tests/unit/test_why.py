"""Situations in which a job has no pilot, each with the first thing that pilotbed-why says; docs/why.md has the table.

``python tests/unit/test_why.py`` writes it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from pilotbed.frontend.config import DEFAULT_JOBS, DEFAULT_MATCH
from pilotbed.pool.values import Ad, Expr, Value
from pilotbed.why.cli import matcher
from pilotbed.why.situations import Answer, Scene, explain_entry, explain_job, span
from pilotbed_suite import CHECKOUT, document

NOW = 1_800_000_000
JOBS = f'({DEFAULT_JOBS}) && x509UserProxyVOName =?= "gridlab"'
JOB: Ad = {
    "JobStatus": 1, "JobUniverse": 5, "EnteredCurrentStatus": NOW - 700, "x509userproxy": "/tmp/x509up_u1",
    "x509UserProxyExpiration": NOW + 40000, "x509UserProxyVOName": "gridlab", "RequestCpus": 1, "RequestMemory": 128,
    "DESIRED_Sites": "alpha", "Requirements": True,
}  # fmt: skip
SCHEDD: Ad = {"Name": "submit.grid.test", "TotalRunningJobs": 3, "MaxJobsRunning": 200}
GROUP: Ad = {
    "GlideClientName": "gridlab.main", "GlideClientJobs": JOBS, "GlideClientMatch": DEFAULT_MATCH, "GlideClientTurn": 5,
    "GlideClientSchedds": "submit.grid.test,other.grid.test", "GlideClientScheddsClosed": "", "GlideClientStopped": "",
    "LastHeardFrom": NOW - 4,
}  # fmt: skip
ALPHA: Ad = {
    "Name": "alpha@v1@factory@gridlab.main", "GlideFactoryName": "alpha@v1@factory", "GlideClientName": "gridlab.main",
    "GLIDEIN_Site": "alpha", "GLIDEIN_In_Downtime": "False", "GLIDEIN_CPUS": 1, "GLIDEIN_MaxMemMBs": 2000,
    "GLIDEIN_Gatekeeper": "ce.alpha:2119", "GlideClientMonitorJobsIdle": 4, "GlideClientMonitorGlideinsRequestIdle": 2,
    "GlideClientMonitorWhy": "jobs without a slot: 4", "GlideFactoryMonitorStatusIdle": 5,
    "GlideFactoryMonitorStatusUnsubmitted": 0, "GlideFactoryMonitorStatusIdleSince": NOW - 12 * 60,
    "GlideFactoryMonitorStatusRunning": 0, "GlideFactoryMonitorStatusHeld": 0, "GlideFactoryMonitorSubmitted": 0,
    "GlideFactoryMonitorFailed": 0, "GlideFactoryMonitorWhy": "enough",
}  # fmt: skip
BETA = {**ALPHA, "Name": "beta@v1@factory@gridlab.main", "GlideFactoryName": "beta@v1@factory", "GLIDEIN_Site": "beta"}
SLOT: Ad = {
    "Name": "slot1@glidein_7@wn1", "GLIDEIN_Entry_Name": "alpha", "GLIDECLIENT_Name": "gridlab.main", "Cpus": 1,
    "Memory": 2000, "State": "Unclaimed", "LastHeardFrom": NOW - 9, "GLIDEIN_ToRetire": NOW + 9000,
    "GLIDEIN_ToDie": NOW + 9000, "Requirements": Expr("TARGET.x509userproxy =!= undefined", open=True),
}  # fmt: skip


SCENE = Scene(NOW, "12.0", JOB, None, SCHEDD, (GROUP,), (ALPHA, BETA), (), matcher())


def job(**changes: Value | None) -> Scene:
    ad = {name: value for name, value in (dict(JOB) | changes).items() if value is not None}
    return replace(SCENE, job=ad)


def group(**changes: Value) -> Scene:
    return replace(SCENE, groups=[GROUP | {f"GlideClient{name}": value for name, value in changes.items()}])


def alpha(client: Mapping[str, Value] | None = None, factory: Mapping[str, Value] | None = None, **own: Value) -> Scene:
    changed = dict(ALPHA) | own | {f"GlideClientMonitor{name}": value for name, value in (client or {}).items()}
    changed |= {f"GlideFactoryMonitor{name}": value for name, value in (factory or {}).items()}
    return replace(SCENE, resources=[changed, BETA])


def slots(*changes: Mapping[str, Value], asked: int = 0) -> Scene:
    scene = alpha({"GlideinsRequestIdle": asked}, {"StatusIdle": 0, "StatusRunning": len(changes)})
    return replace(scene, slots=[dict(SLOT) | one for one in changes])


@dataclass(frozen=True)
class Situation:
    """What is so, and how the first answer begins."""

    what: str
    scene: Scene
    says: str
    entry: str = ""
    explain: Callable[[Scene], list[Answer]] = explain_job


QUIET = {"StatusIdle": 0, "StatusRunning": 0}
SITUATIONS = [
    Situation("no such job", replace(SCENE, job=None), "there is no job 12.0, in the queue or in the history"),
    Situation("it has ended", replace(SCENE, job=None, ended={"JobStatus": 4, "ExitCode": 3}),
              "the job has ended with code 3"),
    Situation("it was removed", replace(SCENE, job=None, ended={"JobStatus": 3}), "the job was removed"),
    Situation("it runs", job(JobStatus=2, MachineAttrGLIDEIN_Entry_Name0="alpha"),
              "the job runs, at alpha, for 11 min"),
    Situation("it hands back its output", job(JobStatus=6, RemoteHost="slot1@wn1"),
              "the job hands back its output, at slot1@wn1"),
    Situation("the site has suspended it", job(JobStatus=7, RemoteHost="wn1"),
              "the job is suspended by the site, at wn1"),
    Situation("it is held", job(JobStatus=5, HoldReason="Failed to open /home/a/in: errno 2"),
              "the job is held, for 11 min: Failed to open /home/a/in: errno 2"),
    Situation("it is removed, and its pilot gone", job(JobStatus=3),
              "the job is over, and leaves the queue as soon as"),
    Situation("another universe", job(JobUniverse=7), "pilots run jobs of the vanilla universe (5); this one's is 7"),
    Situation("no proxy", job(x509userproxy=None), "the job has no proxy, and sites give payloads an account by it"),
    Situation("its proxy has expired", job(x509UserProxyExpiration=NOW - 7200), "the job's proxy ended 2 h ago"),
    Situation("an absurd size", job(RequestCpus="four"),
              'no pilot can be asked for: RequestCpus is "four", not a number'),
    Situation("the schedd is not in the pool", replace(SCENE, schedd=None),
              "the pool's collector does not know this schedd"),
    Situation("the schedd runs all that it may", replace(SCENE, schedd=SCHEDD | {"TotalRunningJobs": 200}),
              "the schedd runs as many jobs as it may: 200 of 200 (MaxJobsRunning)"),
    Situation("no frontend", replace(SCENE, groups=()), "no frontend shows itself in this pool"),
    Situation("no frontend for its VO", job(x509UserProxyVOName="cosmo"),
              "no frontend group takes a job of VO cosmo: there is gridlab.main"),
    Situation("no frontend for its schedd", group(Schedds="other.grid.test"),
              "gridlab.main does not ask the schedd submit.grid.test"),
    Situation("the frontend is dead", replace(SCENE, groups=[GROUP | {"LastHeardFrom": NOW - 400}]),
              "the frontend group gridlab.main was last heard of 6 min ago"),
    Situation("the frontend does not reach the schedd", group(ScheddsClosed="submit.grid.test: does not answer"),
              "the frontend leaves out this schedd's idle jobs: does not answer"),
    Situation("the frontend is in downtime", group(Stopped="frontend is in downtime: new disks"),
              "the frontend asks for nothing: frontend is in downtime: new disks"),
    Situation("the pilots' proxy is too old", group(Stopped="pilot proxy lives only 90 s more (least 3600 s)"),
              "the frontend asks for nothing: pilot proxy lives only 90 s more"),
    Situation("no factory", replace(SCENE, resources=()), "the frontend group gridlab.main sees no entry"),
    Situation("it wants a site that is not there", job(DESIRED_Sites="gamma"),
              '2 of 2 entries do not match: alpha, beta (DESIRED_Sites = "gamma")'),
    Situation("it is larger than any pilot", job(RequestMemory=9000, DESIRED_Sites=None),
              "2 of 2 entries do not match: alpha, beta (RequestMemory 9000 > 2000 MB)"),
    Situation("the entry is in downtime",
              alpha(factory=QUIET | {"Why": "downtime of alpha: move"}, GLIDEIN_In_Downtime="True"),
              "the entry is in downtime (downtime of alpha: move)", "alpha"),
    Situation("a limit of the frontend's",
              alpha({"GlideinsRequestIdle": 0, "Why": "limit max_slots: 100 of 100"}, QUIET),
              "the frontend asks for no more: limit max_slots: 100 of 100", "alpha"),
    Situation("pilots match, and no job starts in them",
              alpha({"GlideinsRequestIdle": 0,
                     "Why": "no job started in the last 2 pilots that matched: the next one in 400 s"},
                    QUIET),
              "the frontend asks for none: no job started in the last 2 pilots that matched", "alpha"),
    Situation("the frontend has not seen it yet", alpha({"GlideinsRequestIdle": 0, "JobsIdle": 0}, QUIET),
              "no idle job asks for a pilot there, as of the frontend's last turn", "alpha"),
    Situation("the factory refuses the request",
              replace(SCENE, resources=[{name: value for name, value in ALPHA.items() if "Factory" not in name}
                                        | {"GlideFactoryName": "alpha@v1@factory"}]),
              "2 pilots asked for, no answer of the factory: it is away, or refuses the request", "alpha"),
    Situation("a limit of the factory's", alpha(factory=QUIET | {"Why": "limit max_pilots"}),
              "the factory submits none: limit max_pilots", "alpha"),
    Situation("the factory's copy of the proxy is too old",
              alpha(factory=QUIET | {"Why": "credential lives only 0 s more (least 3600 s)"}),
              "the factory submits none: credential lives only 0 s more", "alpha"),
    Situation("pilots fail on the workers",
              alpha(factory={"Failed": 7, "FailedLast": NOW - 130,
                             "FailedWhy": "validate_node.sh: 3 MB of free space, 100 are needed"}),
              "7 pilots failed within an hour, the last 2 min ago: validate_node.sh: 3 MB of free space", "alpha"),
    Situation("pilots are held",
              alpha(factory={"StatusIdle": 0, "StatusHeld": 3, "HoldReason": "AREX: 403 Forbidden"}),
              "3 pilots held: AREX: 403 Forbidden", "alpha"),
    Situation("the computing element is away", alpha(factory={"StatusUnsubmitted": 5}),
              "5 pilots submitted, the computing element (ce.alpha:2119) has taken none yet", "alpha"),
    Situation("the batch system is full", SCENE,
              "5 pilots queued at the computing element, the oldest for 12 min: its batch system has no free slot",
              "alpha"),
    Situation("a pilot starts", alpha(factory={"StatusIdle": 0, "StatusRunning": 1}),
              "1 pilot started at the site, none in the pool yet", "alpha"),
    Situation("a slot is free for it", slots({}), "slot1@glidein_7@wn1 is free for it, in the negotiator's next cycle",
              "alpha"),
    Situation("a free slot is too small", slots({"Memory": 100}),
              "1 slot is free, and none takes the job: RequestMemory 128 > 100 MB that are free there", "alpha"),
    Situation("a free slot's pilot retires", slots({"GLIDEIN_ToRetire": NOW - 1}),
              "1 slot is free, and none takes the job: the pilot takes no new jobs, its time is over", "alpha"),
    Situation("it needs longer than any pilot has left",
              replace(slots({}), job=dict(JOB) | {"MaxWallTimeMins": 600}),
              "1 slot is free, and none takes the job: the job says that it needs 10 h, the pilot has 2 h left",
              "alpha"),
    Situation("its own requirements",
              replace(slots({}), job=dict(JOB) | {"Requirements": Expr('TARGET.Arch == "PPC"', open=True)}),
              "1 slot is free, and none takes the job: the job's Requirements are not true of it", "alpha"),
    Situation("all slots have jobs", slots({"State": "Claimed"}),
              "1 slot there, all with jobs; the next pilot comes when the site has room", "alpha"),
    Situation("no such entry", SCENE, "no frontend sees an entry gamma; there are alpha, beta",
              explain=lambda scene: explain_entry(scene, "gamma")),
    Situation("an entry, for all its frontends", SCENE,
              "5 pilots queued at the computing element, the oldest for 12 min", "alpha (gridlab.main)",
              explain=lambda scene: explain_entry(scene, "alpha")),
]  # fmt: skip


@pytest.mark.parametrize("one", SITUATIONS, ids=lambda one: one.what)
def test_the_first_answer_is_what_stops_it(one: Situation) -> None:
    first = one.explain(one.scene)[0]
    assert first.text.startswith(one.says), first
    assert first.entry == one.entry
    assert first.command, "nobody can check it"


def test_the_only_entry_is_told_of_in_the_singular() -> None:
    only = replace(job(DESIRED_Sites="gamma"), resources=(ALPHA,))
    assert explain_job(only)[0].text == '1 of 1 entry does not match: alpha (DESIRED_Sites = "gamma")'


def test_who_matches_and_who_does_not_are_both_told() -> None:
    first, second = explain_job(SCENE)
    assert (first.entry, second.entry) == ("alpha", "")
    assert second.text == '1 of 2 entries does not match: beta (DESIRED_Sites = "alpha")'
    assert "beta" not in first.text


@pytest.mark.parametrize("absurd", [Expr("error"), "many", -1, float("nan"), True, 2**62, "\ud800"])
def test_an_absurd_ad_ends_nothing(absurd: Any) -> None:
    """Every attribute of every ad, one after the other, and all of an ad at once."""
    def changed(ad: Ad) -> list[dict[str, Value]]:
        return [dict(ad) | {name: absurd} for name in ad] + [dict.fromkeys(ad, absurd), {}]

    scenes = [replace(SCENE, job=ad) for ad in changed(JOB)] + [replace(SCENE, schedd=ad) for ad in changed(SCHEDD)]
    scenes += [replace(SCENE, groups=[ad]) for ad in changed(GROUP)]
    scenes += [replace(SCENE, resources=[ad]) for ad in changed(ALPHA)]
    scenes += [replace(slots({}), slots=[ad]) for ad in changed(SLOT)]
    for scene in scenes:
        for answer in [*explain_job(scene), *explain_entry(scene, "alpha")]:
            assert str(answer).encode("utf-8", "replace")


@pytest.mark.parametrize(
    ("seconds", "said"), [(-3, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 days")]
)
def test_times_are_told_as_people_tell_them(seconds: float, said: str) -> None:
    assert span(seconds) == said


def rows() -> str:
    """Return the table of docs/why.md."""
    found = [(one.what, one.explain(one.scene)[0]) for one in SITUATIONS]
    body = [[what, str(answer).partition("\n")[0].replace("|", "\\|"), f"`{answer.command}`".replace("|", "\\|")]
            for what, answer in found]  # fmt: skip
    return "\n".join(document.table(["what is so", "pilotbed-why", "what shows it"], body))


def test_the_page_has_what_it_says() -> None:
    assert rows() in (CHECKOUT / "docs/why.md").read_text(), "run: python tests/unit/test_why.py"


if __name__ == "__main__":
    document.write(CHECKOUT / "docs/why.md", "situations", rows())
