"""Prometheus metrics of a service."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A Prometheus metric.

    Attributes:
        name: with its unit, without prefix and `_total`.
        help: what it counts.
        values: by value of `label`; by "" without one.
        label: what tells the values apart.
        counter: whether it only grows (else a gauge).
    """

    name: str
    help: str
    values: Mapping[str, float]
    label: str = ""
    counter: bool = False


def serve_metrics(prefix: str, collect: Callable[[], Sequence[Metric]], port: int) -> None:
    """Serve metrics on 127.0.0.1:`port`, from prometheus_client's thread; it has the loop collect them.

    Args:
        prefix: of the metrics' names.
        collect: called in the running loop at each scrape.
    """
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    loop = asyncio.get_running_loop()

    async def in_loop() -> Sequence[Metric]:
        return collect()

    class Collector:
        def collect(self) -> Any:
            for metric in asyncio.run_coroutine_threadsafe(in_loop(), loop).result(5):
                kind = CounterMetricFamily if metric.counter else GaugeMetricFamily
                labels = [metric.label] if metric.label else []
                family = kind(f"{prefix}_{metric.name}", metric.help, labels=labels)
                for value, number in metric.values.items():
                    family.add_metric([value] if metric.label else [], number)
                yield family

    registry = CollectorRegistry()
    registry.register(Collector())
    start_http_server(port, addr="127.0.0.1", registry=registry)
