"""How calls, streams and steps are carried out over httpx, once for sync and once for async callers. It owns the wire:
headers, retries, resuming of streams, and reading of errors; it refuses to know which requests exist.

What both share is in plain functions; the two classes differ only in how they send, sleep and iterate.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, closing
from functools import partial
from typing import Any, TypeVar

import httpx
import httpx_sse

from phalanx import config
from phalanx.bodies import achunks, areceive, chunks, receive
from phalanx.calls import Answer, Call, Download, Message, Now, Pages, Pause, Step, Steps, Stream, Work
from phalanx.errors import ConfigError, ConnectionFailed, ProtocolError, from_problem
from phalanx.retry import OUTAGE_TOLERANCE_S, RETRIED_STATUSES, RetryPolicy, retry_after_s

T = TypeVar("T")
Clock = Callable[[], float]  # seconds, only forward

CONNECT_TIMEOUT_S = 5.0
STREAM_SILENCE_S = 60.0  # the server sends a comment at least every 15 s
STREAM_HELD_S = 10.0
STREAM_RETRY = RetryPolicy(attempts=None, base_s=0.2, cap_s=5.0, longest_outage_s=OUTAGE_TOLERANCE_S)


class _Failed(Exception):
    """A try that may be repeated: `error` is what the caller sees if it is not."""

    def __init__(self, error: Exception, *, retry_after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.retry_after_s = error, retry_after_s


def options(url: str, token: str | None) -> dict[str, Any]:
    """What both httpx clients are made with."""
    headers = {"User-Agent": "phalanx-client", "Accept": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    timeout = httpx.Timeout(30.0, connect=CONNECT_TIMEOUT_S)
    # A proxy of the environment is not meant for a server on this machine.
    return {"base_url": _base_url(url), "headers": headers, "timeout": timeout, "trust_env": not config.is_local(url)}


def _base_url(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no server address: {error}") from None


def _request(call: Call[Any], content: Any) -> dict[str, Any]:
    timeout = httpx.Timeout(call.timeout_s, connect=CONNECT_TIMEOUT_S)
    sent: dict[str, Any] = {"params": call.params, "headers": dict(call.headers), "timeout": timeout}
    if call.body_path is not None:
        sent["content"] = content
        sent["headers"]["Content-Length"] = str(call.body_path.stat().st_size)
    elif call.json is not None:
        sent["json"] = call.json
    return {"method": call.method, "url": call.path, **sent}


def _download(download: Download) -> dict[str, Any]:
    headers = {"Accept": "application/octet-stream", "Accept-Encoding": "identity"}
    timeout = httpx.Timeout(download.timeout_s, connect=CONNECT_TIMEOUT_S)
    return {"method": "GET", "url": download.path, "params": download.params, "headers": headers, "timeout": timeout}


def _conclude(call: Call[T], response: httpx.Response) -> T:
    """Read a response that has its body; raises _Failed where trying again may help, else the error."""
    if response.status_code >= 400 and response.status_code not in call.accept:
        raise _refusal(response)
    if 300 <= response.status_code < 400:
        raise ProtocolError(
            f"{response.url} redirects to {response.headers.get('location')}: give that address instead"
        )
    return call.read(Answer(response.status_code, response.headers, _body(response)))


def _refusal(response: httpx.Response) -> Exception:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    error = from_problem(response.status_code, problem, request_id=response.headers.get("x-request-id", ""))
    if response.status_code in RETRIED_STATUSES:
        return _Failed(error, retry_after_s=retry_after_s(response.headers))
    return error


def _body(response: httpx.Response) -> Any:
    if not response.content or "json" not in response.headers.get("content-type", ""):
        return response.text
    try:
        return response.json()
    except ValueError:
        raise ProtocolError(f"{response.url} answered something that is not JSON") from None


def _unsent(url: httpx.URL, error: httpx.TransportError) -> Exception:
    """What a request has become that got no answer."""
    if isinstance(error, httpx.LocalProtocolError):  # never repeated, in either sense: it may quote a header, the token
        return ProtocolError("the request is not valid HTTP: is there a line break in one of its headers?")
    what = "did not answer in time" if isinstance(error, httpx.TimeoutException) else f"cannot be reached ({error})"
    return _Failed(ConnectionFailed(f"the server at {str(url).rstrip('/')} {what}"))


def _next_delay_s(
    policy: RetryPolicy, failed: _Failed, *, tried: int, failing_s: float = 0.0, repeatable: bool = True
) -> float:
    """Seconds until the next try; raises the failure's own error where there is none."""
    delay_s = policy.delay_s(
        tried=tried, jitter=random.random(), retry_after_s=failed.retry_after_s, failing_s=failing_s
    )
    if delay_s is None or not repeatable:
        raise failed.error from None
    return delay_s


class _Resumed:
    """Where a stream is: the last id seen, and failures in a row since something came."""

    def __init__(self, stream: Stream[Any], clock: Clock) -> None:
        self.stream, self._clock = stream, clock
        self.last_event_id = stream.last_event_id
        self.tried, self.failing_since_s = 0, 0.0
        self.opened_at_s: float | None = None
        self.ended = False

    def request(self) -> dict[str, Any]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self.last_event_id is not None:
            headers["Last-Event-ID"] = self.last_event_id
        timeout = httpx.Timeout(STREAM_SILENCE_S, connect=CONNECT_TIMEOUT_S)
        return {
            "method": "GET",
            "url": self.stream.path,
            "params": self.stream.params,
            "headers": headers,
            "timeout": timeout,
        }

    def take(self, sse: httpx_sse.ServerSentEvent) -> Any:
        """What the event says to the caller, or None."""
        self.tried = 0
        self.last_event_id = sse.id or self.last_event_id
        self.ended = sse.event == "end"
        if self.ended or not sse.data:
            return None
        try:
            data = json.loads(sse.data)
        except ValueError:
            raise ProtocolError(f"{self.stream.path} sent an event that is not JSON: {sse.data[:80]!r}") from None
        if sse.event == "error":
            raise from_problem(int(data.get("status") or 500), data)
        return self.stream.read(Message(sse.event, sse.id, data))

    def opened(self) -> None:
        self.opened_at_s = self._clock()

    def broken(self) -> _Failed:
        return _Failed(ConnectionFailed(f"the stream {self.stream.path} broke off again and again"))

    def failed(self, failed: _Failed) -> float:
        """Note a failure; seconds until the next try. A connection that held, though silent, was none in a row."""
        now_s = self._clock()
        held = self.opened_at_s is not None and now_s - self.opened_at_s > STREAM_HELD_S
        self.tried, self.opened_at_s = 1 if held else self.tried + 1, None
        if self.tried == 1:
            self.failing_since_s = now_s
        return _next_delay_s(STREAM_RETRY, failed, tried=self.tried, failing_s=now_s - self.failing_since_s)


# ------------------------------------------------------------------ sync


class SyncTransport:
    """Carries out descriptions, blocking."""

    def __init__(
        self,
        url: str,
        token: str | None,
        *,
        retry: RetryPolicy,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Clock = time.monotonic,
    ) -> None:
        self._http = httpx.Client(**options(url, token), transport=transport)
        self._retry, self._sleep, self._clock = retry, sleep, clock

    def close(self) -> None:
        self._http.close()

    def send(self, call: Call[T]) -> T:
        return self._again(partial(self._try, call), repeatable=call.repeatable)

    def fetch(self, download: Download) -> str:
        return self._again(partial(self._receive, download))

    def _again(self, attempt: Callable[[], T], *, repeatable: bool = True) -> T:
        tried = 0
        while True:
            try:
                return attempt()
            except _Failed as failed:
                tried += 1
                self._sleep(_next_delay_s(self._retry, failed, tried=tried, repeatable=repeatable))

    def _receive(self, download: Download) -> str:
        try:
            with self._http.stream(**_download(download)) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                return receive(response, download.file)
        except httpx.TransportError as error:
            raise _unsent(self._http.base_url, error) from None

    def _try(self, call: Call[T]) -> T:
        content = chunks(call.body_path) if call.body_path else None
        try:
            return _conclude(call, self._http.request(**_request(call, content)))
        except httpx.TransportError as error:
            raise _unsent(self._http.base_url, error) from None

    def run(self, steps: Steps[T]) -> T:
        with closing(steps):
            proceed = partial(next, steps)
            while True:
                try:
                    step = proceed()
                except StopIteration as done:
                    return done.value
                try:
                    proceed = partial(steps.send, self._step(step))
                except Exception as error:
                    proceed = partial(steps.throw, error)

    def _step(self, step: Step) -> Any:
        if isinstance(step, Pause):
            return self._sleep(step.seconds)
        if isinstance(step, Now):
            return self._clock()
        if isinstance(step, Download):
            return self.fetch(step)
        return step.run() if isinstance(step, Work) else self.send(step)

    def iterate(self, pages: Pages[T]) -> Iterator[T]:
        cursor: str | None = None
        while True:
            page = self.send(pages(cursor))
            yield from page.items
            cursor = page.next_cursor
            if cursor is None:
                return

    def stream(self, stream: Stream[T]) -> Iterator[T]:
        where = _Resumed(stream, self._clock)
        while not where.ended:
            try:
                yield from self._listen(where)
            except _Failed as failed:
                self._sleep(where.failed(failed))

    def _listen(self, where: _Resumed) -> Iterator[Any]:
        try:
            with self._http.stream(**where.request()) as response:
                if response.status_code >= 400:
                    response.read()
                    raise _refusal(response)
                where.opened()
                for sse in httpx_sse.EventSource(response).iter_sse():
                    if (said := where.take(sse)) is not None:
                        yield said
                    if where.ended:
                        return
        except httpx.TransportError as error:
            raise _unsent(self._http.base_url, error) from None
        raise where.broken()


# ------------------------------------------------------------------ async


class AsyncTransport:
    """Carries out descriptions on asyncio."""

    def __init__(
        self,
        url: str,
        token: str | None,
        *,
        retry: RetryPolicy,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Any] = asyncio.sleep,
        clock: Clock = time.monotonic,
    ) -> None:
        self._http = httpx.AsyncClient(**options(url, token), transport=transport)
        self._retry, self._sleep, self._clock = retry, sleep, clock

    async def close(self) -> None:
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        return await self._again(partial(self._try, call), repeatable=call.repeatable)

    async def fetch(self, download: Download) -> str:
        return await self._again(partial(self._receive, download))

    async def _again(self, attempt: Callable[[], Awaitable[T]], *, repeatable: bool = True) -> T:
        tried = 0
        while True:
            try:
                return await attempt()
            except _Failed as failed:
                tried += 1
                await self._sleep(_next_delay_s(self._retry, failed, tried=tried, repeatable=repeatable))

    async def _receive(self, download: Download) -> str:
        try:
            async with self._http.stream(**_download(download)) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refusal(response)
                return await areceive(response, download.file)
        except httpx.TransportError as error:
            raise _unsent(self._http.base_url, error) from None

    async def _try(self, call: Call[T]) -> T:
        content = achunks(call.body_path) if call.body_path else None
        try:
            return _conclude(call, await self._http.request(**_request(call, content)))
        except httpx.TransportError as error:
            raise _unsent(self._http.base_url, error) from None

    async def run(self, steps: Steps[T]) -> T:
        with closing(steps):
            proceed = partial(next, steps)
            while True:
                try:
                    step = proceed()
                except StopIteration as done:
                    return done.value
                try:
                    proceed = partial(steps.send, await self._step(step))
                except Exception as error:
                    proceed = partial(steps.throw, error)

    async def _step(self, step: Step) -> Any:
        if isinstance(step, Pause):
            return await self._sleep(step.seconds)
        if isinstance(step, Now):
            return self._clock()
        if isinstance(step, Download):
            return await self.fetch(step)
        return await asyncio.to_thread(step.run) if isinstance(step, Work) else await self.send(step)

    async def iterate(self, pages: Pages[T]) -> AsyncIterator[T]:
        cursor: str | None = None
        while True:
            page = await self.send(pages(cursor))
            for item in page.items:
                yield item
            cursor = page.next_cursor
            if cursor is None:
                return

    async def stream(self, stream: Stream[T]) -> AsyncIterator[T]:
        where = _Resumed(stream, self._clock)
        while not where.ended:
            try:
                async with aclosing(self._listen(where)) as said:
                    async for item in said:
                        yield item
            except _Failed as failed:
                await self._sleep(where.failed(failed))

    async def _listen(self, where: _Resumed) -> AsyncGenerator[Any]:
        try:
            async with self._http.stream(**where.request()) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise _refusal(response)
                where.opened()
                async with aclosing(httpx_sse.EventSource(response).aiter_sse()) as events:
                    async for sse in events:
                        if (said := where.take(sse)) is not None:
                            yield said
                        if where.ended:
                            return
        except httpx.TransportError as error:
            raise _unsent(self._http.base_url, error) from None
        raise where.broken()
