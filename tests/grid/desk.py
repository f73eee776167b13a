"""An ordinary user's place at the submit host."""

import re

from pilotbed_suite.support import as_user, ok, until, until_none, write

#: The directory in a user's home where all this happens.
PLACE = "users-test"
SUBMIT = """executable = payload.sh
arguments = $(Process)
output = {name}.$(Process).out
error = {name}.$(Process).err
log = {name}.log
use_x509userproxy = true
should_transfer_files = yes
request_memory = 128
+DESIRED_Sites = "{site}"
{extra}
queue {queue}
"""
#: Makes a file from one that it was given; node B of the DAG fails at the first try.
PAYLOAD = """#!/bin/sh
echo "$(id -un) $*"
[ ! -e given.txt ] || tr a-z A-Z < given.txt > made.txt
[ "$1 $2" != "B 0" ] || exit 3
"""


def cluster(said):
    """The cluster of what condor_submit -terse has said: "7.0 - 7.49"."""
    return re.search(r"^(\d+)\.\d+ - ", said, re.MULTILINE)[1]


class Desk:
    """A user's place at the submit host."""

    def __init__(self, node, walker, site):
        self.node, self.account, self.site = node, walker.account, site
        self.home = ok(node, "getent passwd %s", walker.account).split(":")[5]
        self.uid = ok(node, "id -u %s", walker.account).strip()
        as_user(node, self.account, f"rm -rf {PLACE}; mkdir {PLACE}")
        self.run(f"voms-proxy-init --quiet --voms {walker.voms}")
        self.put("payload.sh", PAYLOAD, "0755")

    def run(self, command, fails=False):
        """Run a command that must succeed, or fail; return what it said."""
        code, said = as_user(self.node, self.account, f"cd {PLACE} && {command}")
        assert (code != 0) is fails, f"{self.account}: {command}: {said}"
        return said

    def put(self, name, text, mode="0644"):
        write(self.node, f"{self.home}/{PLACE}/{name}", text, self.account, mode)

    def describe(self, name, extra="", queue=""):
        self.put(f"{name}.sub", SUBMIT.format(name=name, site=self.site.name, extra=extra, queue=queue))

    def submit(self, name, extra="", queue="", options=""):
        """Submit a cluster; return its number."""
        self.describe(name, extra, queue)
        return cluster(self.run(f"condor_submit -terse {options} {name}.sub"))

    def asked(self, cluster, *attributes):
        """What queue and history say of the cluster's jobs."""
        tools = (f"{tool} {cluster} -af {' '.join(attributes)}" for tool in ("condor_q", "condor_history"))
        return self.run("; ".join(tools)).splitlines()

    def wait(self, cluster, jobs=1, status="4", deadline=480):
        """Wait until all jobs of a cluster have ended."""
        until(f"{jobs} jobs of cluster {cluster} end",
              lambda: self.asked(cluster, "JobStatus").count(status) == jobs, deadline, every=1)  # fmt: skip

    def close(self):
        """Remove all that the user has here; jobs that stayed would ask for pilots in other tests.

        A job that is removed after its pilot was killed is in the queue, as such, while its shadow looks for the pilot.
        """
        as_user(self.node, self.account, f"condor_rm -all; rm -rf {PLACE}")
        left = "condor_q %s -constraint 'JobStatus != 3' -autoformat ClusterId"
        until_none(f"all of {self.account}'s jobs are removed", lambda: ok(self.node, left, self.account))
