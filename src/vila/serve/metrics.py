"""Prometheus metrics: requests, latencies, tokens and queue lengths. Each server has its own registry."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vila.serve.models import Models

_HISTOGRAMS = {
    "time_to_first_token": (
        "Time from the arrival of a request to the first text of its answer.",
        (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    ),
    "time_per_token": (
        "Mean time between the tokens of an answer.",
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
    ),
    "request": (
        "Time from the arrival of a request to the last token.",
        (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
    ),
}
_GAUGES = {
    "running": "Requests in the running batch.",
    "waiting": "Requests in the queue.",
    "kv_tokens_used": "KV cache tokens used by running requests.",
    "kv_tokens_total": "Capacity of the KV cache in tokens.",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens.",
    "cached_prompt_tokens": "Prompt tokens found in the prefix cache.",
    "new_tokens": "Generated tokens.",
    "steps": "Forward passes of the batch.",
    "finished": "Requests that were answered.",
    "cancelled": "Requests that were cancelled or timed out.",
    "failed": "Requests that failed.",
}


class Metrics:
    """The metrics of one server."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vila_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.open = Gauge("vila_open_requests", "Requests in progress.", registry=self.registry)
        self.first_token, self.per_token, self.request = (
            Histogram(f"vila_{name}_seconds", text, ["model"], buckets=buckets, registry=self.registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        )
        self.registry.register(_BatcherCollector(models))

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class _BatcherCollector(Collector):
    """Reads the statistics of each model's batcher when the metrics are scraped."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def collect(self) -> Iterable[Metric]:
        ready = GaugeMetricFamily("vila_model_ready", "Whether the model is loaded.", labels=["model"])
        gauges = {name: GaugeMetricFamily(f"vila_{name}", text, labels=["model"]) for name, text in _GAUGES.items()}
        counters = {
            name: CounterMetricFamily(f"vila_{name}", text, labels=["model"]) for name, text in _COUNTERS.items()
        }
        for model in self.models.models:
            ready.add_metric([model.name], model.batcher is not None)
            if model.batcher is None:
                continue
            stats = model.batcher.stats()
            for name, family in (gauges | counters).items():
                family.add_metric([model.name], getattr(stats, name))
        return [ready, *gauges.values(), *counters.values()]
