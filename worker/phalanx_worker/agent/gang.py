"""Gangs as Ray placement groups: one bundle for each node, pinned to it, that only counts GPUs and CPUs.

Owns when a group may be created: never before Ray's own view shows its resources free, for one that misses its first
try waits 0.8 s. Which GPUs, and whether it fits at all, was decided before. Ray's calls block, so they run in threads.

Ray never forgets a removed group: to be told of 100,000 takes it 8 s and 300 MiB of GCS's memory. So which ones there
may be is kept beside them, in Ray's key-value store. A key outlives its group: it is deleted when nothing is left of
the attempt on any node, and tells the next agent until then that something may be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray._private.state
from phalanx.units import duration_text
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_exists, _internal_kv_list, _internal_kv_put
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from phalanx_worker.agent.launch import PlacementUnavailable, StartFailed
from phalanx_worker.protocol import DesiredAttempt

PREFIX = "phalanx/"
INDEX_NAMESPACE = "phalanx-placement-groups"  # of Ray's key-value store: keys of attempts that may have left something
INDEXED = b"indexed"  # the key that says so; before, no group was entered
OF_ATTEMPT = b"attempt/"
POLL_S = 0.003
CREATED_TIMEOUT_S = 10
SMALLEST_CPUS = 0.001  # a bundle may not be empty; Ray counts in steps of this
TOLERANCE = 1e-4  # of Ray's fractional counts

T = TypeVar("T")


@dataclass(frozen=True)
class Bundle:
    """What an attempt takes of one node."""

    node: str  # its name, for messages
    ray_node_id: str
    gpus: int
    cpus: float

    def resources(self) -> dict[str, float]:
        wanted = {"GPU": float(self.gpus), "CPU": self.cpus}
        return {kind: amount for kind, amount in wanted.items() if amount > 0} or {"CPU": SMALLEST_CPUS}


@dataclass(eq=False)
class _Waiter:
    bundles: list[Bundle]
    granted: asyncio.Future[None]
    missing: str = ""
    node: str | None = None


@dataclass
class PlacementGroups:
    """The placement groups of attempts in the cluster that this process has joined."""

    threads: ThreadPoolExecutor
    handles: dict[str, PlacementGroup | None] = field(default_factory=dict)  # by attempt that has a key
    _waiters: list[_Waiter] = field(default_factory=list)
    _creating: list[_Waiter] = field(default_factory=list)  # granted, and perhaps not yet in Ray's view
    _watch: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """Learn which groups there may be."""
        self.handles.update(await self._in_thread(_existing))

    def attempts(self) -> frozenset[str]:
        return frozenset(self.handles)

    async def create(self, attempt: DesiredAttempt, ray_node_ids: dict[str, str], *, free_timeout_s: float) -> None:
        """Wait until the resources are free, then take them. Raises StartFailed.

        Cancelling it while it waits leaves nothing behind; later it may leave a group, for `remove`.
        """
        bundles = bundles_of(attempt, ray_node_ids)
        waiter = _Waiter(bundles, asyncio.get_running_loop().create_future())
        try:
            await self._wait_granted(waiter, free_timeout_s)
            taking = asyncio.create_task(self._take(attempt.attempt_id, bundles))
            try:
                await asyncio.shield(taking)
            finally:
                await asyncio.wait([taking])
        finally:
            _discard(self._waiters, waiter)
            _discard(self._creating, waiter)

    async def remove(self, attempt_id: str) -> None:
        """Remove the attempt's group; no group is fine. Raises PlacementUnavailable."""

        def give_back() -> None:
            handle = self.handles.get(attempt_id) or _named(attempt_id)  # that of an older agent may have no key
            if handle is not None:
                remove_placement_group(handle)

        try:
            await self._in_thread(give_back)
        except RayError as error:
            raise PlacementUnavailable(str(error)) from error
        if attempt_id in self.handles:
            self.handles[attempt_id] = None

    async def forget(self, attempt_id: str) -> None:
        """Its group is removed, and nothing is left of it on any node. Raises PlacementUnavailable."""
        if attempt_id not in self.handles:
            return
        try:
            await self._in_thread(lambda: _internal_kv_del(_key(attempt_id), namespace=INDEX_NAMESPACE))
        except RayError as error:
            raise PlacementUnavailable(str(error)) from error
        self.handles.pop(attempt_id, None)

    async def _take(self, attempt_id: str, bundles: list[Bundle]) -> None:
        self.handles[attempt_id] = None

        def take() -> bool:
            _internal_kv_put(_key(attempt_id), b"", namespace=INDEX_NAMESPACE)
            self.handles[attempt_id] = handle = placement_group(
                [bundle.resources() for bundle in bundles],
                strategy="PACK",
                name=PREFIX + attempt_id,
                lifetime="detached",
                bundle_label_selector=[{"ray.io/node-id": bundle.ray_node_id} for bundle in bundles],
            )
            return handle.wait(CREATED_TIMEOUT_S)

        try:
            created = await self._in_thread(take)
        except (RayError, ValueError) as error:
            raise StartFailed(f"Ray refused the placement group: {error}") from error
        if not created:
            raise StartFailed(f"Ray did not create the placement group within {CREATED_TIMEOUT_S} s")

    async def _wait_granted(self, waiter: _Waiter, timeout_s: float) -> None:
        self._waiters.append(waiter)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._grant())
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.granted
        except TimeoutError:
            raise StartFailed(f"{waiter.missing} after {duration_text(timeout_s)}", waiter.node) from None

    async def _grant(self) -> None:
        """Ask Ray while anybody waits, and let through who fits, in the order of asking."""
        while self._waiters:
            asked_s = time.monotonic()
            try:
                free = await self._in_thread(ray._private.state.available_resources_per_node)
            except RayError:
                free = {}
            for creating in self._creating:
                _subtract(free, creating.bundles)
            for waiter in list(self._waiters):
                waiter.missing, waiter.node = shortage(waiter.bundles, free)
                if not waiter.missing and not waiter.granted.done():
                    waiter.granted.set_result(None)
                    self._waiters.remove(waiter)
                    self._creating.append(waiter)
                _subtract(free, waiter.bundles)
            await asyncio.sleep(max(0.0, asked_s + POLL_S - time.monotonic()))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


def _key(attempt_id: str) -> bytes:
    return OF_ATTEMPT + attempt_id.encode()


def _existing() -> dict[str, PlacementGroup | None]:
    """The groups that exist, by attempt. A key without a group tells as much: its nodes may not be clear, and an agent
    that this one replaces may just be about to create it."""
    if not _internal_kv_exists(INDEXED, namespace=INDEX_NAMESPACE):
        for row in placement_group_table().values():
            if row["name"].startswith(PREFIX) and row["state"] != "REMOVED":
                _internal_kv_put(_key(row["name"].removeprefix(PREFIX)), b"", namespace=INDEX_NAMESPACE)
        _internal_kv_put(INDEXED, b"", namespace=INDEX_NAMESPACE)
    keys = _internal_kv_list(OF_ATTEMPT, namespace=INDEX_NAMESPACE)
    attempts = [key.removeprefix(OF_ATTEMPT).decode() for key in keys]
    return {attempt_id: _named(attempt_id) for attempt_id in attempts}


def _named(attempt_id: str) -> PlacementGroup | None:
    try:
        return get_placement_group(PREFIX + attempt_id)
    except ValueError:  # there is none of that name
        return None


def bundles_of(attempt: DesiredAttempt, ray_node_ids: Mapping[str, str]) -> list[Bundle]:
    return [
        Bundle(
            node=group.node,
            ray_node_id=ray_node_ids[group.node],
            gpus=len(group.gpu_indices),
            cpus=attempt.launch.cpus_per_group[group.group_rank],
        )
        for group in attempt.groups
    ]


def shortage(bundles: list[Bundle], free: Mapping[str, Mapping[str, Any]]) -> tuple[str, str | None]:
    """What the first node that cannot hold its bundle lacks, and that node; ("", None) if all fit."""
    for bundle in bundles:
        there = free.get(bundle.ray_node_id, {})
        for kind, wanted in bundle.resources().items():
            amount = there.get(kind, 0.0)
            if amount + TOLERANCE < wanted:
                return f"Ray shows {amount:g} of {wanted:g} {kind}s free on node {bundle.node}", bundle.node
    return "", None


def _discard(waiters: list[_Waiter], waiter: _Waiter) -> None:
    if waiter in waiters:
        waiters.remove(waiter)


def _subtract(free: dict[str, dict[str, float]], bundles: list[Bundle]) -> None:
    for bundle in bundles:
        there = free.get(bundle.ray_node_id, {})
        for kind, wanted in bundle.resources().items():
            there[kind] = there.get(kind, 0.0) - wanted
