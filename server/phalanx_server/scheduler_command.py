"""`phalanx scheduler`: the process that decides. Run as many as you like; one leads, the others wait for it to die.

Owns which loops there are and how the process starts and ends.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import httpx
import structlog
import typer
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.loops.deliver_outbox import DeliverOutbox
from phalanx_server.loops.enforce import Enforce
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.measure_speeds import MeasureSpeeds
from phalanx_server.loops.measures import Loop, Loops, PassMeasures, measure, serve_measures
from phalanx_server.loops.retain import Keep, Retain
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.loops.watch_nodes import Patience, WatchNodes
from phalanx_server.main import configure_logging
from phalanx_server.settings import Settings
from phalanx_server.store import migrate
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.engine import create_engine
from phalanx_server.store.ids import new_id
from phalanx_server.store.logs import LogFiles
from phalanx_server.store.outputs import OutputFiles
from phalanx_server.store.snapshots import read_policy
from phalanx_server.store.wakeups import Wakeups

USAGE, UNAVAILABLE = 2, 6  # exit codes of the CLI
POOL_SIZE = 6
STATEMENT_TIMEOUT_S = 120.0  # a cold start reads a million jobs, retention deletes days of rows
# A planner is a million objects that live long: with Python's own thresholds the collector takes half of a cold start.
GC_THRESHOLDS = (100_000, 50, 100)

log = structlog.get_logger()


async def run_scheduler(settings: Settings) -> None:
    """Run every loop until SIGTERM or SIGINT, then let another scheduler lead at once."""
    gc.set_threshold(*GC_THRESHOLDS)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    url = settings.required_database_url
    engine = create_engine(
        url, pool_size=POOL_SIZE, application_name="phalanx-scheduler", statement_timeout_s=STATEMENT_TIMEOUT_S
    )
    holder = f"{socket.gethostname()}-{os.getpid()}-{new_id().hex[-8:]}"
    leader = Leader(engine, holder=holder, ttl_s=settings.lease_ttl_s, renew_s=settings.lease_renew_s)
    registry = CollectorRegistry()
    async with AsyncExitStack() as stack:
        _serve(stack, registry, settings)
        stack.push_async_callback(engine.dispose)
        wakeups = await stack.enter_async_context(Wakeups(url))
        client = await stack.enter_async_context(httpx.AsyncClient())
        stack.push_async_callback(leader.resign)
        await leader.tick(datetime.now(UTC))
        passes = PassMeasures(registry)
        loops = _loops(settings, engine, leader, wakeups=wakeups, client=client, passes=passes)
        measure(registry, loops, passes, engine)
        log.info("scheduler runs", holder=holder, leads=leader.lease is not None)
        await _run_until(stop, loops.by_name)


def _serve(stack: AsyncExitStack, registry: CollectorRegistry, settings: Settings) -> None:
    """Answer Prometheus until the stack is left, if a port was named."""
    host, port = settings.metrics_host, settings.metrics_port
    if port is None:
        return
    try:
        port = stack.enter_context(serve_measures(registry, host=host, port=port))
    except OSError as error:
        raise _stop(USAGE, f"cannot serve metrics on {host}:{port}: {error.strerror or error}") from None
    log.info("metrics are served", host=host, port=port)


def _loops(
    settings: Settings,
    engine: AsyncEngine,
    leader: Leader,
    *,
    wakeups: Wakeups,
    client: httpx.AsyncClient,
    passes: PassMeasures,
) -> Loops:
    policy = read_policy(settings.policy_file.read_text() if settings.policy_file else None)
    patience = Patience(
        node_timeout_s=settings.node_timeout_s,
        startup_grace_s=settings.startup_grace_s,
        fence_s=settings.fence_s,
        loss_grace_s=settings.loss_grace_s,
        outage_tolerance_s=settings.outage_tolerance_s,
    )
    keep = Keep(
        metrics=timedelta(days=settings.retain_metrics_days),
        events=timedelta(days=settings.retain_events_days),
        logs=timedelta(days=settings.retain_logs_days),
        bundles=timedelta(days=settings.retain_bundles_days),
        outputs=timedelta(days=settings.retain_outputs_days),
    )
    return Loops(
        leader=leader,
        schedule=ScheduleLoop(engine, leader, policy=policy, wakeups=wakeups, told=passes.observe),
        watch_nodes=WatchNodes(engine, leader, patience),
        enforce=Enforce(engine, leader, policy=policy),
        speeds=MeasureSpeeds(engine, leader),
        outbox=DeliverOutbox(engine, leader, webhook_url=settings.webhook_url, client=client),
        retain=Retain(
            engine,
            leader,
            keep=keep,
            files=LogFiles(settings.storage_root),
            bundles=BundleFiles(settings.storage_root),
            outputs=OutputFiles(settings.storage_root),
        ),
    )


async def _run_until(stop: asyncio.Event, loops: Mapping[str, Loop]) -> None:
    """Run the loops until `stop`; should one of them end by itself, that is an error of the process."""
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(loop.run_forever(), name=name) for name, loop in loops.items()
    ]
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (*tasks, stopping):
            task.cancel()
        await asyncio.gather(*tasks, stopping, return_exceptions=True)
    for task in done - {stopping}:
        raise RuntimeError(f"loop {task.get_name()} ended") from task.exception()


def scheduler(
    metrics_host: Annotated[
        str | None, typer.Option(help="Address of the metrics.  [env: PHALANX_METRICS_HOST; 127.0.0.1]")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            help="Port on which Prometheus finds metrics, without a token.  [env: PHALANX_METRICS_PORT; none]"
        ),
    ] = None,
) -> None:
    """Decide what runs where, until Ctrl-C. Settings come from PHALANX_… variables."""
    options = {"metrics_host": metrics_host, "metrics_port": metrics_port}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    try:
        settings = Settings(**given)
        url = settings.required_database_url
        read_policy(settings.policy_file.read_text() if settings.policy_file else None)
    except ValidationError as error:
        problem = error.errors()[0]
        raise _stop(USAGE, f"PHALANX_{'_'.join(map(str, problem['loc'])).upper()}: {problem['msg']}") from None
    except (ValueError, OSError) as error:
        raise _stop(USAGE, str(error)) from None
    configure_logging(settings)
    asyncio.run(_check_database(url))
    asyncio.run(run_scheduler(settings))


async def _check_database(url: str) -> None:
    """Exit with one clear line unless the database can be reached and has the schema of this version."""
    try:
        revision = await migrate.current(url)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise _stop(UNAVAILABLE, f"cannot use the database: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise _stop(USAGE, f"PHALANX_DATABASE_URL: {error}") from None
    if revision != migrate.HEAD:
        found = f"is at schema {revision}" if revision else "has never been migrated"
        raise _stop(UNAVAILABLE, f"the database {found}, this version needs {migrate.HEAD}: `phalanx server --migrate`")


def _stop(code: int, message: str) -> typer.Exit:
    typer.echo(f"phalanx scheduler: {message}", err=True)
    return typer.Exit(code)


def register(app: typer.Typer) -> None:
    app.command("scheduler")(scheduler)
