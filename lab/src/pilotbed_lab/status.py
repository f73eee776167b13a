"""The grid at a glance, and the logs that matter."""

from __future__ import annotations

import json

from pilotbed_suite import inventory, local
from pilotbed_suite.reach import host

from . import LabError, topology

#: Expression for condor_q: the state of a job as a word.
STATE = r"""'JobStatus == 2 ? "running" : JobStatus == 5 ? "held" : "idle"'"""


def members(group: str) -> list[str]:
    """Return the hosts of a group of the inventory that run."""
    running = local.running()
    return [name for name in inventory.load().names(group) if name in running]


def logs(node: str) -> None:
    """Print the end of the logs that matter for the roles of ``node``, as its groups name them.

    Raises:
        LabError: there is no such node.
        GridError: it does not run.
    """
    grid = inventory.load()
    topology.load().node(node)
    local.enter(node)
    units, files, identifiers = (grid.logs(node, kind) for kind in ("units", "files", "identifiers"))
    machine = host(node)
    if units:
        print(f"--- journal of {', '.join(units)}")
        words = " ".join(f"--unit='{unit}'" for unit in units)
        print(machine.run(f"journalctl --no-pager --lines 60 {words}").stdout)
    for path in files:
        print(machine.run(f'for f in {path}; do [ -s "$f" ] && echo "--- $f" && tail -n 30 "$f"; done; true').stdout)
    if identifiers:
        print(f"--- messages of {', '.join(identifiers)}")
        words = " ".join(f"--identifier={name}" for name in identifiers)
        print(machine.run(f"journalctl --no-pager --lines 30 {words}").stdout)


def show() -> None:
    """Print nodes, services, pilots and jobs.

    Raises:
        LabError: no node runs.
    """
    running = local.running()
    if not running:
        raise LabError("no node runs: `make lab` boots the grid")
    print("nodes")
    for node in topology.load().nodes:
        where = ", ".join(f"{address} ({network})" for network, address in node.addresses)
        if node.name not in running:
            print(f"  {node.name:<14} down      {where}")
            continue
        failed = host(node.name).run("systemctl --failed --plain --no-legend").stdout.split("\n")
        bad = ", ".join(line.split()[0] for line in failed if line)
        print(f"  {node.name:<14} {'failed: ' + bad if bad else 'up':<9} {where}")
    for factory in members("factory"):
        _list(
            "pilots (entry, pilots queued or running at the computing element)",
            host(factory).run(
                f"pilotbed-factory-pool condor_q -nobatch -allusers -af:j GlideinEntryName {STATE} GridJobStatus"
            ).stdout,
        )
    for central in members("central_manager"):
        _list(
            "slots (name, site, state, activity, way)",
            host(central).run(
                "condor_status -constraint 'MyType == \"Machine\"' "
                "-af Name GLIDEIN_Site State Activity GLIDEIN_Traversal"
            ).stdout,
        )
    for relay in members("relay"):
        leases = json.loads(host(relay).run("pilotbed-relay status").stdout or "{}").get("leases", [])
        lines = [f"{lease['port']}  {lease['pilot']}  {lease['streams_total']}" for lease in leases]
        _list(f"{relay} (port, pilot, streams so far)", "\n".join(lines))
    for submit in members("submit"):
        jobs = host(submit).run(f"condor_q -nobatch -allusers -af:j Owner {STATE} Cmd").stdout
        _list(f"jobs of {submit} (id, user, state, command)", jobs)
    for frontend in members("frontend"):
        # One object a line for each group.
        command = "for f in /run/pilotbed/frontend/*/state.json; do tr -d '\\n' < $f; echo; done"
        states = host(frontend).run(command).stdout
        left_out = [one for line in states.splitlines() if line for one in json.loads(line).get("left_out", [])]
        if left_out:
            lines = [f"{one['jobs']}  {one['example']}  {one['why']}" for one in left_out]
            _list("jobs for which no pilot is asked (how many, such as, why)", "\n".join(lines))


def _list(heading: str, text: str) -> None:
    print(f"\n{heading}")
    print("\n".join(f"  {line}" for line in text.splitlines()) or "  none")
