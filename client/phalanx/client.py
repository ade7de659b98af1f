"""The clients: `Client` blocks, `AsyncClient` awaits. This module owns the list of operations; what each one is stands
in `requests.py`, how it is carried out in `transport.py`.

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

from phalanx import config, requests
from phalanx.calls import Call, Pages, Steps, Stream
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

    submit = _run(requests.submit)
    submit_many = _run(requests.submit_many)
    dry_run = _call(requests.dry_run)
    upload = _run(requests.upload)
    job = _call(requests.job)
    jobs = _pages(requests.jobs)
    cancel = _call(requests.cancel)
    hold = _call(requests.hold)
    release = _call(requests.release)
    wait = _run(requests.wait)
    attempts = _call(requests.attempts)
    explain = _call(requests.explain)
    events = _call(requests.events)
    follow = _stream(requests.follow)
    logs = _call(requests.logs)
    follow_logs = _stream(requests.follow_logs)
    metrics = _call(requests.metrics)
    follow_metrics = _stream(requests.follow_metrics)
    queue = _pages(requests.queue)
    plan = _call(requests.plan)
    nodes = _call(requests.nodes)
    node = _call(requests.node)
    cordon = _call(requests.cordon)
    uncordon = _call(requests.uncordon)
    drain = _call(requests.drain)
    tenants = _call(requests.tenants)
    tenant = _call(requests.tenant)
    create_tenant = _call(requests.create_tenant)
    quotas = _call(requests.quotas)
    quota_set = _run(requests.quota_set)
    tokens = _call(requests.tokens)
    create_token = _call(requests.create_token)
    revoke_token = _call(requests.revoke_token)
    whoami = _call(requests.whoami)


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

    submit = _arun(requests.submit)
    submit_many = _arun(requests.submit_many)
    dry_run = _acall(requests.dry_run)
    upload = _arun(requests.upload)
    job = _acall(requests.job)
    jobs = _apages(requests.jobs)
    cancel = _acall(requests.cancel)
    hold = _acall(requests.hold)
    release = _acall(requests.release)
    wait = _arun(requests.wait)
    attempts = _acall(requests.attempts)
    explain = _acall(requests.explain)
    events = _acall(requests.events)
    follow = _astream(requests.follow)
    logs = _acall(requests.logs)
    follow_logs = _astream(requests.follow_logs)
    metrics = _acall(requests.metrics)
    follow_metrics = _astream(requests.follow_metrics)
    queue = _apages(requests.queue)
    plan = _acall(requests.plan)
    nodes = _acall(requests.nodes)
    node = _acall(requests.node)
    cordon = _acall(requests.cordon)
    uncordon = _acall(requests.uncordon)
    drain = _acall(requests.drain)
    tenants = _acall(requests.tenants)
    tenant = _acall(requests.tenant)
    create_tenant = _acall(requests.create_tenant)
    quotas = _acall(requests.quotas)
    quota_set = _arun(requests.quota_set)
    tokens = _acall(requests.tokens)
    create_token = _acall(requests.create_token)
    revoke_token = _acall(requests.revoke_token)
    whoami = _acall(requests.whoami)
