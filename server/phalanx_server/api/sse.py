"""Server-sent events: following something in the database until it is over.

Owns the frame of a stream: resume by Last-Event-ID, heartbeats, the closing `end` event, clean-up when the client goes,
and that no stream outlives its token: it ends without `end`, and the client is told why when it comes again. It
pulls: rows are read in bounded batches and only as fast as the client takes them, so a slow client costs no memory.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pydantic_core
from sse_starlette import EventSourceResponse, ServerSentEvent

from phalanx_server.api.auth import Principal
from phalanx_server.api.deps import Services
from phalanx_server.api.errors import overloaded
from phalanx_server.domain.errors import Invalid

HEARTBEAT_S = 15
POLL_S = 1.5
"""Wakeups are only hints: every stream also looks by itself this often."""
SOON_S = 0.05
SEND_TIMEOUT_S = 60.0

STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


@dataclass(frozen=True)
class Batch:
    """What is new since a cursor.

    `over`: nothing will ever follow, and `end` is the data of the closing event. `soon`: look again at once, though
    nothing could be sent yet (a row waits for an older transaction).
    """

    events: Sequence[ServerSentEvent]
    cursor: Any
    over: bool = False
    end: dict[str, Any] = field(default_factory=dict)
    soon: bool = False


Fetch = Callable[[Any], Awaitable[Batch]]


def event(kind: str, data: Any, *, id: int | str | None = None) -> ServerSentEvent:
    """One event whose data is JSON."""
    return ServerSentEvent(
        data=pydantic_core.to_json(data).decode(), event=kind, id=None if id is None else str(id), sep="\n"
    )


def stream(
    services: Services, principal: Principal, fetch: Fetch, *, topics: Sequence[str], cursor: Any
) -> EventSourceResponse:
    """Answer with everything that `fetch` finds from `cursor` on, woken by `topics`, until it says that it is over.
    Raises Problem `overloaded` where there are as many streams as there may be."""
    if services.measures.streams >= services.settings.max_streams:
        raise overloaded(f"{services.measures.streams} streams are open, and no more may be. Try again shortly.")
    events = _follow(services, principal, fetch, topics=topics, cursor=cursor)
    return EventSourceResponse(events, ping=HEARTBEAT_S, sep="\n", send_timeout=SEND_TIMEOUT_S)


async def _follow(
    services: Services, principal: Principal, fetch: Fetch, *, topics: Sequence[str], cursor: Any
) -> AsyncIterator[ServerSentEvent]:
    services.measures.stream_opened()
    trusted_until = time.monotonic() + services.settings.token_cache_s
    try:
        async with services.wakeups.subscribe(*topics) as subscription:
            while True:
                if time.monotonic() >= trusted_until:
                    if not await services.authenticator.still_valid(principal.credential):
                        return
                    trusted_until = time.monotonic() + services.settings.token_cache_s
                batch = await fetch(cursor)
                for item in batch.events:
                    yield item
                cursor = batch.cursor
                if batch.over:
                    yield event("end", batch.end)
                    return
                if not batch.events:
                    await subscription.wait(SOON_S if batch.soon else POLL_S)
    finally:
        services.measures.stream_closed()


def resume_after(last_event_id: str | None, *, otherwise: int | None) -> int | None:
    """The id to go on after: Last-Event-ID if the client sent one, else `otherwise`."""
    if last_event_id is None or last_event_id == "":
        return otherwise
    if not last_event_id.isascii() or not last_event_id.isdigit() or len(last_event_id) > 18:
        raise Invalid.field("Last-Event-ID", "is not an id of this stream", "send the id of the last event as it was")
    return int(last_event_id)


def wants_stream(accept: str | None, follow: bool) -> bool:
    """Whether the caller asked for a stream, by `?follow=true` or by the media type it accepts."""
    return follow or (accept is not None and accept.partition(",")[0].partition(";")[0].strip() == "text/event-stream")
