"""Every way through the firewalls: the lab with the nodes of inventory/traversal.

    submit (wan) ─────────────┐                    ┌── beta-router ──▶ beta-wn1 filtered, beta-wn2 public
    home-submit ── home-router┤ wan, relay, central├── alpha-router ─▶ alpha-wn1 behind NAT
                              └────────────────────└── gamma-border ─▶ gamma-wn1 sealed

`make traversal` boots and deploys it. Pilots are started by hand, with the factory's own stage and an entry for each
way; everything else is as users find it.
"""

import pytest
from matrix import Ways, warm
from pilotbed_suite.support import GRID


def pytest_collection_modifyitems(items):
    """Faults come last: the pool counts a lost pilot for a while, and has no other made meanwhile."""
    items.sort(key=lambda item: item.path.name == "test_faults.py")


@pytest.fixture(scope="session")
def grid():
    return GRID


@pytest.fixture(scope="session")
def warmed():
    with warm():
        yield


@pytest.fixture(scope="module")
def ways(warmed):
    """Pilots and jobs of a module; all are gone at its end."""
    with Ways() as made:
        yield made
