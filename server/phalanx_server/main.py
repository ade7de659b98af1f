"""The composition root of the API process: builds the services, wires the routes, runs uvicorn.

Everything that has a lifetime (engine, listener, submitter) is made and closed here, and nowhere else.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.exceptions import HTTPException

from phalanx_server.actions.submit_jobs import Submitter
from phalanx_server.api import (
    agent_link,
    arrays,
    bundles,
    calibration,
    clusters,
    environments,
    errors,
    events,
    explain,
    goodput,
    health,
    jobs,
    logs,
    maintenance,
    metrics,
    node_link,
    nodes,
    openapi,
    outputs,
    plan,
    policy,
    profiles,
    queue,
    quotas,
    tenants,
    tokens,
)
from phalanx_server.api.access import AccessMiddleware
from phalanx_server.api.admission import AdmissionMiddleware, Gates
from phalanx_server.api.auth import Authenticator
from phalanx_server.api.deps import Services
from phalanx_server.api.fullness import Fullness
from phalanx_server.api.limits import LimitsMiddleware
from phalanx_server.api.measures import Measures
from phalanx_server.api.what_if import WhatIf
from phalanx_server.domain.errors import PhalanxError
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.settings import Settings
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.engine import create_engine
from phalanx_server.store.logs import LogFiles
from phalanx_server.store.outputs import OutputFiles
from phalanx_server.store.snapshots import read_policy
from phalanx_server.store.wakeups import Wakeups

OF_JOBS = (jobs, arrays, events, explain, goodput, logs, outputs, profiles, metrics, queue, plan, calibration)
RESOURCES = (*OF_JOBS, bundles, environments, nodes, maintenance, tenants, quotas, policy, tokens, clusters)
ROUTERS = (*RESOURCES, agent_link, node_link, health)
DESCRIPTION = "Submit training jobs, follow them, and ask why they wait."


def create_app(settings: Settings) -> FastAPI:
    """The API as an ASGI application. Its services exist while its lifespan runs."""
    measures = Measures()
    app = FastAPI(
        title="Phalanx",
        version=version("phalanx"),
        description=DESCRIPTION,
        lifespan=_lifespan,
        redoc_url=None,
        redirect_slashes=False,
        responses=openapi.PROBLEM_RESPONSES,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers={
            HTTPException: errors.handle_http,
            RequestValidationError: errors.handle_validation,
            PhalanxError: errors.handle_domain,
        },
    )
    app.state.settings = settings
    app.state.measures = measures
    for module in ROUTERS:
        app.include_router(module.router)
    app.state.routes = [route for module in ROUTERS for route in module.router.routes]
    app.openapi = lambda: openapi.document_of(app)  # type: ignore[method-assign]
    app.add_middleware(LimitsMiddleware, default_bytes=settings.max_body_bytes, limits_bytes=_limits(settings))
    app.state.gates = Gates(connections=_user_connections(settings), waiting=settings.max_waiting_requests)
    app.add_middleware(AdmissionMiddleware, gates=app.state.gates)
    app.add_middleware(AccessMiddleware, measures=measures)
    return app


def _limits(settings: Settings) -> dict[str, int]:
    return {
        "/v1/jobs/batch": settings.max_batch_bytes,
        "/v1/plan": settings.max_batch_bytes,
        "/v1/bundles/": settings.max_bundle_bytes,
        "/v1/agent/": settings.max_batch_bytes,
        "/v1/node/": settings.max_report_bytes,
        "/v1/node/attempts/": settings.max_output_bytes,
    }


def _link_connections(settings: Settings) -> int:
    return max(1, settings.database_pool // 4)


def _user_connections(settings: Settings) -> int:
    return max(1, settings.database_pool - _link_connections(settings))


def _engine(settings: Settings, connections: int) -> AsyncEngine:
    return create_engine(
        settings.required_database_url,
        pool_size=connections,
        application_name="phalanx-server",
        statement_timeout_s=settings.statement_timeout_s,
    )


def _policy(settings: Settings) -> Policy:
    return read_policy(settings.policy_file.read_text() if settings.policy_file else None)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    url = settings.required_database_url
    engine, links = _engine(settings, _user_connections(settings)), _engine(settings, _link_connections(settings))
    async with Wakeups(url) as wakeups:
        base = _policy(settings)
        submitter = Submitter(engine, policy=base, on_flush=app.state.measures.observe_flush)
        await submitter.start()
        try:
            app.state.services = Services(
                settings=settings,
                engine=engine,
                reads=engine.execution_options(isolation_level="AUTOCOMMIT"),
                links=links,
                link_reads=links.execution_options(isolation_level="AUTOCOMMIT"),
                wakeups=wakeups,
                submitter=submitter,
                authenticator=Authenticator(engine, cache_s=settings.token_cache_s),
                measures=app.state.measures,
                what_if=WhatIf(engine, base),
                gates=app.state.gates,
                log_files=LogFiles(settings.storage_root),
                bundle_files=BundleFiles(settings.storage_root),
                output_files=OutputFiles(settings.storage_root),
                policy=base,
            )
            app.state.measures.watch(Fullness(app.state.services))
            yield
        finally:
            await submitter.close()
            await engine.dispose()
            await links.dispose()


class Server(uvicorn.Server):
    """uvicorn, telling long polls to answer when a signal asks for the end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.begin_shutdown()

    def begin_shutdown(self) -> None:
        """Take no more requests, answer those that wait, and end."""
        self.should_exit = True
        services: Services | None = getattr(self._app.state, "services", None)
        if services is not None:
            services.stopping.set()


def configure_logging(settings: Settings) -> None:
    """structlog to stderr, one line per event: JSON for machines or colours for people."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if settings.log_format == "console":
        # Plain: the rich one prints local variables, and among them secrets.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info if settings.log_format == "json" else _as_is,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _as_is(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return event


def server_for(settings: Settings) -> Server:
    """A server that is ready to run."""
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_s)),
    )
    return Server(config, app)


def serve(settings: Settings) -> None:
    """Serve until a signal ends it."""
    configure_logging(settings)
    server_for(settings).run()
