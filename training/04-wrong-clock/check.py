"""A clock that was wrong: no certificate of the grid begins in the future, and the worker's glexec is known again."""

from collections.abc import Iterator
from datetime import UTC, datetime

from pilotbed_suite import inventory
from pilotbed_training import examine

#: A new certificate is what is asked for; with a new key, if one likes.
ALLOWED = (("worker", "file /etc/grid-security/glexec/*.pem"),)
CERTIFICATES = "/etc/grid-security/hostcert.pem /etc/grid-security/*/cert.pem /etc/grid-security/services/*/cert.pem"


def certificates_have_begun() -> Iterator[str]:
    """Every certificate of a node or a service is valid now."""
    look = f"for f in {CERTIFICATES}; do [ -e $f ] && echo $f $(openssl x509 -noout -startdate -in $f); done; true"
    for name in inventory.load().hosts():
        for line in examine.said(examine.host(name), look).splitlines():
            path, _, told = line.partition(" notBefore=")
            begins = datetime.strptime(told, "%b %d %H:%M:%S %Y %Z").replace(tzinfo=UTC) if told else None
            if begins is None or begins > datetime.now(UTC):
                yield f"on {name} {path} is not valid before {told or '?'}"


def alice_has_an_account() -> Iterator[str]:
    """The site gives alice's payloads an account."""
    yield from examine.no_account("alice")


def clocks_agree() -> Iterator[str]:
    """All nodes have the same time."""
    times = {name: int(examine.said(examine.host(name), "date +%s")) for name in inventory.load().hosts()}
    if max(times.values()) - min(times.values()) > 30:
        yield f"{max(times, key=lambda name: times[name])} is {max(times.values()) - min(times.values())} s ahead"


def job_runs() -> Iterator[str]:
    """A job of alice's runs."""
    yield from examine.job_runs("alice")


CHECKS = (certificates_have_begun, alice_has_an_account, clocks_agree)
JOBS = (job_runs,)
