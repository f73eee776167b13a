"""What `make bench-relay` makes of its samples; the measuring itself needs a machine."""

from itertools import pairwise

import pytest
from pilotbed_bench.relay.comparison import aims, levels, median, per_gigabyte, pick, tables
from pilotbed_bench.relay.load import quantile, spread
from pilotbed_bench.relay.ways import LEVELS, STREAMS_PER_AGENT, cpu_of, streams_each


@pytest.mark.parametrize(("fraction", "expected"), [(0, 1), (0.5, 50), (0.99, 99), (1, 100)])
def test_quantile_is_a_value_that_was_seen(fraction, expected):
    assert quantile(range(100, 0, -1), fraction) == expected


def test_quantile_of_few_and_of_none():
    assert quantile([3.0, 1.0], 0.99) == 3.0
    with pytest.raises(ValueError, match="nothing"):
        quantile([], 0.5)
    assert spread([0.001, 0.002, 0.004]) == {"median_ms": 2.0, "p99_ms": 4.0}


def test_cpu_of_a_process_whose_name_looks_like_the_end_of_a_name(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    # proc(5): after the name come state (3rd field), …, utime (14th), stime, cutime, cstime.
    fields = ["S", *map(str, range(4, 14)), "100", "20", "3", "7", "20", "0"]
    assert cpu_of(f"42 (a) S 1 (b) {' '.join(fields)}") == pytest.approx(1.30)


def test_streams_fit_into_the_open_files():
    assert streams_each(2000, 100_000) == STREAMS_PER_AGENT
    for descriptors in (20_000, 10_000, 6_000, 1_000):
        for agents in LEVELS:
            each = streams_each(agents, descriptors)
            assert each == 0 or 2 * agents * (1 + each) + 500 <= descriptors
    assert streams_each(2000, 20_000) == 3


def test_median_is_of_the_ratios_within_a_round():
    mine, theirs = [{"x": 1}, {"x": 4}, {"x": 9}], [{"x": 1}, {"x": 2}, {"x": 3}]
    assert median(mine, lambda sample: pick(sample, "x")) == 4
    assert median(mine, lambda sample: pick(sample, "x"), theirs) == 2
    assert median(mine, lambda sample: pick(sample, "x"), theirs[::-1]) == pytest.approx(2)
    assert median(mine, lambda sample: pick(sample, "x"), theirs, lambda a, b: a - b) == 2


def test_a_figure_that_one_way_has_not_is_left_out():
    assert pick({"a": {"b": 1}}, "a.b") == 1
    assert pick({"a": {"b": 1}}, "a.c") is None
    assert median([{"a": 1}, {}], lambda sample: pick(sample, "a")) is None
    assert median([{"a": 1}], lambda sample: pick(sample, "a"), [{"a": 0}]) is None
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        median([{"a": 1}], lambda sample: pick(sample, "a"), [])


def found(relay=1.0, agent_kb=20.0, late=1.0):
    """Results in which the relay is so many times as fast as everything else."""
    def way(factor, **more):
        moved = {"gb_per_s": factor, "relay_cpu_s_per_gb": 1 / factor, "cpu_s_per_gb": 2 / factor}
        kinds = dict.fromkeys(("up_1", "down_1", "up_8", "down_8"), moved)
        echo = {"median_ms": 0.1 / factor, "p99_ms": 0.2 / factor}
        opened = {"per_second": 100 * factor, "relay_cpu_ms": 1 / factor}
        return [kinds | {"echo": echo, "connections": opened} | more] * 5

    def asked(factor):
        figures = {"per_second": 50 * factor, "median_ms": 1, "p99_ms": 2, "relay_cpu_ms": 1}
        return [{"one": figures, "many": figures, "fetch": way(factor)[0]["up_1"], "failures": 0}] * 5

    def level(agents, factor):
        probes = [{"median_ms": factor * n, "p99_ms": 2 * factor * n, "relay_cpu_ms": factor * n} for n in (1, 2, 9)]
        return {"agents": agents, "streams": 5 * agents, "registrations_per_s": 9, "registration_relay_cpu_ms": 1,
                "agent_kb": agent_kb, "stream_kb": factor, "relay_mb": 20, "probes": probes}  # fmt: skip

    return {
        "date": "2026-01-01", "yardstick_seconds": 1.0,
        "machine": {"cores": 2, "cpu": "x", "memory_gib": 8, "kernel": "6", "load": 0.0},
        "ways": {"direct": way(2.0), "haproxy": way(1.0, idle_stream_kb=3.0),
                 "haproxy, two hops": way(1.0), "relay": way(relay, idle_stream_kb=9.0)},
        "pool": {"direct": asked(2.0), "CCB": asked(1.0), "CCB streaming": asked(0.5), "relay": asked(relay)},
        "growth": [level(100, 1.0), level(2000, late)],
    }  # fmt: skip


def test_growth_is_told_by_the_medians_of_its_probes():
    assert [level["open"]["p99_ms"] for level in levels(found(late=1.5)["growth"])] == [4, 6]


@pytest.mark.parametrize(("results", "expected"), [
    (found(), [True] * 10),
    (found(relay=0.9), [False] * 7 + [True] * 3),
    (found(agent_kb=31.0), [True] * 7 + [False, True, True]),
    (found(late=1.3), [True] * 8 + [False, False]),
])  # fmt: skip
def test_an_aim_is_met_or_not(results, expected):
    assert [met for _what, _value, met in aims(results)] == expected


def test_cpu_a_gigabyte_is_of_all_transfers():
    sample = {kind: {"cpu": value} for kind, value in (("up_1", 1), ("down_1", 2), ("up_8", 3), ("down_8", 6))}
    assert per_gigabyte("cpu")(sample) == 3


def test_tables_have_every_way_and_leave_blank_what_it_has_not():
    lines = tables(found(relay=2.0)).splitlines()
    assert "|  | direct | haproxy | haproxy, two hops | relay | relay / haproxy | relay / haproxy, two hops |" in lines
    assert "| GB/s, 1 stream, to the worker | 2.00 | 1.00 | 1.00 | 2.00 | 2.00 | 2.00 |" in lines
    assert "| memory an idle stream, at the relay, kB |  | 3 |  | 9 | 3.00 |  |" in lines
    assert any(line.startswith("Added to the direct round trip") and "haproxy 0.050 (0.100)" in line for line in lines)
    widths = [line.count("|") for line in lines]
    assert set(widths) == {0, 4, 8, 11}
    assert all(0 in pair for pair in pairwise(widths) if pair[0] != pair[1]), "a blank line is between two tables"
