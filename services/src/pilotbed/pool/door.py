"""Collector and schedd through htcondor2, in plain Python values and one exception."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .values import Ad, Expr, Value

#: Seconds that a query or a handshake may take before the pool counts as down; HTCondor's own are 60 and 20.
DEADLINE = 5
#: Seconds for which one of several collectors that did not answer is left alone.
AVOIDED = 60


class PoolError(Exception):
    """HTCondor refused or could not be reached; the message names the daemon and what was asked."""


@dataclass(frozen=True)
class Identity:
    """A certificate and key (PEM files) to authenticate with over SSL."""

    certificate: Path
    key: Path


def open_door(identity: Identity | None = None) -> None:
    """Set how this process meets HTCondor; call it once, before anything else of this package.

    Args:
        identity: the certificate for remote daemons; None means the local account (FS), for the own host's daemons.

    The configuration is read once, when htcondor2 is imported: settings go through the environment.
    """
    settings = {"QUERY_TIMEOUT": DEADLINE, "Q_QUERY_TIMEOUT": DEADLINE, "SEC_DEFAULT_AUTHENTICATION_TIMEOUT": DEADLINE}
    os.environ.update({f"_CONDOR_{name}": str(value) for name, value in settings.items()})
    if identity is not None:
        os.environ.update(
            {
                "_CONDOR_SEC_CLIENT_AUTHENTICATION_METHODS": "SSL",
                "_CONDOR_AUTH_SSL_CLIENT_CERTFILE": str(identity.certificate),
                "_CONDOR_AUTH_SSL_CLIENT_KEYFILE": str(identity.key),
            }
        )
        os.environ.pop("X509_USER_PROXY", None)


def version() -> str:
    """Return the version of this host's HTCondor, such as ``25.14.1``."""
    import htcondor2

    return str(htcondor2.version()).split()[1]  # $CondorVersion: 25.14.1 2026-03-01 BuildID: ... $


def _faults() -> tuple[type[Exception], ...]:
    """Return what the library raises: its own exceptions, and Python's for what it cannot bring over."""
    import htcondor2

    return htcondor2.HTCondorException, ValueError, SystemError


def _ask(question: Callable[[], Any]) -> Any:
    """Return the answer to ``question``, asked again once if it fails.

    A daemon that was restarted no longer knows the session of our last question; it refuses the first question after
    that ("attempt to open invalid session"), the next one makes a new session.
    """
    try:
        return question()
    except _faults():
        return question()


def plain(ad: Any, asked: Iterable[str] = ()) -> dict[str, Value]:
    """Return the attributes of a ClassAd that are not undefined; expressions are evaluated where they can be.

    Whoever wrote the ad may have written ``desired_sites``: to ClassAds it is the same. Names in ``asked`` come back as
    they are there.
    """
    import classad2

    spelling = {name.lower(): name for name in asked}
    values: dict[str, Value] = {}
    for name in ad:
        try:
            value = ad[name]
            if isinstance(value, classad2.ExprTree):
                value = value.eval(ad)
        except Exception:  # text that is not UTF-8: UnicodeDecodeError; in a list: SystemError
            value = classad2.Value.Error
        if isinstance(value, str | float | bool) or (isinstance(value, int) and not isinstance(value, classad2.Value)):
            values[spelling.get(name.lower(), name)] = value
        elif (text := repr(ad.lookup(name))) != "undefined":
            values[spelling.get(name.lower(), name)] = Expr(text, open=value is classad2.Value.Undefined)
    return values


def classad(values: Ad) -> Any:
    """Return the ClassAd of ``values``; what it cannot hold is brought as near as it can."""
    import classad2

    def fitting(value: Value) -> Any:
        if isinstance(value, Expr):
            return classad2.ExprTree(value.text)
        if isinstance(value, int) and not isinstance(value, bool):
            return max(-(2**63), min(value, 2**63 - 1))
        # A lone surrogate crashes the library.
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

    return classad2.ClassAd({name: fitting(value) for name, value in values.items()})


class Collector:
    """The collector at ``address``, or a pool's several: ``host:port``, with commas between.

    All are told everything; one is asked, the next if it does not answer. That is kept to from then on: one that comes
    back knows nothing for a while, and nobody should decide by that. One that does not answer costs seconds, and is
    left alone for ``AVOIDED`` unless none of them answers.
    """

    def __init__(self, address: str) -> None:
        import htcondor2

        self.address = address
        self._all = {each: htcondor2.Collector(each) for each in address.replace(",", " ").split()}
        #: Until when, of the monotonic clock, each is left alone.
        self._away: dict[str, float] = {}
        # The collector counts lost updates by it; the clock keeps it growing over a restart.
        self._sequence = int(time.time())

    def query(self, constraint: str, attributes: Sequence[str] = ()) -> list[dict[str, Value]]:
        """Return the ads of any kind that satisfy ``constraint``; with ``attributes``, only those.

        Raises:
            PoolError: no collector answers, or all refuse.
        """
        import htcondor2

        ads = self._asked("a query", lambda one: one.query(htcondor2.AdType.Any, constraint, list(attributes)))
        return [plain(ad, attributes) for ad in ads]

    def locate(self, schedd: str) -> Any:
        """Return HTCondor's ad of a schedd, by which it is reached.

        Raises:
            PoolError: no collector answers, or none knows it.
        """
        import htcondor2

        found = self._asked("a question", lambda one: one.locate(htcondor2.DaemonType.Schedd, schedd))
        if found is None:
            raise PoolError(f"collector {self.address} knows no schedd {schedd}")
        return found

    def _asked(self, what: str, question: Callable[[Any], Any]) -> Any:
        failed = []
        for address in self._in_order():
            try:
                return _ask(partial(question, self._all[address]))
            except _faults() as error:
                failed.append(f"collector {address} does not answer {what}: {error}")
                self._avoid(address)
        raise PoolError("; ".join(failed))

    def _in_order(self) -> list[str]:
        return sorted(self._all, key=self._avoided)

    def _avoided(self, address: str) -> bool:
        return self._away.get(address, 0) > time.monotonic()

    def _avoid(self, address: str) -> None:
        self._away[address] = time.monotonic() + AVOIDED
        self._all[address] = self._all.pop(address)  # the last that is asked

    def advertise(self, ads: Iterable[Ad], command: str) -> None:
        """Send ``ads`` with ``command`` (``UPDATE_..._AD``).

        Raises:
            PoolError: no collector answers, or our identity may not send this kind.
        """
        self._sequence += 1
        # Without MyAddress a LICENSE ad vanishes; the collector logs "Could not make hashkey --- ignoring ad".
        extra: dict[str, Value] = {"MyAddress": "<127.0.0.1:0>", "UpdateSequenceNumber": self._sequence}
        self._send([classad(extra | dict(ad)) for ad in ads], command)

    def invalidate(self, my_type: str, constraint: str, command: str) -> None:
        """Remove our ads of ``my_type`` that satisfy ``constraint`` with ``command`` (``INVALIDATE_...``).

        Raises:
            PoolError: as ``advertise``.
        """
        import classad2

        # TargetType must be the ads' own MyType: with "Generic" or nothing the collector removes none, silently.
        query = classad2.ClassAd({"MyType": "Query", "TargetType": my_type})
        query["Requirements"] = classad2.ExprTree(constraint)
        self._send([query], command)

    def _send(self, ads: list[Any], command: str) -> None:
        if not ads:
            return
        failed, taken = [], False
        for address in self._in_order():
            if taken and self._avoided(address):
                continue
            try:
                _ask(partial(self._all[address].advertise, ads, command))
                taken = True
            except _faults() as error:
                failed.append(f"collector {address} did not take {command}: {error}")
                self._avoid(address)
        if not taken:
            raise PoolError("; ".join(failed))


def pool_address() -> str:
    """Return the collector of this host's pool, or its several, as it is configured."""
    import htcondor2

    return str(htcondor2.param["COLLECTOR_HOST"])


class Schedd:
    """A schedd: the local one, or ``name`` as ``pool`` knows it.

    Raises:
        PoolError: the pool does not know it.
    """

    def __init__(self, name: str = "", pool: Collector | None = None) -> None:
        import htcondor2

        self.name = name or "(local)"
        where = [pool.locate(name)] if pool else []
        try:
            self._schedd = htcondor2.Schedd(*where)
        except _faults() as error:
            raise PoolError(f"schedd {self.name} cannot be found: {error}") from error

    def query(self, constraint: str, attributes: Sequence[str]) -> list[dict[str, Value]]:
        """Return ``attributes`` of the jobs that satisfy ``constraint``.

        Raises:
            PoolError: the schedd does not answer, or refuses.
        """

        try:
            ads = _ask(lambda: self._schedd.query(constraint, list(attributes)))
        except _faults() as error:
            raise PoolError(f"schedd {self.name} does not answer a query: {error}") from error
        return [plain(ad, attributes) for ad in ads]

    def history(self, constraint: str, most: int) -> list[dict[str, Value]]:
        """Return the latest jobs that satisfy ``constraint`` of those that have left the queue, ``most`` at most.

        Raises:
            PoolError: the schedd does not answer, or refuses.
        """
        try:
            ads = _ask(lambda: list(self._schedd.history(constraint, [], most)))
        except _faults() as error:
            raise PoolError(f"schedd {self.name} does not tell of its history: {error}") from error
        return [plain(ad) for ad in ads]

    def submit(self, description: str, count: int) -> int:
        """Submit ``count`` jobs of a submit description as one cluster and return its number.

        Raises:
            PoolError: the schedd refused, with its reason.
        """
        import htcondor2

        try:
            return int(self._schedd.submit(htcondor2.Submit(description), count=count).cluster())
        except _faults() as error:
            raise PoolError(f"schedd {self.name} refused a submission: {error}") from error

    def remove(self, jobs: Sequence[str], reason: str, forced: bool = False) -> None:
        """Remove ``jobs`` (``cluster.proc``); ``forced`` also drops what the CE does not confirm.

        Raises:
            PoolError: the schedd does not answer.
        """
        self._act("Remove", jobs, reason)
        if forced:
            self._act("RemoveX", jobs, reason)

    def release(self, jobs: Sequence[str], reason: str) -> None:
        """Release held ``jobs``.

        Raises:
            PoolError: the schedd does not answer.
        """
        self._act("Release", jobs, reason)

    def _act(self, action: str, jobs: Sequence[str], reason: str) -> None:
        import htcondor2

        if not jobs:
            return
        try:
            # A reason that is not a (reason, code) pair is dropped by htcondor2.
            self._schedd.act(getattr(htcondor2.JobAction, action), list(jobs), (reason, 0))
        except _faults() as error:
            raise PoolError(f"schedd {self.name} refused {action} of {', '.join(jobs)}: {error}") from error
