"""What `comparison` runs in namespaces of its own: every way, round by round, then many agents, then HTCondor."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from . import pool
from .ways import (
    ADDRESSES,
    LOAD,
    ROUNDS,
    SERVICE_PORT,
    WAYS,
    WORK,
    Process,
    Trust,
    descriptors_allowed,
    echoes,
    grow,
    make_machines,
    measure,
    say,
    until,
)


def main() -> None:
    """Measure; print one JSON object."""
    descriptors = descriptors_allowed()
    WORK.mkdir(parents=True)
    make_machines()
    trust = Trust(WORK)
    samples: dict[str, list[dict[str, Any]]] = {way.name: [] for way in WAYS}
    with Process("worker", "service", *LOAD, "serve", SERVICE_PORT) as service:
        until(lambda: echoes(SERVICE_PORT, ADDRESSES["worker"]), "the service", service)
        for number in range(ROUNDS):
            for kind in WAYS:
                began = time.monotonic()
                with kind(trust) as way:
                    samples[kind.name].append(measure(way))
                say(f"round {number + 1}, {kind.name}: {time.monotonic() - began:.1f} s")
        growth = grow(trust, descriptors)
        calls = pool.measure(trust)
    json.dump({"descriptors": descriptors, "ways": samples, "growth": growth, "pool": calls}, sys.stdout)

