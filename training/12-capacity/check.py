"""Capacity: no limit keeps the grid below what the site could do, and alice has her fair share of it."""

from collections.abc import Iterator

from pilotbed_suite import inventory, walk
from pilotbed_training import examine

#: A limit that is high enough is none.
ALLOWED = (
    ("submit", "file /etc/condor/config.d/90-limits.conf"),
    ("factory", "file /etc/pilotbed/factory.toml"),
)


def schedd_runs_many() -> Iterator[str]:
    """The schedd may run as many jobs as the site has room for."""

    def limit() -> int:
        told = examine.said(examine.service("submit"), "condor_config_val -schedd MAX_JOBS_RUNNING")
        return int(told) if told.isdigit() else 10000

    if limit() < 40:
        yield f"it runs at most {limit()} jobs at a time (MAX_JOBS_RUNNING), and 40 wait"


def entry_takes_pilots() -> Iterator[str]:
    """The factory may have as many pilots as jobs ask for."""
    asked = "pilotbed-factory-pool condor_status -any -constraint %s -af GlideinConfigPerEntryMaxGlideins"

    def limits() -> list[int]:
        told = examine.said(examine.service("factory"), asked, 'GlideinMyType == "glidefactory"').split()
        return [int(each) for each in told if each.isdigit()]

    # It advertises anew when it has been restarted.
    if not examine.within(15, lambda: limits() and min(limits()) >= 10):
        yield f"an entry takes no more pilots than {min(limits(), default=0)} (max_pilots)"


def shares_are_fair() -> Iterator[str]:
    """Alice counts as much as everybody."""
    told = examine.said(examine.service("central_manager"), "condor_userprio -allusers -af Name PriorityFactor")
    factors = {name: float(factor) for name, factor in (line.split() for line in told.splitlines() if "@" in line)}
    domain = inventory.load().variable("grid_domain")
    mine = factors.get(f"alice@{domain}", 1000.0)
    others = [factor for name, factor in factors.items() if name.startswith(("bob@", "carol@"))] or [1000.0]
    if mine > 2 * max(others):
        yield f"her priority factor is {mine:.0f}, others have {max(others):.0f}: of what is scarce she gets nothing"


def jobs_run_side_by_side() -> Iterator[str]:
    """Jobs of alice's run side by side."""
    node, names = examine.service("submit"), ("lesson-12-one", "lesson-12-other")
    script, before_others = "#!/bin/sh\nexec sleep 300\n", "priority = 10"
    jobs = [
        walk.submit(node, walk.walker("alice"), name, walk.default_site(), script, before_others) for name in names
    ]
    try:
        running = f"condor_q {' '.join(jobs)} -constraint 'JobStatus == 2' -af ClusterId"
        if not examine.within(examine.JOB, lambda: len(examine.said(node, running).split()) == len(jobs)):
            yield f"of alice's jobs {' and '.join(jobs)} no two ran at a time"
    finally:
        clear = f"condor_rm {' '.join(jobs)} >/dev/null 2>&1; rm -f lesson-12-one.* lesson-12-other.*"
        walk.as_user(node, "alice", clear, check=False)


CHECKS = (schedd_runs_many, entry_takes_pilots, shares_are_fair)
JOBS = (jobs_run_side_by_side,)
