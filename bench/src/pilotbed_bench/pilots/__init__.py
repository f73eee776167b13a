"""What frontend and factory need for a turn's decisions at production scale: var/bench-pilots.json, docs/scale.md.

Jobs, entries, requests and pilots are what the daemons make of ads; no grid runs. Beside the frontend's own matching
stands the same decision with every pair of a class of jobs and an entry evaluated by itself, in the same run.
"""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pilotbed.factory import decisions as factory
from pilotbed.factory.config import Entry
from pilotbed.factory.states import State
from pilotbed.factory.trust import CredentialName, Trusted
from pilotbed.frontend.config import DEFAULT_MATCH, Pressure
from pilotbed.frontend.decisions import Job, Size, View, classify, decide
from pilotbed.pool.expression import Expression
from pilotbed.protocol.ads import Client, ClientStage, FactoryName, Offer, Removal, Request, Sealed
from pilotbed.protocol.manifest import Signed
from pilotbed_suite import CHECKOUT, document

from .. import run

PAGE, MARK = CHECKOUT / "docs/scale.md", "bench-pilots"
FACTORY = FactoryName("v1", "factory")
NOW = 2e9
ROUNDS = 3
#: Pairs of classes and entries that are evaluated one by one, for comparison: more take minutes.
COMPARED = 1_000_000


@dataclass(frozen=True)
class Queue:
    """Users' jobs in so many classes, and entries. Most jobs name up to 8 sites, ``dense`` ones up to half of all."""

    jobs: int
    classes: int
    entries: int
    #: Seconds of a decision, at most; MB of the process.
    aim: float
    memory: int | None = None
    dense: bool = False

    def made(self) -> tuple[list[Job], list[Offer]]:
        """Return the jobs and the entries."""
        chance = random.Random(1)  # noqa: S311 # the same in each run
        offers = [
            Offer(FACTORY, f"entry{at}", {
                "GLIDEIN_Site": f"site{at}", "GLIDEIN_CPUS": chance.choice((1, 8, 16)),
                "GLIDEIN_MaxMemMBs": chance.choice((4000, 16000, 32000)),
            }, {}, in_downtime=False, public_pem="", key_id="")
            for at in range(self.entries)
        ]  # fmt: skip
        kinds: list[tuple[dict[str, str | int], Size]] = []
        for at in range(self.classes):
            cpus = chance.choice((1, 1, 2, 8))
            attributes: dict[str, str | int] = {"RequestCpus": cpus}
            if at % 10:
                count = chance.randint(self.entries // 3, self.entries // 2) if self.dense else chance.randint(1, 8)
                sites = chance.sample(range(self.entries), count)
                attributes["DESIRED_Sites"] = ",".join(f"site{one}" for one in sites)
            kinds.append((attributes, Size(cpus, chance.randint(500, 8000), 100)))
        jobs = []
        for at in range(self.jobs):
            attributes, size = kinds[at % self.classes]
            jobs.append(Job(True, NOW - chance.randint(0, 1200), "", attributes, size, name=f"{at}.0"))
        return jobs, offers


QUEUES = (
    Queue(100_000, 2_000, 500, 0.4, 150),
    Queue(100_000, 2_000, 500, 0.4, 150, dense=True),
    Queue(100_000, 2_000, 5_000, 4.0),
    Queue(1_000_000, 20_000, 500, 4.0),
)
#: Pilots in the factory's queue, of as many entries and clients as follow; the aim in seconds.
PILOTS = ((10_000, 500, 5, 1.0), (50_000, 500, 5, 1.0))


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def frontend(queue: Queue) -> dict[str, Any]:
    """Return seconds of classifying the jobs, of a first decision, of the next turn's, and pair by pair; MB."""
    jobs, offers = queue.made()
    before = _memory()
    found: dict[str, Any] = {"classify": min(_timed(lambda: classify(jobs, NOW, 600)) for _ in range(ROUNDS))}
    classes = classify(jobs, NOW, 600)
    view = View(classes, offers, [])
    firsts, nexts = [], []
    for _ in range(ROUNDS):
        match = Expression(DEFAULT_MATCH)
        firsts.append(_timed(partial(decide, view, Pressure(), match)))
        nexts.append(_timed(partial(decide, view, Pressure(), match)))
    found |= {"first": sorted(firsts)[ROUNDS // 2], "next": sorted(nexts)[ROUNDS // 2], "memory": _memory(),
              "jobs_memory": before}  # fmt: skip
    if len(classes) * len(offers) <= COMPARED:
        found["pairs"] = _timed(partial(decide, view, Pressure(), Expression(DEFAULT_MATCH).__call__))
    return found


def queue_of_pilots(pilots: int, entries: int, clients: int) -> float:
    """Return the seconds of the factory's decision on as many requests as there are entries and clients."""
    chance = random.Random(1)  # noqa: S311 # the same in each run
    groups = [Client("vo", f"group{at}") for at in range(clients)]
    credentials = [CredentialName("vo", "class", str(group), "K6X3URBI") for group in groups]
    nothing = Signed("", "")
    stage, sealed = ClientStage("", "sha1", nothing, nothing, ""), Sealed("", "", "", {})
    requests = [
        Trusted(
            Request(FACTORY.entry(f"entry{at}"), group, "K6X3URBI", 5, 100, Removal.NO, 0, 3600, stage, {}, sealed),
            credential,
            {},
        ) for at in range(entries) for group, credential in zip(groups, credentials, strict=True)
    ]  # fmt: skip
    states = (State.RUNNING, State.RUNNING, State.PENDING, State.UNSUBMITTED, State.HELD)
    template = factory.Pilot("", "", "", "vo:class", "K6X3URBI", State.RUNNING, NOW)
    queue = [
        replace(template, job=f"{at}.0", entry=f"entry{at % entries}", client=chance.choice(credentials).client,
                state=chance.choice(states))
        for at in range(pilots)
    ]  # fmt: skip
    entry = Entry("condor", "ce.grid.test ce.grid.test:9619", "grid")
    configured = {f"entry{at}": entry for at in range(entries)}
    left = dict.fromkeys(credentials, 86400)
    decision = partial(factory.manage, requests, configured, queue, left, 3600)
    return sorted(_timed(decision) for _ in range(ROUNDS))[ROUNDS // 2]


def measure() -> dict[str, Any]:
    """Return what a run finds, each case in a process of its own."""
    found: dict[str, Any] = {"frontend": [], "factory": []}
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as alone:
        for queue in QUEUES:
            found["frontend"].append(alone.submit(frontend, queue).result())
        for pilots, entries, clients, _ in PILOTS:
            found["factory"].append(alone.submit(queue_of_pilots, pilots, entries, clients).result())
    return found


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rows, aims = [], []
    for queue, one in zip(QUEUES, found["frontend"], strict=True):
        name = f"{queue.jobs:,} in {queue.classes:,} x {queue.entries:,}{' dense' if queue.dense else ''}"
        ratio = f"{one['pairs'] / one['first']:.0f}" if "pairs" in one else ""
        seconds = [f"{one[what]:.2f}" for what in ("classify", "first", "next")]
        rows.append([name, *seconds, ratio, str(one["memory"]), str(one["jobs_memory"])])
        aims.append((f"{name}: at most {queue.aim} s", f"{one['first']:.2f} s", one["first"] <= queue.aim))
        if queue.memory is not None:
            aims.append((f"{name}: below {queue.memory} MB", f"{one['memory']} MB", one["memory"] < queue.memory))
    pilots = []
    for (count, entries, clients, aim), seconds in zip(PILOTS, found["factory"], strict=True):
        pilots.append([f"{count:,}", f"{entries} x {clients}", f"{seconds:.2f}"])
        aims.append((f"factory, {count:,} pilots: at most {aim} s", f"{seconds:.2f} s", seconds <= aim))
    head = ["jobs in classes x entries", "classify", "decide", "next turn", "pair by pair / decide", "MB", "jobs' MB"]
    lines = [
        "Seconds, the middle of three; MB are the process's, and what of it was there with the jobs alone.", "",
        *document.table(head, rows), "",
        *document.table(["pilots", "entries x clients", "factory's decision"], pilots), "",
        *document.aims(aims),
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Measure; write var/bench-pilots.json and the page's tables, and print these."""
    document.publish(PAGE.read_text(), MARK, "")  # rather now than after minutes
    found = run.conditions() | measure() | {"load_at_the_end": os.getloadavg()[0]}
    target = CHECKOUT / "var/bench-pilots.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    text = f"{run.heading('make bench-pilots', found)} {tables(found)}"
    document.write(PAGE, MARK, text)
    print(text)
    return 0
