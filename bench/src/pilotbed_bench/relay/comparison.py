"""The relay beside what else there is, measured in one run: var/bench-relay.json and the tables in docs/relay.md.

Measured in network, process and mount namespaces of their own over the node image (`inside`), so neither the grid
nor the host's network has a part in it, and all of it ends with the command, however that ends.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pilotbed_lab import LabError, enclosure, image
from pilotbed_suite import CHECKOUT, document

from .. import run

#: Between markers of this name the tables stand in docs/relay.md.
MARKER = "bench-relay"
#: Name of the way with a haproxy in the agent's place, too.
TWO_HOPS = "haproxy, two hops"
#: Seconds after which the bench is given up.
TIMEOUT = 1200

#: Where the image is mounted, in a mount namespace of the bench's own: for everybody else an empty directory.
SCRATCH = Path("/run/pilotbed-bench")


def enclosed(root: Path, sources: Sequence[Path]) -> dict[str, Any]:
    """Run `inside` over the image at ``root``, with the modules below ``sources``; return what it found.

    Raises:
        LabError: it failed; the reason is on stderr.
    """
    SCRATCH.mkdir(exist_ok=True)
    program = "from pilotbed_bench.relay import inside; inside.main()"
    command = enclosure.command(root, SCRATCH, "python3", "-c", program, modules=sources)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise LabError(f"measuring was not done in {TIMEOUT} s; what it did last stands above") from None
    finally:
        SCRATCH.rmdir()
    if done.returncode:
        raise LabError("measuring failed; the reason stands above")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- what the samples say. A sample is one round's; ratios and differences are made within a round, then the median


def pick(sample: dict[str, Any], path: str) -> float | None:
    """Return the figure at ``path`` (keys joined by dots), or None if the sample has none."""
    value: Any = sample
    for key in path.split("."):
        if key not in value:
            return None
        value = value[key]
    return float(value)


def _ratio(mine: float, theirs: float) -> float | None:
    return mine / theirs if theirs else None


def median(
    samples: Sequence[dict[str, Any]],
    figure: Callable[[dict[str, Any]], float | None],
    beside: Sequence[dict[str, Any]] | None = None,
    operation: Callable[[float, float], float | None] = _ratio,
) -> float | None:
    """Return the median of a figure over the rounds, or of what ``operation`` makes of it and ``beside``'s."""
    values = [figure(sample) for sample in samples]
    if beside is not None:
        others = [figure(sample) for sample in beside]
        pairs = zip(values, others, strict=True)
        values = [None if a is None or b is None else operation(a, b) for a, b in pairs]
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(samples) else None


def per_gigabyte(key: str) -> Callable[[dict[str, Any]], float | None]:
    """Return the figure: CPU-seconds a GB, the mean of the four kinds of transfer."""
    return lambda sample: statistics.mean(sample[kind][key] for kind in ("up_1", "down_1", "up_8", "down_8"))


def _at(path: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda sample: pick(sample, path)


_Figure = Callable[[dict[str, Any]], float | None]
_TCP: tuple[tuple[str, _Figure, str], ...] = (
    ("GB/s, 1 stream, to the worker", _at("up_1.gb_per_s"), ".2f"),
    ("GB/s, 1 stream, from the worker", _at("down_1.gb_per_s"), ".2f"),
    ("GB/s, 8 streams, to the worker", _at("up_8.gb_per_s"), ".2f"),
    ("GB/s, 8 streams, from the worker", _at("down_8.gb_per_s"), ".2f"),
    ("CPU-s a GB, at the relay", per_gigabyte("relay_cpu_s_per_gb"), ".2f"),
    ("CPU-s a GB, relay and both ends", per_gigabyte("cpu_s_per_gb"), ".2f"),
    ("1-byte echo, median, ms", _at("echo.median_ms"), ".3f"),
    ("1-byte echo, 99 %, ms", _at("echo.p99_ms"), ".3f"),
    ("new connections a second", _at("connections.per_second"), ".0f"),
    ("CPU-ms a connection, at the relay", _at("connections.relay_cpu_ms"), ".2f"),
    ("memory an idle stream, at the relay, kB", _at("idle_stream_kb"), ".0f"),
    ("memory an idle agent, at the relay, kB", _at("idle_agent_kb"), ".0f"),
)
_POOL: tuple[tuple[str, _Figure, str], ...] = (
    ("connections a second, 1 client", _at("one.per_second"), ".0f"),
    ("connections a second, 8 clients", _at("many.per_second"), ".0f"),
    ("query on a new connection, median, ms", _at("one.median_ms"), ".2f"),
    ("query on a new connection, 99 %, ms", _at("one.p99_ms"), ".2f"),
    ("CPU-ms a connection, at relay or broker", _at("many.relay_cpu_ms"), ".2f"),
    ("GB/s, 1 stream, from the worker", _at("fetch.gb_per_s"), ".2f"),
    ("CPU-s a GB, at relay or broker", _at("fetch.relay_cpu_s_per_gb"), ".2f"),
    ("CPU-s a GB, in all", _at("fetch.cpu_s_per_gb"), ".2f"),
)
_GROWTH: tuple[tuple[str, str, str], ...] = (
    ("agents", "agents", ".0f"),
    ("streams", "streams", ".0f"),
    ("registrations a second", "registrations_per_s", ".0f"),
    ("relay's CPU-ms a registration", "registration_relay_cpu_ms", ".2f"),
    ("kB an agent", "agent_kb", ".1f"),
    ("kB a stream", "stream_kb", ".1f"),
    ("relay, MB", "relay_mb", ".0f"),
    ("opening a stream: median, ms", "open.median_ms", ".2f"),
    ("99 %, ms", "open.p99_ms", ".2f"),
    ("relay's CPU-ms", "open.relay_cpu_ms", ".2f"),
)


def levels(growth: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the levels of growth with the medians of their probes as ``open``."""
    keys = ("median_ms", "p99_ms", "relay_cpu_ms")
    return [
        level | {"open": {key: statistics.median(probe[key] for probe in level["probes"]) for key in keys}}
        for level in growth
    ]


def aims(found: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """Return what was aimed at, what came of it, and whether that is enough."""
    relay, haproxy = found["ways"]["relay"], found["ways"]["haproxy"]
    pool, growth = found["pool"], levels(found["growth"])

    def speed(beside: str, *kinds: str) -> float:
        return min(median(relay, _at(f"{kind}.gb_per_s"), found["ways"][beside]) or 0.0 for kind in kinds)

    rows = [
        ("throughput no worse than haproxy's, 1 stream (ratio, the worse direction)",
         speed("haproxy", "up_1", "down_1"), 1.0, True),
        ("the same, 8 streams", speed("haproxy", "up_8", "down_8"), 1.0, True),
        ("throughput no worse than haproxy's in two hops, 1 stream", speed(TWO_HOPS, "up_1", "down_1"), 1.0, True),
        ("the same, 8 streams", speed(TWO_HOPS, "up_8", "down_8"), 1.0, True),
        ("CPU a GB at the relay no more than haproxy's (ratio)",
         median(relay, per_gigabyte("relay_cpu_s_per_gb"), haproxy) or 0.0, 1.0, False),
        ("more new connections a second than CCB, 1 client (ratio)",
         median(pool["relay"], _at("one.per_second"), pool["CCB"]) or 0.0, 1.0, True),
        ("the same, 8 clients", median(pool["relay"], _at("many.per_second"), pool["CCB"]) or 0.0, 1.0, True),
        ("an idle agent under 30 kB at the relay (kB, the dearest level)",
         max(level["agent_kb"] for level in growth), 30.0, False),
        ("memory a stream flat: most to fewest agents (ratio, up to 1.2)",
         growth[-1]["stream_kb"] / growth[0]["stream_kb"], 1.2, False),
        ("CPU a stream flat (ratio, up to 1.2)",
         growth[-1]["open"]["relay_cpu_ms"] / growth[0]["open"]["relay_cpu_ms"], 1.2, False),
    ]  # fmt: skip
    return [(what, value, value >= bound if more else value <= bound) for what, value, bound, more in rows]


# -- tables


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _compared(
    ways: dict[str, list[dict[str, Any]]], rows: Sequence[tuple[str, _Figure, str]], *beside: str
) -> list[str]:
    """Return the table of some ways: medians, and the relay beside some of the others."""
    body = [
        [what, *(_shown(median(samples, figure), form) for samples in ways.values()),
         *(_shown(median(ways["relay"], figure, ways[other]), ".2f") for other in beside)]
        for what, figure, form in rows
    ]  # fmt: skip
    return [*document.table(["", *ways, *(f"relay / {other}" for other in beside)], body), ""]


def _added(ways: dict[str, list[dict[str, Any]]]) -> str:
    said = []
    for way, samples in ways.items():
        middle, tail = (
            median(samples, _at(f"echo.{key}"), ways["direct"], lambda mine, direct: mine - direct)
            for key in ("median_ms", "p99_ms")
        )
        if way != "direct":
            said.append(f"{way} {middle:.3f} ({tail:.3f})")
    return f"Added to the direct round trip of one byte, median (99 %), ms: {', '.join(said)}."


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    growth = levels(found["growth"])
    lines = [
        f"{run.heading('make bench-relay', found)} "
        f"Medians of {len(found['ways']['relay'])} alternating rounds; the last columns are medians of the ratios "
        "within a round.",
        "",
        *_compared(found["ways"], _TCP, "haproxy", TWO_HOPS),
        _added(found["ways"]),
        "",
        "Under HTCondor:",
        "",
        *_compared(found["pool"], _POOL, "CCB", "CCB streaming"),
        _failures(found["pool"]),
        "",
        f"The relay with ever more agents, {growth[-1]['streams'] // growth[-1]['agents']} streams each (five, or what "
        "the host's limit of open files allows):",
        "",
        *document.table([what for what, _path, _form in _GROWTH],
                        [[_shown(pick(level, path), form) for _what, path, form in _GROWTH] for level in growth]),
        "",
        *document.aims((what, f"{value:.2f}", met) for what, value, met in aims(found)),
    ]  # fmt: skip
    return "\n".join(lines)


def _failures(pool: dict[str, list[dict[str, Any]]]) -> str:
    counted = {way: sum(int(sample["failures"]) for sample in samples) for way, samples in pool.items()}
    said = [f"{way} {count}" for way, count in counted.items() if count]
    return f"Samples that failed and were taken again: {', '.join(said) or 'none'}."


def main() -> int:
    """Measure; write var/bench-relay.json and the tables of docs/relay.md, and print these."""
    page = CHECKOUT / "docs/relay.md"
    document.publish(page.read_text(), MARKER, "")  # rather now than after ten minutes
    root = image.build(CHECKOUT, CHECKOUT / "var/log/image.log")
    found = run.conditions()
    found |= enclosed(root, [CHECKOUT / "services/src", CHECKOUT / "bench/src"])
    found["load_at_the_end"] = os.getloadavg()[0]
    found["aims"] = [{"aim": what, "measured": value, "met": met} for what, value, met in aims(found)]
    (CHECKOUT / "var/bench-relay.json").write_text(json.dumps(found, indent=1) + "\n")
    text = tables(found)
    document.write(page, MARKER, text)
    print(text)
    return 0
