"""Asking the grid of a payload: whose it is first, then all that is known of it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pilotbed.trace import records
from pilotbed.trace.records import Payload

from .. import GridError
from ..inventory import Inventory
from . import found, nodes
from .nodes import NodeError, ok, side_by_side

#: Attributes of the factory's job that name the pilot at its computing element.
_PILOT = ("GridJobId", "GridResource", "GlideinEntryName", "GridJobStatus", "JobStatus", "QDate", "ClusterId", "ProcId")


def job_ad(node: str, job: str) -> dict[str, Any]:
    """Return the ad of a job (cluster.proc) from the queue or the history of a submit host.

    Raises:
        GridError: the schedd knows no such job, or does not answer.
    """
    for tool in ("condor_q -allusers", "condor_history -limit 1"):
        ads = nodes.listed(node, ok(node, f"{tool} -json %s", job))
        if ads:
            return ads[0]
    raise GridError(f"{node} knows no job {job}: condor_q and condor_history there have those that it knows")


def people(known: Inventory) -> dict[str, str]:
    """Return the DN of every user of the inventory, by account."""
    prefix = str(known.variable("grid_people_dn_prefix") or "")
    return {one["account"]: prefix + one["dn_name"] for one in known.variable("grid_users") or []}


def traced(node: str, *arguments: str) -> list[Payload]:
    """Return the payloads that pilotbed-trace has on a worker. Raises NodeError."""
    done = ok(node, "pilotbed-trace --json " + " ".join(["%s"] * len(arguments)), *arguments)
    try:
        return [records.from_json(one) for one in nodes.listed(node, done)]
    except records.Unreadable as error:
        raise NodeError(f"{node}: pilotbed-trace: {error}") from error


def payloads(known: Inventory, dns: Sequence[str], since: float) -> tuple[list[Payload], list[str]]:
    """Return all that users have run on all workers since a time (1970 s), and which workers did not answer."""
    asked = list(itertools.product(known.names("worker"), dns))
    answers = side_by_side(
        known.names("worker"),
        lambda node: [one for name, dn in asked if name == node
                      for one in traced(node, "--dn", dn, "--since", f"@{int(since)}")],
    )  # fmt: skip
    return gathered(answers.values())


def gathered(answers: Iterable[list[Payload] | NodeError]) -> tuple[list[Payload], list[str]]:
    """Return the payloads of all answers, by start, and who did not answer."""
    runs, silent = [], []
    for answer in answers:
        if isinstance(answer, NodeError):
            silent.append(str(answer))
        else:
            runs += answer
    return sorted(runs, key=lambda one: one.start), silent


def identify(known: Inventory, node: str, job: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ad and user of a job, cluster.proc, of a submit host.

    Where glexec has recorded the job as another one's, his DN is among the user's, and is blocked as well.

    Raises:
        NodeError: the schedd does not answer.
        GridError: there is no such job, or its ad does not say whose it is.
    """
    ad = job_ad(node, job)
    user = found.user_of(ad, people(known))
    worker = found.machine(ad, "GLIDEIN_Worker").partition(".")[0]
    if worker in known.names("worker"):
        try:
            runs = traced(worker, "--node", worker, "--since", f"@{int(queued(ad)) - 60}")
        except NodeError:
            runs = []  # it is asked again, and told, when the user is blocked
        theirs = (one.dn for one in found.runs_of(named(known, node, job), runs) if one.dn)
        user["dns"] = list(dict.fromkeys([*user["dns"], *theirs]))
    return ad, user


def named(known: Inventory, node: str, job: str) -> str:
    """Return a job's name as GlobalJobId begins."""
    return f"{node}.{known.variable('grid_domain')}#{job}"


def queued(ad: Mapping[str, Any]) -> float:
    """Return when a job was submitted (1970 s), as the schedd says in its name: QDate can be its user's own word."""
    when = found.text_of(ad, "GlobalJobId").rpartition("#")[2]
    return float(when) if when.isdecimal() and len(when) == 10 else time.time() - 86400


def pilot_at_element(known: Inventory, number: str) -> dict[str, str]:
    """Return how a pilot, the factory's job CLUSTER.PROC, is called at its computing element; {} if it is forgotten."""
    node = known.first("factory")
    for tool in ("condor_q -allusers", "condor_history -limit 1"):
        asked = f"pilotbed-factory-pool {tool} -json -attributes %s %s"
        for ad in nodes.listed(node, ok(node, asked, ",".join(_PILOT), number)):
            return {"computing element job": found.text_of(ad, "GridJobId"),
                    "computing element": found.text_of(ad, "GridResource")}  # fmt: skip
    return {}


def look(known: Inventory, node: str, job: str, ad: Mapping[str, Any], user: Mapping[str, Any],
         before: Mapping[str, Any]) -> tuple[dict[str, Any], list[Payload], list[str]]:  # fmt: skip
    """Find all that is known of a job.

    Args:
        known: the inventory.
        node: its submit host.
        job: cluster.proc.
        ad: its ad.
        user: whose it is.
        before: what an earlier look has found, when there was more to see; {} for none.

    Returns:
        What was found, in JSON's types; the job's runs; who did not answer.
    """
    runs, silent = payloads(known, user["dns"], queued(ad) - 60)
    mine = found.runs_of(named(known, node, job), runs)
    result = {
        "job": named(known, node, job), "schedd": node,
        "status": found.STATUS.get(ad.get("JobStatus", 0), "unknown"), "user": dict(user),
        "contact": known.variable("grid_security_contact") or {}, **found.of_job(ad, mine),
    }  # fmt: skip
    result["others"] = [found.payload(one) for one in runs if one not in mine]
    if number := result["pilot"]["factory job"]:
        try:
            result["pilot"] |= pilot_at_element(known, number)
        except NodeError as error:
            silent.append(str(error))
    if not mine and before.get("runs"):  # its worker does not answer now
        result |= {name: before[name] for name in ("site", "entry", "node", "payload account", "runs")}
    result["pilot"] = before.get("pilot", {}) | {name: said for name, said in result["pilot"].items() if said}
    seen = {one.node.partition(".")[0] for one in runs if one.end is None}
    proxy = found.text_of(ad, "x509userproxy")
    places: dict[str, list[str]] = {name: [] for name in known.names("worker") if name in seen}
    places[node] = [*places.get(node, []), proxy] if proxy.startswith("/") else places.get(node, [])
    asked = {"dns": [*user["dns"], *{one.dn for one in runs}]}
    answers = side_by_side(places, lambda name: looked(name, {**asked, "paths": places[name]}))
    result["looks"] = list(before.get("looks", []))
    for name, answer in answers.items():
        if isinstance(answer, NodeError):
            silent.append(str(answer))
        elif answer["payloads"] or answer["files"]:
            result["looks"].append({"node": name, **answer})
    result["ad"] = dict(ad)
    return result, mine, silent


def looked(node: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what onnode/look.py sees. Raises NodeError."""
    said = nodes.program(node, "look", asked, deadline=30).text
    try:
        answer: dict[str, Any] = json.loads(said)
    except ValueError as error:
        raise NodeError(f"{node}: look.py: {error}") from error
    return answer
