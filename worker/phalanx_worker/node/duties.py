"""Everything of a node that lives as long as its runner: warm process, link, watch, fence, directories.

Owns putting these together and taking them apart. Knows groups only as a list to look at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from phalanx.units import duration_text

from phalanx_worker.node import environment, processes, users
from phalanx_worker.node.bundles import Bundles
from phalanx_worker.node.devices import Devices
from phalanx_worker.node.disk import DiskWatch
from phalanx_worker.node.fence import CheckGcs, Fence
from phalanx_worker.node.interpreters import MOST_WARM, open_interpreters
from phalanx_worker.node.isolation import Isolation
from phalanx_worker.node.launch import Launcher
from phalanx_worker.node.link import Link
from phalanx_worker.node.orders import GroupOrder, Settings
from phalanx_worker.node.outbox import Outbox
from phalanx_worker.node.profiles import Profiles
from phalanx_worker.node.ranks import Group
from phalanx_worker.node.spool import Spool
from phalanx_worker.node.transfers import Transfers
from phalanx_worker.node.warm import WarmProcess
from phalanx_worker.node.watch import Watch
from phalanx_worker.node.workspace import Workspace
from phalanx_worker.protocol import AttemptRef, Fill, Fullness, Heartbeat


@dataclass(frozen=True)
class Hooks:
    """What the duties need of the runner."""

    groups: Callable[[], list[Group]]
    orders: Callable[[], list[GroupOrder]]  # of groups that use their environment, or are about to
    attempts: Callable[[], list[AttemptRef]]  # with ranks here, or about to have some
    changed: Callable[[], None]
    taken: Callable[[], object]  # called after each report that the server has taken
    gcs_alive: CheckGcs | None


@dataclass
class Duties:
    workspace: Workspace
    warm: WarmProcess
    light: WarmProcess
    outbox: Outbox
    link: Link
    transfers: Transfers
    profiles: Profiles
    launcher: Launcher
    fence: Fence
    watch: Watch
    own_users_problem: str  # why ranks do not run as their tenant's user; "" if they do
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    async def open(
        cls,
        settings: Settings,
        hooks: Hooks,
        *,
        boot: str,
        python: str,
        environ: Mapping[str, str],
        warm_env: Mapping[str, str],
    ) -> Duties:
        """Start everything. Processes and directories that an earlier runner of this node left are removed first."""
        data_dir = Path(settings.data_dir)
        workspace = Workspace(data_dir, settings.checkpoint_root)
        env = {**environment.warm_environment(environ, python=python), **warm_env}
        isolation = await asyncio.to_thread(Isolation.find, python, env, allowed=settings.allow_mounts)
        await asyncio.to_thread(_end_leftovers, workspace, isolation)  # before anything new can be taken for it
        warm = WarmProcess(python=python, env=env, log_path=data_dir / "warm.log")
        light = WarmProcess(python=python, env=env, log_path=data_dir / "warm.log", light=True)
        problem = await users.own_users_problem(python, data_dir) if settings.own_users else "not asked for"
        interpreters = open_interpreters(
            warm,
            environ,
            isolation,
            python=python,
            warm_env=warm_env,
            directory=data_dir / "environments",
            limit_bytes=settings.environments_bytes,
            live=lambda: _live(hooks.orders(), own_users=not problem),
        )
        outbox = Outbox(boot)
        fence = Fence(fence_s=settings.fence_s, gcs_alive=hooks.gcs_alive)
        watch = Watch(Devices(), hooks.groups)
        link = Link(outbox, Spool(data_dir / "spool"), lambda: _heartbeat(hooks, duties), hooks.taken)
        transfers = Transfers(link)
        profiles = Profiles(transfers, own_users=not problem)
        launcher = Launcher(
            workspace=workspace,
            bundles=Bundles(data_dir / "bundles", transfers.fetch_bundle),
            interpreters=interpreters,
            light=light,
            own_users=not problem,
            fence=fence,
            outage=link.outage,
            isolation=isolation,
        )
        duties = cls(workspace, warm, light, outbox, link, transfers, profiles, launcher, fence, watch, problem)
        warm.start(on_ready=hooks.changed)  # last: what fails above is tried again, and must leave no process behind
        light.start(on_ready=lambda: None)
        duties.tasks = [
            asyncio.create_task(link.run()),
            asyncio.create_task(watch.run()),
            asyncio.create_task(watch.run_hangs()),
            asyncio.create_task(DiskWatch(settings.disk_bytes, hooks.groups).run()),
            asyncio.create_task(interpreters.run()),
            asyncio.create_task(fence.keep_leases(lambda fence_s: _ping(hooks.groups(), fence_s))),
            asyncio.create_task(fence.run(lambda silent_s: _cut_off(hooks.groups(), "its cluster", silent_s))),
            asyncio.create_task(link.outage.run(lambda silent_s: _cut_off(hooks.groups(), "the server", silent_s))),
        ]
        return duties

    @property
    def is_warm(self) -> bool:
        state = self.warm.state
        return state is not None and not state.unfit

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.link.close()
        await self.launcher.interpreters.close()
        await self.light.close()


def _end_leftovers(workspace: Workspace, isolation: Isolation) -> None:
    """An earlier runner's guardians kill their ranks when it dies; this is for ranks whose guardian died as well."""
    attempts = set(workspace.leftovers())
    processes.kill(stray.pid for stray in processes.strays() if f"{stray.attempt_id}-{stray.group_rank}" in attempts)
    for name in attempts:
        isolation.cgroups.clear(name)
    workspace.clear()


def _live(orders: list[GroupOrder], *, own_users: bool) -> list[tuple[GroupOrder, int | None]]:
    return [(order, order.desired.tenant_uid if own_users else None) for order in orders]


def _heartbeat(hooks: Hooks, duties: Duties) -> Heartbeat:
    return Heartbeat(
        attempts=hooks.attempts(),
        stats=duties.watch.stats,
        warm_ready=duties.is_warm,
        fullness=_fullness(duties),
    )


def _fullness(duties: Duties) -> Fullness:
    reports, logs = duties.link.spools
    interpreters, dropped = duties.launcher.interpreters, duties.link.dropped
    return Fullness(
        outbox=duties.outbox.fill,
        reports=reports.fill,
        logs=logs.fill,
        bundles=duties.launcher.bundles.fill,
        environments=interpreters.environments.fill,
        outputs=Fill(duties.transfers.waiting_bytes, 0),
        warm_processes=interpreters.warm_processes,
        warm_processes_limit=1 + MOST_WARM,
        dropped_logs=dropped["logs"],
        dropped_metrics=dropped["metrics"],
        dropped_marks=dropped["marks"],
    )


def _ping(groups: list[Group], fence_s: float) -> None:
    for group in groups:
        if group.state != "ended":
            group.ping(fence_s)


def _cut_off(groups: list[Group], whom: str, silent_s: float) -> None:
    for group in groups:
        if group.state != "ended":
            group.note(
                "note",
                {"message": f"the node was cut off from {whom} for {duration_text(round(silent_s))}: ranks ended"},
            )
            group.kill()
