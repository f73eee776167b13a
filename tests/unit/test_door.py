"""One pool, several collectors: pilotbed.pool.Collector."""

from __future__ import annotations

from unittest import mock

import pytest
from pilotbed.pool import Collector, PoolError, door


class Peer:
    """As htcondor2's Collector, of one address."""

    def __init__(self, address: str) -> None:
        self.address, self.down, self.told, self.asked = address, False, 0, 0

    def query(self, _kind: object, _constraint: str, _attributes: list[str]) -> list[dict[str, str]]:
        self.asked += 1
        if self.down:
            raise ValueError("Failed to connect")
        return [{"Name": self.address}]

    def locate(self, _kind: object, name: str) -> dict[str, str] | None:
        self.query(None, "", [])
        return {"Name": name} if name == "submit" else None

    def advertise(self, _ads: object, _command: str) -> None:
        self.told += 1
        if self.down:
            raise ValueError("Failed to connect")


@pytest.fixture
def peers() -> dict[str, Peer]:
    return {}


@pytest.fixture
def pool(peers: dict[str, Peer]) -> Collector:
    def made(address: str) -> Peer:
        return peers.setdefault(address.partition(":")[0], Peer(address))

    with mock.patch("htcondor2.Collector", made):
        return Collector("one:9618, two:9618")


def names(pool: Collector) -> list[object]:
    return [ad["Name"] for ad in pool.query("true")]


def test_all_are_told_and_one_is_asked(pool: Collector, peers: dict[str, Peer]) -> None:
    pool.advertise([{"MyType": "x"}], "UPDATE_AD_GENERIC")
    assert names(pool) == ["one:9618"]
    assert [(one.told, one.asked) for one in peers.values()] == [(1, 1), (1, 0)]


def test_another_answers_for_one_that_is_away_and_is_kept_to(pool: Collector, peers: dict[str, Peer]) -> None:
    peers["one"].down = True
    assert names(pool) == names(pool) == ["two:9618"]
    assert peers["one"].asked == 2, "asked once more, as ever, and then left alone: each costs seconds"
    pool.advertise([{"MyType": "x"}], "UPDATE_AD_GENERIC")
    assert (peers["one"].told, peers["two"].told) == (0, 1)
    peers["one"].down = False
    with mock.patch.object(door, "AVOIDED", 0):
        assert names(pool) == ["two:9618"], "what has just come back knows nothing yet"
    peers["two"].down = True
    assert names(pool) == ["one:9618"]


def test_one_that_is_back_is_told_again(pool: Collector, peers: dict[str, Peer]) -> None:
    peers["one"].down = True
    with mock.patch.object(door, "AVOIDED", 0):
        pool.advertise([{"MyType": "x"}], "UPDATE_AD_GENERIC")
    peers["one"].down = False
    pool.invalidate("x", "true", "INVALIDATE_ADS_GENERIC")
    assert (peers["one"].told, peers["two"].told) == (3, 2)


def test_all_are_away(pool: Collector, peers: dict[str, Peer]) -> None:
    for one in peers.values():
        one.down = True
    for _ in range(2):
        with pytest.raises(PoolError, match=r"collector one:9618 does not answer a query: .*; collector two:9618 does"):
            pool.query("true")
        with pytest.raises(PoolError, match=r"collector one:9618 did not take UPDATE_AD_GENERIC: .*; collector two:96"):
            pool.advertise([{"MyType": "x"}], "UPDATE_AD_GENERIC")
    peers["one"].down = False
    assert names(pool) == ["one:9618"], "the one that answers is found at once"


def test_a_schedd_that_no_collector_knows(pool: Collector) -> None:
    assert pool.locate("submit") == {"Name": "submit"}
    with pytest.raises(PoolError, match="collector one:9618, two:9618 knows no schedd nobody"):
        pool.locate("nobody")
