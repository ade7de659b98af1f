"""The clients: `Client` blocks, `AsyncClient` awaits. This module owns the list of operations; what each one is stands
in `job_requests.py`, `array_requests.py`, `outputs.py`, `profiles.py`, `environments.py`, `maintenance.py`,
`fleet_requests.py`, how it is carried out in `transport.py`.

    job_file = {"name": "hello", "resources": {"gpus": 2}, "run": {"command": "python train.py"}}
    with phalanx.Client() as client:  # the server of PHALANX_URL and PHALANX_TOKEN, else of `phalanx login`
        job = client.submit(job_file, workdir=".")
        job = client.wait(job.id)
        print(client.logs(job.id, tail_lines=20))
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from phalanx import array_requests as arrays
from phalanx import config
from phalanx import environments as packages
from phalanx import fleet_requests as fleet
from phalanx import job_requests as work
from phalanx import maintenance as upkeep
from phalanx import outputs as files
from phalanx import profiles as traces
from phalanx.calls import Call, Download, Pages, Steps, Stream
from phalanx.retry import RetryPolicy
from phalanx.transport import AsyncTransport, SyncTransport

P = ParamSpec("P")
T = TypeVar("T")


# ------------------------------------------------------------------ from a description to a method


def _call(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(build)
    def method(self: Client, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.transport.send(build(*args, **kwargs))

    return method


def _run(build: Callable[P, Steps[T]]) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(build)
    def method(self: Client, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.transport.run(build(*args, **kwargs))

    return method


def _fetch(build: Callable[P, Download]) -> Callable[Concatenate[Client, P], str]:
    @functools.wraps(build)
    def method(self: Client, *args: P.args, **kwargs: P.kwargs) -> str:
        return self.transport.fetch(build(*args, **kwargs))

    return method


def _stream(build: Callable[P, Stream[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    @functools.wraps(build)
    def method(self: Client, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self.transport.stream(build(*args, **kwargs))

    return method


def _pages(build: Callable[P, Pages[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    @functools.wraps(build)
    def method(self: Client, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self.transport.iterate(build(*args, **kwargs))

    return method


def _acall(build: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    @functools.wraps(build)
    def method(self: AsyncClient, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        return self.transport.send(build(*args, **kwargs))

    return method


def _arun(build: Callable[P, Steps[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    @functools.wraps(build)
    def method(self: AsyncClient, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        return self.transport.run(build(*args, **kwargs))

    return method


def _afetch(build: Callable[P, Download]) -> Callable[Concatenate[AsyncClient, P], Awaitable[str]]:
    @functools.wraps(build)
    def method(self: AsyncClient, *args: P.args, **kwargs: P.kwargs) -> Awaitable[str]:
        return self.transport.fetch(build(*args, **kwargs))

    return method


def _astream(build: Callable[P, Stream[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    @functools.wraps(build)
    def method(self: AsyncClient, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return self.transport.stream(build(*args, **kwargs))

    return method


def _apages(build: Callable[P, Pages[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    @functools.wraps(build)
    def method(self: AsyncClient, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return self.transport.iterate(build(*args, **kwargs))

    return method


# ------------------------------------------------------------------ the clients


class Client:
    """A connection to one server. Thread-safe; close it, or use it in a `with`."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
        **seams: Any,
    ) -> None:
        """Without `url` and `token`: those of the environment, else of `phalanx login`. `transport` is httpx's seam."""
        login = config.resolve(url, token)
        self.url = login.url
        self.transport = SyncTransport(
            login.url, login.token, retry=retry or RetryPolicy(), transport=transport, **seams
        )

    def close(self) -> None:
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    submit = _run(work.submit)
    submit_many = _run(work.submit_many)
    dry_run = _call(work.dry_run)
    upload = _run(work.upload)
    job = _call(work.job)
    jobs = _pages(work.jobs)
    cancel = _call(work.cancel)
    hold = _call(work.hold)
    release = _call(work.release)
    requeue = _call(work.requeue)
    set_priority = _call(work.set_priority)
    wait = _run(work.wait)
    attempts = _call(work.attempts)
    explain = _call(work.explain)
    goodput = _call(work.goodput)
    events = _pages(work.events)
    follow = _stream(work.follow)
    logs = _call(work.logs)
    iter_logs = _pages(work.iter_logs)
    follow_logs = _stream(work.follow_logs)
    metrics = _call(work.metrics)
    follow_metrics = _stream(work.follow_metrics)
    outputs = _pages(files.outputs)
    download_output = _fetch(files.download_output)
    download_outputs = _run(files.download_outputs)
    request_profile = _call(traces.request_profile)
    profiles = _call(traces.profiles)
    profile = _call(traces.profile)
    wait_profile = _run(traces.wait_profile)
    download_trace = _fetch(traces.download_trace)
    download_traces = _run(traces.download_traces)
    array = _call(arrays.array)
    cancel_array = _call(arrays.cancel_array)
    hold_array = _call(arrays.hold_array)
    release_array = _call(arrays.release_array)
    requeue_array = _call(arrays.requeue_array)
    set_array_priority = _call(arrays.set_array_priority)
    wait_array = _run(arrays.wait_array)
    environments = _pages(packages.environments)
    environment = _call(packages.environment)
    create_environment = _call(packages.create_environment)
    delete_environment = _call(packages.delete_environment)
    queue = _pages(fleet.queue)
    plan = _call(fleet.plan)
    calibration = _call(fleet.calibration)
    nodes = _pages(fleet.nodes)
    node = _call(fleet.node)
    cordon = _call(fleet.cordon)
    uncordon = _call(fleet.uncordon)
    drain = _call(fleet.drain)
    maintenance_windows = _pages(upkeep.maintenance_windows)
    maintenance_window = _call(upkeep.maintenance_window)
    create_maintenance = _call(upkeep.create_maintenance)
    change_maintenance = _call(upkeep.change_maintenance)
    end_maintenance = _call(upkeep.end_maintenance)
    delete_maintenance = _call(upkeep.delete_maintenance)
    clusters = _pages(fleet.clusters)
    create_cluster = _call(fleet.create_cluster)
    tenants = _pages(fleet.tenants)
    tenant = _call(fleet.tenant)
    create_tenant = _call(fleet.create_tenant)
    quotas = _call(fleet.quotas)
    change_tenant = _run(fleet.change_tenant)
    quota_set = _run(fleet.quota_set)
    quota_unset = _run(fleet.quota_unset)
    policy = _call(fleet.policy)
    policy_set = _run(fleet.policy_set)
    tokens = _pages(fleet.tokens)
    create_token = _call(fleet.create_token)
    revoke_token = _call(fleet.revoke_token)
    whoami = _call(fleet.whoami)


class AsyncClient:
    """`Client` for asyncio: the same operations, awaited or iterated with `async for`."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        **seams: Any,
    ) -> None:
        login = config.resolve(url, token)
        self.url = login.url
        self.transport = AsyncTransport(
            login.url, login.token, retry=retry or RetryPolicy(), transport=transport, **seams
        )

    async def close(self) -> None:
        await self.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    submit = _arun(work.submit)
    submit_many = _arun(work.submit_many)
    dry_run = _acall(work.dry_run)
    upload = _arun(work.upload)
    job = _acall(work.job)
    jobs = _apages(work.jobs)
    cancel = _acall(work.cancel)
    hold = _acall(work.hold)
    release = _acall(work.release)
    requeue = _acall(work.requeue)
    set_priority = _acall(work.set_priority)
    wait = _arun(work.wait)
    attempts = _acall(work.attempts)
    explain = _acall(work.explain)
    goodput = _acall(work.goodput)
    events = _apages(work.events)
    follow = _astream(work.follow)
    logs = _acall(work.logs)
    iter_logs = _apages(work.iter_logs)
    follow_logs = _astream(work.follow_logs)
    metrics = _acall(work.metrics)
    follow_metrics = _astream(work.follow_metrics)
    outputs = _apages(files.outputs)
    download_output = _afetch(files.download_output)
    download_outputs = _arun(files.download_outputs)
    request_profile = _acall(traces.request_profile)
    profiles = _acall(traces.profiles)
    profile = _acall(traces.profile)
    wait_profile = _arun(traces.wait_profile)
    download_trace = _afetch(traces.download_trace)
    download_traces = _arun(traces.download_traces)
    array = _acall(arrays.array)
    cancel_array = _acall(arrays.cancel_array)
    hold_array = _acall(arrays.hold_array)
    release_array = _acall(arrays.release_array)
    requeue_array = _acall(arrays.requeue_array)
    set_array_priority = _acall(arrays.set_array_priority)
    wait_array = _arun(arrays.wait_array)
    environments = _apages(packages.environments)
    environment = _acall(packages.environment)
    create_environment = _acall(packages.create_environment)
    delete_environment = _acall(packages.delete_environment)
    queue = _apages(fleet.queue)
    plan = _acall(fleet.plan)
    calibration = _acall(fleet.calibration)
    nodes = _apages(fleet.nodes)
    node = _acall(fleet.node)
    cordon = _acall(fleet.cordon)
    uncordon = _acall(fleet.uncordon)
    drain = _acall(fleet.drain)
    maintenance_windows = _apages(upkeep.maintenance_windows)
    maintenance_window = _acall(upkeep.maintenance_window)
    create_maintenance = _acall(upkeep.create_maintenance)
    change_maintenance = _acall(upkeep.change_maintenance)
    end_maintenance = _acall(upkeep.end_maintenance)
    delete_maintenance = _acall(upkeep.delete_maintenance)
    clusters = _apages(fleet.clusters)
    create_cluster = _acall(fleet.create_cluster)
    tenants = _apages(fleet.tenants)
    tenant = _acall(fleet.tenant)
    create_tenant = _acall(fleet.create_tenant)
    quotas = _acall(fleet.quotas)
    change_tenant = _arun(fleet.change_tenant)
    quota_set = _arun(fleet.quota_set)
    quota_unset = _arun(fleet.quota_unset)
    policy = _acall(fleet.policy)
    policy_set = _arun(fleet.policy_set)
    tokens = _apages(fleet.tokens)
    create_token = _acall(fleet.create_token)
    revoke_token = _acall(fleet.revoke_token)
    whoami = _acall(fleet.whoami)
