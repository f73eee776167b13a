"""The grid at a glance, and the logs that matter."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import LabError, nodes
from .reach import host
from .topology import Topology

#: What to look at where: units whose journal, and files whose end tells how a role is doing.
UNITS = {
    "certificate_authority": ("pilotbed-crl", "nginx"),
    "voms_server": ("voms@*", "voms-members@*", "mariadb"),
    "myproxy_server": ("myproxy-server",),
    "central_manager": ("condor",),
    "submit": ("condor",),
    "factory": ("pilotbed-factory", "pilotbed-renew", "condor", "nginx"),
    "frontend": ("pilotbed-frontend", "pilotbed-pilot-credential", "nginx"),
    "relay": ("pilotbed-relay",),
    "border": ("pilotbed-border",),
    "relay_agent": ("pilotbed-relay-agent",),
    "ccb_broker": ("condor",),
    "site_router": ("nftables",),
    "web_cache": ("squid",),
    "batch_slurm": ("slurmctld", "slurmd", "munge"),
    "ce_arc": ("arc-arex", "arc-arex-ws"),
    "mapping_service": ("pilotbed-mapping", "nginx"),
    "worker": ("slurmd", "pilotbed-glexec-clean.timer"),
}
FILES = {
    "voms_server": ("/var/log/voms/voms.*",),
    "central_manager": ("/var/log/condor/CollectorLog", "/var/log/condor/NegotiatorLog", "/var/log/condor/MatchLog"),
    "submit": ("/var/log/condor/SchedLog", "/var/log/condor/ShadowLog"),
    "factory": ("/var/log/condor/SchedLog", "/var/log/condor/GridmanagerLog.*"),
    "ccb_broker": ("/var/log/condor/CollectorLog",),
    "web_cache": ("/var/log/squid/access.log", "/var/log/squid/cache.log"),
    "batch_slurm": ("/var/log/slurm/*.log",),
    "ce_arc": ("/var/log/arc/arex.log", "/var/log/arc/arex-jobs.log", "/var/log/arc/ws-interface.log"),
}

#: Expression for condor_q: the state of a job as a word.
STATE = r"""'JobStatus == 2 ? "running" : JobStatus == 5 ? "held" : "idle"'"""


def inventory(checkout: Path) -> Mapping[str, Any]:
    """Return the inventory, as ``ansible-inventory --list`` gives it."""
    command = ["ansible-inventory", "--list"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


def members(known: Mapping[str, Any], group: str) -> list[str]:
    """Return the hosts of a group of the inventory that run."""
    running = nodes.running()
    return [name for name in known.get(group, {}).get("hosts", []) if name in running]


def logs(checkout: Path, node: str) -> int:
    """Print the end of the logs that matter for the roles of ``node``.

    Raises:
        LabError: the node does not run.
    """
    roles = [name for name, group in inventory(checkout).items() if node in group.get("hosts", [])]
    units = sorted({unit for role in roles for unit in UNITS.get(role, ())})
    files = sorted({path for role in roles for path in FILES.get(role, ())})
    machine = host(node)
    if units:
        print(f"--- journal of {', '.join(units)}")
        print(machine.run("journalctl --no-pager --lines 60 " + " ".join(f"--unit='{unit}'" for unit in units)).stdout)
    for path in files:
        print(machine.run(f'for f in {path}; do [ -s "$f" ] && echo "--- $f" && tail -n 30 "$f"; done; true').stdout)
    if "worker" in roles:
        print("--- gLExec")
        print(machine.run("journalctl --no-pager --lines 30 --identifier=glexec --identifier=lcmaps").stdout)
    return 0


def show(checkout: Path, grid: Topology) -> None:
    """Print nodes, services, pilots and jobs.

    Raises:
        LabError: no node runs.
    """
    running = nodes.running()
    if not running:
        raise LabError("no node runs: `make lab` boots the grid")
    print("nodes")
    for node in grid.nodes:
        where = ", ".join(f"{address} ({network})" for network, address in node.addresses)
        if node.name not in running:
            print(f"  {node.name:<14} down      {where}")
            continue
        machine = host(node.name)
        failed = machine.run("systemctl --failed --plain --no-legend").stdout.split("\n")
        bad = ", ".join(line.split()[0] for line in failed if line)
        print(f"  {node.name:<14} {'failed: ' + bad if bad else 'up':<9} {where}")
    print("\npilots (entry, pilots queued or running at the computing element)")
    print(_indent(host("factory").run(
        f"condor_q -nobatch -allusers -af:j GlideinEntryName {STATE} GridJobStatus"
    ).stdout) or "  none")
    print("\nslots (name, site, state, activity, way)")
    print(_indent(host("central").run(
        "condor_status -constraint 'MyType == \"Machine\"' -af Name GLIDEIN_Site State Activity GLIDEIN_Traversal"
    ).stdout) or "  none")
    known = inventory(checkout)
    for relay in members(known, "relay"):
        print(f"\n{relay} (port, pilot, streams so far)")
        leases = json.loads(host(relay).run("pilotbed-relay status").stdout or "{}").get("leases", [])
        lines = [f"  {lease['port']}  {lease['pilot']}  {lease['streams_total']}" for lease in leases]
        print("\n".join(lines) or "  none")
    for submit in members(known, "submit"):
        print(f"\njobs of {submit} (id, user, state, command)")
        jobs = host(submit).run(f"condor_q -nobatch -allusers -af:j Owner {STATE} Cmd")
        print(_indent(jobs.stdout) or "  none")


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
