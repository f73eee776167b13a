"""The command pilotbed-why: asks queue and pool; what to make of it is in ``situations``."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence

from pilotbed.pool import Collector, Expression, PoolError, Schedd, any_of, equals, open_door, pool_address
from pilotbed.pool.values import Ad, Value
from pilotbed.protocol.ads import Kind

from .situations import Scene, as_json, explain_entry, explain_job

_JOB = re.compile(r"([0-9]+)(\.([0-9]+))?")


def matcher() -> Callable[[str, Ad, Ad], bool]:
    """Return what tells whether an expression is true of a MY and a TARGET."""
    known: dict[str, Expression] = {}

    def matches(text: str, my: Ad, target: Ad) -> bool:
        try:  # it is somebody else's: one that cannot be read is not true
            if text not in known:
                known[text] = Expression(text)
            return known[text](my, target)
        except (PoolError, ValueError):
            return False

    return matches


def look(name: str) -> Scene:
    """Return what can be seen of job ``name`` (CLUSTER.PROC) of the local schedd; of no job, if that is empty.

    Raises:
        PoolError: the schedd or the pool's collector does not answer.
    """
    pool = Collector(pool_address())
    kinds = any_of("MyType", [Kind.GROUP.my_type, Kind.RESOURCE.my_type])
    found: dict[str, list[dict[str, Value]]] = {}
    for ad in pool.query(f"({kinds}) || (MyType == \"Machine\" && IS_GLIDEIN)"):
        found.setdefault(str(ad.get("MyType")), []).append(ad)
    job = ended = schedd = None
    if name:
        cluster, _, proc = name.partition(".")
        which = f"ClusterId == {cluster} && ProcId == {proc or 0}"
        local = Schedd()
        job = next(iter(local.query(which, ())), None)
        if job is None:
            ended = next(iter(local.history(which, 1)), None)
        else:
            schedd_name = str(job.get("GlobalJobId", "")).partition("#")[0]
            schedd = next(iter(pool.query(equals(MyType="Scheduler", Name=schedd_name))), None)
    return Scene(time.time(), name, job, ended, schedd, found.get(Kind.GROUP.my_type, []),
                 found.get(Kind.RESOURCE.my_type, []), found.get("Machine", []), matcher())  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``pilotbed-why``; 2 if the question is no question, 1 if nobody answers."""
    parser = argparse.ArgumentParser(
        prog="pilotbed-why", description="Why does a job not run, an entry have no pilots? The first reason, in words."
    )
    parser.add_argument("job", nargs="?", default="", metavar="CLUSTER[.PROC]", help="a job of this host's queue")
    parser.add_argument("--entry", default="", help="an entry or a site: for all of the frontends that see it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if bool(options.job) == bool(options.entry):
        parser.error("a job, or --entry ENTRY")
    if options.job and not _JOB.fullmatch(options.job):
        parser.error(f"{options.job!r} is no job: CLUSTER or CLUSTER.PROC, as condor_q shows it")
    name = options.job and (options.job if "." in options.job else f"{options.job}.0")
    try:
        open_door()
        scene = look(name)
    except PoolError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    answers = explain_entry(scene, options.entry) if options.entry else explain_job(scene)
    if options.json:
        print(json.dumps(as_json(answers), indent=2))
    else:
        print("\n".join(map(str, answers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
