"""What the API process measures of itself, as Prometheus metrics.

Owns the metric names. Counts of jobs and queues are not kept here: they are read from the database when scraped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What only the database knows."""

    jobs_by_state: Mapping[str, int]
    queued_by_reason: Mapping[str, int]
    undelivered_notices: int


class Measures:
    """One registry per application object, so that two of them in one process do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        labels = ("method", "route", "status")
        self._requests = Counter("phalanx_http_requests", "HTTP requests.", labels, registry=self.registry)
        self._latency = Histogram(
            "phalanx_http_request_seconds",
            "Time to answer, by route template.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._flush = Histogram(
            "phalanx_submit_flush_jobs",
            "Jobs that shared one submit transaction.",
            buckets=_BATCH,
            registry=self.registry,
        )
        self.streams = 0
        self._streams = Gauge("phalanx_http_streams", "Open event streams and long polls.", registry=self.registry)
        self._jobs = Gauge("phalanx_jobs", "Jobs that are not over, by state.", ("state",), registry=self.registry)
        self._queue = Gauge(
            "phalanx_queue_jobs", "Queued jobs, by the reason they wait.", ("reason",), registry=self.registry
        )

        self._outbox = Gauge(
            "phalanx_outbox_notices", "Notices that are not delivered to the webhook yet.", registry=self.registry
        )

    def watch(self, collector: Collector) -> None:
        """Show what the collector reads, too, from now on."""
        self.registry.register(collector)

    def observe_request(self, method: str, route: str, status: int, elapsed_s: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(method, route).observe(elapsed_s)

    def observe_flush(self, jobs: int) -> None:
        self._flush.observe(jobs)

    def stream_opened(self) -> None:
        self._streams.inc()
        self.streams += 1

    def stream_closed(self) -> None:
        self._streams.dec()
        self.streams -= 1

    def render(self, counts: Counts) -> bytes:
        """The text exposition, with the database's counts as of now."""
        _replace(self._jobs, counts.jobs_by_state)
        _replace(self._queue, counts.queued_by_reason)
        self._outbox.set(counts.undelivered_notices)
        return generate_latest(self.registry)


def _replace(gauge: Gauge, values: Mapping[str, int]) -> None:
    gauge.clear()
    for label, value in values.items():
        gauge.labels(label).set(value)
