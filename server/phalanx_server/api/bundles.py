"""Code bundles: working directories as tar.gz, uploaded by content so that nothing is sent twice."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel

from phalanx_server.actions.save_bundle import save_bundle
from phalanx_server.api.auth import Principal
from phalanx_server.api.deps import Serving, Submitting
from phalanx_server.api.errors import not_found
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.tenant import ROOT
from phalanx_server.store.bundles import has_bundle

router = APIRouter(tags=["bundles"])

GZIP_MAGIC = b"\x1f\x8b"

Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the bytes, in hex.")]
ForTenant = Annotated[str | None, Query(max_length=256, description="Absent: the caller's own, else `default`.")]

_BINARY = {"application/gzip": {"schema": {"type": "string", "format": "binary"}}}
BUNDLE_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"content": _BINARY}}


class Bundle(BaseModel):
    sha256: str
    tenant: str
    bytes: int


@router.head(
    "/v1/bundles/{digest}",
    operation_id="has_bundle",
    response_class=Response,
    responses={200: {"description": "The server has it for this tenant."}, 404: {"description": "It has to be sent."}},
)
async def has_bundle_already(
    digest: Digest, services: Serving, principal: Submitting, tenant: ForTenant = None
) -> Response:
    """Whether the tenant has uploaded this bundle before."""
    owner = _owner(principal, tenant)
    async with services.reads.connect() as conn:
        known = await has_bundle(conn, digest, tenant=owner)
    if not known or await services.bundle_files.size_bytes(digest) is None:
        raise not_found(f"bundle {digest} of tenant {owner}")
    return Response()


@router.put(
    "/v1/bundles/{digest}",
    operation_id="put_bundle",
    status_code=201,
    responses={200: {"model": Bundle, "description": "The tenant had it already."}},
    openapi_extra={"requestBody": {"required": True, "content": _BINARY}},
)
async def put_bundle(
    digest: Digest,
    request: Request,
    response: Response,
    services: Serving,
    principal: Submitting,
    tenant: ForTenant = None,
) -> Bundle:
    """Upload a tar.gz whose SHA-256 is `digest`. It is verified while it streams in."""
    owner = _owner(principal, tenant)
    with tempfile.NamedTemporaryFile(prefix="phalanx-bundle-") as file:
        size = await _receive(request, digest, file)
        await services.bundle_files.write(digest, FilePath(file.name))
        fresh = await save_bundle(services.engine, owner, digest=digest, size_bytes=size, actor=principal.actor)
        await services.bundle_files.write(digest, FilePath(file.name))  # retention may just have taken it away
    response.status_code = 201 if fresh else 200
    return Bundle(sha256=digest, tenant=owner, bytes=size)


async def _receive(request: Request, digest: str, file: Any) -> int:
    """Write the body to `file`; its size. Raises Invalid unless it is gzip with this digest."""
    seen, size, head = hashlib.sha256(), 0, b""
    async for piece in request.stream():
        seen.update(piece)
        size += len(piece)
        head = head if len(head) >= len(GZIP_MAGIC) else (head + piece)[: len(GZIP_MAGIC)]
        file.write(piece)
    file.flush()
    if head != GZIP_MAGIC:
        raise Invalid.field("", "the body is not gzip: send the working directory as tar.gz")
    if seen.hexdigest() != digest:
        raise Invalid.field("digest", f"the body has the SHA-256 {seen.hexdigest()}", "was it cut off on the way?")
    return size


def _owner(principal: Principal, tenant: str | None) -> str:
    """The tenant that the bundle is for. One that the caller may not know of does not exist."""
    owner = tenant or principal.tenant or ROOT
    if not principal.sees(owner):
        raise Invalid.field("tenant", f"there is no tenant {owner!r:.80}")
    return owner
