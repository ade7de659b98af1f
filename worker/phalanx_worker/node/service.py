"""The node runner: what the agent asks of one node, and everything that runs for it meanwhile.

Owns the table of groups on this node. Plain asyncio: knows no Ray (see `runner.py`), and decides nothing about jobs.
All arguments and results are plain JSON data, as the agent sends and takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from phalanx_worker import protocol
from phalanx_worker.node import hangs
from phalanx_worker.node.duties import Duties, Hooks
from phalanx_worker.node.fence import CheckGcs
from phalanx_worker.node.orders import GroupOrder, Settings, StartFailed
from phalanx_worker.node.ranks import Group, GroupEvents
from phalanx_worker.node.uploads import deliver_outputs
from phalanx_worker.protocol import AttemptRef

__all__ = ["Runner", "StartFailed"]

PREPARED_S = 4_500.0  # no agent waits longer for the other nodes of a gang (its PREPARE_TIMEOUT_S)
_FLUSH_S = 0.5
_KILLED_S = 30.0
_BACKLOG = 1024

T = TypeVar("T")


class Runner:
    """One node. `configure` must be called first; every method may be called again with the same arguments."""

    def __init__(
        self,
        *,
        address: str = "127.0.0.1",
        gcs_alive: CheckGcs | None = None,
        python: str = sys.executable,
        environ: Mapping[str, str] | None = None,
        warm_env: Mapping[str, str] | None = None,
    ):
        self.boot = uuid.uuid4().hex
        self._address = address
        self._gcs_alive = gcs_alive
        self._python = python
        self._environ = dict(os.environ if environ is None else environ)
        self._warm_env = dict(warm_env or {})
        self._settings: Settings | None = None
        self._duties: Duties | None = None
        self._opening = asyncio.Lock()
        self._starts: dict[str, tuple[int, asyncio.Task[Group]]] = {}
        self._preparing: dict[str, tuple[int, asyncio.Task[None]]] = {}
        # And not started yet: other nodes may still prepare theirs. With the monotonic time until which that may be so:
        # an agent that has died meanwhile stops nothing.
        self._prepared: dict[str, tuple[GroupOrder, float]] = {}
        self._listeners: dict[str, socket.socket] = {}
        self._seq = time.time_ns() // 1_000_000  # an agent that knew the runner before this one must see a change
        self._changed = asyncio.Event()

    # -------------------------------------------------------------- what the agent calls

    async def configure(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Take the settings, starting the node's duties with the first ones; answers `capabilities()`."""
        read = Settings.read(settings)
        async with self._opening:
            if self._duties is None:
                self._duties = await self._open(read)
            self._settings = read
            self._duties.fence.fence_s = read.fence_s
            self._duties.fence.touch()
            await self._duties.link.configure(
                server_url=read.server_url,
                token=read.node_token,
                heartbeat_s=read.heartbeat_s,
                outage_tolerance_s=read.outage_tolerance_s,
            )
        return self.capabilities()

    def capabilities(self) -> dict[str, Any]:
        """What this node can do, for its entry in the inventory."""
        duties = self._open_duties()
        return {
            "own_users": duties.launcher.own_users,
            "own_users_problem": duties.own_users_problem,
            "isolation": duties.launcher.isolation.in_words,
        }

    async def reserve_rendezvous(self, attempt_id: str) -> dict[str, Any]:
        """Bind the port that the attempt's TCPStore will listen on."""
        self._open_duties().fence.touch()
        listener = self._listeners.get(attempt_id)
        if listener is None:
            listener = self._listeners[attempt_id] = _listen(self._address)
        return {"host": self._address, "port": listener.getsockname()[1]}

    async def prepare_group(self, order: dict[str, Any]) -> dict[str, Any]:
        """Build the group's environment, which may take long, so that its start does not. Raises StartFailed."""
        duties = self._open_duties()
        duties.fence.touch()
        read = GroupOrder.read(order)
        epoch, preparing = self._preparing.get(read.attempt_id, (read.epoch, None))
        if preparing is None:
            preparing = asyncio.create_task(self._prepare(duties, read))
            self._preparing[read.attempt_id] = (epoch, preparing)
            preparing.add_done_callback(lambda _: self._end_preparing(read.attempt_id))
            self._note_change()
        _expect_epoch(epoch, read)
        await _unless_stopped(preparing)
        return {}

    async def start_group(self, order: dict[str, Any]) -> dict[str, Any]:
        """Start one group and answer its ranks; again the same for the same attempt and epoch. Raises StartFailed."""
        duties = self._open_duties()
        duties.fence.touch()
        read = GroupOrder.read(order)
        epoch, start = self._starts.get(read.attempt_id, (None, None))
        if start is None:
            epoch = read.epoch
            start = asyncio.create_task(self._start(duties, read))
            self._starts[read.attempt_id] = (epoch, start)
        _expect_epoch(epoch, read)
        group = await _unless_stopped(start)
        return {"ranks": [protocol.encode(rank) for rank in group.starts]}

    async def stop_group(self, attempt_id: str, grace_s: float) -> None:
        """SIGTERM to its ranks, SIGKILL after `grace_s`; nothing if there is no such group."""
        self._open_duties().fence.touch()
        group = await self._group(attempt_id)
        if group is not None:
            group.stop(grace_s)

    async def keep_stacks(self, attempt_id: str) -> None:
        """Keep what its ranks are doing among its outputs, for another node sees that the attempt is hung."""
        for group in self._groups():
            if group.order.attempt_id == attempt_id and group.is_going:
                kept = await hangs.keep_stacks(group)
                group.note("note", {"message": f"no step on another node{kept}"})

    async def profile_group(self, attempt_id: str, request: dict[str, Any]) -> None:
        """Ask its ranks for a trace of their next steps; nothing if there is no such group."""
        duties = self._open_duties()
        duties.fence.touch()
        read = protocol.decode(protocol.ProfileRequest, request)
        for group in self._groups():
            if group.order.attempt_id == attempt_id:
                duties.profiles.ask(group, read)

    async def kill_group(self, attempt_id: str) -> None:
        self._open_duties().fence.touch()
        group = await self._group(attempt_id)
        if group is not None:
            group.kill()

    async def forget_group(self, attempt_id: str) -> None:
        """Free everything of the attempt; what still runs is killed first."""
        duties = self._open_duties()
        duties.fence.touch()
        group = await self._group(attempt_id)
        if group is not None:
            if group.state != "ended":
                group.kill()
            try:
                async with asyncio.timeout(_KILLED_S):
                    await group.ended.wait()
            except TimeoutError:
                raise RuntimeError(f"processes of {attempt_id} do not die; it cannot be forgotten yet") from None
            await group.dismiss()
            await duties.profiles.forget(group)
            await asyncio.to_thread(duties.workspace.remove, group.places)
            duties.outbox.forget(group.key)
        self._starts.pop(attempt_id, None)
        self._drop_listener(attempt_id)
        self._note_change()

    async def next_facts(self, after: int, wait_s: float) -> dict[str, Any]:
        """The table of groups, as soon as it differs from the one numbered `after`, at the latest after `wait_s`."""
        self._open_duties().fence.touch()
        if self._seq == after:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
        self._look_for_delivered()
        groups = [_facts(group) for group in self._groups()]
        preparing = [protocol.encode(ref) for ref in self._without_ranks()]
        return {"seq": self._seq, "groups": groups, "preparing": preparing, "warm_ready": self._open_duties().is_warm}

    async def close(self) -> None:
        """End every rank and hand what is unsent to the spool."""
        duties = self._duties
        if duties is None:
            return
        tasks = [*self._starts.values(), *self._preparing.values()]
        starting = [start for _, start in tasks if not start.done()]
        for start in starting:
            start.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        for group in self._groups():
            await group.dismiss()
        for attempt_id in list(self._listeners):
            self._drop_listener(attempt_id)
        await duties.close()
        self._duties = None

    # -------------------------------------------------------------- groups

    async def _prepare(self, duties: Duties, order: GroupOrder) -> None:
        await duties.launcher.prepare(order, duties.outbox.put)
        self._prepared[order.attempt_id] = (order, time.monotonic() + PREPARED_S)

    def _end_preparing(self, attempt_id: str) -> None:
        del self._preparing[attempt_id]
        self._note_change()

    async def _start(self, duties: Duties, order: GroupOrder) -> Group:
        listener = self._listeners.get(order.attempt_id) if order.hosts_rendezvous else None
        try:
            if order.hosts_rendezvous and listener is None:
                raise StartFailed("no rendezvous port is reserved here for this attempt")
            events = GroupEvents(
                put=duties.outbox.put,
                changed=self._note_change,
                collect=partial(_bring, duties),
                flush=self._flush,
                profile=duties.profiles.heard,
            )
            group = await duties.launcher.start(order, listener, events)
        except BaseException:
            self._starts.pop(order.attempt_id, None)
            raise
        finally:
            self._drop_listener(order.attempt_id)
            self._prepared.pop(order.attempt_id, None)
        self._note_change()
        return group

    async def _group(self, attempt_id: str) -> Group | None:
        """The started group; None if there is none. A start that is under way is given up, and has ended then."""
        await self._stop_preparing(attempt_id)
        _, start = self._starts.get(attempt_id, (0, None))
        if start is None:
            return None
        if not start.done() and not start.cancelling():  # a second cancel would cut its clearing up short
            start.cancel()
        with contextlib.suppress(StartFailed, asyncio.CancelledError):
            return await asyncio.shield(start)
        return None

    async def _stop_preparing(self, attempt_id: str) -> None:
        _, preparing = self._preparing.get(attempt_id, (0, None))
        if preparing is not None:
            if not preparing.cancelling():
                preparing.cancel()
            await asyncio.wait([preparing])
        if self._prepared.pop(attempt_id, None) is not None:
            self._note_change()

    def _groups(self) -> list[Group]:
        done = [start for _, start in self._starts.values() if start.done() and not start.cancelled()]
        return [start.result() for start in done if start.exception() is None]

    def _orders(self) -> list[GroupOrder]:
        """Of groups whose ranks may run, and of those that are prepared for them."""
        now_s = time.monotonic()
        self._prepared = {name: each for name, each in self._prepared.items() if each[1] > now_s}
        prepared = [order for order, _ in self._prepared.values()]
        return [*prepared, *(group.order for group in self._groups() if group.state != "ended")]

    def _present(self) -> list[AttemptRef]:
        """Attempts that have ranks here or may have them soon: the server takes one that is not listed for gone."""
        begun = [*self._starts.items(), *self._preparing.items()]
        starting = [AttemptRef(name, epoch) for name, (epoch, start) in begun if not start.done()]
        return list(dict.fromkeys([*starting, *(AttemptRef(each.attempt_id, each.epoch) for each in self._orders())]))

    def _without_ranks(self) -> list[AttemptRef]:
        """Of those that are present, what is prepared, being prepared or being started."""
        with_ranks = {group.order.attempt_id for group in self._groups()}
        return [ref for ref in self._present() if ref.attempt_id not in with_ranks]

    def _drop_listener(self, attempt_id: str) -> None:
        listener = self._listeners.pop(attempt_id, None)
        if listener is not None:
            listener.close()

    def _note_change(self) -> None:
        self._seq += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def _look_for_delivered(self) -> bool:
        """Whether the server has got, since the last look, all that an ended group left behind."""
        link = self._open_duties().link
        waiting = [group for group in self._groups() if group.state == "ended" and not group.delivered]
        for group in waiting:
            group.delivered = not link.holds(group.key)
        return any(group.delivered for group in waiting)

    def _note_delivered(self) -> None:
        if self._duties is not None and self._look_for_delivered():
            self._note_change()

    async def _flush(self) -> None:
        if self._duties is not None:
            await self._duties.link.flush(_FLUSH_S)

    # -------------------------------------------------------------- duties

    async def _open(self, settings: Settings) -> Duties:
        hooks = Hooks(
            groups=self._groups,
            orders=self._orders,
            attempts=self._present,
            changed=self._note_change,
            taken=self._note_delivered,
            gcs_alive=self._gcs_alive,
        )
        return await Duties.open(
            settings, hooks, boot=self.boot, python=self._python, environ=self._environ, warm_env=self._warm_env
        )

    def _open_duties(self) -> Duties:
        if self._duties is None:
            raise RuntimeError("the runner is not configured yet")
        return self._duties


async def _bring(duties: Duties, group: Group) -> None:
    """What its ranks have left: traces first, which are on their way already."""
    await duties.profiles.settle(group)
    await deliver_outputs(group, duties.transfers, own_users=duties.launcher.own_users)


def _expect_epoch(here: int | None, order: GroupOrder) -> None:
    if here != order.epoch:
        raise StartFailed(f"epoch {here} of this attempt is here, epoch {order.epoch} was ordered")


async def _unless_stopped(task: asyncio.Task[T]) -> T:
    """The result of a start, or of what prepares one. Raises StartFailed where the attempt was stopped meanwhile."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.cancelled():
            raise  # only this call was given up
        raise StartFailed("the attempt was stopped before its ranks were started") from None


def _facts(group: Group) -> dict[str, Any]:
    return {
        "attempt_id": group.order.attempt_id,
        "epoch": group.order.epoch,
        "state": group.state,
        "exits": [protocol.encode(end) for end in group.exits],
        "first_failed_rank": group.first_failed_rank,
        "delivered": group.delivered,
        "hung": group.is_going and group.pace.hung_s > 0,
    }


def _listen(address: str) -> socket.socket:
    """A listening socket on any free port of `address`, or of every address where that one is not this machine's."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((address, 0))
    except OSError:
        listener.bind(("", 0))
    listener.listen(_BACKLOG)
    return listener
