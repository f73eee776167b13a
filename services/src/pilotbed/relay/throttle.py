"""The throttle of work that holds up the loop, so that streams go on beside it."""

import asyncio

from pilotbed.relay.streams import Traffic

SHARE = 0.1  # of the time for throttled work, while
BUSY = 256 * 1024  # bytes or more were carried since the last one


class Throttle:
    """Turns for work that holds up the loop: one at a time, and while bytes flow, only `SHARE` of the time.

    Without it, whoever attempts TLS handshakes as fast as they can, for which nobody needs a certificate, would take
    the loop from the streams: milliseconds each, in which others carry megabytes.

    Args:
        traffic: of all streams.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic, self._moved, self._began = traffic, 0, 0.0
        self._lock = asyncio.Lock()  # first come, first served

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        self._began = asyncio.get_running_loop().time()

    async def __aexit__(self, *exception: object) -> None:
        moved, before = self._traffic.inward + self._traffic.outward, self._moved
        self._moved = moved
        if moved - before < BUSY:
            self._lock.release()
        else:
            loop = asyncio.get_running_loop()
            loop.call_later((loop.time() - self._began) * (1 / SHARE - 1), self._lock.release)
