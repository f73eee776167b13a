"""How fast the mapping service is, beside a bare Flask application: a part of `make bench-glexec`.

The bare one returns four bytes, under the same gunicorn settings behind the same nginx. TLS, nginx, gunicorn, LCMAPS
and the clients (tests/glexec/mappingload.py) share this machine's cores.
"""

from __future__ import annotations

import importlib
from typing import Any

from pilotbed_suite import document

from ..run import middle, ratio

CLIENTS = (1, 2, 8, 32)
ROUNDS, SECONDS, WARM_UP = 5, 3.0, 1.0
#: Mappings a second, at every number of clients.
RATE_AIM = 1000
#: What is left of one client's rate at the slowest number of clients.
FLAT_AIM = 0.9


def measure(bed: Any, rounds: int = ROUNDS, seconds: float = SECONDS) -> dict[str, Any]:
    """Return samples, one a round: {"mapping", "bare": {clients: what the clients counted}}."""
    module = importlib.import_module("mappingbed")
    service = module.Service(bed)
    try:
        service.start_bare()
        ports = {"mapping": module.PORT, "bare": module.BARE_PORT}
        for port in ports.values():
            service.load(max(CLIENTS), WARM_UP, port)
        samples = []
        for turn in range(rounds):
            sample: dict[str, dict[str, Any]] = {name: {} for name in ports}
            for clients in CLIENTS:
                for name in sorted(ports, reverse=bool(turn % 2)):
                    sample[name][str(clients)] = service.load(clients, seconds, ports[name])
            samples.append(sample)
    finally:
        service.close()
    return {"samples": samples, "seconds": seconds}


def _rates(sample: dict[str, Any]) -> dict[str, float]:
    """Return mappings a second by number of clients, that of the slowest number, and this beside one client's."""
    rates = {clients: each["per_second"] for clients, each in sample["mapping"].items()}
    slowest = min(rates.values())
    return rates | {"slowest": slowest, "flat": slowest / rates["1"]}


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    samples, rows = found["samples"], []
    for clients in map(str, CLIENTS):
        ways = [[sample[name][clients] for sample in samples] for name in ("mapping", "bare")]
        rates = [{"mapping": a["per_second"], "bare": b["per_second"]} for a, b in zip(*ways, strict=True)]
        figures = (("per_second", ".0f"), ("median_ms", ".2f"), ("p99_ms", ".2f"))
        shown = [format(middle(way, key), form) for way in ways for key, form in figures]
        rows.append([clients, *shown, f"{ratio(rates, 'mapping', 'bare'):.2f}"])
    rates = [_rates(sample) for sample in samples]
    slowest, flat = middle(rates, "slowest"), middle(rates, "flat")
    counted = [each for sample in samples for each in sample["mapping"].values()]
    answers, bad = (sum(each[key] for each in counted) for key in ("answers", "bad"))
    return "\n".join([
        f"Medians of {len(samples)} alternating rounds, {found['seconds']:g} s a figure; ratios are made within a "
        "round.",
        "",
        *document.table(["clients", "mappings a second", "median, ms", "99 %, ms", "bare Flask a second", "median, ms",
                         "99 %, ms", "mappings / bare"], rows),
        "",
        *document.aims([
            (f"mappings a second at the slowest number of clients (at least {RATE_AIM})",
             f"{slowest:.0f}", slowest >= RATE_AIM),
            (f"flat: the slowest number of clients / one client (at least {FLAT_AIM})",
             f"{flat:.2f}", flat >= FLAT_AIM),
            (f"wrong answers, of {answers}", str(bad), bad == 0),
        ]),
    ])  # fmt: skip
