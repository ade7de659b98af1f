"""How full everything is that has a bound in this process, as Prometheus metrics of the moment of a scrape.

Owns these metrics' names; docs/metrics.md says of each what to do when it comes near its bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from phalanx_server.actions.submit_jobs import WAITING_MAX_JOBS
from phalanx_server.api.admission import Gate
from phalanx_server.api.deps import Services

Values = Mapping[str, float]  # by label


class Fullness(Collector):
    """Reads the services when it is asked."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        services = self._services
        yield from _requests(services.gates.all)
        yield _gauge("http_streams_limit", "Event streams that may be open.", services.settings.max_streams)
        pools = {"users": services.engine.sync_engine.pool, "links": services.links.sync_engine.pool}
        used = {name: pool.checkedout() for name, pool in pools.items()}  # type: ignore[attr-defined]
        most = {name: pool.size() for name, pool in pools.items()}  # type: ignore[attr-defined]
        yield _by("pool", "database_connections", "Database connections in use.", used)
        yield _by("pool", "database_connections_limit", "Database connections that there may be.", most)
        waiting = services.submitter.waiting_jobs
        yield _gauge("submit_waiting_jobs", "Jobs that wait for the next submit transaction.", waiting)
        yield _gauge("submit_waiting_jobs_limit", "Jobs that may wait for it.", WAITING_MAX_JOBS)
        cache = services.authenticator
        yield _gauge("token_cache_entries", "Tokens that are trusted for some seconds.", cache.trusted)
        yield _gauge("token_cache_entries_limit", "Over this many all are verified anew.", cache.trusted_limit)
        yield _gauge("wakeup_subscriptions", "Waiters for a wakeup.", services.wakeups.subscriptions)
        files = services.log_files
        yield _gauge("log_storage_waiting", "Reads and writes of log files that wait for a thread.", files.waiting)


def _requests(gates: Iterable[Gate]) -> Iterator[Metric]:
    gates = tuple(gates)
    for name, text, read in (
        ("running", "Requests under way.", lambda gate: gate.running),
        ("running_limit", "Requests that may be under way.", lambda gate: gate.bounds.running),
        ("waiting", "Requests that wait for others to end.", lambda gate: gate.waiting),
        ("waiting_limit", "Requests that may wait.", lambda gate: gate.bounds.waiting),
    ):
        yield _by("gate", f"http_requests_{name}", text, {gate.name: read(gate) for gate in gates})
    refused = CounterMetricFamily(
        "phalanx_http_requests_refused", "Requests that were told to come back.", labels=("gate", "code")
    )
    for gate in gates:
        for code, count in gate.refused.items():
            refused.add_metric((gate.name, code), count)
    yield refused


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"phalanx_{name}", text, value=value)


def _by(label: str, name: str, text: str, values: Values) -> Metric:
    family = GaugeMetricFamily(f"phalanx_{name}", text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family
