"""The CRL that expired: the worker must know who is revoked, tomorrow, too."""

from collections.abc import Iterator
from datetime import UTC, datetime

from pilotbed_suite import inventory
from pilotbed_training import examine

ALLOWED = ()
CRL = "/etc/grid-security/certificates/*.r0"


def crl_is_valid() -> Iterator[str]:
    """Every node has a CRL that is valid."""
    for name in inventory.load().hosts():
        told = examine.said(examine.host(name), f"openssl crl -noout -nextupdate -in {CRL}").partition("=")[2]
        ends = datetime.strptime(told, "%b %d %H:%M:%S %Y %Z").replace(tzinfo=UTC) if told else None
        if ends is None or ends < datetime.now(UTC):
            yield f"on {name} the CRL has expired ({told or 'there is none'})"


def crl_is_fetched() -> Iterator[str]:
    """Every node fetches a newer one by itself, also after its next boot."""
    for name in inventory.load().hosts():
        for verb in ("is-active", "is-enabled"):
            state = examine.said(examine.host(name), f"systemctl {verb} pilotbed-fetch-crl.timer")
            if state not in ("active", "enabled"):
                yield f"on {name} pilotbed-fetch-crl.timer is {state}"


def alice_has_an_account() -> Iterator[str]:
    """The site gives alice's payloads an account."""
    yield from examine.no_account("alice")


def job_runs() -> Iterator[str]:
    """A job of alice's runs."""
    yield from examine.job_runs("alice")


CHECKS = (crl_is_valid, crl_is_fetched, alice_has_an_account)
JOBS = (job_runs,)
