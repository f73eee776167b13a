"""A payload that daemonises: it is gone, its user is banned at the site, and nobody else is."""

from collections.abc import Iterator

from pilotbed_suite import inventory
from pilotbed_training import examine

#: What a ban is: whom it keeps out is asked below. One list is enough, the one that decides.
ALLOWED = (
    ("mapping_service", "file /etc/grid-security/ban_*.db"),
    ("computing_element", "file /etc/grid-security/ban_*.db"),
    ("worker", "file /etc/grid-security/ban_*.db"),
)


def process_is_gone() -> Iterator[str]:
    """The process that calls itself a kernel thread is gone."""
    for name in inventory.load().names("worker"):
        look = "pgrep -f '^.kworker/u9:3-events. 3333' | head -n 1"
        if pid := examine.said(examine.host(name), look):
            user = examine.said(examine.host(name), f"ps -o user:20= -p {pid}")
            yield f"it runs on {name}, PID {pid}, as {user}"


def its_user_is_banned() -> Iterator[str]:
    """The site gives the user whose payload it is no account any more."""
    given, why = examine.site_gives(examine.fresh_proxy("carol"))
    if given:
        yield f"her next payload would run, as {given}"
    elif "203" not in why:
        yield f"it is refused, but not by a ban: {why}"


def nobody_else_is_banned() -> Iterator[str]:
    """The site gives all others an account."""
    for account in ("alice", "bob"):
        yield from examine.no_account(account)


def honest_payload_runs() -> Iterator[str]:
    """Bob's payload, which ran beside it, has not been ended."""
    ads = [ad for ad in examine.all_called("lesson-11") if ad.get("Owner") == "bob"]
    if not any(ad.get("JobStatus") == 2 for ad in ads):
        yield "his job does not run any more: he had done nothing"


CHECKS = (process_is_gone, its_user_is_banned, nobody_else_is_banned, honest_payload_runs)
JOBS = ()
