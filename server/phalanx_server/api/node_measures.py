"""How near runners and agents are to their bounds, as Prometheus metrics: what each said with its last heartbeat.

Owns these metrics' names. Of each node a fixed number of lines; bounds are the same on all nodes of a cluster, and
stand there once for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ValidationError

from phalanx_server.domain.messages import Backlog, Fullness, Message
from phalanx_server.store.node_views import NodeFullness

_BYTES = ("outbox", "reports", "logs", "bundles", "environments", "outputs")
_KINDS = ("logs", "metrics", "marks")
_NODE = ("cluster", "node")

M = TypeVar("M", bound=Message)


def render_nodes(nodes: Sequence[NodeFullness], agents: Mapping[str, str | None]) -> bytes:
    """The text exposition; `agents` is what that of each cluster keeps, as JSON of `messages.Backlog`.

    Takes a while with thousands of nodes, and touches nothing else: meant for a thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Nodes(nodes))
    registry.register(_Agents(agents))
    return generate_latest(registry)


class _Nodes(Collector):
    def __init__(self, nodes: Sequence[NodeFullness]) -> None:
        self._nodes = nodes

    def collect(self) -> Iterator[Metric]:
        spool = GaugeMetricFamily(
            "phalanx_node_spool_bytes", "What a node keeps because it could not be delivered.", labels=_NODE
        )
        used = GaugeMetricFamily("phalanx_node_bytes", "How much a node holds.", labels=(*_NODE, "what"))
        warm = GaugeMetricFamily("phalanx_node_warm_processes", "Processes that ranks are forked from.", labels=_NODE)
        dropped = CounterMetricFamily(
            "phalanx_node_dropped", "What a node had to give up, in items.", labels=(*_NODE, "kind")
        )
        byte_limits: dict[tuple[str, str], int] = {}
        warm_limits: dict[str, int] = {}
        for node in self._nodes:
            name = (node.cluster, node.name)
            spool.add_metric(name, node.spool_bytes)
            said = _read(Fullness, node.fullness)
            if said is None:
                continue
            for what in _BYTES:
                fill = getattr(said, what)
                used.add_metric((*name, what), fill.used_bytes)
                if fill.limit_bytes:
                    limit = byte_limits.get((node.cluster, what), 0)
                    byte_limits[node.cluster, what] = max(limit, fill.limit_bytes)
            warm.add_metric(name, said.warm_processes)
            warm_limits[node.cluster] = max(warm_limits.get(node.cluster, 0), said.warm_processes_limit)
            for kind in _KINDS:
                dropped.add_metric((*name, kind), getattr(said, f"dropped_{kind}"))
        yield from (spool, used, _byte_limits(byte_limits), warm, _warm_limits(warm_limits), dropped)


class _Agents(Collector):
    def __init__(self, agents: Mapping[str, str | None]) -> None:
        self._agents = agents

    def collect(self) -> Iterator[Metric]:
        facts = GaugeMetricFamily(
            "phalanx_agent_facts", "What an agent keeps for the server to acknowledge.", labels=("cluster",)
        )
        limit = GaugeMetricFamily("phalanx_agent_facts_limit", "The most that it may keep.", labels=("cluster",))
        for cluster, text in self._agents.items():
            said = _read(Backlog, text)
            if said is not None:
                facts.add_metric((cluster,), said.facts)
                limit.add_metric((cluster,), said.facts_limit)
        yield from (facts, limit)


def _read(kind: type[M], text: str | None) -> M | None:
    """None from a node or an agent of another version, or where another version of the server stored it."""
    try:
        return kind.read(text) if text else None
    except ValidationError:
        return None


def _byte_limits(limits: dict[tuple[str, str], int]) -> Metric:
    family = GaugeMetricFamily(
        "phalanx_node_bytes_limit", "The most that a node of a cluster may hold.", labels=("cluster", "what")
    )
    for labels, limit in limits.items():
        family.add_metric(labels, limit)
    return family


def _warm_limits(limits: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(
        "phalanx_node_warm_processes_limit", "How many a node of a cluster may have.", labels=("cluster",)
    )
    for cluster, limit in limits.items():
        family.add_metric((cluster,), limit)
    return family
