"""What it costs that a claim ends (CLAIM_WORKLIFE in condor_vars.lst): jobs a second, with long claims and with ours.

On a deployed lab with a warm pilot, two pilots are started by hand on one worker, which differ in that alone. A user's
jobs go to one and then to the other, round by round.
"""

from __future__ import annotations

import shlex
import statistics
import time
from contextlib import ExitStack

from pilotbed_suite import CHECKOUT, document, walk
from pilotbed_suite.support import GRID, HandPilot, Site, arguments, ok, until, with_parameters, worker_with_a_pilot

from ..run import conditions, heading, ratio

PAGE = CHECKOUT / "docs/glidein.md"
ROUNDS, JOBS, CORES = 3, 60, 4
#: Seconds: HTCondor's own, and what condor_vars.lst has.
LONG, OURS = "1200", "20"

JOB = """executable = /bin/sleep
arguments = {seconds}
transfer_executable = false
should_transfer_files = yes
use_x509userproxy = true
request_memory = 64
log = bench.log
requirements = split(TARGET.Name, "@")[1] == "{slots}"
+DESIRED_Sites = "{site}"
queue {jobs}
"""


def rate(slots: str, site: Site, jobs: int = JOBS, seconds: int = 0) -> float:
    """Return the jobs a second that slots of the pool end, from the first start to the last end.

    Args:
        slots: the part of their name that they share, as a pilot's name.
        site: which of the pool's pilots the jobs ask for.
        jobs: how many, of the first user of the walk.
        seconds: what each of them takes.

    Raises:
        GridError: the jobs are not accepted.
    """
    alice, node = walk.walkers()[0], GRID.node("submit")
    text = JOB.format(slots=slots, site=site.name, jobs=jobs, seconds=seconds)
    submit = f"printf %s {shlex.quote(text)} > bench.sub && condor_submit -terse bench.sub"
    said = walk.as_user(node, alice.account, submit)
    cluster = said.split()[0].partition(".")[0]

    def ended() -> list[list[float]]:
        shown = ok(node, f"condor_history {cluster} -af JobStartDate CompletionDate").splitlines()
        return [list(map(float, line.split())) for line in shown] if len(shown) == jobs else []

    times = until(f"{jobs} jobs end", ended, max(300, 2 * jobs), every=2)
    walk.as_user(node, alice.account, "rm -f bench.sub bench.log")
    return jobs / (max(end for _, end in times) - min(start for start, _ in times))


def main() -> int:
    """Measure, and write the table into the page."""
    found = conditions()
    site, alice = GRID.site("with CCB", lambda site: site.traversal == "ccb"), walk.walkers()[0]
    walk.as_user(GRID.node("submit"), alice.account, f"voms-proxy-init --quiet --voms {alice.voms}")
    worker, options = worker_with_a_pilot(site), arguments(site)
    samples = []
    with ExitStack() as running:
        pilots = {
            life: running.enter_context(HandPilot(
                worker, with_parameters(options, CLAIM_WORKLIFE=life, GLIDEIN_CPUS=str(CORES)),
                f"/var/tmp/pilotbed-bench-{life}", f"pilotbed-bench-{life}",  # noqa: S108
            )) for life in (LONG, OURS)
        }  # fmt: skip
        for pilot in pilots.values():
            until("the pilot is in the pool", pilot.slots)
        for number in range(ROUNDS):
            began = time.monotonic()
            order = sorted(pilots, reverse=number % 2 == 0)
            samples.append({life: rate(pilots[life].name, site) for life in order})
            print(f"round {number + 1}: {samples[-1]}, {time.monotonic() - began:.0f} s", flush=True)
    rows = [
        [f"{life} s{' (ours)' if life == OURS else ''}", f"{statistics.median(sample[life] for sample in samples):.2f}",
         f"{ratio(samples, life, LONG):.2f}"] for life in (LONG, OURS)
    ]  # fmt: skip
    table = document.table(["`CLAIM_WORKLIFE`", "jobs/s", f"of that with {LONG} s"], rows)
    text = (
        f"{heading('python -m pilotbed_bench claims', found)} {JOBS} jobs of no length on {CORES} slots; "
        f"medians of {ROUNDS} alternating rounds, the ratio within a round."
    )
    document.write(PAGE, "claims", "\n".join([text, "", *table]))
    return 0
