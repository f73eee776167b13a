"""Proxy anatomy: alice's proxy is of her group first, may be delegated, and lasts; its jobs run as that group's."""

import re
import time
from collections.abc import Iterator

from pilotbed_suite import inventory, walk
from pilotbed_training import examine

ALLOWED = ()
#: Seconds that a proxy must have left, for a job that waits a while.
LEFT = 3 * 3600


def _info(option: str) -> list[str]:
    node = examine.service("submit")
    told = walk.as_user(node, "alice", f"voms-proxy-info {option} 2>&1", check=False)
    return told.splitlines()


def proxy_lasts() -> Iterator[str]:
    """Alice has a proxy that lasts for a job that waits a while."""
    told = (_info("--timeleft") or [""])[0]
    if not told.isdigit():
        yield f"voms-proxy-info says: {told}"
    elif int(told) < LEFT:
        yield f"it has {int(told) // 60} minutes left, and the jobs wait longer than that"


def proxy_is_delegated() -> Iterator[str]:
    """Alice's proxy may be delegated to the worker."""
    node = examine.service("submit")
    shown = examine.said(node, "openssl x509 -noout -text -in %s", walk.proxy_of(node, "alice"))
    length = re.search(r"Path Length Constraint: (\d+)", shown)
    if length and int(length[1]) < 2:
        yield f"its path length is {int(length[1])}: what is delegated from it is no valid chain any more"
    if "limited" in " ".join(_info("--type")):
        yield "it is a limited proxy itself"


def group_comes_first() -> Iterator[str]:
    """The first FQAN of alice's proxy is her group's."""
    wanted = f"/{inventory.load().variable('grid_vos')[0]['name']}/analysis"
    first = (_info("--fqan") or ["none"])[0]
    if not re.match(rf"{re.escape(wanted)}(/Role=NULL)?(/Capability=NULL)?$", first):
        yield f"it is {first}, and not {wanted}"


def job_is_the_groups() -> Iterator[str]:
    """A job with alice's proxy, as it is, runs as her group's."""
    node, name = examine.service("submit"), f"lesson-02-{int(time.time())}"
    text = walk.SUBMIT.format(name=name, sites=walk.default_site(), proxy=walk.proxy_of(node, "alice"))
    try:
        job = walk.as_user(
            node, "alice",
            f"printf %s '{text}' > {name}.sub && printf '#!/bin/sh\\nid\\n' > {name}.sh && chmod 755 {name}.sh && "
            f"condor_submit -terse {name}.sub",
        ).split()[0]  # fmt: skip
        wrong = list(examine.ends_well(job))
        yield from wrong
        if not wrong:
            lines = [
                line for worker in inventory.load().names("worker")
                for line in examine.said(
                    examine.host(worker), f"journalctl -t glexec -o cat --no-pager | grep -F '#{job}#'"
                ).splitlines()
            ]  # fmt: skip
            if not any('/analysis/Role=NULL' in line for line in lines):
                yield f"glexec's record of job {job} has not her group's FQAN: {(lines or ['none'])[-1][:300]}"
    finally:
        walk.as_user(node, "alice", f"rm -f {name}.*", check=False)


CHECKS = (proxy_lasts, proxy_is_delegated, group_comes_first)
JOBS = (job_is_the_groups,)
