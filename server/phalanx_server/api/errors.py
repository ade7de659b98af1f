"""Every error that leaves the API: RFC 9457 problem documents with a stable `code`.

Owns the codes, their statuses, and the translation of framework, validation and database errors into problems.
Refuses to show a traceback, a SQL text or a value that the caller did not send.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from phalanx_server.domain.errors import FieldError, Invalid, PhalanxError, Unavailable

log = structlog.get_logger("phalanx.api")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2

# code -> (status, title)
CODES: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "The body is not valid JSON"),
    "invalid_request": (422, "The request is not valid"),
    "unknown_field": (422, "The request has a field that does not exist"),
    "impossible_request": (422, "No node of any cluster could ever run this"),
    "unauthorized": (401, "A valid token is needed"),
    "token_expired": (401, "The token has expired"),
    "forbidden": (403, "The token does not allow this"),
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "The method is not allowed here"),
    "conflict": (409, "The request conflicts with the current state"),
    "idempotency_conflict": (409, "The idempotency key was used with another body"),
    "superseded": (409, "A newer agent has taken over this cluster"),
    "etag_mismatch": (412, "The resource has changed"),
    "body_too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "The media type is not supported"),
    "precondition_required": (428, "If-Match is required"),
    "rate_limited": (429, "Too many requests"),
    "internal": (500, "Something went wrong on the server"),
    "unavailable": (503, "The service is not available right now"),
    "overloaded": (503, "The server has more to do than it can"),
    "storage_unavailable": (503, "The storage of logs, code and outputs is not available right now"),
}
_CODE_OF_STATUS = {400: "invalid_request", **{status: code for code, (status, _) in reversed(CODES.items())}}
_CODE_OF_STATUS[422] = "invalid_request"


class FieldProblem(BaseModel):
    """What is wrong with one field, and what to do about it."""

    field: str = Field(description="Path of the field, like `jobs[3].resources.replicas`; empty for the whole body.")
    message: str
    hint: str | None = None


class ProblemDocument(BaseModel):
    """An RFC 9457 problem document."""

    model_config = ConfigDict(title="Problem")

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[FieldProblem] = []
    request_id: str


class Problem(HTTPException):
    """Raise anywhere in the API; the handler makes the document. `code` must be one of CODES."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(status or CODES[code][0], detail, dict(headers) if headers else None)
        self.code = code
        self.errors = list(errors)


def from_domain(error: PhalanxError) -> Problem:
    """What an action or the domain refuses."""
    if isinstance(error, Unavailable):
        return unavailable(error.detail, code=error.code)
    return Problem(error.code, error.detail, errors=error.errors)


def not_found(what: str) -> Problem:
    return Problem("not_found", f"There is no {what}, or it is not yours to see.")


def unavailable(
    detail: str = "The database or the storage cannot be reached. Try again shortly.", *, code: str = "unavailable"
) -> Problem:
    return Problem(code, detail, headers={"Retry-After": str(RETRY_AFTER_S)})


def overloaded(detail: str) -> Problem:
    return unavailable(detail, code="overloaded")


def respond(problem: Problem, request_id: str) -> Response:
    """The HTTP response of a problem."""
    document = ProblemDocument(
        type=f"urn:phalanx:problem:{problem.code}",
        title=CODES[problem.code][1],
        status=problem.status_code,
        detail=problem.detail,
        code=problem.code,
        errors=[FieldProblem(field=e.field, message=e.message, hint=e.hint) for e in problem.errors],
        request_id=request_id,
    )
    body = document.model_dump_json(exclude_none=True)
    return Response(body, problem.status_code, headers=problem.headers, media_type=MEDIA_TYPE)


# ------------------------------------------------------------------ translation


def from_http(error: HTTPException) -> Problem:
    """What the framework itself refuses: unknown routes, wrong methods, bodies that cannot be read."""
    if isinstance(error, Problem):
        return error
    code = _CODE_OF_STATUS.get(error.status_code, "invalid_request" if error.status_code < 500 else "internal")
    return Problem(code, str(error.detail), headers=error.headers, status=error.status_code)


def from_outage(error: BaseException) -> Problem | None:
    """Trouble that passes is a 503: the database refuses, is full or restarts, or the storage does not answer. None for
    anything else. (An OSError is how a connection that cannot be made shows, in asyncpg and in fsspec.)"""
    if isinstance(error, PoolTimeout | InterfaceError | OperationalError | OSError):
        return unavailable()
    if isinstance(error, DBAPIError):
        return unavailable() if error.connection_invalidated or _passes(error.orig) else None
    return unavailable() if _passes(error) else None


# SQLSTATE classes: connection exception, insufficient resources, operator intervention; and serialization failures.
_PASSING_STATES = ("08", "53", "57", "40")


def _passes(error: BaseException | None) -> bool:
    return _state(error)[:2] in _PASSING_STATES


def _state(error: BaseException | None) -> str:
    """The SQLSTATE of a driver's error; "" where it has none."""
    return getattr(error, "sqlstate", None) or ""


def from_validation(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """Parameters of the path, the query or the headers that are wrong. (Bodies are read by `api.bodies`.)"""
    fields = [FieldError(_parameter(error["loc"]), _sentence(error)) for error in errors[:50]]
    return from_domain(Invalid.fields(fields))


def _parameter(loc: Sequence[int | str]) -> str:
    """`("query", "limit")` as `limit`."""
    return ".".join(str(part) for part in loc[1:] or loc)


def _sentence(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be", 1)


def invalid_json(text: str, *, position: int, reason: str) -> Problem:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    detail = f"{reason} at line {line}, column {column}."
    return Problem("invalid_json", detail, errors=[FieldError("", detail)])


# ------------------------------------------------------------------ handlers


def request_id_of(request: Request) -> str:
    return request.scope.get("phalanx.request_id", "")


async def handle_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = respond(from_http(error), request_id_of(request))
    if error.status_code == 405:
        response.headers["allow"] = ", ".join(sorted(_methods_at(request)))
    return response


def _methods_at(request: Request) -> set[str]:
    """What may be done at a path. (The framework names the methods of the first route that has the path, only.)"""
    routes = [route for route in request.app.state.routes if route.path_regex.match(request.url.path)]
    return {method for route in routes for method in route.methods}


async def handle_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return respond(from_validation(error.errors()), request_id_of(request))


async def handle_domain(request: Request, error: Exception) -> Response:
    assert isinstance(error, PhalanxError)
    return respond(from_domain(error), request_id_of(request))


def for_unexpected(error: Exception) -> Problem:
    """The last resort: database trouble is a 503, everything else a 500 whose cause is only in our own log."""
    problem = from_outage(error)
    if problem is not None:
        log.warning("database or storage trouble", error=f"{type(error).__name__}: {error}"[:500])
        return problem
    if isinstance(error, DBAPIError) and _state(error.orig).startswith("22"):
        log.warning("a value that the database cannot take", exc_info=error)
        return Problem("invalid_request", "A value of the request is not one that can be stored or compared.")
    log.error("unexpected error", exc_info=error)
    return Problem("internal", "The request failed on our side. The server's log says why, under this request_id.")
