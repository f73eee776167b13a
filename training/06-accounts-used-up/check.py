"""Pool accounts used up: bob gets an account, and nobody who was here lately has lost theirs."""

from collections.abc import Iterator

from pilotbed_suite import inventory
from pilotbed_training import examine

ALLOWED = ()
GRIDMAPDIR = "/srv/site/gridmapdir"


def _leases() -> dict[str, tuple[int, int]]:
    """Return inode and number of links of every file of the gridmapdir, by its name."""
    node = examine.host(inventory.load().first("computing_element"))
    lines = examine.said(node, f"find {GRIDMAPDIR} -type f -printf '%f %i %n\\n'").splitlines()
    return {name: (int(inode), int(links)) for name, inode, links in (line.split(" ") for line in lines)}


def bob_has_an_account() -> Iterator[str]:
    """The site gives bob's payloads an account."""
    yield from examine.no_account("bob")


def others_keep_theirs() -> Iterator[str]:
    """Who was here within the last month has the account that they had."""
    found = _leases()
    for who in ("student%20" + number for number in ("01", "02", "03")):
        if not any(f"cn%3d{who}:" in name for name in found):
            yield f"{who.replace('%20', ' ')}, who was here lately, has lost the lease: their files are another's now"
    prefix = inventory.load().variable("grid_vos")[0]["payload_accounts"]["prefix"]
    for name, (_, links) in found.items():
        if name.startswith(prefix) and links > 2:
            yield f"{name} is leased to {links - 1} users at once"


def accounts_are_free() -> Iterator[str]:
    """There are accounts for those who come next."""
    prefix = inventory.load().variable("grid_vos")[0]["payload_accounts"]["prefix"]
    free = [name for name, (_, links) in _leases().items() if name.startswith(prefix) and links == 1]
    if len(free) < 5:
        yield f"only {len(free)} accounts {prefix}NNN are free"


def job_runs() -> Iterator[str]:
    """A job of bob's runs."""
    yield from examine.job_runs("bob")


CHECKS = (bob_has_an_account, others_keep_theirs, accounts_are_free)
JOBS = (job_runs,)
