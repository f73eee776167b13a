"""A plug-in of pytest: what it gives to tests on a grid, which are its parts, sites of a kind, people, jobs.

A conftest.py that wants it has ``pytest_configure`` import it. With ``import *``, each directory had every fixture of a
session once more: the second ``cut_off`` waited for a site that the first one had cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from testinfra.host import Host

from . import walk
from .reach import host
from .support import GRID, HOLD, CutOff, Grid, Jobs, Site, until


@pytest.fixture(scope="session")
def grid() -> Grid:
    return GRID


@pytest.fixture(scope="session")
def submit() -> Host:
    return GRID.node("submit")


@pytest.fixture(scope="session")
def central() -> Host:
    return GRID.node("central_manager")


@pytest.fixture(scope="session")
def relay() -> Host:
    return GRID.node("relay")


@pytest.fixture(scope="session")
def hidden_site() -> Site:
    """A site behind NAT, reached through the relay."""
    return GRID.site("behind NAT with a relay", lambda site: (site.flavour, site.traversal) == ("nat", "relay"))


@pytest.fixture(scope="session")
def filtered_site() -> Site:
    """A routed site that lets nothing in; its pilots are reached by CCB."""
    return GRID.site("with a filter and CCB", lambda site: (site.flavour, site.traversal) == ("filter", "ccb"))


@pytest.fixture(scope="session")
def any_site() -> Site:
    """A site, of any kind: for what is the same at all of them."""
    return GRID.site("", lambda site: True)


@pytest.fixture(scope="session")
def local_site() -> Site:
    """A site whose workers ask their own LCMAPS."""
    return GRID.site("without a mapping service", lambda site: site.ce not in GRID.names("mapping_service"))


@pytest.fixture(scope="session")
def alice() -> walk.Walker:
    return walk.walker("alice")


@pytest.fixture(scope="session")
def bob() -> walk.Walker:
    return walk.walker("bob")


@pytest.fixture(scope="session")
def carol() -> walk.Walker:
    """A member who may lose her certificate."""
    return walk.walker("carol")


@pytest.fixture(scope="session")
def mallory() -> walk.Walker:
    """Has a certificate, and is no member of any VO."""
    return walk.walker("mallory")


@pytest.fixture(scope="module")
def jobs(submit: Host) -> Iterator[Jobs]:
    with closing(Jobs(submit)) as made:
        yield made


@pytest.fixture(scope="module")
def pilots(jobs: Jobs, alice: walk.Walker, central: Host) -> Callable[..., None]:
    """Have pilots at a site: ``pilots(site, count)`` returns when so many are there, after as many jobs if need be."""

    def have(site: Site, count: int = 1) -> None:
        if len(site.slots(central)) < count:
            waiting = [jobs.submit(alice, site, f"#!/bin/sh\n{HOLD}\n") for _ in range(count)]
            for job in waiting:
                job.holds(site)
            for job in waiting:
                job.remove()
        until(f"{count} pilots of {site.name} are in the pool", lambda: len(site.slots(central)) >= count)

    return have


@pytest.fixture(scope="session")
def workers() -> dict[str, Host]:
    """Every worker by its name."""
    return {name: host(name) for name in GRID.names("worker")}


@pytest.fixture(scope="session")
def cut_off(submit: Host, central: Host, any_site: Site, alice: walk.Walker) -> Iterator[CutOff]:
    """Alice's job at a site that was cut off then."""
    with closing(Jobs(submit)) as made:
        job = made.submit(alice, any_site, f"#!/bin/sh\n{HOLD}\n", "job_lease_duration = 60")
        cut = CutOff(any_site, central, job, *job.holds(any_site), job.ad()["NumJobStarts"])
        cut.begin()
        yield cut
        cut.end()


@pytest.fixture(scope="session")
def elsewhere(request: pytest.FixtureRequest, any_site: Site) -> Site:
    """A site for what needs no particular one; where there are several another one may be cut off, which takes long."""
    site = GRID.sites[-1]
    if site != any_site and any("cut_off" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("cut_off")
    return site
