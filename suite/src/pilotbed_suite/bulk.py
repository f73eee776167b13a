"""Many short jobs of one user, each of which must end once and well, whatever happens meanwhile."""

from __future__ import annotations

from collections import Counter

from testinfra.host import Host

from . import walk
from .support import ok, write

_PAYLOAD = """#!/bin/sh
echo "$1 $(id -un)"
sleep $(($1 % $2))
"""
_SUBMIT = """universe = vanilla
executable = {name}.sh
arguments = $(Process) {longest}
output = {name}/$(Process).out
error = {name}/$(Process).err
log = {name}/log
x509userproxy = {proxy}
should_transfer_files = yes
when_to_transfer_output = on_exit
request_cpus = 1
request_memory = 64
queue {count}
"""


class Bulk:
    """Jobs of ``walker``'s at a submit host, submitted as one cluster.

    Args:
        node: the submit host.
        walker: whose they are; a proxy is made for them, in the user's home: in /tmp it is gone when the host was off.
        count: how many.
        longest: seconds that none of them sleeps; they sleep from none upwards, in turn.
        name: of what it needs in the user's home.
    """

    def __init__(self, node: Host, walker: walk.Walker, count: int, longest: int, name: str) -> None:
        self.node, self.walker, self.count, self.name = node, walker, count, name
        account = walker.account
        made = f"voms-proxy-init --quiet --voms {walker.voms} --out {name}/proxy.pem"
        walk.as_user(node, account, f"rm -rf {name} && mkdir {name} && {made}")
        home = ok(node, "getent passwd %s", account).split(":")[5]
        text = _SUBMIT.format(name=name, longest=longest, proxy=f"{home}/{name}/proxy.pem", count=count)
        write(node, f"{home}/{name}.sh", _PAYLOAD, account, "0755")
        write(node, f"{home}/{name}.sub", text, account)
        said = walk.as_user(node, account, f"condor_submit -terse {name}.sub")
        self.cluster = said.split()[-1].partition(".")[0]

    def left(self) -> int:
        """Return how many have not ended."""
        return ok(self.node, "condor_q %s -allusers -autoformat ProcId", self.cluster).count("\n")

    def problems(self) -> list[str]:
        """Return what is wrong with them after their end: by the schedd's history, and by what came home.

        That is each job's own line, from an account that the job had.
        """
        wanted = "condor_history %s -autoformat ProcId JobStatus ExitCode NumJobCompletions"
        told = [line.split(maxsplit=1) for line in ok(self.node, wanted, self.cluster).splitlines()]
        found = [f"job {self.cluster}.{proc}: status, exit code, completions are {said}"
                 for proc, said in told if said != "4 0 1"]  # fmt: skip
        times = Counter(proc for proc, _ in told)
        found += [f"job {self.cluster}.{proc} is {times[proc]} times in the history"
                  for proc in map(str, range(self.count)) if times[proc] != 1]  # fmt: skip
        each = f"cd {self.name} && for f in *.out; do echo \"${{f%.out}} $(cat $f)\"; done"
        home = Counter(walk.as_user(self.node, self.walker.account, each).splitlines())
        lines = {line.split()[0]: line.split() for line in home}
        for proc in map(str, range(self.count)):
            line = lines.get(proc, [])
            if len(line) != 3 or line[1] != proc:
                found.append(f"job {self.cluster}.{proc}: {' '.join(line)!r} came home")
        return found

    def clear(self) -> None:
        """Remove what is left of them, and of their files."""
        self.node.run("condor_rm %s", self.cluster)
        names = f"{self.name} {self.name}.sh {self.name}.sub"
        walk.as_user(self.node, self.walker.account, f"rm -rf {names}", check=False)
