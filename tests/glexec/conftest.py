"""One bed for all tests (`glexecbed`); after each of them nothing may be left on the node."""

import os

import pytest
from glexecbed import GLEXEC, Bed, Done


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes more than a few seconds")
    config.addinivalue_line("markers", "leaves: the test's subject leaves something behind, which it shows itself")


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("a root file system of one's own takes root's rights")
    made = Bed(tmp_path_factory.mktemp("bed"))
    yield made
    made.close()


@pytest.fixture
def bed(node, request):
    node.clear()
    yield node
    if not request.node.get_closest_marker("leaves"):
        assert node.left() == []


class Pilot:
    """A pilot with alice's proxy in its work directory; ``glexec(…)`` calls glexec as its account."""

    def __init__(self, bed: Bed):
        self.bed = bed
        self.work = bed.directory()
        self.proxy = bed.write(f"{self.work}/proxy", bed.proxy())

    def environment(self, **variables: str | None) -> dict[str, str]:
        """Return the variables of a call; None takes one out."""
        given = {"GLEXEC_CLIENT_CERT": self.proxy, **variables}
        return {key: value for key, value in given.items() if value is not None}

    def glexec(self, *command: str, user: str = "pilot001", cgroups: str = "writable", input: str | None = None,
               **variables: str | None) -> Done:  # fmt: skip
        """Call glexec with a command (default: id)."""
        return self.bed.run(GLEXEC, *(command or ("/usr/bin/id",)), user=user, cgroups=cgroups, input=input,
                            env=self.environment(**variables))  # fmt: skip

    def sh(self, script: str, **options) -> Done:
        """Have glexec run a shell script."""
        return self.glexec("/bin/sh", "-c", script, **options)


@pytest.fixture
def pilot(bed):
    return Pilot(bed)
