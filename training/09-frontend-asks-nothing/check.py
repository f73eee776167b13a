"""The frontend asks for nothing: it must ask for pilots when jobs wait, and alice's jobs must have run."""

import json
from collections.abc import Iterator

from pilotbed_training import examine

#: The match may be the default or a better one: what counts is what becomes of the jobs.
ALLOWED = (("frontend", "file /etc/pilotbed/frontend/main.toml"),)
JOBS_OF_ALICE = "lesson-09"


def idle_jobs_are_counted() -> Iterator[str]:
    """The frontend counts the jobs that wait."""

    def left() -> list[str]:
        idle = [job for job, ad in examine.jobs_called(JOBS_OF_ALICE).items() if ad["JobStatus"] == 1]
        text = examine.said(examine.service("frontend"), "cat /run/pilotbed/frontend/main/state.json")
        entries = json.loads(text or "{}").get("entries", {}) if text.startswith("{") else {}
        return [] if any(entry.get("JobsIdle") or entry.get("JobsRunning") for entry in entries.values()) else idle

    # It looks every few seconds.
    if examine.within(8, lambda: not left()):
        return
    yield f"alice's jobs {', '.join(left())} are idle, and it counts none of them for any entry"


def jobs_have_run() -> Iterator[str]:
    """Alice's jobs have run."""
    yield from examine.called_jobs_end_well(JOBS_OF_ALICE, 2)


CHECKS = (idle_jobs_are_counted,)
JOBS = (jobs_have_run,)
