"""The running grid, asked as its users and its operators do.

    users: submit ── schedd ──▶ central (collector, negotiator, CCB) ◀── pilots at the sites
    pilots: frontend ──▶ factory ──▶ CE (A-REX, Slurm) ──▶ worker: glidein_startup.sh ──▶ startd ──▶ glexec ──▶ payload

Which node does what comes from the inventory. `make grid` boots and deploys the lab first; for another inventory set
PILOTBED_CONNECTION=paramiko, PILOTBED_SSH_CONFIG and ANSIBLE_INVENTORY. What a test changes on a node is put back.
"""

import pytest
from pilotbed_suite import matrix, walk
from pilotbed_suite.support import GRID

TOLD = pytest.StashKey[set]()
SHOWN = pytest.StashKey[dict]()
#: Directories of tests that share one, in stages.
ON_A_GRID = ("grid", "certification")

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
    config.pluginmanager.import_plugin("pilotbed_suite.fixtures")
    for name, what in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {what}")
    config.addinivalue_line(
        "markers", "needs(name, ...): a test of a batch system, only of those that have it: attributes of its class"
    )
    config.addinivalue_line(
        "markers", "check(id, control=False): a part of the certificate (tests/certification/checks.toml); a control "
        "is the attack with the protection off"
    )
    config.addinivalue_line("markers", "flavour(group): a test of one flavour, only where the inventory has it")
    config.addinivalue_line(
        "markers",
        "stage(number): when a test of the grid runs: -1 wants no pilots, 0 makes those that others find warm, "
        "1 (default) leaves things as they were, 2 leaves the grid without pilots for a while, 3 judges what all "
        "others have put back",
    )


def _stage(item):
    marker = item.get_closest_marker("stage")
    return marker.args[0] if marker else 1


def _turn(item):
    """Its stage, and when in it: last what a site that is cut off loses, before it what is done elsewhere meanwhile."""
    elsewhere, cut_off = (name in item.fixturenames for name in ("elsewhere", "cut_off"))
    return _stage(item), [(False, False), (True, False), (True, True), (False, True)].index((elsewhere, cut_off))


def _has_what_it_needs(item):
    flavour = item.get_closest_marker("flavour")
    if flavour and not GRID.names(flavour.args[0]):
        return False
    marker = item.get_closest_marker("needs")
    return not marker or all(getattr(item.module.SYSTEMS[item.callspec.params["system"]], name) for name in marker.args)


def _note(item, outcome):
    """Keep what a test shows of a batch system; of its parts the worst counts."""
    if item.path.name == "test_batch.py" and "system" in item.fixturenames:
        shown = item.session.stash.setdefault(SHOWN, {}).setdefault(item.callspec.params["system"], {})
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
    grid = [item for item in items if item.path.parent.name in ON_A_GRID]
    rest = [item for item in items if item.path.parent.name not in ON_A_GRID]
    items[:] = rest + sorted(grid, key=_turn)


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
