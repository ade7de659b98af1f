"""What goes on beside the ranks: the node's figures, and the limits that each group must keep.

Owns the once-a-second look at memory and GPUs. A group over its memory, or seen on a GPU outside its placement, is
ended with a mark that says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from phalanx_worker.node import processes
from phalanx_worker.node.devices import Devices
from phalanx_worker.node.ranks import Group
from phalanx_worker.protocol import NodeStats
from phalanx_worker.runtime import linux

log = logging.getLogger("phalanx.node.watch")

INTERVAL_S = 1.0


class Watch:
    """`stats` are the latest figures of the node."""

    def __init__(self, devices: Devices, groups: Callable[[], list[Group]]):
        self.devices = devices
        self.stats: NodeStats = devices.read()
        self._groups = groups

    async def run(self) -> None:
        while True:
            try:
                await self.tick()
            except Exception:  # a figure that cannot be read must not end the watching
                log.exception("watching failed")
            await asyncio.sleep(INTERVAL_S)

    async def tick(self) -> None:
        groups = [group for group in self._groups() if group.state != "ended"]
        self.stats, findings = await asyncio.to_thread(self._look, groups)
        for group, kind, data in findings:
            group.fail(kind, data)

    def _look(self, groups: list[Group]) -> tuple[NodeStats, list[tuple[Group, str, dict]]]:
        findings = []
        limited = [group for group in groups if group.order.memory_limit_bytes or self.devices.gpus]
        table = linux.parents() if limited else {}
        on_gpus = self.devices.processes_by_gpu() if limited else {}
        for group in limited:
            pids = linux.descendants(group.guardian_pid, table)
            findings += _memory_finding(group, pids) or _gpu_finding(group, pids, on_gpus)
        return self.devices.read(), findings


def _memory_finding(group: Group, pids: list[int]) -> list[tuple[Group, str, dict]]:
    limit_bytes = group.order.memory_limit_bytes
    used_bytes = processes.memory_bytes(pids, limit_bytes=limit_bytes) if limit_bytes else 0
    return [(group, "oom", {"used_bytes": used_bytes, "limit_bytes": limit_bytes})] if used_bytes > limit_bytes else []


def _gpu_finding(group: Group, pids: list[int], on_gpus: dict[int, set[int]]) -> list[tuple[Group, str, dict]]:
    own = set(group.order.group.gpu_indices)
    intruded = sorted(index for index, users in on_gpus.items() if index not in own and users & set(pids))
    if not intruded:
        return []
    message = f"a rank used GPU {', '.join(map(str, intruded))} of its node, which it was not given: ranks ended"
    return [(group, "note", {"message": message})]
