"""What the scheduler process measures of itself, as Prometheus metrics, and the port that it tells them on.

Owns these metrics' names; docs/metrics.md says of each what to do when it comes near its bound. Everything is read from
memory at a scrape, in a thread of the HTTP server's own: a database that hangs leaves the metrics readable.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.loops import deliver_outbox, hold_book, schedule
from phalanx_server.loops.deliver_outbox import DeliverOutbox
from phalanx_server.loops.enforce import Enforce
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.measure_speeds import MeasureSpeeds
from phalanx_server.loops.retain import Retain
from phalanx_server.loops.schedule import Pass, ScheduleLoop
from phalanx_server.loops.ticking import Pulse
from phalanx_server.loops.watch_nodes import WatchNodes
from phalanx_server.scheduling.planner import Size

_PREFIX = "phalanx_scheduler_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Loop(Protocol):
    pulse: Pulse

    async def run_forever(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Loops:
    """All loops of a scheduler."""

    leader: Leader
    schedule: ScheduleLoop
    watch_nodes: WatchNodes
    enforce: Enforce
    speeds: MeasureSpeeds
    outbox: DeliverOutbox
    retain: Retain

    @property
    def by_name(self) -> Mapping[str, Loop]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class PassMeasures:
    """Counts passes, from the beginning of the process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            f"{_PREFIX}pass_seconds",
            "Time of a pass: load, plan and commit.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._started = Counter(f"{_PREFIX}starts", "Jobs that passes started.", registry=registry)
        self._stopped = Counter(
            f"{_PREFIX}stops", "Jobs that passes let give way, by cause.", ("cause",), registry=registry
        )
        self._dropped = Counter(
            f"{_PREFIX}starts_dropped", "Decisions that no longer held when they were committed.", registry=registry
        )
        self.passed_at_s = time.monotonic()
        """Of the last pass; before the first, of this object."""

    def observe(self, done: Pass) -> None:
        self.passed_at_s = time.monotonic()
        self._seconds.observe(done.seconds)
        self._started.inc(len(done.committed.started))
        for cause in done.committed.stopped.values():
            self._stopped.labels(cause.value).inc()
        self._dropped.inc(len(done.committed.dropped))


class SchedulerState(Collector):
    """How full and how far behind the loops are at the moment of a scrape."""

    def __init__(self, loops: Loops, passes: PassMeasures, engine: AsyncEngine) -> None:
        self._loops = loops
        self._passes = passes
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        yield from self._leadership()
        yield from self._last_pass()
        yield from self._holds()
        yield from self._forecasts()
        yield from self._backlogs()
        yield from _pulses(self._loops.by_name)
        pool = self._engine.sync_engine.pool
        yield _gauge("database_connections", "Database connections in use.", pool.checkedout())  # type: ignore[attr-defined]
        yield _gauge("database_connections_limit", "Connections that there may be.", pool.size())  # type: ignore[attr-defined]

    def _leadership(self) -> Iterator[Metric]:
        leader = self._loops.leader
        yield _gauge("leads", "1 where this scheduler leads, else 0.", leader.lease is not None)
        yield _gauge("lease_age_seconds", "Since the lease was last renewed.", leader.lease_age_s)
        yield _gauge("lease_age_seconds_limit", "From this age on another may lead.", leader.ttl_s)

    def _last_pass(self) -> Iterator[Metric]:
        last = self._loops.schedule.last
        size = last.size if last else Size()
        age_s = time.monotonic() - self._passes.passed_at_s
        yield _gauge("pass_age_seconds", "Since the last pass ended.", age_s)
        yield _gauge("pass_changes", "Jobs, nodes and tenants that the last pass read.", last.changes if last else 0)
        yield _gauge("pass_classes", "Kinds of waiting jobs that the last pass considered.", size.classes)
        yield _gauge("pass_queued_jobs", "Waiting jobs that the last pass considered.", last.queued if last else 0)
        yield _gauge("pass_starts", "Starts that the last pass decided on.", len(last.plan.starts) if last else 0)
        yield _gauge("pass_starts_limit", "Starts that are committed at once.", schedule.STARTS_MAX)
        yield _gauge("planner_jobs", "Jobs that the planner holds in memory.", size.jobs)
        yield _gauge("planner_nodes", "Nodes that the planner holds in memory.", size.nodes)

    def _holds(self) -> Iterator[Metric]:
        book = self._loops.schedule.holds
        yield _gauge("hold_book_jobs", "Waiting jobs of which the stored reason is in memory.", book.jobs)
        yield _gauge("hold_book_words", "Different reasons in memory.", book.words)
        yield _gauge("hold_book_words_limit", "Over it those of no job are forgotten.", hold_book.WORDS_MAX)

    def _forecasts(self) -> Iterator[Metric]:
        starts, runs = self._loops.schedule.starts, self._loops.schedule.runs
        yield _gauge("forecast_runs", "Jobs that ended whose run time had been expected.", runs.jobs)
        yield _gauge("forecast_runs_within", "Those that ended within the interval; 0.8 of them is meant.", runs.within)
        yield _gauge("forecast_runs_log_error", "Sum of their errors, as powers of e.", runs.error)
        yield _gauge("forecast_starts", "Jobs that started whose start had been expected.", starts.jobs)
        yield _gauge("forecast_starts_within", "Those that started within the interval.", starts.within)
        yield _gauge("forecast_starts_error_seconds", "Sum of the errors of first expected starts.", starts.error_s)

    def _backlogs(self) -> Iterator[Metric]:
        outbox, since = self._loops.outbox, self._loops.retain.caught_up_at
        lag_s = (datetime.now(UTC) - since).total_seconds() if since else 0.0
        yield _gauge("outbox_due_notices", "Notices that were due at the last look.", outbox.due)
        yield _gauge("outbox_due_notices_limit", "Notices that are looked at together.", deliver_outbox.BATCH)
        yield _gauge("outbox_lag_seconds", "Age of the oldest notice that is due.", outbox.lag_s)
        yield _counter("outbox_failures", "Deliveries of notices that failed.", outbox.failures)
        yield _gauge("retention_lag_seconds", "Since nothing was left that should be forgotten.", max(0.0, lag_s))


@contextmanager
def serve_measures(registry: CollectorRegistry, *, host: str, port: int) -> Iterator[int]:
    """Answer Prometheus meanwhile; gives the port. Raises OSError where it cannot be listened on."""
    server, thread = start_http_server(port, addr=host, registry=registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def measure(registry: CollectorRegistry, loops: Loops, passes: PassMeasures, engine: AsyncEngine) -> None:
    """Let the registry show these loops, and what the process takes of the machine."""
    registry.register(SchedulerState(loops, passes, engine))
    ProcessCollector(registry=registry)


def _pulses(loops: Mapping[str, Loop]) -> Iterator[Metric]:
    failures = CounterMetricFamily(f"{_PREFIX}loop_failures", "Ticks of a loop that failed.", labels=("loop",))
    failing = GaugeMetricFamily(
        f"{_PREFIX}loop_failing", "Ticks of a loop that failed in a row until now.", labels=("loop",)
    )
    age = GaugeMetricFamily(
        f"{_PREFIX}loop_age_seconds", "Since the last tick of a loop that did not fail.", labels=("loop",)
    )
    for name, loop in loops.items():
        failures.add_metric((name,), loop.pulse.failures)
        failing.add_metric((name,), loop.pulse.failing)
        if (ticked_at_s := loop.pulse.ticked_at_s) is not None:
            age.add_metric((name,), time.monotonic() - ticked_at_s)
    yield from (failures, failing, age)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(_PREFIX + name, text, value=value)
