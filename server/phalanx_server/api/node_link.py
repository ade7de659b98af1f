"""The link of a node's runner: logs, metrics, marks, output files and traces go up, code bundles come down.

Only node tokens work here, each for the attempts of its own node.
"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from phalanx_server.actions.record_node_report import record_node_report
from phalanx_server.actions.save_output import save_output
from phalanx_server.actions.save_trace import save_rank_trace
from phalanx_server.api.agent_link import answer
from phalanx_server.api.auth import Principal
from phalanx_server.api.bodies import message_as, takes
from phalanx_server.api.bundles import BUNDLE_RESPONSES, Digest
from phalanx_server.api.deps import NodeRunner, Serving, now, parse_id
from phalanx_server.api.errors import not_found
from phalanx_server.api.stalls import Sent
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.messages import NodeAnswer, NodeReport
from phalanx_server.domain.output import GROUP_RANK_MAX, PATH_MAX_BYTES
from phalanx_server.store.bundles import is_bundle_of_attempt
from phalanx_server.store.outputs import GroupRef
from phalanx_server.store.profiles import RankRef

router = APIRouter(tags=["node link"])


class StoredOutput(BaseModel):
    path: str
    bytes: int
    sha256: str


@router.post("/v1/node/reports", operation_id="report_node", response_model=NodeAnswer, openapi_extra=takes(NodeReport))
async def report_node(
    services: Serving, principal: NodeRunner, report: Annotated[NodeReport, Depends(message_as(NodeReport))]
) -> Response:
    """A numbered batch of what a runner saw. Each number is taken once; `accepted_seq` is the highest taken."""
    node_id = node_of(principal)
    return answer(await record_node_report(services.links, services.log_files, report, node_id=node_id, now=now()))


@router.get(
    "/v1/node/bundles/{digest}",
    operation_id="fetch_bundle",
    response_class=StreamingResponse,
    responses=BUNDLE_RESPONSES,
)
async def fetch_bundle(
    digest: Digest,
    services: Serving,
    principal: NodeRunner,
    attempt_id: Annotated[str, Query(max_length=64, description="The live attempt that runs this code.")],
) -> StreamingResponse:
    """The bytes of a code bundle, for an attempt that is placed on the caller's node."""
    attempt = parse_id("attempt", attempt_id)
    async with services.link_reads.connect() as conn:
        if not await is_bundle_of_attempt(conn, digest, attempt_id=attempt, node_id=node_of(principal)):
            raise not_found(f"bundle {digest} of {attempt_id[:80]}")
    files = services.bundle_files
    size = await files.size_bytes(digest)
    if size is None:
        raise not_found(f"bundle {digest} in the storage")
    return Sent(files.read(digest), media_type="application/gzip", headers={"Content-Length": str(size)})


@router.put(
    "/v1/node/attempts/{attempt_id}/outputs/{path:path}",
    operation_id="put_output",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def put_output(
    attempt_id: Annotated[str, Path(max_length=64)],
    path: Annotated[str, Path(min_length=1, max_length=PATH_MAX_BYTES)],
    request: Request,
    services: Serving,
    principal: NodeRunner,
    epoch: Annotated[int, Query(ge=0, lt=1 << 63)],
    group_rank: Annotated[int, Query(ge=0, le=GROUP_RANK_MAX)],
    sha256: Annotated[str, Query(pattern=r"^[0-9a-f]{64}$", description="Of the body, in hex.")],
) -> StoredOutput:
    """A file that the ranks of one group left, whose attempt still counts as live. Sending it again is harmless."""
    size_bytes = _announced_bytes(request)
    await save_output(
        services.links,
        services.output_files,
        GroupRef(parse_id("attempt", attempt_id), epoch, group_rank),
        request.stream(),
        path=path,
        sha256=sha256,
        size_bytes=size_bytes,
        node_id=node_of(principal),
        now=now(),
    )
    return StoredOutput(path=path, bytes=size_bytes, sha256=sha256)


class StoredTrace(BaseModel):
    profile_id: str
    rank: int
    bytes: int
    sha256: str


@router.put(
    "/v1/node/attempts/{attempt_id}/profiles/{profile_id}/ranks/{rank}",
    operation_id="put_trace",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def put_trace(
    attempt_id: Annotated[str, Path(max_length=64)],
    profile_id: Annotated[str, Path(max_length=64)],
    rank: Annotated[int, Path(ge=0, le=GROUP_RANK_MAX)],
    request: Request,
    services: Serving,
    principal: NodeRunner,
    epoch: Annotated[int, Query(ge=0, lt=1 << 63)],
    sha256: Annotated[str, Query(pattern=r"^[0-9a-f]{64}$", description="Of the body, in hex.")],
) -> StoredTrace:
    """The trace of a rank that was asked for a profile, while it runs. Sending it again is harmless."""
    size_bytes = _announced_bytes(request)
    await save_rank_trace(
        services.links,
        services.output_files,
        RankRef(parse_id("attempt", attempt_id), epoch, parse_id("profile", profile_id), rank),
        request.stream(),
        sha256=sha256,
        size_bytes=size_bytes,
        node_id=node_of(principal),
        now=now(),
    )
    return StoredTrace(profile_id=profile_id, rank=rank, bytes=size_bytes, sha256=sha256)


def _announced_bytes(request: Request) -> int:
    length = request.headers.get("content-length", "")
    if not length.isascii() or not length.isdigit():
        raise Invalid.field("", "the request has no Content-Length", "say how many bytes the file has")
    return int(length)


def node_of(principal: Principal) -> UUID:
    node_id = principal.credential.node_id
    assert node_id is not None, "a node token without a node: the schema forbids it"
    return node_id
