"""Figures for Prometheus: requests, tokens, queues, how long answers take. Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vila.serve.models import Models

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """What is counted while requests are answered."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vila_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.open = Gauge("vila_open_requests", "Requests that are being answered.", registry=self.registry)
        self.first = _histogram("time_to_first_token", "From a request to its first text.", _FIRST, self.registry)
        self.token = _histogram("time_per_token", "Between tokens of an answer, averaged.", _TOKEN, self.registry)
        self.whole = _histogram("request", "From a request to its last token.", _WHOLE, self.registry)
        self.registry.register(_Batchers(models))

    def text(self) -> bytes:
        """In Prometheus' form."""
        return generate_latest(self.registry)


def _histogram(name: str, what: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"vila_{name}_seconds", what, ["model"], buckets=buckets, registry=registry)


_GAUGES = {
    "running": "Requests in the running batch.",
    "waiting": "Requests that wait for a place in it.",
    "kv_tokens_used": "Tokens of running requests in memory.",
    "kv_tokens_total": "Tokens that the memory holds.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "cached_prompt_tokens": "Tokens of prompts that were not computed again.",
    "new_tokens": "Tokens of answers.",
    "steps": "Steps of the batch.",
    "finished": "Requests that got their answer.",
    "cancelled": "Requests that were given up or ran out of time.",
    "failed": "Requests that failed.",
}


class _Batchers(Collector):
    """The batchers' own figures, read when they are asked for."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def collect(self) -> Iterable[Metric]:
        ready = GaugeMetricFamily("vila_model_ready", "Whether a model is loaded.", labels=["model"])
        gauges = {name: GaugeMetricFamily(f"vila_{name}", what, labels=["model"]) for name, what in _GAUGES.items()}
        counters = {
            name: CounterMetricFamily(f"vila_{name}", what, labels=["model"]) for name, what in _COUNTERS.items()
        }
        for model in self.models.models:
            ready.add_metric([model.name], model.batcher is not None)
            if model.batcher is None:
                continue
            stats = model.batcher.stats()
            for name, family in (gauges | counters).items():
                family.add_metric([model.name], getattr(stats, name))
        return [ready, *gauges.values(), *counters.values()]
