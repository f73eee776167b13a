"""pilotbed-factory: reads requests, does what ``decisions`` says, and answers. The thin shell around pure parts."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from pilotbed.daemon import NAMED, Daemon, NotReady, run
from pilotbed.pool import AbsurdValue, Collector, PoolError, Schedd, any_of, equals, open_door, version
from pilotbed.pool.values import Value
from pilotbed.protocol import ProtocolError
from pilotbed.protocol.ads import GlobalOffer, Kind, Offer, answer_ad
from pilotbed.protocol.crypto import FactoryKey
from pilotbed.protocol.manifest import Stage, parse_manifest
from pilotbed.proxy import Proxy, ProxyError
from pilotbed.service import event, read_file

from . import downtime
from .config import PARAMETERS, Config, Entry
from .credentials import Store
from .decisions import Decision, Patience, Pilot, grouped, manage, tend
from .downtime import Downtime
from .endings import Endings
from .renewals import Renewals
from .states import State
from .submission import Submission
from .trust import CredentialName, Refusal, Rules, Trusted, check_credentials, check_request

_log = logging.getLogger("pilotbed.factory")

#: Most pilots in one cluster.
CLUSTER = 10
#: Seconds between two looks at the output of pilots that have ended.
LOOK = 15


class Factory(Daemon):
    """One factory: what it remembers from turn to turn, and the turn itself."""

    def __init__(self, config: Config) -> None:
        super().__init__("factory", config.status, config.loop_delay)
        self.config = config
        self.rules = Rules(config.name, FactoryKey.generate(), config.frontends, config.entries, PARAMETERS)
        self.collector = Collector(config.collector)
        self.store = Store(config.directory / "credentials")
        self.submission = Submission(config.name, socket.getfqdn(), config.executable, config.verbosity)
        self.started = int(time.time())
        self.refused: dict[str, str] = {}
        self.entries: dict[str, dict[str, Any]] = {name: {} for name in config.entries}
        self.proxies: dict[CredentialName, Proxy] = {}
        self.renewals = Renewals(config.certificates)
        #: Of the pilots' HTCondor: this host's, or one that only its tarball knows (glideinWMS then says "default").
        self.condor = version() if config.stage.condor == "host" else "default"
        self.endings = Endings(config.directory / "log")
        #: When outputs of pilots are looked at again.
        self.look_at = 0.0
        #: The entries in downtime, as their ads say.
        self.down: set[str] = set()

    # -- reading

    def downtimes(self) -> dict[str, Downtime]:
        """Return the downtimes that hold now, by name. Other files there, such as an editor's, mean nothing."""
        directory, known, now = self.config.directory / "downtime", downtime.names(self.config), time.time()
        found = {}
        try:
            names = sorted(os.listdir(directory))  # noqa: PTH208  # Path.glob hides that it may not look
        except FileNotFoundError:
            return {}
        except OSError as error:
            # Rather no pilots than pilots into a site that is being worked on.
            return {"ALL": Downtime(f"downtimes cannot be read: {directory}: {error.strerror}")}
        for name in names:
            if name not in known:
                self.leave_out("downtimes", name, f"no entry, no SECURITYNAME:CLASS and not ALL, in {directory}")
                continue
            notes: list[str] = []
            one = downtime.read(directory / name, notes)
            self.odd("downtimes", name, notes)
            if one.over(now):
                self.say(f"downtime {name}", "downtime-over", name=name, until=one.until)
            else:
                found[name] = one
        return found

    def stage(self) -> Stage:
        """Return the stage area's manifest."""
        path = self.config.manifest
        try:
            return parse_manifest(read_file(path), "entries")
        except OSError as error:
            raise NotReady(f"{path}: {error.strerror}: build the stage area with pilotbed-factory-stage") from error
        except ProtocolError as error:
            raise NotReady(f"{path}: {error}") from error

    def pilots(self, schedd: Schedd) -> list[Pilot]:
        """Return this factory's pilots in the queue."""
        mine = equals(GlideinFactory=self.config.factory, GlideinName=self.config.glidein)
        found = []
        for job in schedd.query(mine, Pilot.ATTRIBUTES):
            notes: list[str] = []
            try:
                pilot = Pilot.from_job(job, notes)
            except AbsurdValue as error:
                self.leave_out("pilots", job.get("GridJobId"), error)
                continue
            if pilot is not None:
                self.odd("pilots", pilot.job, notes)
                found.append(pilot)
        return found

    # -- taking what others send

    def take_credentials(self, ads: Sequence[Mapping[str, Value]]) -> None:
        """Store the credentials of trusted frontends, and what the renewal has left."""
        arrived: list[tuple[str, CredentialName, str]] = []
        for ad in ads:
            with self.apart(f"credentials {ad.get('Name')}"):
                try:
                    found = check_credentials(ad, self.rules)
                except Refusal as refusal:
                    self.refuse(ad, refusal)
                    continue
                self.believe(ad)
                arrived += [("frontend", name, pem) for name, pem in found.items()]
        for name in self.store.read():
            path = self.config.renewed / name.filename
            try:
                arrived.append(("renewal", name, read_file(path)))
            except FileNotFoundError:
                continue
            except OSError as error:
                self.leave_out("credentials", path, error.strerror)
        for source, name, pem in arrived:
            with self.apart(f"credential {name.filename}"):
                self.keep(source, name, pem)
        self.proxies = self.store.read()

    def keep(self, source: str, name: CredentialName, pem: str) -> None:
        """Store a credential that ``source`` has sent or left, if it is better than what there is."""
        try:
            proxy, why_not = self.store.keep(name, pem, time.time())
        except (ProxyError, OSError) as error:
            self.say(f"credential {name}", "credential-failed", name=name.filename, source=source, why=error)
            return
        if not why_not:
            _log.info(event("credential-stored", name=name.filename, source=source, proxy=proxy))
        elif why_not != "same":
            self.say(f"credential {name} {source}", "credential-kept", name=name.filename, offered_by=source,
                     why=why_not)  # fmt: skip

    def take_requests(self, ads: Sequence[Mapping[str, Value]], downtimes: Mapping[str, Downtime]) -> list[Trusted]:
        """Return the requests that pass all checks."""
        found, reasons = [], {name: one.reason for name, one in downtimes.items()}
        for ad in sorted(ads, key=lambda ad: str(ad.get("Name", ""))):
            with self.apart(f"request {ad.get('Name')}"):
                try:
                    trusted = check_request(ad, self.rules, self.proxies, reasons)
                except Refusal as refusal:
                    self.refuse(ad, refusal)
                else:
                    self.believe(ad)
                    found.append(trusted)
                    for name, why in trusted.left_out.items():
                        self.leave_out("additions", f"{trusted.request.name} {name}", why)
        return found

    def refuse(self, ad: Mapping[str, Value], why: Refusal) -> None:
        """Note and log a refused ad; once, not in every turn."""
        name = f"{ad.get('GlideinMyType', '?')} {ad.get('Name', '?')}"
        if self.refused.get(name) != str(why):
            identity = ad.get("AuthenticatedIdentity", "unauthenticated")
            _log.warning(event("refused", ad=name, sender=identity, why=why))
        self.refused[name] = str(why)
        self.absurd["ads_refused"] += 1

    def believe(self, ad: Mapping[str, Value]) -> None:
        """Forget an earlier refusal of ``ad``."""
        self.refused.pop(f"{ad.get('GlideinMyType', '?')} {ad.get('Name', '?')}", None)

    # -- doing

    def submit(self, schedd: Schedd, decision: Decision, stage: Stage) -> int:
        """Submit what ``decision`` says; return how many pilots were queued."""
        trusted, config = decision.trusted, self.config
        entry = config.entries[trusted.request.entry_short]
        logs = config.directory / "log" / f"entry_{trusted.request.entry_short}"
        logs.mkdir(mode=0o750, parents=True, exist_ok=True)
        words = self.submission.arguments(entry, trusted, stage)
        credential = trusted.credential
        ends = self.proxies[credential].ends
        files = self.keep_tokens(trusted)
        text = self.submission.description(entry, trusted, words, self.store.path(credential), ends, logs, files)
        queued = 0
        while queued < decision.submit:
            count = min(CLUSTER, decision.submit - queued)
            cluster = schedd.submit(text, count)
            queued += count
            _log.info(event("submitted", entry=trusted.request.entry_short, client=trusted.request.client,
                            pilots=count, cluster=cluster))  # fmt: skip
        return queued

    def keep_tokens(self, trusted: Trusted) -> list[Path]:
        """Write the tokens of a request where HTCondor takes them from; return the files."""
        name, now = trusted.credential, time.time()
        directory = self.config.directory.joinpath(
            "tokens", name.security_name, name.security_class, name.client, name.credential, trusted.request.entry_short
        )
        found = []
        for token in trusted.tokens:
            if token.expired(now):
                self.leave_out("tokens", f"{trusted.request.name} {token.kind}", "it has expired")
            else:
                found.append(token.keep(directory))
        return found

    def carry_out(self, schedd: Schedd, decision: Decision, stage: Stage) -> bool:
        """Do what ``decision`` says and log it; return whether anything was changed."""
        request = decision.trusted.request
        fields = {
            "entry": request.entry_short, "client": request.client, "idle": decision.idle,
            "running": decision.running, "held": decision.held, "requested_idle": request.idle,
            "requested_max": request.maximum, "submit": decision.submit, "remove": len(decision.remove),
            "why": decision.why,
        }  # fmt: skip
        entry = self.entries[request.entry_short]
        now = int(time.time())
        entry["requests"] = entry.get("requests", 0) + 1
        entry["requested_idle"] = entry.get("requested_idle", 0) + request.idle
        entry["requested_max"] = entry.get("requested_max", 0) + request.maximum
        entry["why"] = decision.why
        if request.idle:
            entry["last_request"] = now
        if not decision.submit and not decision.remove:
            self.say(f"decision {request.name}", "decision", **fields)
            return False
        _log.info(event("decision", **fields))
        try:
            if decision.submit and self.submit(schedd, decision, stage):
                entry["last_submit"] = now
            schedd.remove(decision.remove, f"pilotbed-factory: {decision.why}")
        except (PoolError, ProtocolError, ValueError, OSError) as error:
            _log.error(event("decision-failed", entry=request.entry_short, client=request.client, why=error))
            entry["why"] = str(error)
        return True

    def look_after(self, schedd: Schedd, at: Mapping[str, Sequence[Pilot]]) -> None:
        """Release and remove held and stale pilots, given by entry."""
        config = self.config
        patience = Patience(config.recoverable_holds, config.hold_wait, config.max_releases, config.stale_idle,
                            config.stale_running)  # fmt: skip
        for name, entry in config.entries.items():
            with self.apart(f"pilots of entry {name}"):
                self.look_after_entry(schedd, name, entry, at.get(name, []), patience)

    def look_after_entry(
        self, schedd: Schedd, name: str, entry: Entry, pilots: Sequence[Pilot], patience: Patience
    ) -> None:
        """The same for one entry."""
        care = tend(entry, pilots, patience, time.time())
        if care.release or care.remove or care.force:
            reasons = {pilot.job: pilot.hold_reason for pilot in pilots}
            for verb, jobs in (("release", care.release), ("remove", care.remove), ("force", care.force)):
                for job in jobs:
                    _log.info(event("tend", entry=name, action=verb, pilot=job, hold_reason=reasons[job]))
            schedd.release(care.release, "pilotbed-factory: recoverable hold")
            schedd.remove(care.remove, "pilotbed-factory: held for good, or stale")
            schedd.remove(care.force, "pilotbed-factory: held too often", forced=True)

    def clear(self, schedd: Schedd, pilots: Sequence[Pilot], downtimes: Mapping[str, Downtime]) -> None:
        """Remove the pilots that a downtime is to have none of: all at once, there may be a reason to hurry."""
        leaving = downtime.leaving(pilots, downtimes)
        for pilot in leaving:
            _log.info(event("downtime-removes", pilot=pilot.job, entry=pilot.entry, state=pilot.state.value))
        schedd.remove([pilot.job for pilot in leaving], "pilotbed-factory: downtime")

    def renew(self, pilots: Sequence[Pilot]) -> None:
        """Have newer proxies brought to pilots where HTCondor does not, and tell of those that do not get theirs."""
        self.renewals.turn(pilots, self.proxies, self.store.path)
        for job, why in list(self.renewals.failures.items())[:NAMED]:
            self.say(f"renewal {job}", "renewal-failed", pilot=job, why=why)

    # -- telling

    def advertise(self, decisions: Sequence[Decision], downtimes: Mapping[str, Downtime], acted: bool) -> None:
        """Send the factory's key, its answers, and now and then its entries: at once where something has changed."""
        config, key = self.config, self.rules.key
        common: dict[str, Value] = {"DaemonStartTime": self.started}
        whole = GlobalOffer(config.name, key.public_pem, key.key_id).to_ad() | common
        self.collector.advertise([whole], Kind.GLOBAL_OFFER.update)
        down = {name for name in config.entries if not downtimes.keys().isdisjoint((name, "ALL"))}
        if acted or down != self.down or self.turns % config.advertise_turns == 1 or config.advertise_turns == 1:
            offers = []
            for name, entry in config.entries.items():
                counts = self.entries[name]
                monitor = {
                    "TotalStatusIdle": counts["idle"],
                    "TotalStatusRunning": counts["running"],
                    "TotalStatusHeld": counts["held"],
                    "TotalRequestedIdle": counts.get("requested_idle", 0),
                    "TotalRequestedMaxGlideins": counts.get("requested_max", 0),
                }
                limits = {
                    "PerEntryMaxGlideins": entry.limits.max_pilots,
                    "PerEntryMaxIdle": entry.limits.max_idle,
                    "PerEntryMaxHeld": entry.limits.max_held,
                    "DefaultPerFrontendMaxGlideins": entry.limits.class_max_pilots,
                    "DefaultPerFrontendMaxIdle": entry.limits.class_max_idle,
                    "DefaultPerFrontendMaxHeld": entry.limits.class_max_held,
                }
                offer = Offer(
                    name=config.name,
                    entry=name,
                    attributes=entry.published() | {"CONDOR_VERSION": self.condor},
                    parameters=PARAMETERS | dict(entry.parameters),
                    in_downtime=name in down,
                    public_pem=key.public_pem,
                    key_id=key.key_id,
                    limits=limits,
                    monitor=monitor,
                )
                offers.append(offer.to_ad() | common)
            self.collector.advertise(offers, Kind.OFFER.update)
            self.down = down
        answers = [
            answer_ad(config.name, request.entry_short, request, decision.monitor()
                      | self.endings.monitor(request.entry_short, decision.trusted.outputs, time.time()))
            for decision in decisions for request in (decision.trusted.request,)
        ]  # fmt: skip
        self.collector.advertise(answers, Kind.ANSWER.update)

    def withdraw(self) -> None:
        """Remove the factory's ads from the collector."""
        mine = equals(FactoryName=self.config.factory, GlideinName=self.config.glidein)
        answers = equals(ReqFactoryName=self.config.factory, ReqGlideinName=self.config.glidein)
        for kind, whose in ((Kind.OFFER, mine), (Kind.GLOBAL_OFFER, mine), (Kind.ANSWER, answers)):
            self.collector.invalidate(kind.my_type, whose, kind.invalidate)

    def status(self, now: float) -> dict[str, Any]:
        """Return entries, credentials and refusals."""
        return {
            "factory": str(self.config.name),
            "entries": self.entries,
            "credentials": {
                name.filename: {"dn": proxy.dn, "left": proxy.left(now)} for name, proxy in self.proxies.items()
            },
            "refused": self.refused,
            "renewals_waiting": self.renewals.waiting,
        }

    def metrics(self) -> dict[str, float]:
        """Return how pilots get newer proxies where HTCondor does not bring them."""
        renewals = self.renewals
        return {
            "renewals_total": renewals.done,
            "renewals_failed_total": renewals.failed,
            "renewals_waiting": renewals.waiting,
        }

    # -- the turn

    def work(self) -> None:
        """Read, decide, act, answer."""
        stage = self.stage()
        downtimes = self.downtimes()
        schedd = Schedd()
        pilots = self.pilots(schedd)
        ads = self.collector.query(any_of("GlideinMyType", [Kind.CREDENTIALS.my_type, Kind.REQUEST.my_type]))
        there = {f"{ad.get('GlideinMyType', '?')} {ad.get('Name', '?')}" for ad in ads}
        self.refused = {name: why for name, why in self.refused.items() if name in there}
        self.take_credentials([ad for ad in ads if ad.get("GlideinMyType") == Kind.CREDENTIALS.my_type])
        requests = self.take_requests([ad for ad in ads if ad.get("GlideinMyType") == Kind.REQUEST.my_type], downtimes)
        at = grouped(pilots, attrgetter("entry"))
        for name, entry in self.entries.items():
            here = at.get(name, [])
            entry |= {
                "idle": sum(pilot.state.idle for pilot in here),
                "running": sum(pilot.state is State.RUNNING for pilot in here),
                "held": sum(pilot.state is State.HELD for pilot in here),
                "downtime": next((downtimes[one].reason for one in (name, "ALL") if one in downtimes), ""),
                "requests": 0, "requested_idle": 0, "requested_max": 0, "why": "no request",
            }  # fmt: skip
        now = time.time()
        left = {name: proxy.left(now) for name, proxy in self.proxies.items()}
        decisions = manage(requests, self.config.entries, pilots, left, self.config.least_proxy_life, self.apart)
        acted = []
        for decision in decisions:
            with self.apart(f"decision {decision.trusted.request.name}"):
                acted.append(self.carry_out(schedd, decision, stage))
        self.look_after(schedd, at)
        if now >= self.look_at:
            self.look_at = now + LOOK
            for name in self.entries:
                with self.apart(f"outputs of entry {name}"):
                    self.endings.look(name, now)
        with self.apart("downtimes"):
            self.clear(schedd, pilots, downtimes)
        with self.apart("renewals"):
            self.renew(pilots)
        self.advertise(decisions, downtimes, any(acted))


def start(config: Config) -> Factory:
    """Open the door to the local pool and return the factory."""
    open_door()
    _log.info(event("start", factory=config.name, collector=config.collector, entries=",".join(config.entries)))
    return Factory(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the factory until it is told to stop."""
    return run("factory", "Queue pilots as trusted frontends request.", Config, start, argv)


if __name__ == "__main__":
    sys.exit(main())
