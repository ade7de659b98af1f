"""The agent as a process: its settings, its connection to Ray, its signals and its exit codes."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn

from phalanx_worker.agent.gang import PlacementGroups
from phalanx_worker.agent.link import ServerLink, Superseded
from phalanx_worker.agent.nodes import NodeSettings, RayNodes, connect
from phalanx_worker.agent.service import Agent, RunnerSettings

log = logging.getLogger("phalanx.agent")

RAY_THREADS = 16
EXIT_OK = 0
EXIT_FAILED = 1


@dataclass(frozen=True)
class AgentSettings:
    server_url: str
    token: Callable[[], str]  # asked again when the server no longer takes it
    ray_address: str
    runner: RunnerSettings
    nodes: NodeSettings
    runner_silent_s: float


def run(settings: AgentSettings) -> int:
    """Run the agent until SIGTERM or SIGINT; the exit code. What runs on the cluster goes on running."""
    try:
        connect(settings.ray_address)
    except ConnectionError as error:
        log.error("%s", error)
        return EXIT_FAILED
    return asyncio.run(_serve(settings))


def leave(code: int) -> NoReturn:
    """End the process now. Calls into a Ray cluster that goes away cannot be interrupted, and a thread in one of them
    would hold up the interpreter's own exit; Ray sees the connection close."""
    logging.shutdown()
    os._exit(code)


async def _serve(settings: AgentSettings) -> int:
    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(RAY_THREADS, thread_name_prefix="ray-nodes")
    placement_threads = ThreadPoolExecutor(RAY_THREADS, thread_name_prefix="ray-placement")  # these may have to wait
    instance = secrets.token_hex(8)
    placements = PlacementGroups(placement_threads)
    await placements.load()
    link = ServerLink(url=settings.server_url, token=settings.token, instance=instance)
    agent = Agent(
        link=link,
        cluster=RayNodes(settings.nodes, threads),
        placements=placements,
        settings=settings.runner,
        runner_silent_s=settings.runner_silent_s,
    )
    serving = asyncio.create_task(agent.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    log.info("agent %s serves the Ray cluster at %s for %s", instance, settings.ray_address, settings.server_url)
    try:
        await serving
    except Superseded as error:
        log.error("another agent has taken over this cluster (%s): this one ends", error)
        return EXIT_FAILED
    except ConnectionError as error:
        log.error("%s", error)
        return EXIT_FAILED
    except asyncio.CancelledError:
        log.info("agent %s ends; what it started goes on", instance)
    finally:
        await link.close()
        for pool in (threads, placement_threads):
            pool.shutdown(wait=False, cancel_futures=True)
    return EXIT_OK
