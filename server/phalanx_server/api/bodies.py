"""Request bodies: JSON read once, with errors that name line and column, or the field and the nearest valid one.

Owns reading and its OpenAPI side. A body is a dependency like any other, so it can be declared after the caller: who
may not do something is told so before the body is read.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from phalanx_server.api.errors import Problem, invalid_json
from phalanx_server.domain.errors import Invalid, UnknownField
from phalanx_server.domain.field_errors import check_text, explain
from phalanx_server.domain.messages import Message
from phalanx_server.domain.spec import JobSpec, parse_job

M = TypeVar("M", bound=BaseModel)
G = TypeVar("G", bound=Message)

SCHEMAS: dict[str, type[BaseModel]] = {}
"""Every model that some body is read as, by its name in the OpenAPI document."""


class Given(BaseModel):
    """Base of request bodies: a key that does not exist is an error, not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is `model`."""
    SCHEMAS[model.__name__] = model
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def body_as(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """A dependency: the body as `model`. Raises Problem 400 and 415, Invalid and UnknownField."""

    async def read(request: Request) -> M:
        document = await json_of(request)
        check_text(document)
        try:
            return model.model_validate(document)
        except ValidationError as error:
            raise explain(error, model) from None

    return read


def message_as(message: type[G]) -> Callable[[Request], Awaitable[G]]:
    """A dependency: the body as a message of the worker protocol, where keys that a newer peer adds are ignored."""

    async def read(request: Request) -> G:
        try:
            return message.read(await request.body())
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
            if problems[0]["type"] == "json_invalid":
                raise Problem("invalid_json", problems[0]["msg"]) from None
            raise explain(error, message) from None

    return read


BATCH_MAX_JOBS = 1000


async def job_body(request: Request) -> JobSpec:
    """A dependency: the body as a job file. Raises as `body_as` does."""
    return parse_job(await json_of(request))


async def jobs_body(request: Request) -> list[JobSpec]:
    """A dependency: the job files of `{"jobs": […]}`. Errors name `jobs[3].…`."""
    document = await json_of(request)
    jobs = document.get("jobs") if isinstance(document, dict) else None
    if not isinstance(jobs, list) or not 1 <= len(jobs) <= BATCH_MAX_JOBS:
        raise Invalid.field("jobs", f"expected a list of 1 to {BATCH_MAX_JOBS} job files")
    for key in document.keys() - {"jobs"}:
        raise UnknownField.field(key[:80], "this field does not exist", "valid here: jobs")
    return [parse_job(job, where=f"jobs[{index}]") for index, job in enumerate(jobs)]


async def json_of(request: Request) -> Any:
    """The body as JSON. Raises Problem `unsupported_media_type` or `invalid_json`."""
    content_type = request.headers.get("content-type", "")
    if not _is_json(content_type):
        found = f"not {content_type[:80]}" if content_type else "and say so in Content-Type"
        raise Problem("unsupported_media_type", f"Send the body as application/json, {found}.")
    body = await request.body()
    try:
        return json.loads(body, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Problem("invalid_json", f"The body is not UTF-8 (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise invalid_json(error.doc, position=error.pos, reason=error.msg) from None
    except RecursionError:
        raise Problem("invalid_json", "The body is nested too deeply.") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise Problem("invalid_json", f"A number cannot be read: {error}") from None


def _no_constant(name: str) -> Any:
    raise Problem("invalid_json", f"{name} is no JSON value.")


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
