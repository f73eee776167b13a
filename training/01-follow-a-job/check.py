"""Follow a job: each of alice's three jobs has been found where it stood, and has run."""

from collections.abc import Iterator

from pilotbed_suite import walk
from pilotbed_training import examine

ALLOWED = ()
BATCH = "lesson-01"


def _job(number: int) -> dict[str, object]:
    found = [ad for job, ad in examine.jobs_called(BATCH).items() if job.endswith(f".{number}")]
    return found[0] if found else {}


def first_is_not_held() -> Iterator[str]:
    """The first job does not stand at the schedd."""
    if _job(0).get("JobStatus") == 5:
        yield f"it is held: {_job(0).get('HoldReason')}"


def second_asks_for_a_pilot() -> Iterator[str]:
    """The second job does not stand at the frontend."""
    wish = _job(1).get("DESIRED_Sites", walk.default_site())
    if _job(1).get("JobStatus") == 1 and wish != walk.default_site():
        yield f"it wishes for site {wish}, which no entry of the factory's is"


def third_matches() -> Iterator[str]:
    """The third job does not stand at the negotiator."""
    if _job(2).get("JobStatus") == 1 and "wn9" in str(_job(2).get("Requirements")):
        yield "its Requirements ask for the worker wn9, and no pilot is there"


def jobs_have_run() -> Iterator[str]:
    """All three have run."""
    yield from examine.called_jobs_end_well(BATCH, 3)


CHECKS = (first_is_not_held, second_asks_for_a_pilot, third_matches)
JOBS = (jobs_have_run,)
