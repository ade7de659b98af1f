"""What pydantic found wrong with a document, in words for its author.

Owns the naming of fields (`resources.replicas`), the nearest valid key for an unknown one, and the refusal of text that
no database can store. Knows no particular document.
"""

import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from phalanx_server.domain.errors import FieldError, Invalid, UnknownField

ERRORS_MAX = 50
DEPTH_MAX = 32
SHOWN_MAX_CHARS = 60


class WrongFields(ValueError):
    """What a validator raises that finds several fields wrong below its own, each named from there."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(f"{error.field}: {error.message}" for error in errors))
        self.errors = tuple(errors)


def explain(error: ValidationError, model: type[BaseModel], *, where: str = "") -> Invalid:
    """The refusal that a validation error of `model` means; `where` is put before every field."""
    details = error.errors(include_url=False)
    fields = [field for detail in details for field in _field_errors(detail, model, where)][:ERRORS_MAX]
    unknown = any(detail["type"] == "extra_forbidden" for detail in details)
    return (UnknownField if unknown else Invalid).fields(fields)


def _field_errors(detail: ErrorDetails, model: type[BaseModel], where: str) -> list[FieldError]:
    raised = (detail.get("ctx") or {}).get("error")
    if not isinstance(raised, WrongFields):
        return [_field_error(detail, model, where)]
    within = join(where, detail["loc"])
    return [replace(error, field=join(within, (error.field,) if error.field else ())) for error in raised.errors]


def _field_error(detail: ErrorDetails, model: type[BaseModel], where: str) -> FieldError:
    loc = detail["loc"]
    field = join(where, loc)
    if detail["type"] == "extra_forbidden":
        return FieldError(field, "this field does not exist", _nearest_key(model, loc))
    if detail["type"] == "missing":
        return FieldError(field, "this field is required")
    message = detail["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be", 1).replace("String should", "must", 1)
    if detail["type"] not in ("value_error", "unsupported") and not isinstance(detail["input"], Mapping):
        message += f", not {_shown(detail['input'])}"
    return FieldError(field, message, (detail.get("ctx") or {}).get("hint"))


def join(where: str, loc: Sequence[int | str]) -> str:
    """`("resources", "gpu_types", 1)` below `jobs[3]` as `jobs[3].resources.gpu_types[1]`."""
    path = where
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def _nearest_key(model: type[BaseModel], loc: Sequence[int | str]) -> str | None:
    """A hint for an unknown key: the nearest of the keys that are valid at that place."""
    for part in loc[:-1]:
        inner = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
        if inner is None:
            return None
        model = inner
    valid = list(model.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid here: {', '.join(valid)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *typing.get_args(annotation)]
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), None)


def check_text(document: Any, *, where: str = "", depth: int = 0) -> None:
    """Refuse text that cannot be stored (NUL, lone surrogates) and nesting without end. Raises Invalid."""
    if depth > DEPTH_MAX:
        raise Invalid.field(where, f"is nested more than {DEPTH_MAX} levels deep")
    if isinstance(document, str):
        _check_string(document, where)
    elif isinstance(document, Mapping):
        for key, value in document.items():
            _check_string(str(key), where)
            check_text(value, where=join(where, (str(key),)), depth=depth + 1)
    elif isinstance(document, list | tuple):
        for index, value in enumerate(document):
            check_text(value, where=join(where, (index,)), depth=depth + 1)


def _check_string(text: str, where: str) -> None:
    if "\0" in text:
        raise Invalid.field(where, "holds a NUL character")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise Invalid.field(where, "holds half of a surrogate pair, which is no character")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_MAX_CHARS else text[:SHOWN_MAX_CHARS] + "…"
