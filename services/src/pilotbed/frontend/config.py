"""The frontend's configuration file, /etc/pilotbed/frontend.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pilotbed.pool.text import equals, quote
from pilotbed.protocol import ProtocolError
from pilotbed.protocol.ads import Client, check_name

#: What a job says of the sites it wants: DESIRED_Sites, a ClassAd list, or a string with commas or blanks between;
#: without it any site will do. Either function is an error, and so no match, for the other's kind of list.
DEFAULT_MATCH = (
    "MY.DESIRED_Sites =?= undefined || ifThenElse(isList(MY.DESIRED_Sites), "
    "member(TARGET.GLIDEIN_Site, MY.DESIRED_Sites), stringListIMember(TARGET.GLIDEIN_Site, MY.DESIRED_Sites))"
)

#: Jobs that a pilot can run for their owner: vanilla, with a proxy for gLExec to switch by. Not x509userproxysubject:
#: the schedd leaves that out of the first job of an owner ("ReadProxyFileIntoAd ... Failed to switch to user priv").
DEFAULT_JOBS = "JobUniverse == 5 && x509userproxy =!= undefined"

#: glideins_remove.type, the least first; DISABLE is less than nothing.
REMOVE_TYPES = ("DISABLE", "NO", "WAIT", "IDLE", "ALL", "UNREG")


@dataclass(frozen=True)
class Pressure:
    """Parameters of the constant-pressure formulas, with glideinWMS's defaults; its names in parentheses.

    Args:
        attenuation: how many turns the pressure takes to build up (ramp_up_attenuation); 1 asks for all at once.
        old_idle: seconds after which an idle job counts as old.
        reserve: most extra pilots for old jobs (idle_glideins_per_entry.reserve).
        max_request: most idle pilots asked of one entry (idle_glideins_per_entry.max).
        relative_to_queue: slots wanted per job (running_glideins_per_entry.relative_to_queue).
        min_running: pilots wanted at an entry without any job (running_glideins_per_entry.min).
        entry_max_slots, entry_max_idle, entry_curb_idle: slots of one entry (running_glideins_per_entry.max,
            idle_vms_per_entry.max and .curb).
        max_slots, curb_slots, max_idle, curb_idle: slots of the whole group (running_glideins_total, idle_vms_total).
            With ``frontend_`` before the name those of all groups of the frontend, with ``global_`` those of all pilots
            in the pool, whoever asked for them (the same of the frontend, and ..._total_global). From a curb on half as
            many are asked for, from a maximum on none.
        least_memory: MB that a partitionable slot needs free to count as idle (partitionable_glidein.min_memory).
        silence: seconds without an ad from its pilot, after which a slot counts no more; a pilot sends one every
            UPDATE_INTERVAL (30 s), and the collector remembers a dead one's for minutes.
        wait_after, idle_after: turns without idle jobs, until unsubmitted and then idle pilots may be removed.
        remove_type: what may be removed besides (glideins_remove.type): NO for nothing; WAIT, IDLE, ALL or UNREG; or
            DISABLE, and nothing is, after whatever time.
        remove_wait: turns without idle jobs after which that is so (wait).
        requests_tracking: that it is so at any time: whatever there is more of than is asked for goes (the same).
        remove_margin: pilots more than are asked for that are left all the same, with requests_tracking (margin).
        remember_size: turns for which a pilot's size counts as that of its entry's pilots after none is seen any more;
            then a job that is larger may try one again.
        idle_lifetime: seconds after which a pilot that never started is removed; 0 for never.
        backoff: seconds for which an entry is asked for no more after a pilot that no job wanted, though those that
            match had waited for longer than old_idle; twice as many after each further one in a row, an hour at most; 0
            for never. glideinWMS has none.
        canaries: most pilots that are asked for with a stage area (scripts, attributes) of which no pilot has come into
            the pool yet; what is wrong with it costs so many, not every pilot everywhere. Ours; glideinWMS has none.
        cores_by_share: whether an entry's jobs count with the cores of its share of them. glideinWMS takes the mean of
            all jobs that match, be it by one entry or by all: those of many cores that may run anywhere weigh too much.
    """

    attenuation: float = 3
    old_idle: int = 600
    reserve: int = 5
    max_request: int = 100
    relative_to_queue: float = 1.15
    min_running: int = 0
    entry_max_slots: int = 10000
    entry_max_idle: int = 100
    entry_curb_idle: int = 5
    max_slots: int = 100000
    curb_slots: int = 90000
    max_idle: int = 1000
    curb_idle: int = 200
    frontend_max_slots: int = 100000
    frontend_curb_slots: int = 90000
    frontend_max_idle: int = 1000
    frontend_curb_idle: int = 200
    global_max_slots: int = 100000
    global_curb_slots: int = 90000
    global_max_idle: int = 1000
    global_curb_idle: int = 200
    least_memory: int = 128
    silence: int = 100
    wait_after: int = 6
    idle_after: int = 11
    remove_type: str = "NO"
    remove_wait: int = 0
    requests_tracking: bool = False
    remove_margin: int = 0
    remember_size: int = 60
    idle_lifetime: int = 3600
    cores_by_share: bool = False
    canaries: int = 10
    backoff: int = 300

    def __post_init__(self) -> None:
        if self.attenuation < 1:
            raise ValueError("attenuation must be at least 1")
        if self.remove_type not in REMOVE_TYPES:
            raise ValueError(f"remove_type {self.remove_type!r} must be one of {', '.join(REMOVE_TYPES)}")
        if self.remove_wait < 0 or self.remove_margin < 0:
            raise ValueError("remove_wait and remove_margin must not be negative")
        if self.canaries < 1:
            raise ValueError(f"canaries is {self.canaries}: without one no stage area would ever be tried")


@dataclass(frozen=True)
class Schedd:
    """A schedd whose jobs count, and the share of its MaxJobsRunning at which its idle jobs do not any more."""

    name: str
    full: float = 0.95


@dataclass(frozen=True)
class Factory:
    """A factory: its collector (host:port), and the only sender there whose entries are believed."""

    collector: str
    identity: str


@dataclass(frozen=True)
class Config:
    """The whole file. Times in seconds.

    Args:
        frontend, group: the names; together FRONTEND.GROUP, which pilots carry as GLIDECLIENT_Name.
        identity: what the factories' collectors make of our certificate.
        certificate, key: our own service certificate, to authenticate with (files; ``$CREDENTIALS_DIRECTORY/...`` for
            a credential that systemd loads).
        security_name, security_class: as the factories have them configured.
        pool: host:port of the users' collector.
        schedds: whose jobs count.
        factories: whose entries are asked for pilots; one that is away is asked for none meanwhile.
        proxy: the pilots' proxy, to send to the factories.
        vo: the VO whose jobs count, at entries that accept it or do not say; empty for any.
        jobs, job_attributes, match: which jobs count, what of them the match looks at, and the match: a ClassAd
            expression with the job as MY and the entry as TARGET. What a job's size asks for is matched besides.
        entries: constraint on the factories' entries.
        parameters: set for pilots.
        manifest: written by pilotbed-stage.
        status: status file for tools.
        least_proxy_life: with less, nothing is asked for.
        downtime: if this file exists, nothing is asked for; its first line is the reason.
        host: this frontend's own name among those of the same FRONTEND.GROUP.
        ahead: the hosts of those that go before it: while one of them is at work this one stands by.
        takeover: seconds without a word from those, in the users' pool, after which this one goes to work.
    """

    frontend: str
    group: str
    identity: str
    certificate: str
    key: str
    security_name: str
    security_class: str
    pool: str
    schedds: tuple[Schedd, ...]
    factories: tuple[Factory, ...]
    proxy: Path
    vo: str = ""
    jobs: str = DEFAULT_JOBS
    job_attributes: tuple[str, ...] = ("DESIRED_Sites", "RequestCpus")
    match: str = DEFAULT_MATCH
    entries: str = "true"
    parameters: Mapping[str, str] = field(default_factory=dict)
    loop_delay: float = 60
    manifest: Path = Path("/var/lib/pilotbed/frontend/stage/manifest.json")
    status: Path = Path("/run/pilotbed/frontend/state.json")
    least_proxy_life: int = 3600
    downtime: Path = Path("/var/lib/pilotbed/frontend/downtime")
    host: str = ""
    ahead: tuple[str, ...] = ()
    takeover: float = 300
    pressure: Pressure = field(default_factory=Pressure)

    def __post_init__(self) -> None:
        if not self.factories:
            raise ValueError("factories: there is none; [[factories]] needs a collector and an identity")
        if self.ahead and (not self.host or self.host in self.ahead):
            raise ValueError(f"host {self.host!r}: it needs a name of its own among the frontends, as ahead has theirs")
        try:
            check_name(self.frontend, "frontend", at=False)
            check_name(self.group, "group", at=False)
            if self.vo:
                check_name(self.vo, "vo", at=False)
        except ProtocolError as error:
            raise ValueError(str(error)) from error

    @property
    def which_jobs(self) -> str:
        """The constraint on jobs. The schedd says of which VO a job's proxy is, and no user can change that."""
        return f"({self.jobs}) && {equals(x509UserProxyVOName=self.vo)}" if self.vo else self.jobs

    @property
    def which_entries(self) -> str:
        """The constraint on the factories' entries."""
        if not self.vo:
            return self.entries
        accepted = f"stringListMember({quote(self.vo)}, GLIDEIN_Supported_VOs)"
        return f"({self.entries}) && (GLIDEIN_Supported_VOs =?= undefined || {accepted})"

    @property
    def client(self) -> Client:
        """``FRONTEND.GROUP``."""
        return Client(self.frontend, self.group)
