"""From an order to running ranks: its Python, directories, code, variables, the choice of warm or cold, the fork.

Owns that sequence. Knows neither the table of groups nor the server.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from phalanx_worker.node import environment
from phalanx_worker.node.bundles import Bundles
from phalanx_worker.node.command import Launch, plan_launch
from phalanx_worker.node.environment import Places
from phalanx_worker.node.fence import Fence, OutageFence
from phalanx_worker.node.interpreters import Interpreter, Interpreters
from phalanx_worker.node.isolation import Confinement, Isolation
from phalanx_worker.node.orders import GroupOrder, StartFailed
from phalanx_worker.node.ranks import Group, GroupEvents
from phalanx_worker.node.threads import to_its_end
from phalanx_worker.node.warm import WarmProcess, WarmState
from phalanx_worker.node.workspace import Workspace
from phalanx_worker.protocol import Mark
from phalanx_worker.runtime.spec import GroupSpec, RankSpec, StoreSpec


@dataclass(frozen=True)
class Launcher:
    """`own_users`: whether ranks switch to their tenant's user, already known to work on this node. While `fence` or
    `outage` is over, nothing starts here."""

    workspace: Workspace
    bundles: Bundles
    interpreters: Interpreters
    light: WarmProcess
    own_users: bool
    fence: Fence
    outage: OutageFence
    isolation: Isolation

    async def start(self, order: GroupOrder, listener: socket.socket | None, events: GroupEvents) -> Group:
        """Start one group. Raises StartFailed with nothing left behind, directories included."""
        uid = self._uid(order)
        async with self._interpreter(order, uid, events.put) as interpreter:
            return await self._start(order, uid, interpreter, listener, events)

    async def prepare(self, order: GroupOrder, put: Callable[[Mark], None]) -> None:
        """Build the group's environment where it has one. Raises StartFailed."""
        async with self._interpreter(order, self._uid(order), put):
            pass

    async def _start(
        self,
        order: GroupOrder,
        uid: int | None,
        interpreter: Interpreter,
        listener: socket.socket | None,
        events: GroupEvents,
    ) -> Group:
        state = await interpreter.ready()
        places = self.workspace.places(order)
        try:
            confinement = await to_its_end(self.isolation.prepare, order, uid)
            await to_its_end(self.workspace.prepare, order, uid)
            if order.desired.launch.bundle:
                await self.bundles.unpack(order.desired.launch.bundle, order.attempt_id, Path(places.work), uid)
            launch = _plan(order, interpreter.python, state)
            light = _needs_no_torch(order, launch)
            hosted_store = bool(state.torch) and not (light and order.hosts_rendezvous)
            spec = self._spec(order, places, launch, interpreter, confinement, uid=uid, hosted_store=hosted_store)
            group = Group(order, places, launch, confinement, events)
            if listener is not None and spec.store is None:
                listener.close()  # the store is not hosted here: rank 0 binds the port itself
                listener = None
            self._expect_contact()
            await group.start(self.light if light else interpreter.warm, spec, listener)
            self.isolation.started(order)
        except BaseException:
            await to_its_end(self.isolation.discard, order)
            await to_its_end(self.workspace.remove, places)
            raise
        return group

    def _expect_contact(self) -> None:
        """What started now would be seen by no fence before it runs."""
        if self.fence.is_over or self.outage.is_over:
            raise StartFailed("the node is cut off from its cluster or the server, so nothing starts on it")

    def _uid(self, order: GroupOrder) -> int | None:
        if not self.own_users:
            return None
        if order.desired.tenant_uid <= 0:
            raise StartFailed("the tenant has no Unix user, and this node runs ranks under their tenant's user")
        return order.desired.tenant_uid

    def _interpreter(
        self, order: GroupOrder, uid: int | None, put: Callable[[Mark], None]
    ) -> AbstractAsyncContextManager[Interpreter]:
        def tell(message: str) -> None:
            data = {"message": f"{message} on {order.group.node}"}
            first_rank = order.group.first_rank
            put(Mark(order.attempt_id, order.epoch, first_rank, kind="environment", at=time.time(), data=data))

        return self.interpreters.hold(order.desired.launch.environment, uid, tell)

    def _spec(
        self,
        order: GroupOrder,
        places: Places,
        launch: Launch,
        interpreter: Interpreter,
        confinement: Confinement,
        *,
        uid: int | None,
        hosted_store: bool,
    ) -> GroupSpec:
        user = _own_name() if uid is None else f"phx{uid}"
        env = environment.group_environment(
            order, places, node_env=interpreter.node_env, user=user, hosted_store=hosted_store
        )
        first_rank = order.group.first_rank
        hosts = order.hosts_rendezvous and hosted_store
        return GroupSpec(
            program=launch.program,
            env=env,
            cwd=places.work,
            ranks=[
                RankSpec(first_rank + local, environment.rank_environment(order, local, places))
                for local in range(order.group.ranks)
            ],
            uid=uid,
            store=StoreSpec(order.master_addr, order.master_port, order.desired.launch.world_size) if hosts else None,
            threads=_threads(order, env) if launch.warm else 1,
            unbuffered=bool(env["PYTHONUNBUFFERED"]),
            venv=interpreter.venv,
            fence_s=self.fence.fence_s,
            straggler_s=_seconds(order.desired.launch.env.get("PHALANX_STRAGGLER_S", "")),
            cgroup=confinement.cgroup_spec,
            cores=confinement.cores,
            private=confinement.private,
            mounts=confinement.mounts,
            shm_bytes=order.desired.launch.shm_bytes,
            preflight_factor=order.desired.launch.health.preflight_factor if order.desired.launch.health else 0.0,
        )


def _plan(order: GroupOrder, python: str, state: WarmState) -> Launch:
    launch = order.desired.launch
    try:
        return plan_launch(launch.command, launch.env, python=python, version=state.python, warm_unfit=state.unfit)
    except ValueError as error:
        raise StartFailed(f"the command cannot be understood: {error}") from error


def _needs_no_torch(order: GroupOrder, launch: Launch) -> bool:
    """A program that is executed, and whose guardian hosts no store, or one that nobody else would join."""
    hosts_for_others = order.hosts_rendezvous and order.desired.launch.world_size > 1
    return launch.program.kind == "exec" and not hosts_for_others


def _threads(order: GroupOrder, env: Mapping[str, str]) -> int:
    """Of torch in a fork of the warm process, whose own default is one: what a fresh process in these cores has."""
    return int(env.get("OMP_NUM_THREADS") or order.cpus or os.cpu_count() or 1)


def _seconds(text: str) -> float:
    """A positive number of seconds; 0 for anything else."""
    with contextlib.suppress(ValueError):
        return seconds if 0 < (seconds := float(text)) < float("inf") else 0.0
    return 0.0


def _own_name() -> str:
    """Of the runner's user; containers may run under an id that has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid{os.geteuid()}"
