"""The factory's configuration file, /etc/pilotbed/factory.toml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotbed.pool.values import Value
from pilotbed.protocol import ProtocolError
from pilotbed.protocol.ads import FactoryName, check_name

from . import gridtypes

_ATTRIBUTE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_URL = re.compile(r"https?://[A-Za-z0-9.:/_-]+")

TRAVERSALS = ("direct", "ccb", "ccb_streaming", "ccb_tunnel", "relay")


def _names(names: Mapping[str, object], what: str, at: bool = False) -> None:
    for name in names:
        try:
            check_name(name, what, at)
        except ProtocolError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Limits:
    """How many pilots an entry takes; a class is one frontend's SecurityClass. Defaults are glideinWMS's."""

    max_pilots: int = 10000
    max_idle: int = 2000
    max_held: int = 1000
    class_max_pilots: int = 5000
    class_max_idle: int = 100
    class_max_held: int = 50
    #: Most pilots that one turn submits, releases and removes.
    submit_per_turn: int = 100
    release_per_turn: int = 20
    remove_per_turn: int = 5


@dataclass(frozen=True)
class Frontend:
    """A frontend that may ask; its key in the file is the SecurityName.

    ``identity`` is what the collector makes of its certificate, ``classes`` the SecurityClasses that it may use.
    """

    identity: str
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _names(dict.fromkeys(self.classes), "classes")


@dataclass(frozen=True)
class Entry:
    """One way into one site.

    Args:
        gridtype: a module of gridtypes.
        gatekeeper: the CE's address, of the form that its grid type has.
        queue: the batch queue behind it.
        proxy: URL of the site's Squid; empty for none.
        traversal: how the pool reaches pilots there: `TRAVERSALS`, joined by commas, the best one first; a pilot takes
            the first one that it gets (docs/traversal.md).
        relays: host:port of the relays' control ports; with ``relay`` among the ways, and only then.
        ccb_broker: host:port of the collector that pilots tunnel through; with ``ccb_tunnel``, and only then.
        glexec: GLEXEC_BIN, the site's gLExec; ``NONE`` if it has none.
        attributes: published in the ad, and given to the pilots.
        parameters: what a frontend may set, with its default.
        allow_frontends: SecurityNames, or ``NAME:CLASS``; empty for all.
        limits: how many pilots.
        max_walltime: seconds that the queue lets a pilot run.
        memory: MB that a pilot asks the batch system for, and has for its jobs.
        work_dir: where a pilot makes its work directory: the worker's own disk, not the session directory, which is
            shared with the CE. AUTO takes TMPDIR or /var/tmp; see glidein_startup.sh -dir for more.
        files: further files for the pilots there, as in `Stage`.
    """

    gridtype: str
    gatekeeper: str
    queue: str
    proxy: str = ""
    traversal: str = "direct"
    relays: tuple[str, ...] = ()
    ccb_broker: str = ""
    glexec: str = "NONE"
    max_walltime: int = 86400
    memory: int = 1000
    work_dir: str = "AUTO"
    attributes: Mapping[str, str | int | bool] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    allow_frontends: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    files: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        kind = gridtypes.load(self.gridtype)
        if not kind.gatekeeper.fullmatch(self.gatekeeper):
            raise ValueError(f"gatekeeper {self.gatekeeper!r} must be of the form {kind.example}")
        if self.proxy and not _URL.fullmatch(self.proxy):
            raise ValueError(f"proxy {self.proxy!r} must be a URL, such as http://squid:3128")
        ways = self.traversal.split(",")
        if not set(ways) <= set(TRAVERSALS):
            raise ValueError(f"traversal {self.traversal!r} must be of {', '.join(TRAVERSALS)}, joined by commas")
        if ("relay" in ways) != bool(self.relays):
            raise ValueError("relays must be given with traversal = 'relay', and only then")
        if ("ccb_tunnel" in ways) != bool(self.ccb_broker):
            raise ValueError("ccb_broker must be given with traversal = 'ccb_tunnel', and only then")
        for name in (*self.attributes, *self.parameters):
            if not _ATTRIBUTE.fullmatch(name):
                raise ValueError(f"{name!r} is not an attribute name: letters, digits and _ only")
        try:
            check_name(self.queue, "queue", at=False)
        except ProtocolError as error:
            raise ValueError(str(error)) from error

    def published(self) -> dict[str, Value]:
        """Return the attributes that the entry's ad shows to frontends."""
        own: dict[str, Value] = {
            "GLIDEIN_Gatekeeper": self.gatekeeper,
            "GLIDEIN_GridType": self.gridtype,
            "GLIDEIN_TrustDomain": "grid",
            "GLIDEIN_SupportedAuthenticationMethod": "grid_proxy",
            "GLIDEIN_REQUIRE_VOMS": True,
            "GLIDEIN_CPUS": 1,
        }
        return own | self._shared() | dict(self.attributes)

    def staged(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes that the entry's pilots get with its part of the stage area.

        Args:
            common: attributes of every entry's pilots; what they say needs no default here.
        """
        own = {name: value for name, value in self._shared().items() if value != ""} | dict(self.attributes)
        if "GLIDEIN_Job_Max_Time" not in {**common, **own}:
            # A pilot takes jobs for the other half of the queue's time; with the usual 36 hours for a job it would be
            # ten minutes.
            own["GLIDEIN_Job_Max_Time"] = self.max_walltime // 2
        return own

    def _shared(self) -> dict[str, Value]:
        """Return what frontends and pilots are told alike."""
        return {
            "GLIDEIN_Max_Walltime": self.max_walltime,
            "GLIDEIN_MaxMemMBs": self.memory,
            "GLIDEIN_Traversal": self.traversal,
            "GLIDEIN_Relay_Server": " ".join(self.relays),
            "GLIDEIN_CCB_Broker": self.ccb_broker,
            "GLEXEC_BIN": self.glexec,
        }


@dataclass(frozen=True)
class Stage:
    """What pilots fetch from this factory; pilotbed.glidein.builder says more of attributes and files.

    Args:
        web: URL of the directory that holds the manifest.
        attributes: of every entry's pilots; a value may be a ClassAd expression, ``{expr = "..."}``.
        files: further files for every entry's pilots.
        condor: ``host`` packs the installed HTCondor, ``none`` none; or a .tar.gz.
        tarballs: HTCondor for workers of other platforms: ``file``, ``os`` (debian13), ``arch`` (aarch64).
        keep_days: how long files stay that no list names any more.
    """

    web: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Mapping[str, Any], ...] = ()
    condor: str = "host"
    tarballs: tuple[Mapping[str, Any], ...] = ()
    keep_days: float = 30


#: What a frontend may set at every entry. GLIDEIN_Collector is its pool; the rest steer a pilot's life.
PARAMETERS = {
    "GLIDEIN_Collector": "",
    "GLIDECLIENT_ReqNode": "",
    "GLIDEIN_Max_Idle": "",
    "GLIDEIN_Max_Tail": "",
    "GLIDEIN_Glexec_Use": "",
}


@dataclass(frozen=True)
class Config:
    """The whole file. Times in seconds.

    Args:
        factory: FACTORY in names.
        glidein: GLIDEIN in names: the version of this set of entries.
        collector: host:port of the WMS collector.
        frontends: by SecurityName.
        entries: by name.
        stage: what pilots fetch.
        loop_delay: from one turn to the next.
        advertise_turns: entries' ads are sent every so many turns, and in each turn that did something or finds another
            downtime.
        directory: credentials, logs of pilots, downtimes.
        renewed: where the renewal leaves what it renewed.
        manifest: written by pilotbed-factory-stage, beside the files.
        executable: the pilots' start-up script.
        status: status file for tools.
        certificates: directory of CAs and CRLs, by which the factory itself knows computing elements.
        verbosity: of the start-up script (std, nodebug, fast, check).
        least_proxy_life: with less, a credential submits no pilot.
        recoverable_holds: regular expressions on HoldReason; such pilots are released, others removed.
        hold_wait: a pilot is released after this, times the number of its holds.
        max_releases: a pilot held more often than this is removed.
        stale_idle, stale_running: a pilot older than this is removed.
    """

    factory: str
    glidein: str
    collector: str
    frontends: Mapping[str, Frontend]
    entries: Mapping[str, Entry]
    stage: Stage
    loop_delay: float = 60
    advertise_turns: int = 5
    directory: Path = Path("/var/lib/pilotbed/factory")
    renewed: Path = Path("/var/lib/pilotbed/renewed")
    manifest: Path = Path("/var/lib/pilotbed/factory/stage/manifest.json")
    executable: Path = Path("/usr/lib/pilotbed/pilotbed/glidein/glidein_startup.sh")
    status: Path = Path("/run/pilotbed/factory/state.json")
    certificates: Path = Path("/etc/grid-security/certificates")
    verbosity: str = "std"
    least_proxy_life: int = 3600
    recoverable_holds: tuple[str, ...] = ("SSL connect error", "curl_easy_perform")
    hold_wait: int = 300
    max_releases: int = 10
    stale_idle: int = 7 * 86400
    stale_running: int = 31 * 86400

    def __post_init__(self) -> None:
        _names({self.factory: None}, "factory")
        _names({self.glidein: None}, "glidein")
        _names(self.frontends, "frontends")
        _names(self.entries, "entries")
        for pattern in self.recoverable_holds:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"recoverable_holds {pattern!r}: {error}") from error
        for name, entry in self.entries.items():
            known = {
                *self.frontends,
                *(f"{frontend}:{klass}" for frontend, one in self.frontends.items() for klass in one.classes),
            }
            if wrong := sorted(set(entry.allow_frontends) - known):
                raise ValueError(f"entries.{name}.allow_frontends: {wrong[0]} is not under frontends")

    @property
    def name(self) -> FactoryName:
        """``GLIDEIN@FACTORY``."""
        return FactoryName(self.glidein, self.factory)
