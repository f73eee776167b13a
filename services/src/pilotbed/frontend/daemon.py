"""pilotbed-frontend: looks at jobs, slots and entries, decides, and asks the factory. The thin shell."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotbed.daemon import Daemon, NotReady, run
from pilotbed.pool import AbsurdValue, Collector, Expression, Identity, PoolError, Schedd, any_of, equals, open_door
from pilotbed.pool.values import Value, number
from pilotbed.protocol import ProtocolError
from pilotbed.protocol.ads import (
    ClientStage,
    Credentials,
    GlobalOffer,
    Kind,
    Offer,
    Request,
    Sealed,
    answered,
    group_ad,
    resource_ad,
)
from pilotbed.protocol.crypto import SessionKey
from pilotbed.protocol.manifest import parse_manifest
from pilotbed.proxy import Proxy, ProxyError
from pilotbed.service import event, first_line, read_file

from . import config as settings
from .config import Config
from .decisions import (
    Decision,
    History,
    Job,
    LeftOut,
    Level,
    Size,
    Slot,
    View,
    classify,
    decide,
    merged,
    name_of,
    whereabouts,
)

_log = logging.getLogger("pilotbed.frontend")


#: Most kinds of jobs that the status file and the log name when no pilot is asked for them.
NAMED = 20


def credential_id(path: Path, dn: str) -> str:
    """Return the name of a credential in requests: eight characters that stay when the proxy is renewed."""
    return hashlib.sha256(f"{path}\0{dn}".encode()).hexdigest()[:8].upper()


@dataclass
class Wms:
    """A factory as it is met: its collector, whom to believe there, and the requests that are left there."""

    collector: Collector
    identity: str
    address: str
    asked: set[str] = field(default_factory=set)


class Frontend(Daemon):
    """One frontend group: what it remembers from turn to turn, and the turn itself."""

    def __init__(self, config: Config) -> None:
        super().__init__("frontend", config.status, config.loop_delay)
        self.config = config
        self.match = Expression(config.match)
        self.pool = Collector(config.pool)
        self.factories = [Wms(Collector(one.collector), one.identity, one.collector) for one in config.factories]
        #: The factory of each name, as its ads say it.
        self.wms: dict[str, Wms] = {}
        self.history: dict[str, History] = {}
        #: By the factory's public key, not by the number that it gives to it: another may give that, too.
        self.sessions: dict[str, tuple[SessionKey, str]] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.left_out: list[LeftOut] = []
        self.proxy: Proxy | None = None
        #: What the factory has said of each entry, by its full name; why a schedd's idle jobs do not count; and what
        #: stops all.
        self.answers: dict[str, dict[str, Value]] = {}
        self.closed: dict[str, str] = {}
        #: The stage area with which a pilot has come into the pool.
        self.tried: tuple[str, str] | None = None
        self.stopped_why = ""
        #: The frontend of our name that is at work, while we are not.
        self.active = ""

    # -- reading

    def jobs(self) -> tuple[list[Job], bool]:
        """Return the jobs of all schedds, and whether one of these could not be asked.

        Jobs that wait at a schedd which can start no more are left out.

        Raises:
            PoolError: none could be asked.
        """
        wanted = self.config.job_attributes
        attributes = [*Job.ATTRIBUTES, *(name for name in wanted if name not in Job.ATTRIBUTES)]
        constraint = f"({self.config.which_jobs}) && {Job.STATES}"
        found, missing = [], []
        self.left_out, self.closed = [], {}
        for one in self.config.schedds:
            try:
                full = self.full(one)
                ads = Schedd(one.name, self.pool).query(constraint, attributes)
            except PoolError as error:
                missing.append(error)
                self.closed[one.name] = str(error)
                self.say(f"schedd {one.name}", "schedd-missing", schedd=one.name, why=error)
                continue
            for ad in ads:
                with self.apart(f"job {name_of(ad)}"):
                    job = self.job(ad)
                    if job is not None and not (full and job.idle):
                        found.append(job)
            if full:
                self.closed[one.name] = full
                self.say(f"schedd {one.name}", "schedd-full", schedd=one.name, why=full)
        if missing and len(missing) == len(self.config.schedds):
            raise missing[0]
        return found, bool(missing)

    def job(self, ad: Mapping[str, Value]) -> Job | None:
        """Return the job of an ad; None if it does not count."""
        notes: list[str] = []
        try:
            job = Job.from_ad(ad, self.config.job_attributes, notes)
        except AbsurdValue as error:
            self.absurd["jobs_left_out"] += 1
            self.left_out.append(LeftOut(1, name_of(ad), str(error)))
            return None
        self.odd("jobs", name_of(ad), notes)
        return job

    def full(self, schedd: settings.Schedd) -> str:
        """Return why idle jobs of ``schedd`` cannot start anyway; empty if they can."""
        attributes = [
            "TotalRunningJobs", "MaxJobsRunning", "TransferQueueNumUploading", "TransferQueueMaxUploading",
            "CurbMatchmaking",
        ]  # fmt: skip
        ads = self.pool.query(f"{equals(MyType='Scheduler', Name=schedd.name)}", attributes)
        if not ads:
            raise PoolError(f"collector {self.config.pool} knows no schedd {schedd.name}")
        ad, notes = ads[0], list[str]()
        for count, most in (attributes[:2], attributes[2:4]):
            limit, has = number(ad, most, 0, notes=notes), number(ad, count, 0, notes=notes)
            if limit and has >= schedd.full * limit:
                return f"{count} {has} of {limit}"
        self.odd("schedds", schedd.name, notes)
        return "CurbMatchmaking" if ad.get("CurbMatchmaking") is True else ""

    def slots(self) -> list[Slot]:
        """Return the slots of all pilots in the pool that are alive, whoever asked for them."""
        pilots = f"{equals(MyType='Machine')} && IS_GLIDEIN =?= true"
        alive = f"time() - LastHeardFrom < {self.config.pressure.silence}"
        ads = self.pool.query(f"{pilots} && {alive}", Slot.ATTRIBUTES)
        found = []
        for ad in ads:
            notes: list[str] = []
            with self.apart(f"slot {ad.get('Name')}"):
                found.append(Slot.from_ad(ad, self.config.pressure.least_memory, notes))
                self.odd("slots", ad.get("Name"), notes)
        return found

    def offers(self) -> tuple[list[Offer], dict[str, GlobalOffer]]:
        """Return entries and factory keys, from the trusted factories only.

        Raises:
            PoolError: none of them could be asked.
        """
        offers: list[Offer] = []
        keys: dict[str, GlobalOffer] = {}
        missing = []
        self.answers, self.wms = {}, {}
        for wms in self.factories:
            try:
                self.offers_of(wms, offers, keys)
            except PoolError as error:
                missing.append(error)
                self.say(f"factory {wms.address}", "factory-missing", factory=wms.address, why=error)
        if len(missing) == len(self.factories):
            raise missing[0]
        self.sessions = {key.public_pem: self.sessions[key.public_pem] for key in keys.values()}
        return sorted(offers, key=lambda offer: offer.full_name), keys

    def offers_of(self, wms: Wms, offers: list[Offer], keys: dict[str, GlobalOffer]) -> None:
        """Add those of one factory."""
        offer, key, answer = Kind.OFFER.my_type, Kind.GLOBAL_OFFER.my_type, Kind.ANSWER.my_type
        entries = f"({equals(GlideinMyType=offer)}) && ({self.config.which_entries})"
        answers = equals(GlideinMyType=answer, ReqClientName=str(self.config.client))
        ads = wms.collector.query(f"({entries}) || ({any_of('GlideinMyType', [key])}) || ({answers})")
        for ad in ads:
            name = f"{ad.get('GlideinMyType')} {ad.get('Name')}"
            if ad.get("AuthenticatedIdentity") != wms.identity:
                why = f"sent by {ad.get('AuthenticatedIdentity')}, not {wms.identity}"
                self.leave_out("offers", name, why)
                continue
            with self.apart(f"offer {name}"):
                try:
                    if ad.get("GlideinMyType") == key:
                        found = GlobalOffer.from_ad(ad)
                        if (known := self.wms.get(str(found.name), wms)) is not wms:
                            self.leave_out("offers", name, f"the factory at {known.address} is called so, too")
                            continue
                        self.session(found)  # before it counts as known: its key may be none
                        self.wms[str(found.name)], keys[str(found.name)] = wms, found
                    elif ad.get("GlideinMyType") == answer:
                        entry, said = answered(ad)
                        self.answers[entry] = said
                    else:
                        one, notes = Offer.from_ad(ad), list[str]()
                        Size.of_pilots(one.attributes, None, notes)
                        self.odd("offers", name, notes)
                        offers.append(one)
                except ProtocolError as error:
                    self.leave_out("offers", name, error)

    def stage(self) -> ClientStage:
        """Return where pilots find our own files."""
        path, group = self.config.manifest, self.config.group
        try:
            found = parse_manifest(read_file(path), "groups")
            return ClientStage(found.web, found.signtype, found.main, found.part(group), f"{found.web}/group_{group}")
        except OSError as error:
            raise NotReady(f"{path}: {error.strerror}: build the stage area with pilotbed-stage") from error
        except ProtocolError as error:
            raise NotReady(f"{path}: {error}") from error

    def pilot_proxy(self) -> tuple[str, str]:
        """Return the pilots' proxy (PEM), and why it cannot be used; empty if it can."""
        path, least = self.config.proxy, self.config.least_proxy_life
        try:
            pem = read_file(path)
            self.proxy = Proxy.read(pem)
        except OSError as error:
            self.proxy = None
            return "", f"{path}: {error.strerror}: start pilotbed-pilot-credential.service"
        except ProxyError as error:
            self.proxy = None
            return "", f"{path}: {error}"
        left = self.proxy.left(time.time())
        return pem, f"pilot proxy lives only {left} s more (least {least} s)" if left < least else ""

    def stopped(self) -> str:
        """Return the reason of a downtime; empty without one."""
        path = self.config.downtime
        return f"frontend is in downtime: {first_line(path)}" if os.path.lexists(path) else ""

    # -- asking

    def session(self, key: GlobalOffer) -> tuple[SessionKey, str]:
        """Return the session key for a factory's key, and that wrapped for it; the same as long as the key is."""
        if key.public_pem not in self.sessions:
            session = SessionKey.new()
            self.sessions[key.public_pem] = session, session.wrapped(key.public_pem)
        return self.sessions[key.public_pem]

    def ask(self, decisions: Sequence[Decision], keys: dict[str, GlobalOffer], pem: str, stage: ClientStage) -> None:
        """Send credentials and requests to the factories, and the decisions to the users' pool."""
        failed = []
        for name, wms in self.wms.items():
            try:
                here = [decision for decision in decisions if str(decision.offer.name) == name]
                self.ask_one(wms, here, keys[name], pem, stage)
            except PoolError as error:
                failed.append(error)
                self.say(f"factory {wms.address}", "factory-missing", factory=wms.address, why=error)
        self.tell_users(decisions)
        if failed and len(failed) == len(self.wms):
            raise failed[0]

    def ask_one(
        self, wms: Wms, decisions: Sequence[Decision], key: GlobalOffer, pem: str, stage: ClientStage
    ) -> None:
        """Send them to one of them."""
        config = self.config
        requests, globals_ = [], []
        if self.proxy is not None:
            name = credential_id(config.proxy, self.proxy.dn)
            session, code = self.session(key)
            values = Credentials.values(config.security_name, {name: (config.security_class, pem)})
            sealed = Sealed.seal(session, code, key.key_id, config.identity, values)
            globals_.append(Credentials(str(key.name), config.client, sealed).to_ad())
            for decision in decisions:
                with self.apart(f"request to {decision.offer.full_name}"):
                    requests.append(self.request(decision, key, name, stage, wms.address.partition(":")[0]))
        wms.collector.advertise(globals_, Kind.CREDENTIALS.update)
        wms.collector.advertise([request.to_ad() for request in requests], Kind.REQUEST.update)
        names = {request.name for request in requests}
        if gone := wms.asked - names:
            wms.collector.invalidate(Kind.REQUEST.my_type, any_of("Name", sorted(gone)), Kind.REQUEST.invalidate)
        wms.asked = names

    def request(
        self, decision: Decision, key: GlobalOffer, credential: str, stage: ClientStage, node: str
    ) -> Request:
        """Return what is asked of one entry, for its factory's ``key`` and ``node``, by the name of a credential."""
        config, counts = self.config, decision.counts
        session, code = self.session(key)
        values = {
            "SecurityName": config.security_name,
            "SecurityClass": config.security_class,
            "SubmitProxy": credential,
        }
        return Request(
            entry=decision.offer.full_name,
            client=config.client,
            credential=credential,
            idle=decision.idle,
            maximum=decision.maximum,
            removal=decision.removal,
            margin=decision.margin,
            idle_lifetime=config.pressure.idle_lifetime,
            stage=stage,
            parameters={"GLIDECLIENT_ReqNode": node} | dict(config.parameters),
            sealed=Sealed.seal(session, code, key.key_id, config.identity, values),
            monitor={
                "Idle": counts["JobsIdle"],
                "OldIdle": counts["JobsIdleOld"],
                "Running": counts["JobsRunning"],
                "RunningHere": counts["JobsRunningHere"],
                "GlideinsTotal": counts["GlideinsTotal"],
                "GlideinsIdle": counts["GlideinsIdle"],
            },
        )

    def unused(self, now: float) -> dict[str, tuple[int, float]]:
        """Return by entry how many pilots in a row no job wanted, as its factory says, and the last one's age."""
        found = {}
        for name, said in self.answers.items():
            if count := number(said, "Unused", 0, notes=[]):
                found[name] = count, max(now - number(said, "UnusedLast", int(now), notes=[]), 0)
        return found

    def tell_users(self, decisions: Sequence[Decision]) -> None:
        """Publish what was decided in the users' pool, for pilotbed-why: useful, but nothing hangs on it."""
        config = self.config
        ads = [
            resource_ad(decision.offer, config.client, dict(decision.counts) | {"Why": decision.why},
                        self.answers.get(decision.offer.full_name))
            for decision in decisions
        ]  # fmt: skip
        group = group_ad(config.client, {
            "Jobs": config.which_jobs,
            "Match": config.match,
            "Schedds": ",".join(one.name for one in config.schedds),
            "ScheddsClosed": "; ".join(f"{name}: {why}" for name, why in self.closed.items()),
            "Stopped": self.stopped_why,
            "Entries": len(decisions),
            "Host": config.host,
            "Turn": math.ceil(config.loop_delay),
        })  # fmt: skip
        try:
            self.pool.advertise([*ads, group], Kind.RESOURCE.update)
        except PoolError as error:
            self.say("resource", "glideresource-failed", why=error)

    def withdraw(self) -> None:
        """Take back everything that was asked for; by name that is another's, while we stand by."""
        if self.active:
            return
        mine = equals(ClientName=str(self.config.client))
        for wms in self.factories:
            try:
                for kind in (Kind.REQUEST, Kind.CREDENTIALS):
                    wms.collector.invalidate(kind.my_type, mine, kind.invalidate)
            except PoolError as error:
                _log.warning(event("not-withdrawn", factory=wms.address, why=error))
        for kind in (Kind.RESOURCE, Kind.GROUP):
            self.pool.invalidate(kind.my_type, equals(GlideClientName=str(self.config.client)), kind.invalidate)

    def status(self, now: float) -> dict[str, Any]:
        """Return entries and the pilots' proxy."""
        return {
            "client": str(self.config.client),
            "active": self.active or self.config.host,
            "entries": self.entries,
            "left_out": [vars(one) for one in self.left_out[:NAMED]],
            "proxy": {"dn": self.proxy.dn, "left": self.proxy.left(now)} if self.proxy else None,
        }

    # -- the turn

    def before_us(self) -> str:
        """Return which of the frontends that go before us is at work; empty if none is.

        glideinWMS has it, too: its standby looks for the requests of the one that it stands by for. Here it is the word
        to the users' pool, whose collector tells by its own clock how old that is.
        """
        if not self.config.ahead:
            return ""
        # Pilots and schedds may write into that pool, too.
        ours = equals(MyType=Kind.GROUP.my_type, GlideClientName=str(self.config.client),
                      AuthenticatedIdentity=self.config.identity)  # fmt: skip
        young = f"time() - LastHeardFrom < {self.config.takeover}"
        ahead = any_of("GlideClientHost", self.config.ahead)
        ads = self.pool.query(f"{ours} && ({ahead}) && {young}", ["GlideClientHost"])
        return str(ads[0]["GlideClientHost"]) if ads else ""

    def work(self) -> None:
        """Look, decide, ask; or stand by."""
        config = self.config
        self.active = self.before_us()
        if config.ahead:
            self.say("active", "stands-by" if self.active else "at-work", active=self.active or config.host)
        if self.active:
            # What was asked for and seen is the other's now.
            self.entries, self.history, self.closed = {}, {}, {}
            for wms in self.factories:
                wms.asked = set()
            return
        stage = self.stage()
        pem, unusable = self.pilot_proxy()
        offers, keys = self.offers()
        # Without the factory's key nothing can be asked of its entries; both come back with its next turn.
        offers = [offer for offer in offers if str(offer.name) in keys]
        (jobs, blind), everybody = self.jobs(), self.slots()
        slots = [slot for slot in everybody if slot.client == str(config.client)]
        frontend = Level.of(slot for slot in everybody if slot.client.rpartition(".")[0] == config.frontend)
        now = time.time()
        classes = classify(jobs, now, config.pressure.old_idle)
        places = whereabouts(jobs, slots, offers)
        self.stopped_why = self.stopped() or unusable
        signed = stage.main.sign, stage.group.sign
        if any(slot.stage == signed for slot in slots):
            self.tried = signed
        view = View(classes, offers, slots, places, self.history, self.stopped_why, blind, signed != self.tried,
                    frontend, Level.of(everybody), self.unused(now))  # fmt: skip
        decisions, left_out = decide(view, config.pressure, self.match, self.apart)
        self.left_out = merged([*left_out, *self.left_out])
        for one in self.left_out[:NAMED]:
            self.once(f"left out {one.why}", "jobs-left-out", jobs=one.jobs, such_as=one.example, why=one.why)
        self.ask(decisions, keys, pem, stage)
        there = {offer.full_name for offer in offers}
        self.history = {name: one for name, one in self.history.items() if name in there}
        self.history |= {decision.offer.full_name: decision.history for decision in decisions}
        if not decisions:
            self.say("entries", "no-entries", factories=",".join(one.collector for one in config.factories),
                     trusted=",".join(one.identity for one in config.factories))  # fmt: skip
        self.note(decisions, int(now))

    def note(self, decisions: Sequence[Decision], now: int) -> None:
        """Log the decisions that differ from the last turn's, and keep all for the status file."""
        last = {name: entry.get("last_request", 0) for name, entry in self.entries.items()}
        self.entries = {}
        for decision in decisions:
            name, counts = decision.offer.full_name, decision.counts
            self.say(
                f"decision {name}", "decision", entry=decision.offer.entry, idle_jobs=counts["JobsIdle"],
                running_jobs=counts["JobsRunningHere"], slots=counts["GlideinsTotal"],
                idle_slots=counts["GlideinsIdle"], ask_idle=decision.idle, ask_max=decision.maximum,
                remove=decision.removal.value, why=decision.why,
            )  # fmt: skip
            self.entries[name] = dict(counts) | {
                "entry": decision.offer.entry,
                "ask_idle": decision.idle,
                "ask_max": decision.maximum,
                "remove": decision.removal.value,
                "why": decision.why,
                "last_request": now if decision.idle else last.get(name, 0),
            }


def start(config: Config) -> Frontend:
    """Open the door to the pools with the frontend's own certificate and return the frontend."""
    certificate, key = (Path(os.path.expandvars(path)) for path in (config.certificate, config.key))
    open_door(Identity(certificate, key))
    _log.info(event("start", client=config.client, pool=config.pool,
                    factories=",".join(one.collector for one in config.factories), match=config.match))
    return Frontend(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the frontend until it is told to stop."""
    return run("frontend", "Ask for pilots where jobs wait.", Config, start, argv)


if __name__ == "__main__":
    sys.exit(main())
