"""What goes on beside the ranks: the node's figures, and the limits that each group must keep.

Owns the once-a-second looks at GPUs and figures, and at the steps of ranks, and the five looks a second at memory. A
group over its memory, or seen on a GPU outside its placement, is ended with a mark that says so.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable

from phalanx_worker.node import hangs, offences, processes
from phalanx_worker.node.devices import Devices
from phalanx_worker.node.gpu_faults import GpuFault
from phalanx_worker.node.offences import Offence
from phalanx_worker.node.ranks import Group
from phalanx_worker.protocol import NodeStats
from phalanx_worker.runtime import linux

log = logging.getLogger("phalanx.node.watch")

MEMORY_INTERVAL_S = 0.2  # memory is filled at gigabytes a second
_HANGS_INTERVAL_S = 1.0
_LOOKS_AT_MEMORY = 5  # for each look at everything

Finding = tuple[Group, Offence]


class Watch:
    """`stats` are the latest figures of the node."""

    def __init__(self, devices: Devices, groups: Callable[[], list[Group]]):
        self.devices = devices
        self.stats: NodeStats = devices.read()
        self._groups = groups
        self._pids: dict[tuple[str, int], list[int]] = {}  # of each group that is watched, at the last look
        self._attending: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        for count in itertools.count():
            try:
                await (self.look_at_memory() if count % _LOOKS_AT_MEMORY else self.tick())
            except Exception:  # a figure that cannot be read must not end the watching
                log.exception("watching failed")
            await asyncio.sleep(MEMORY_INTERVAL_S)

    async def tick(self) -> None:
        """Look at everything."""
        groups = self._living()
        self.stats, faults, findings = await asyncio.to_thread(self._look, groups)
        for group in groups:
            tell_faults(group, faults)
        for group, offence in findings:
            group.fail(offence)

    async def run_hangs(self) -> None:
        """Beside `run`, which waits for drivers."""
        while True:
            self.look_for_hangs()
            await asyncio.sleep(_HANGS_INTERVAL_S)

    def look_for_hangs(self) -> None:
        for group in self._living():
            if group.is_going and group.pace.look(time.monotonic()):
                group.changed()
                attending = asyncio.create_task(hangs.attend(group))
                self._attending.add(attending)
                attending.add_done_callback(self._attended)

    def _attended(self, attending: asyncio.Task[None]) -> None:
        self._attending.discard(attending)
        if not attending.cancelled() and attending.exception() is not None:
            log.error("attending to a hang failed", exc_info=attending.exception())

    async def look_at_memory(self) -> None:
        """Ask the kernel whether it has ended a process; where it keeps no limit, look at the known processes."""
        groups = self._living()
        for group in groups:
            group.look_for_oom(lambda group=group: _victim(group))
        watched = [group for group in groups if group.confinement.watched_memory_bytes]
        if watched:
            for group, offence in await asyncio.to_thread(self._look_at, watched):
                group.fail(offence)

    def _living(self) -> list[Group]:
        return [group for group in self._groups() if group.state != "ended"]

    def _look(self, groups: list[Group]) -> tuple[NodeStats, list[GpuFault], list[Finding]]:
        looked_at = [group for group in groups if group.confinement.watched_memory_bytes or self.devices.gpus]
        table = linux.parents() if looked_at else {}
        on_gpus = self.devices.processes_by_gpu() if looked_at else {}
        self._pids = {group.key: linux.descendants(group.guardian_pid, table) for group in looked_at}
        findings = self._look_at(looked_at)
        for group in looked_at:
            findings += _gpu_finding(group, self._pids[group.key], on_gpus)
        return self.devices.read(), self.devices.faults.read(), findings

    def _look_at(self, groups: list[Group]) -> list[Finding]:
        return [finding for group in groups for finding in _memory_finding(group, self._pids.get(group.key, []))]


def _memory_finding(group: Group, pids: list[int]) -> list[Finding]:
    limit_bytes = group.confinement.watched_memory_bytes
    if not limit_bytes:
        return []
    shm_bytes = _own_shm_bytes(group)
    used_bytes = processes.memory_bytes(pids, limit_bytes=limit_bytes, shm_bytes=shm_bytes)
    if used_bytes <= limit_bytes:
        return []
    return [(group, offences.out_of_memory(group.order, limit_bytes, rank=_hungriest(group), used_bytes=used_bytes))]


def _own_shm_bytes(group: Group) -> int:
    """What lies in the group's own /dev/shm, which counts like its memory."""
    if not group.confinement.private:
        return 0
    try:
        status = os.statvfs(f"/proc/{group.guardian_pid}/root/dev/shm")
    except OSError:
        return 0
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _victim(group: Group) -> int | None:
    """Of the kernel: the rank that is dead and whose end was not told yet, else the one whose child it was likely."""
    hungriest = _hungriest(group)  # first: a rank whose memory is gone by now is seen to be dying below
    told = {end.rank for end in group.exits}
    dead = [start.rank for start in group.starts if start.rank not in told and processes.is_dying(start.pid)]
    return dead[0] if dead else hungriest


def _hungriest(group: Group) -> int | None:
    """The rank that holds the most memory now, with all that it has started."""
    table = linux.parents()
    held = {
        start.rank: processes.resident_bytes([start.pid, *linux.descendants(start.pid, table)])
        for start in group.starts
        if start.pid in table
    }
    return max(held, key=lambda rank: held[rank], default=None)


def tell_faults(group: Group, faults: list[GpuFault]) -> None:
    """Tell its owner of what is wrong with the group's GPUs, and end it if its job says so and it is that bad."""
    action, first_rank = group.health.gpu, group.order.group.first_rank
    mine = [fault for fault in faults if fault.index in group.order.group.gpu_indices and action != "off"]
    for fault in mine:
        done = action if fault.is_fatal else "warn"
        message = f"GPU {fault.index} of {group.order.group.node} {fault.text}"
        group.note("health", {"check": "gpu", "action": done, "message": message, "blamed": first_rank})
    if action in ("restart", "stop") and (worst := next((fault for fault in mine if fault.is_fatal), None)):
        group.fail(offences.sick_gpu(f"used GPU {worst.index}, which {worst.text}", final=action == "stop"))


def _gpu_finding(group: Group, pids: list[int], on_gpus: dict[int, set[int]]) -> list[Finding]:
    own = set(group.order.group.gpu_indices)
    intruded = sorted(index for index, users in on_gpus.items() if index not in own and users & set(pids))
    return [(group, offences.foreign_gpu(intruded))] if intruded else []
