"""Which pilots need a newer proxy than they have, and the bringing of it where HTCondor does not.

It is done beside the factory's turns, in a thread for each computing element: one that does not answer, or never ends
its answer, keeps nobody but its own pilots waiting.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pilotbed.proxy import Proxy
from pilotbed.service import event

from . import gridtypes
from .decisions import Pilot
from .states import State
from .trust import CredentialName

_log = logging.getLogger("pilotbed.factory")

#: Seconds after a failure until the same computing element is tried again.
AGAIN = 60
#: Most pilots of one round.
MOST = 200
#: Seconds after which a round that has not ended counts as failed.
OVERDUE = 300

#: Pilots whose proxy is in the computing element's hands.
_THERE = (State.PENDING, State.STAGE_IN, State.RUNNING, State.OTHER)


@dataclass(frozen=True)
class Round:
    """Pilots of one computing element that run under one credential, and shall have what is stored of it.

    Args:
        renew: of the grid type.
        gatekeeper: the computing element.
        credential: whose proxy.
        ends: when the stored one ends (seconds, Unix).
        names: the computing element's names of the pilots, by their job.
    """

    renew: gridtypes.Renewer
    gatekeeper: str
    credential: CredentialName
    ends: float
    names: Mapping[str, str]

    @property
    def key(self) -> tuple[str, CredentialName]:
        """What there is one round of at a time."""
        return self.gatekeeper, self.credential


def outdated(
    pilots: Sequence[Pilot], proxies: Mapping[CredentialName, Proxy], renewed: Mapping[str, float]
) -> list[Round]:
    """Return what has to be brought to pilots of grid types that HTCondor does not renew.

    Args:
        pilots: of this factory, in the queue.
        proxies: those that are stored.
        renewed: when the proxy ends that a pilot was brought, by job.
    """
    found: dict[tuple[gridtypes.Renewer, str, CredentialName], dict[str, str]] = {}
    for pilot in pilots:
        kind = gridtypes.of(pilot.grid_id)
        # "arc URL NAME", once the computing element has taken it.
        words = pilot.grid_id.split()
        if pilot.state not in _THERE or not kind or not kind.renew or len(words) < 3:
            continue
        security_name, _, security_class = pilot.security.partition(":")
        credential = CredentialName(security_name, security_class, pilot.client, pilot.credential)
        proxy = proxies.get(credential)
        if proxy and proxy.ends > max(pilot.proxy_ends, renewed.get(pilot.job, 0)):
            found.setdefault((kind.renew, words[1], credential), {})[pilot.job] = words[-1]
    return [
        Round(renew, gatekeeper, credential, proxies[credential].ends, names)
        for (renew, gatekeeper, credential), names in found.items()
    ]


class Renewals:
    """What has been brought, what is on its way, and what has failed.

    Args:
        certificates: directory of CAs and CRLs, by which computing elements are known.
    """

    def __init__(self, certificates: Path) -> None:
        self.certificates = certificates
        #: Since the start.
        self.done = self.failed = 0
        #: Pilots that have less than they should, as of the last turn.
        self.waiting = 0
        #: Why not, by job, of those.
        self.failures: dict[str, str] = {}
        self._renewed: dict[str, float] = {}
        self._running: dict[tuple[str, CredentialName], float] = {}
        self._again: dict[tuple[str, CredentialName], float] = {}
        self._results: queue.SimpleQueue[tuple[Round, dict[str, str]]] = queue.SimpleQueue()

    def turn(
        self, pilots: Sequence[Pilot], proxies: Mapping[CredentialName, Proxy], path: Callable[[CredentialName], Path]
    ) -> None:
        """Take in what has been done, and start what is to be done. ``path``: of a stored proxy's file."""
        self._take_in()
        jobs = {pilot.job for pilot in pilots}
        self._renewed = {job: ends for job, ends in self._renewed.items() if job in jobs}
        rounds = outdated(pilots, proxies, self._renewed)
        waiting = {job for one in rounds for job in one.names}
        self.waiting = len(waiting)
        self.failures = {job: why for job, why in self.failures.items() if job in waiting}
        now = time.monotonic()
        for one in rounds:
            if began := self._running.get(one.key):
                if now - began > OVERDUE:
                    self.failures |= dict.fromkeys(one.names, f"no end after {OVERDUE} s")
            elif self._again.get(one.key, 0) <= now:
                self._running[one.key] = now
                # What has failed must not keep the others out for ever.
                names = sorted(one.names.items(), key=lambda item: item[0] in self.failures)[:MOST]
                work = replace(one, names=dict(names)), path(one.credential)
                # Not one of a pool: its end would be waited for at the factory's.
                threading.Thread(target=self._work, args=work, daemon=True).start()

    def _take_in(self) -> None:
        while not self._results.empty():
            one, why = self._results.get()
            del self._running[one.key]
            failed = {job: reason for job, reason in why.items() if reason}
            self._renewed |= dict.fromkeys(why.keys() - failed.keys(), one.ends)
            self.failures |= failed
            self.done += len(why) - len(failed)
            self.failed += len(failed)
            if failed:
                self._again[one.key] = time.monotonic() + AGAIN
            else:
                self._again.pop(one.key, None)
            if len(why) > len(failed):
                _log.info(event("proxies-renewed", gatekeeper=one.gatekeeper, name=one.credential.filename,
                                pilots=len(why) - len(failed)))  # fmt: skip

    def _work(self, one: Round, proxy: Path) -> None:
        """Bring the proxy; runs in a thread of its own, whatever happens to it must be told."""
        try:
            said = one.renew(one.gatekeeper, list(one.names.values()), proxy, self.certificates)
        except Exception as error:
            _log.exception(event("renewal-failed", gatekeeper=one.gatekeeper))
            said = dict.fromkeys(one.names.values(), repr(error))
        self._results.put((one, {job: said.get(name, "nothing is known of it") for job, name in one.names.items()}))
