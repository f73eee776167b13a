"""The banned user: bob has an account at the site again, and carol, who has left, still has no attributes."""

from collections.abc import Iterator

from pilotbed_training import examine

ALLOWED = (
    # An empty list and one with comments ban nobody: what counts is asked below.
    ("mapping_service", "file /etc/grid-security/ban_*.db"),
)


def bob_has_an_account() -> Iterator[str]:
    """The site gives bob's payloads an account."""
    yield from examine.no_account("bob")


def alice_has_an_account() -> Iterator[str]:
    """The site gives alice's payloads an account."""
    yield from examine.no_account("alice")


def carol_is_suspended() -> Iterator[str]:
    """Carol, who has left, gets no attributes from her VO."""
    try:
        examine.fresh_proxy("carol")
    except examine.GridError:
        return
    yield "VOMS gives her attributes again: she has left, and her VO's manager has suspended her with good reason"


def job_runs() -> Iterator[str]:
    """A job of bob's runs."""
    yield from examine.job_runs("bob")


CHECKS = (bob_has_an_account, alice_has_an_account, carol_is_suspended)
JOBS = (job_runs,)
