"""Checks of the certificate that tests/grid has not: docs/certification.md. What they share with it is the suite's."""

from contextlib import closing
from dataclasses import dataclass

import pytest
from pilotbed_suite.support import HOLD, Job, Jobs, Process
from testinfra.host import Host

#: Says what it has from its pilot, and waits.
TELLS = f"""#!/bin/sh
umask > umask.txt
env -0 | tr '\\0\\n' '\\n ' > env.txt
ls -l /proc/$$/fd > fd.txt
cat /proc/$$/limits > limits.txt
cp umask.txt env.txt fd.txt limits.txt /tmp/
{HOLD}
"""


def pytest_configure(config):
    config.pluginmanager.import_plugin("pilotbed_suite.fixtures")


@dataclass(frozen=True)
class Running:
    """A user's job that waits, and its payload's process on the worker."""

    job: Job
    worker: Host
    process: Process

    def has(self, name):
        """What the payload has written into a file."""
        found = self.worker.run("cat /proc/%s/root/tmp/%s", str(self.process.pid), name)
        assert found.rc == 0, found.stderr
        return found.stdout


@pytest.fixture(scope="session")
def running(submit, any_site, alice):
    """Alice's job, which has told of itself and waits."""
    with closing(Jobs(submit)) as made:
        job = made.submit(alice, any_site, TELLS)
        yield Running(job, *job.holds(any_site))
