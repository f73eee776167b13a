"""How the checks of lessons look at the grid: as its users do, and as those who run it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pilotbed_suite import GridError, inventory, walk
from pilotbed_suite.reach import host, service
from testinfra.host import Host

Found = TypeVar("Found")
#: Seconds that a job may take through a grid without pilots, on a machine that others use, too.
JOB = walk.DEADLINE
#: A pilot account that glexec is called by; the pilots themselves have others.
CALLER = "pilot010"
_PROXY = "/var/tmp/pilotbed-lesson-proxy.pem"  # noqa: S108 (made anew, for its account alone)


def said(node: Host, command: str, *words: str) -> str:
    """Return what a command prints, whether or not it succeeds, and its errors."""
    done = node.run(command, *words)
    return f"{done.stdout}{done.stderr}".strip()


def within(seconds: float, look: Callable[[], Found], every: float = 0.5) -> Found:
    """Return the first true value of ``look``, or the last one when ``seconds`` have passed."""
    end = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < end:
        time.sleep(every)
    return found


def fresh_proxy(account: str) -> str:
    """Return a new VOMS proxy of a user, chain and key; the user's own one stays as it is.

    Raises:
        GridError: VOMS gives none.
    """
    voms = walk.walker(account).voms
    make = f"f=$(mktemp) && voms-proxy-init --quiet --voms {voms} --out $f && cat $f; code=$?; rm -f $f; exit $code"
    return walk.as_user(service("submit"), account, make)


def site_gives(pem: str) -> tuple[str, str]:
    """Return the account that a worker's glexec gives to a proxy, or "" and what it says."""
    worker = host(inventory.load().first("worker"))
    done = worker.run(
        "install -m 0600 -o %s /dev/null %s && printf %%s %s > %s && cd / && "
        "runuser -u %s -- env GLEXEC_CLIENT_CERT=%s timeout 30 /usr/sbin/glexec /usr/bin/id -un; "
        "code=$?; rm -f %s; exit $code",
        CALLER, _PROXY, pem, _PROXY, CALLER, _PROXY, _PROXY,
    )  # fmt: skip
    if done.rc == 0:
        return str(done.stdout).strip(), ""
    return "", f"glexec ends with {done.rc}: {(done.stderr or done.stdout).strip()[-300:]}"


def no_account(account: str) -> Iterator[str]:
    """Yield what the site says where it gives a user no account."""
    given, why = site_gives(fresh_proxy(account))
    if not given:
        yield f"the site gives {account} no account, {why}"


def job_runs(account: str, seconds: float = JOB) -> Iterator[str]:
    """Yield what is wrong with a new job of a user's: it must end well, under an account of the site's."""
    node, name = service("submit"), f"lesson-{int(time.time())}"
    job = walk.submit(node, walk.walker(account), name, walk.default_site())
    try:
        yield from ends_well(job, seconds)
    finally:
        walk.as_user(node, account, f"condor_rm {job} >/dev/null 2>&1; rm -f {name}.*", check=False)


def ends_well(job: str, seconds: float = JOB) -> Iterator[str]:
    """Yield what is wrong with a job that is in the queue or was there: it must end, with exit code 0.

    A job that is held, or that glexec has refused, is not waited for.
    """
    node = service("submit")
    ad: dict[str, Any] = {}

    def over() -> bool:
        ad.clear()
        ad.update(walk.job_ad(node, job))
        return ad.get("JobStatus") in (3, 4, 5)

    within(seconds, over)
    state = walk.STATUS.get(int(ad.get("JobStatus", 0)), "not in the queue")
    who = f"{ad.get('Owner', 'the')}'s job {job}" if ad else f"job {job}"
    if state != "done":
        why = f": {ad['HoldReason']}" if state == "held" and ad.get("HoldReason") else ""
        yield f"{who} is {state}{why}"
    elif ad.get("ExitCode") != 0:
        yield f"{who} has ended with exit code {ad.get('ExitCode')}"


def all_called(batch: str) -> list[dict[str, Any]]:
    """Return the ads of all jobs with this JobBatchName: those in history, then those in the queue."""
    node, found = service("submit"), []
    for tool in ("condor_history", "condor_q -allusers"):
        text = node.run(f"{tool} -constraint %s -json", f'JobBatchName == "{batch}"').stdout.strip()
        found += json.loads(text or "[]")
    return found


def jobs_called(batch: str) -> dict[str, dict[str, Any]]:
    """Return the ads of the last cluster with this JobBatchName by the jobs' ids."""
    found = {f"{ad['ClusterId']}.{ad['ProcId']}": ad for ad in all_called(batch)}
    last = max((ad["ClusterId"] for ad in found.values()), default=0)
    return {job: ad for job, ad in found.items() if ad["ClusterId"] == last}


def called_jobs_end_well(batch: str, count: int, seconds: float = JOB) -> Iterator[str]:
    """Yield what is wrong with the jobs of this JobBatchName: there must be so many, and each must end well."""
    ads = jobs_called(batch)
    if len(ads) < count:
        yield f"of the {count} jobs called {batch} only {len(ads)} are left: condor_rm was no solution"
    end = time.monotonic() + seconds
    for job in ads:
        yield from ends_well(job, max(1.0, end - time.monotonic()))


def succeeds(node: Host, command: str, *words: str) -> Iterator[str]:
    """Yield what a command says that fails."""
    done = node.run(command, *words)
    if done.rc:
        shown = command % tuple(map(shlex.quote, words)) if words else command
        yield f"`{shown}` fails: {(done.stderr or done.stdout).strip()[-300:] or f'exit code {done.rc}'}"


__all__ = [
    "CALLER", "JOB", "GridError", "all_called", "called_jobs_end_well", "ends_well", "fresh_proxy", "host", "job_runs",
    "jobs_called", "no_account", "said", "service", "site_gives", "succeeds", "within",
]  # fmt: skip
