"""The OpenAPI document: what FastAPI derives, plus what holds for every operation (problems, tokens).

Owns nothing that code does not: response models and parameters come from the routes.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from phalanx_server.api.bodies import SCHEMAS
from phalanx_server.api.errors import MEDIA_TYPE, ProblemDocument

_REF = "#/components/schemas/{model}"
_PUBLIC = frozenset({"healthz", "readyz"})

_PROBLEM_CONTENT = {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="Problem")}}}
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request was refused; `code` says why.", "content": _PROBLEM_CONTENT},
    "5XX": {"description": "The server could not do it; 503 says when to try again.", "content": _PROBLEM_CONTENT},
}


def document_of(app: FastAPI) -> dict[str, Any]:
    """The document, built once."""
    if app.openapi_schema is None:
        app.openapi_schema = _build(app)
    return app.openapi_schema


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version="3.1.0",
        description=app.description,
        routes=app.routes,
        separate_input_output_schemas=app.separate_input_output_schemas,
    )
    components = document.setdefault("components", {})
    schema = ProblemDocument.model_json_schema(ref_template=_REF)
    schemas = components.setdefault("schemas", {})
    schemas |= {**schema.pop("$defs", {}), "Problem": schema}
    _, bodies = models_json_schema([(model, "validation") for model in SCHEMAS.values()], ref_template=_REF)
    for name, body in bodies.get("$defs", {}).items():
        if schemas.setdefault(name, body).keys() != body.keys():
            raise RuntimeError(f"two schemas are called {name}: rename one of the models")
    components["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "`phx_…`, from `POST /v1/tokens`."}
    }
    for operation in _operations(document):
        operation["security"] = [] if operation["operationId"] in _PUBLIC else [{"token": []}]
    return document


def _operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for path in document["paths"].values() for operation in path.values()]
