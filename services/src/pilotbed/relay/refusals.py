"""The refusals of a service: each is logged and counted, with its code and the reason."""

import logging
import ssl
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from pilotbed.relay.log import event
from pilotbed.relay.metrics import Metric
from pilotbed.relay.protocol import Refusal


class Refusals:
    """The refusals since the process began.

    Args:
        log: of the service.
        codes: that metrics show before they happen.
    """

    def __init__(self, log: logging.Logger, codes: Iterable[str]) -> None:
        self._log = log
        self._counts: Counter[str] = Counter(dict.fromkeys(codes, 0))
        self._recent: deque[dict[str, object]] = deque(maxlen=50)

    def record(self, code: str, reason: str, *, peer: str, **more: object) -> None:
        """Log and count one; `more` says who or what it was about."""
        self._counts[code] += 1
        self._recent.append({"time": int(time.time()), "code": code, "reason": reason, "peer": peer, **more})
        event(self._log, "refused", level=logging.WARNING, code=code, reason=reason, peer=peer, **more)

    def record_error(self, error: BaseException, *, peer: str) -> None:
        """Log and count what broke a connection."""
        self.record(code_of(error), reason_of(error), peer=peer)

    def status(self) -> dict[str, Any]:
        """Their part of a service's status."""
        return {
            "refusals": {code: count for code, count in self._counts.items() if count},
            "recent_refusals": list(self._recent),
        }

    def metric(self) -> Metric:
        """Their part of a service's metrics."""
        return Metric("refusals", "Refusals by reason", dict(sorted(self._counts.items())), "code", counter=True)


def code_of(error: BaseException) -> str:
    """Under which code an error is counted."""
    if isinstance(error, Refusal):
        return error.code
    return "tls" if isinstance(error, ssl.SSLError) else "timeout" if isinstance(error, TimeoutError) else "lost"


def reason_of(error: BaseException) -> str:
    """The error in words for people."""
    if isinstance(error, Refusal):
        return error.reason
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, TimeoutError):
        return "said nothing in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
