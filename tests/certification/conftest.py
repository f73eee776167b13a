"""Checks of the certificate that tests/grid has not: docs/certification.md. What they share with it is the suite's."""

from dataclasses import dataclass

import pytest
from pilotbed_suite.fixtures import *  # noqa: F403  # they are for pytest, by their names
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, HOLD, Job, Jobs, Process, Site, ok
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
    made = Jobs(submit)
    job = made.submit(alice, any_site, TELLS)
    yield Running(job, *job.holds(any_site))
    made.close()


#: A table of its own at a site's router, whatever else it filters.
CUT = "table inet pilotbed_test { chain cut { type filter hook forward priority -300; policy drop; }; }"


@dataclass(frozen=True)
class CutOff:
    """A site whose router forwards nothing, and a job with the payload that ran there, after so many starts."""

    site: Site
    central: Host
    job: Job
    worker: Host
    process: Process
    starts: int

    def usable(self):
        """The names of the site's slots to which the negotiator would give jobs."""
        rule = self.central.run("condor_config_val NEGOTIATOR_SLOT_CONSTRAINT")
        wanted = f'GLIDEIN_Site == "{self.site.name}" && ({rule.stdout.strip() if rule.rc == 0 else "true"})'
        return ok(self.central, "condor_status -constraint %s -autoformat Name", wanted).split()

    def begin(self):
        assert self.usable(), "control"
        ok(host(self.site.router), "nft %s", f"add {CUT}")

    def end(self):
        host(self.site.router).run("nft delete table inet pilotbed_test")


@pytest.fixture(scope="session")
def cut_off(submit, central, any_site, alice):
    """Alice's job at a site that was cut off then."""
    made = Jobs(submit)
    job = made.submit(alice, any_site, f"#!/bin/sh\n{HOLD}\n", "job_lease_duration = 60")
    cut = CutOff(any_site, central, job, *job.holds(any_site), job.ad()["NumJobStarts"])
    cut.begin()
    yield cut
    cut.end()
    made.close()


@pytest.fixture
def elsewhere(request, any_site):
    """A site for what needs no particular one; where there are several another one may be cut off, which takes long."""
    site = GRID.sites[-1]
    if site != any_site and any("cut_off" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("cut_off")
    return site
