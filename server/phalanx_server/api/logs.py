"""Output of a job: a stretch of it as text, or live.

Owns how pieces become text for a reader. Bytes are decoded as UTF-8; what is not is shown as U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel
from sqlalchemy import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection
from sse_starlette import ServerSentEvent

from phalanx_server.api.auth import Principal
from phalanx_server.api.deps import Looking, Services, Serving, now, topic, visible_job
from phalanx_server.api.events import LastEventId
from phalanx_server.api.sse import Batch, event, resume_after, stream
from phalanx_server.store import log_views
from phalanx_server.store.job_views import job_end
from phalanx_server.store.log_views import LogFilter
from phalanx_server.store.logs import LogFiles, read_pieces

router = APIRouter(tags=["logs"])

MIB = 1 << 20
TAIL_PIECES = 2000
TAIL_BYTES = 4 * MIB
BATCH_PIECES = 200
BATCH_BYTES = MIB
"""What a stream reads at a time, and so about what each client costs in memory."""
DRAIN_S = 1.0
"""After its end a job's last output may still be on its way from a node: streams stay open this much longer."""


class LogText(BaseModel):
    """Data of the SSE event `log`."""

    attempt: int
    rank: int
    stream: Literal["stdout", "stderr"]
    at: datetime
    text: str


@dataclass(frozen=True)
class LogQuery:
    """What of a job's output is asked for."""

    rank: Annotated[int | None, Query(ge=0, lt=1 << 31)] = None
    stream: Literal["stdout", "stderr"] | None = None
    attempt: Annotated[int | None, Query(ge=1, lt=1 << 31, description="Absent: the latest, or all if following.")] = (
        None
    )
    tail_lines: Annotated[int | None, Query(ge=0, le=100_000, description="Only the last lines.")] = None
    start_bytes: Annotated[int, Query(ge=0, lt=1 << 62, description="Where to begin in what the filter selects.")] = 0
    limit_bytes: Annotated[int, Query(ge=1, le=16 * MIB)] = MIB
    follow: bool = False

    def of(self, job_id: UUID, *, attempt: int | None) -> LogFilter:
        return LogFilter(job_id, rank=self.rank, stream=self.stream, attempt=self.attempt or attempt)


_SIZE_HEADER = {"schema": {"type": "integer"}, "description": "Bytes of everything that the filter selects."}


@router.get(
    "/v1/jobs/{job_id}/logs",
    operation_id="read_job_logs",
    response_class=PlainTextResponse,
    responses={
        200: {
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
            "headers": {"X-Log-Size-Bytes": _SIZE_HEADER},
        }
    },
)
async def read_job_logs(
    job_id: str,
    services: Serving,
    principal: Looking,
    wanted: Annotated[LogQuery, Depends()],
    last_event_id: LastEventId = None,
) -> Response:
    """Output as text, in the order in which it arrived. With `follow=true`: server-sent events `log`, whose ids can be
    resumed from, until the job is over; then comes `end`."""
    id = await visible_job(services, principal, job_id)
    if wanted.follow:
        after = resume_after(last_event_id, otherwise=None)
        return await _follow(services, principal, id, wanted, after)
    return await _read(services, id, wanted)


# ------------------------------------------------------------------ a stretch


async def _read(services: Services, job_id: UUID, wanted: LogQuery) -> Response:
    async with services.reads.connect() as conn:
        selected = wanted.of(job_id, attempt=(await job_end(conn, job_id)).attempts)
        size = await log_views.size_of_log(conn, selected)
        if wanted.tail_lines is not None:
            rows = await _tail_rows(conn, selected, wanted.tail_lines)
        else:
            end = wanted.start_bytes + wanted.limit_bytes
            rows = await log_views.pieces_between(conn, selected, start_bytes=wanted.start_bytes, end_bytes=end)
    content = await read_pieces(services.log_files, rows)
    if wanted.tail_lines is not None:
        body = b"".join(_last_lines(content, wanted.tail_lines))
    else:
        body = _cut(rows, content, start=wanted.start_bytes, end=wanted.start_bytes + wanted.limit_bytes)
    return PlainTextResponse(body.decode(errors="replace"), headers={"X-Log-Size-Bytes": str(size)})


async def _tail_rows(conn: AsyncConnection, selected: LogFilter, lines: int) -> list[RowMapping]:
    if lines == 0:
        return []
    return await log_views.last_pieces(conn, selected, limit=TAIL_PIECES, limit_bytes=TAIL_BYTES)


def _cut(rows: Sequence[RowMapping], content: Sequence[bytes], *, start: int, end: int) -> bytes:
    """Bytes `[start, end)` of the whole, from pieces that cover them."""
    parts = []
    for row, data in zip(rows, content, strict=True):
        position = int(row["position_bytes"])
        parts.append(data[max(0, start - position) : max(0, end - position)])
    return b"".join(parts)


def _last_lines(content: Sequence[bytes], lines: int) -> list[bytes]:
    """The pieces, emptied or cut in front so that the last `lines` lines are left."""
    kept = list(content)
    wanted = lines + 1 if content and content[-1].endswith(b"\n") else lines
    for index in range(len(kept) - 1, -1, -1):
        newlines = kept[index].count(b"\n")
        if newlines >= wanted:
            kept[index] = kept[index].split(b"\n", newlines - wanted + 1)[-1]
            return [b""] * index + kept[index:]
        wanted -= newlines
    return kept


# ------------------------------------------------------------------ live


@dataclass
class _Decoders:
    """A character may be cut by the end of a piece: one decoder for each stream of each rank of each attempt."""

    open: dict[tuple[int, int, str], codecs.IncrementalDecoder] = field(default_factory=dict)

    def text(self, row: RowMapping, data: bytes) -> str:
        key = (row["attempt"], row["rank"], row["stream"])
        if key not in self.open:
            self.open[key] = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return self.open[key].decode(data)


async def _follow(
    services: Services, principal: Principal, job_id: UUID, wanted: LogQuery, after: int | None
) -> Response:
    files = services.log_files
    selected = wanted.of(job_id, attempt=None)
    first = (
        None
        if after is not None or wanted.tail_lines is None
        else await _tail(services, files, selected, wanted.tail_lines)
    )
    decoders = _Decoders()

    async def fetch(cursor: int | None) -> Batch:
        nonlocal first
        if first is not None:
            rows, content = first
            first = None
            return Batch(_events(decoders, rows, content), rows[-1]["id"] if rows else 0, soon=True)
        async with services.reads.connect() as conn:
            end = await job_end(conn, job_id)
            rows = await log_views.pieces_after(conn, selected, after=cursor or 0, limit=BATCH_PIECES)
        settled = _within_batch([row for row in rows if row["settled"]])
        events = _events(decoders, settled, await read_pieces(files, settled))
        over = not rows and (end.finished_at is not None and (now() - end.finished_at).total_seconds() > DRAIN_S)
        soon = bool(rows) or end.finished_at is not None
        return Batch(events, settled[-1]["id"] if settled else cursor, over, {"state": end.state}, soon)

    return stream(services, principal, fetch, topics=[topic("logs", job_id), topic("job", job_id)], cursor=after)


def _within_batch(rows: Sequence[RowMapping]) -> list[RowMapping]:
    """As many of the first rows as a batch may hold, at least one."""
    ends = list(accumulate(row["length_bytes"] for row in rows))
    return [row for row, end in zip(rows, ends, strict=True) if end <= max(BATCH_BYTES, ends[0])]


async def _tail(
    services: Services, files: LogFiles, selected: LogFilter, lines: int
) -> tuple[list[RowMapping], list[bytes]]:
    """The newest pieces, cut to the last lines. With 0 lines: where the output stands now, emptied."""
    async with services.reads.connect() as conn:
        rows = await _tail_rows(conn, selected, max(lines, 1))
    return rows, _last_lines(await read_pieces(files, rows), lines) if lines else [b""] * len(rows)


def _events(decoders: _Decoders, rows: Sequence[RowMapping], content: Sequence[bytes]) -> list[ServerSentEvent]:
    texts = [(row, decoders.text(row, data)) for row, data in zip(rows, content, strict=True) if data]
    return [_event(row, text) for row, text in texts if text]


def _event(row: RowMapping, text: str) -> ServerSentEvent:
    data: dict[str, Any] = {name: row[name] for name in ("attempt", "rank", "stream", "at")}
    return event("log", LogText(**data, text=text), id=row["id"])
