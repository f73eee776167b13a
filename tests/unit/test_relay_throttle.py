"""What the relay's throttle leaves to streams, by a clock that only the throttled work moves."""

import asyncio

import pytest
from pilotbed.relay.streams import Traffic
from pilotbed.relay.throttle import BUSY, SHARE, Throttle

WORK = 0.004  # seconds that a piece of work holds up the loop


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is moved by work and by waiting for a timer, so that no other process can disturb it."""

    now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()


def share_of_work(carried, workers=16, pieces=10):
    """The share of the time that many who work at once get, when streams carry so many bytes between two pieces."""
    traffic = Traffic()

    async def work(throttle, loop):
        for _ in range(pieces):
            async with throttle:
                loop.now += WORK
                traffic.add_inward(carried)

    async def all_of_them():
        throttle, loop = Throttle(traffic), asyncio.get_running_loop()
        await asyncio.gather(*(work(throttle, loop) for _ in range(workers)))
        return workers * pieces * WORK / loop.now

    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(all_of_them())


@pytest.mark.parametrize(("carried", "share"), [(BUSY, SHARE), (100 * BUSY, SHARE), (BUSY - 1, 1.0), (0, 1.0)])
def test_handshakes_get_a_tenth_of_the_time_while_bytes_flow_and_all_of_it_otherwise(carried, share):
    assert share_of_work(carried) == pytest.approx(share, rel=0.01)


def test_whoever_comes_first_is_first_served():
    traffic, served = Traffic(), []

    async def work(throttle, number):
        async with throttle:
            traffic.add_inward(BUSY)
            served.append(number)

    async def all_of_them():
        throttle = Throttle(traffic)
        await asyncio.gather(*(work(throttle, number) for number in range(16)))

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(all_of_them())
    assert served == list(range(16))
