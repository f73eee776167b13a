"""The walk: two users' jobs through the whole grid, and the table of where each went and when.

Everything in the table is evidence from the component that did it: the schedd's history, the factory's queue, the
frontend's journal, the relay's counters, gLExec's line on the worker, the job's own output.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from testinfra.host import Host

from . import CHECKOUT, PATIENCE, GridError, inventory, record
from .reach import host, service

#: Seconds from submission until the walk is given up.
DEADLINE = 240

#: The stages of a job in the order in which a cold grid passes them, and who says so.
STAGES = ("submitted", "requested", "pilot queued", "pilot running", "registered", "matched", "running", "done")

JOB = """#!/bin/sh
echo "hello from $(id -un) on $(hostname)"
id
openssl x509 -in "$X509_USER_PROXY" -noout -subject
"""

#: The proxy is named in full: with "use_x509userproxy = true" HTCondor 25.14 leaves x509userproxysubject undefined,
#: and no frontend counts the job.
SUBMIT = """universe = vanilla
executable = {name}.sh
output = {name}.out
error = {name}.err
log = {name}.log
x509userproxy = {proxy}
should_transfer_files = yes
when_to_transfer_output = on_exit
request_cpus = 1
request_memory = 128
+DESIRED_Sites = "{sites}"
queue
"""


@dataclass(frozen=True)
class Walker:
    """A user who walks.

    Attributes:
        account: login on the submit host.
        fqan: what to ask VOMS for.
    """

    account: str
    fqan: str

    @property
    def voms(self) -> str:
        """What voms-proxy-init takes: VO:FQAN."""
        return f"{self.fqan.split('/')[1]}:{self.fqan}"


def walker(account: str) -> Walker:
    """Return the user ``account`` with the deepest group that the first VO with such a member has put them into.

    Who is no member of any asks the first VO.
    """
    vos = inventory.load().variable("grid_vos")
    vo = next((vo for vo in vos if account in vo["members"]), vos[0])
    member = vo["members"].get(account) or {}
    return Walker(account, "/".join(["", vo["name"], *member.get("groups", [])[:1]]))


def walkers() -> tuple[Walker, ...]:
    """Return who walks: the first two members of the first VO."""
    return tuple(map(walker, list(inventory.load().variable("grid_vos")[0]["members"])[:2]))


def default_site() -> str:
    """Return the site that is walked through: the first one that is reached through a relay, or else the first."""
    known = inventory.load()
    elements = known.names("computing_element")
    relayed = [ce for ce in elements if "relay" in str(known.variable("site_traversal", ce)).split(",")]
    if not elements:
        raise GridError("group computing_element has no host in this inventory: put one into it")
    return str(known.variable("site_name", (relayed or elements)[0]))


@dataclass
class Trace:
    """What is known of one job; empty where nothing said so yet."""

    user: str
    fqan: str
    job: str = ""
    dn: str = ""
    entry: str = ""
    site: str = ""
    worker: str = ""
    pilot_account: str = ""
    payload_account: str = ""
    way: str = ""
    relay: str = ""
    relay_streams: int = 0
    pilot: str = ""
    exit_code: int | None = None
    first_line: str = ""
    times: dict[str, float] = field(default_factory=dict)


def problems(traces: Sequence[Trace]) -> list[str]:
    """Return what is not as it must be after a walk; empty if all is well."""
    found = []
    for trace in traces:
        who = f"{trace.user} ({trace.job})"
        if trace.exit_code != 0:
            found.append(f"{who}: exit code {trace.exit_code}")
        if not trace.first_line.startswith(f"hello from {trace.payload_account} on {trace.worker}"):
            found.append(f"{who}: the output begins with {trace.first_line!r}")
        if not trace.payload_account or trace.payload_account == trace.pilot_account:
            found.append(f"{who}: the payload ran as {trace.payload_account!r}, the pilot as {trace.pilot_account!r}")
        if not re.fullmatch(r"[a-z]+\d+", trace.pilot_account):
            found.append(f"{who}: {trace.pilot_account!r} is no pool account of pilots")
        if trace.way == "relay" and not (trace.relay and trace.relay_streams):
            found.append(f"{who}: the claim did not come through the relay ({trace.relay or 'no address'})")
        missing = [stage for stage in STAGES if stage not in trace.times]
        if missing:
            found.append(f"{who}: nobody saw it {', '.join(missing)}")
    accounts = [trace.payload_account for trace in traces]
    if len(set(accounts)) != len(accounts):
        found.append(f"two users ran under one account: {', '.join(accounts)}")
    return found


def table(traces: Sequence[Trace]) -> str:
    """Return the walk as a table for a screen: a column a job."""
    begin = {trace.user: trace.times.get("submitted", 0.0) for trace in traces}

    def clock(trace: Trace, stage: str) -> str:
        if stage not in trace.times:
            return "-"
        when = trace.times[stage]
        return f"{time.strftime('%H:%M:%S', time.localtime(when))}  {when - begin[trace.user]:+6.1f} s"

    rows: list[tuple[str, list[str]]] = [
        ("user's DN", [trace.dn for trace in traces]),
        ("FQAN", [trace.fqan for trace in traces]),
        ("entry", [trace.entry for trace in traces]),
        ("site", [trace.site for trace in traces]),
        ("worker", [trace.worker for trace in traces]),
        ("pilot account", [trace.pilot_account for trace in traces]),
        ("payload account", [trace.payload_account for trace in traces]),
        ("way", [trace.way for trace in traces]),
        ("relay address", [f"{trace.relay}, {trace.relay_streams} streams" if trace.relay else "" for trace in traces]),
        ("exit code", ["-" if trace.exit_code is None else str(trace.exit_code) for trace in traces]),
        ("first line", [trace.first_line for trace in traces]),
        *((stage, [clock(trace, stage) for trace in traces]) for stage in STAGES),
    ]
    heads = ["", *(f"{trace.user}'s job {trace.job}" for trace in traces)]
    widths = [max(len(name) for name, _ in rows)]
    widths += [max(len(heads[i + 1]), *(len(cells[i]) for _, cells in rows)) for i in range(len(traces))]
    rule = "-+-".join("-" * width for width in widths)
    lines = [" | ".join(text.ljust(width) for text, width in zip(heads, widths, strict=True)), rule]
    for name, cells in rows:
        lines.append(" | ".join(text.ljust(width) for text, width in zip([name, *cells], widths, strict=True)).rstrip())
        if name == "first line":
            lines.append(rule)
    return "\n".join(lines)


def proxy_of(node: Host, account: str) -> str:
    """Return the path of the proxy that ``voms-proxy-init`` makes for ``account`` on ``node``."""
    return f"/tmp/x509up_u{node.user(account).uid}"  # noqa: S108 (where voms-proxy-init puts it)


def as_user(node: Host, account: str, command: str, check: bool = True) -> str:
    """Run a shell command on ``node`` as ``account``, in the user's own login; return what it printed.

    Raises:
        GridError: it failed, and ``check`` is set.
    """
    done = node.run("runuser --login %s --command %s", account, command)
    if check and done.rc:
        raise GridError(f"{account}: {command}: {(done.stderr or done.stdout).strip()}")
    return str(done.stdout)


def submit(node: Host, walker: Walker, name: str, sites: str, script: str = JOB, extra: str = "") -> str:
    """Make a VOMS proxy and submit a job as ``walker``; return its id.

    Args:
        node: the submit host.
        walker: who submits, with which FQAN.
        name: stem of the job's files in the user's home.
        sites: where it may run, as a list for ``DESIRED_Sites``.
        script: the payload.
        extra: more lines of the submit file.

    Raises:
        GridError: VOMS or the schedd refused.
    """
    proxy = proxy_of(node, walker.account)
    description = SUBMIT.format(name=name, sites=sites, proxy=proxy).replace("\nqueue\n", f"\n{extra}\nqueue\n")
    as_user(node, walker.account, f"voms-proxy-init --quiet --voms {walker.voms}")
    as_user(
        node, walker.account,
        f"printf %s {shlex.quote(script)} > {name}.sh && chmod 755 {name}.sh && "
        f"printf %s {shlex.quote(description)} > {name}.sub && rm -f {name}.out {name}.err {name}.log",
    )
    told = as_user(node, walker.account, f"condor_submit -terse {name}.sub")
    return told.split()[0]


def job_ad(node: Host, job: str) -> dict[str, Any]:
    """Return the ad of ``job`` from the queue or from history; {} if the schedd knows no such job."""
    for tool in ("condor_q", "condor_history -limit 1"):
        text = node.run(f"{tool} {job} -json").stdout.strip()
        if text and (found := json.loads(text)):
            ad: dict[str, Any] = found[0]
            return ad
    return {}


STATUS = {1: "idle", 2: "running", 3: "removed", 4: "done", 5: "held", 6: "transferring output", 7: "suspended"}
#: What the ad of a job that is done gets when it leaves the queue: until then it may say "done" without them.
LAST = ("CompletionDate", "LastRemoteHost")


def wait(node: Host, jobs: Mapping[str, str], deadline: float = DEADLINE) -> dict[str, dict[str, Any]]:
    """Wait until every job of ``jobs`` ({user: id}) has ended, saying what is waited for; return their ads.

    Raises:
        GridError: a job is held, or the deadline passed; the message ends with what explains it.
    """
    deadline *= PATIENCE
    begin = time.monotonic()
    said = ""
    while True:
        ads = {user: job_ad(node, job) for user, job in jobs.items()}
        states = {user: STATUS.get(int(ad.get("JobStatus", 0)), "unknown") for user, ad in ads.items()}
        waited = time.monotonic() - begin
        line = ", ".join(f"{user}'s job {state}" for user, state in states.items())
        if sys.stdout.isatty():
            sys.stdout.write(f"\r\033[K  {line} … {waited:.0f} s")
            sys.stdout.flush()
        elif line != said:
            print(f"  {line} after {waited:.0f} s", flush=True)
        said = line
        if all(states[user] == "done" and all(map(ad.get, LAST)) for user, ad in ads.items()):
            if sys.stdout.isatty():
                sys.stdout.write("\r\033[K")
            return ads
        for user, ad in ads.items():
            if states[user] == "held":
                raise GridError(f"{user}'s job {jobs[user]} is held: {ad.get('HoldReason')}")
            if states[user] == "removed":
                raise GridError(f"{user}'s job {jobs[user]} was removed: {ad.get('RemoveReason')}")
        if waited > deadline:
            raise GridError(f"after {deadline:.0f} s: {line}\n{explain()}")
        time.sleep(0.5)


def explain() -> str:
    """Return what is said of a job that does not run: the last lines of the services on its way, and of each site."""
    queue = "pilotbed-factory-pool condor_q -nobatch -af:j GlideinEntryName JobStatus GridJobId HoldReason"
    known = inventory.load()
    asked = [
        (known.first(group), command) for group, command in (
            ("frontend", "journalctl --unit 'pilotbed-frontend@*' --lines 12 --no-pager --output cat"),
            ("factory", "journalctl --unit pilotbed-factory --lines 12 --no-pager --output cat"),
            ("factory", queue),
            ("factory", "tail -n 20 /var/log/condor-factory/GridmanagerLog.*"),
            ("central_manager", "condor_status -af Name State Activity GLIDEIN_Site"),
            ("relay", "journalctl --unit pilotbed-relay --lines 8 --no-pager --output cat"),
            ("submit", "tail -n 15 /var/log/condor/SchedLog"),
        )
    ]  # fmt: skip
    for element in known.names("computing_element"):
        flavours = (known.variable(f"{kind}_flavour", element) for kind in ("batch_system", "computing_element"))
        logs = [known.variable(f"{flavour}_logs", element) or {} for flavour in flavours]
        asked.append((element, "tail -n 8 " + " ".join(path for one in logs for path in one.get("files", ()))))

    def told(name: str, command: str) -> str:
        try:
            return str(host(name).run(command).stdout).rstrip()[-3000:]
        except GridError as error:
            return str(error)

    return "\n".join(f"--- {name}: {command}\n{told(name, command)}" for name, command in asked)


def trace(node: Host, walker: Walker, job: str, ad: Mapping[str, Any], name: str) -> Trace:
    """Return what the grid's components say of a finished job."""
    def machine(attribute: str) -> str:
        value = ad.get(f"MachineAttr{attribute}0", "")
        return "" if value in ("undefined", None) else str(value)

    found = Trace(walker.account, walker.fqan, job=job)
    found.entry, found.site = machine("GLIDEIN_Entry_Name"), machine("GLIDEIN_Site")
    found.worker, found.pilot_account = machine("GLIDEIN_Worker"), machine("GLIDEIN_Pilot_Account")
    found.way, found.relay = machine("GLIDEIN_Traversal"), machine("GLIDEIN_Relay_Address")
    found.pilot = f"{machine('GLIDEIN_ClusterId')}.{machine('GLIDEIN_ProcId')}"
    found.exit_code = ad.get("ExitCode")
    output = as_user(node, walker.account, f"cat {name}.out")
    found.first_line = output.partition("\n")[0]
    audit = _audit(found.worker, str(ad.get("GlobalJobId", "")))
    found.dn, found.fqan = audit.get("dn", ""), audit.get("fqan", "")
    found.payload_account = audit.get("target", "")

    times = {
        "submitted": ad.get("QDate"),
        "pilot running": machine("GLIDEIN_Pilot_Start"),
        "registered": _registered(str(ad.get("LastRemoteHost", ""))),
        "matched": ad.get("JobStartDate"),
        "running": ad.get("JobCurrentStartExecutingDate"),
        "done": ad.get("CompletionDate"),
    }
    tools = ("condor_q", "condor_history -limit 1")
    command = "; ".join(f"pilotbed-factory-pool {tool} {found.pilot} -af QDate" for tool in tools)
    queued = service("factory").run(command).stdout.split()
    times["pilot queued"] = queued[0] if queued else None
    found.times = {stage: float(value) for stage, value in times.items() if value not in (None, "")}
    if "pilot queued" in found.times:
        asked = _requested(found.entry, found.times["pilot queued"])
        if asked:
            found.times["requested"] = asked
    found.times = {stage: found.times[stage] for stage in STAGES if stage in found.times}
    if found.relay:
        relay = host(found.relay.partition(".")[0])
        status = json.loads(relay.run("pilotbed-relay status").stdout or "{}")
        port = int(found.relay.rpartition(":")[2])
        found.relay_streams = sum(
            int(lease["streams_total"]) for lease in status.get("leases", []) if lease["port"] == port
        )
    return found


def _audit(worker: str, job: str) -> dict[str, str]:
    """Return the fields of gLExec's line about ``job`` (a GlobalJobId) in the journal of ``worker``; {} without one."""
    if not worker:
        return {}
    lines = host(worker.partition(".")[0]).run("journalctl --identifier glexec --no-pager --output cat").stdout
    ours = [line for line in lines.splitlines() if f'id="{job}"' in line]
    return dict(re.findall(r'(\w+)="([^"]*)"', ours[-1])) if ours else {}


def _registered(slot: str) -> str:
    """Return when the startd of ``slot`` (slot1_1@NAME) started, from the collector; "" if the pilot is gone."""
    constraint = f'MyType == "Machine" && Name == "slot1@{slot.partition("@")[2]}"'
    found = service("central_manager").run("condor_status -constraint %s -af DaemonStartTime", constraint)
    return str(found.stdout).strip()


def _requested(entry: str, queued: float) -> float | None:
    """Return when the frontend asked for the pilot at ``entry`` that was queued at ``queued``, from its journal."""
    lines = service("frontend").run(
        "journalctl --unit 'pilotbed-frontend@*' --no-pager --output short-unix --since %s", f"@{int(queued) - 120}"
    ).stdout
    found = None
    for line in lines.splitlines():
        match = re.match(r"([\d.]+) .*\bdecision .*\bentry=(\S+) .*\bask_idle=(\d+)", line)
        if match and match[2] == entry and int(match[3]) > 0 and float(match[1]) <= queued + 1:
            found = float(match[1])
    return found


def walk(site: str = "", who: Sequence[Walker] = ()) -> list[Trace]:
    """Walk: everybody submits one job for ``site``; return their traces when all have ended.

    Args:
        site: by default `default_site`.
        who: by default `walkers`.

    Raises:
        GridError: a job could not be submitted, is held, or did not end in time.
    """
    node = service("submit")
    name = f"walk-{int(time.time())}"
    site, who = site or default_site(), who or walkers()
    jobs = {one.account: submit(node, one, name, site) for one in who}
    ads = wait(node, jobs)
    return [trace(node, one, jobs[one.account], ads[one.account], name) for one in who]


def main() -> int:
    """Walk, print the table, write var/walk.json; return 0 only if everything is as it must be."""
    begin = time.monotonic()
    site, who = default_site(), walkers()
    print(f"the walk: {' and '.join(one.account for one in who)} each submit a job for site {site}")
    traces = walk(site, who)
    wrong = problems(traces)
    told = record("walk.json")
    told.parent.mkdir(exist_ok=True)
    found = {"seconds": round(time.monotonic() - begin, 1), "problems": wrong, "jobs": [asdict(t) for t in traces]}
    told.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\n{table(traces)}\n")
    for problem in wrong:
        print(f"pilotbed: {problem}", file=sys.stderr)
    if not wrong:
        print(f"the walk is done in {found['seconds']} s; as JSON: {told.relative_to(CHECKOUT)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GridError as error:
        sys.exit(f"pilotbed: {error}")
