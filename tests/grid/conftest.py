"""The running grid, asked as its users and its operators do.

    users: submit ── schedd ──▶ central (collector, negotiator, CCB) ◀── pilots at the sites
    pilots: frontend ──▶ factory ──▶ CE (A-REX, Slurm) ──▶ worker: glidein_startup.sh ──▶ startd ──▶ glexec ──▶ payload

Which node does what comes from the inventory. `make grid` boots and deploys the lab first; for another inventory set
PILOTBED_CONNECTION=paramiko, PILOTBED_SSH_CONFIG and ANSIBLE_INVENTORY. What a test changes on a node is put back.
"""

import pytest
from pilotbed_suite import matrix, walk
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, HOLD, Jobs, until

TOLD = pytest.StashKey[set]()
SHOWN = pytest.StashKey[dict]()


#: What a scenario of molecule can choose by `-m` (extensions/molecule).
MARKERS = {
    "walk": "users' jobs at every site, and what each part of the grid did for them",
    "ce": "a computing element: who may submit there, and what becomes of a pilot's proxy",
    "batch": "a batch system: G1 to G14 of docs/glexec.md",
    "revocation": "who is revoked or banned is kept out everywhere, and let in again",
    "vos": "two VOs on one grid",
    "edges": "what the firewalls of sites let through",
    "upgrade": "what another release's grid must not lose (tests/upgrade)",
}


def pytest_configure(config):
    for name, what in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {what}")
    config.addinivalue_line(
        "markers", "needs(name, ...): a test of a batch system, only of those that have it: attributes of its class"
    )
    config.addinivalue_line("markers", "flavour(group): a test of one flavour, only where the inventory has it")
    config.addinivalue_line(
        "markers",
        "stage(number): when a module of the grid tests runs: 0 makes pilots that others find warm, 1 (default) leaves "
        "things as they were, 2 leaves the grid without pilots for a while, 3 judges what all others have put back",
    )


def _stage(item):
    marker = item.get_closest_marker("stage")
    return marker.args[0] if marker else 1


def _has_what_it_needs(item):
    flavour = item.get_closest_marker("flavour")
    if flavour and not GRID.names(flavour.args[0]):
        return False
    marker = item.get_closest_marker("needs")
    return not marker or all(getattr(item.module.SYSTEMS[item.callspec.params["batch"]], name) for name in marker.args)


def _note(item, outcome):
    """Keep what a test shows of a batch system; of its parts the worst counts."""
    if item.path.name == "test_batch.py":
        shown = item.session.stash.setdefault(SHOWN, {}).setdefault(item.callspec.params["batch"], {})
        name = item.originalname.removeprefix("test_")
        shown[name] = max(shown.get(name, outcome), outcome, key=matrix.WORST.index)


def pytest_sessionfinish(session):
    """Keep what all of test_batch has shown."""
    for name, tests in session.stash.get(SHOWN, {}).items():
        if "passed" in tests.values() and not session.config.option.keyword:
            group = f"batch_{name}"
            flavours = (GRID.variable("computing_element_flavour", node) for node in GRID.names(group))
            matrix.keep(group, next(filter(None, flavours)), tests)


def pytest_collection_modifyitems(config, items):
    without = [item for item in items if not _has_what_it_needs(item)]
    config.hook.pytest_deselected(items=without)
    for item in without:
        _note(item, "not tried")
    items[:] = filter(_has_what_it_needs, items)
    grid = [item for item in items if item.path.parent.name == "grid"]
    rest = [item for item in items if item.path.parent.name != "grid"]
    items[:] = rest + sorted(grid, key=_stage)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The first failure of a module comes with what the services say."""
    report = yield
    if report.failed or (report.passed and report.when == "call"):
        _note(item, report.outcome)
    told = item.session.stash.setdefault(TOLD, set())
    if report.failed and item.path.parent.name == "grid" and item.path not in told:
        told.add(item.path)
        report.sections.append(("the grid's services", walk.explain()))
    return report


@pytest.fixture(scope="session")
def grid():
    return GRID


@pytest.fixture(scope="session")
def submit():
    return GRID.node("submit")


@pytest.fixture(scope="session")
def central():
    return GRID.node("central_manager")


@pytest.fixture(scope="session")
def relay():
    return GRID.node("relay")


@pytest.fixture(scope="session")
def hidden_site():
    """A site behind NAT, reached through the relay."""
    return GRID.site("behind NAT with a relay", lambda site: (site.flavour, site.traversal) == ("nat", "relay"))


@pytest.fixture(scope="session")
def filtered_site():
    """A routed site that lets nothing in; its pilots are reached by CCB."""
    return GRID.site("with a filter and CCB", lambda site: (site.flavour, site.traversal) == ("filter", "ccb"))


@pytest.fixture(scope="session")
def any_site():
    """A site, of any kind: for what is the same at all of them."""
    return GRID.site("", lambda site: True)


@pytest.fixture(scope="session")
def local_site():
    """A site whose workers ask their own LCMAPS."""
    return GRID.site("without a mapping service", lambda site: site.ce not in GRID.names("mapping_service"))


@pytest.fixture(scope="session")
def alice():
    return walk.walker("alice")


@pytest.fixture(scope="session")
def bob():
    return walk.walker("bob")


@pytest.fixture(scope="session")
def carol():
    """A member who may lose her certificate."""
    return walk.walker("carol")


@pytest.fixture(scope="session")
def mallory():
    """Has a certificate, and is no member of any VO."""
    return walk.walker("mallory")


@pytest.fixture(scope="module")
def jobs(submit):
    made = Jobs(submit)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pilots(jobs, alice, central):
    """Have pilots at a site: ``pilots(site, count)`` returns when so many are there, after as many jobs if need be."""

    def have(site, count=1):
        if len(site.slots(central)) < count:
            waiting = [jobs.submit(alice, site, f"#!/bin/sh\n{HOLD}\n") for _ in range(count)]
            for job in waiting:
                job.holds(site)
            for job in waiting:
                job.remove()
        until(f"{count} pilots of {site.name} are in the pool", lambda: len(site.slots(central)) >= count)

    return have


@pytest.fixture(scope="session")
def workers():
    """Every worker by its name."""
    return {name: host(name) for name in GRID.names("worker")}
