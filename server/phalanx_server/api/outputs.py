"""Output files of a job: which there are, and their bytes.

Owns the routes for users. How files come in is `node_link`'s.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from phalanx_server.api.deps import Looking, Serving, visible_job
from phalanx_server.api.errors import not_found
from phalanx_server.api.pages import Limit, Page, decode_cursor, encode_cursor
from phalanx_server.api.stalls import Sent
from phalanx_server.domain.field_errors import check_text
from phalanx_server.domain.output import GROUP_RANK_MAX, PATH_MAX_BYTES
from phalanx_server.store.outputs import find_output, list_outputs

router = APIRouter(tags=["outputs"])

OutputPath = Annotated[
    str, Path(min_length=1, max_length=PATH_MAX_BYTES, description="As in the list; slashes may stay as they are.")
]
AttemptNumber = Annotated[
    int | None, Query(ge=1, lt=1 << 31, description="Absent: for each path the newest attempt that left it.")
]
GroupRank = Annotated[
    int | None, Query(ge=0, le=GROUP_RANK_MAX, description="Absent: the lowest group that left that path.")
]
# It holds a whole path: up to 12 characters for 4 bytes of it in JSON, and 4 for 3 of those in base64.
Cursor = Annotated[
    str | None, Query(max_length=4 * PATH_MAX_BYTES + 256, description="`next_cursor` of the page before.")
]

_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "content": _BINARY,
        "headers": {"ETag": {"schema": {"type": "string"}, "description": "The SHA-256 of the bytes, in quotes."}},
    }
}


class OutputFile(BaseModel):
    """A file that a group of an attempt left. Paths of several groups may be the same."""

    path: str
    bytes: int
    sha256: str
    attempt: int
    group_rank: int
    created_at: datetime


@router.get("/v1/jobs/{job_id}/outputs", operation_id="list_job_outputs")
async def list_job_outputs(
    job_id: str,
    services: Serving,
    principal: Looking,
    attempt: AttemptNumber = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[OutputFile]:
    """Files that the job left, by path; they come when the ranks of a node are done."""
    id = await visible_job(services, principal, job_id)
    path, group_rank = decode_cursor(cursor, (str, int)) if cursor else ("", -1)
    after = path, min(max(group_rank, -1), GROUP_RANK_MAX)
    async with services.reads.connect() as conn:
        rows = await list_outputs(conn, id, attempt=attempt, after=after, limit=limit + 1)
    page = rows[:limit]
    more = encode_cursor(page[-1].path, page[-1].group_rank) if len(rows) > limit else None
    return Page(items=[_document(row) for row in page], next_cursor=more)


def _document(row: Any) -> OutputFile:
    return OutputFile(
        path=row.path,
        bytes=row.bytes,
        sha256=row.hash,
        attempt=row.attempt,
        group_rank=row.group_rank,
        created_at=row.created_at,
    )


@router.get(
    "/v1/jobs/{job_id}/outputs/{path:path}",
    operation_id="read_job_output",
    response_class=StreamingResponse,
    responses=_FILE,
)
async def read_job_output(
    job_id: str,
    path: OutputPath,
    services: Serving,
    principal: Looking,
    attempt: AttemptNumber = None,
    group_rank: GroupRank = None,
) -> StreamingResponse:
    """The bytes of one file."""
    id = await visible_job(services, principal, job_id)
    check_text(path, where="path")
    async with services.reads.connect() as conn:
        row = await find_output(conn, id, path, attempt=attempt, group_rank=group_rank)
    if row is None:
        raise not_found(f"output {path[:200]} of this job")
    if await services.output_files.size_bytes(row.url) != row.bytes:
        raise not_found(f"output {path[:200]} of this job in the storage")
    return Sent(services.output_files.read(row.url), media_type="application/octet-stream", headers=_headers(row))


def _headers(row: Any) -> dict[str, str]:
    """A browser is to save it under its name, whatever it may hold."""
    name = quote(row.path.rsplit("/", 1)[-1], safe="")
    return {
        "Content-Length": str(row.bytes),
        "ETag": f'"{row.hash}"',
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
        "X-Content-Type-Options": "nosniff",
    }
