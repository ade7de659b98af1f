"""Owns the reading of JSON documents into frozen dataclasses, with one-line errors that name the field.

Refuses to know which dataclasses: any will do whose annotations pydantic understands.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

_Record = TypeVar("_Record")
_UNKNOWN = "unexpected_keyword_argument"


@cache
def adapter(kind: type[_Record]) -> TypeAdapter[_Record]:
    """Reads and writes records of this dataclass; made once."""
    return TypeAdapter(kind)


def read_record(kind: type[_Record], document: Any) -> _Record:
    """The record that the document says; null means absent. ValueError: one line about the first thing wrong."""
    if not isinstance(document, Mapping):
        raise ValueError("not a JSON object")
    try:
        return adapter(kind).validate_python(_without_nulls(document))
    except ValidationError as error:
        raise ValueError(_first_problem(kind, error, document)) from None


def write_record(record: Any) -> dict[str, Any]:
    """The JSON document of a record; whatever has its default value is left out."""
    return adapter(type(record)).dump_python(record, mode="json", by_alias=True, exclude_defaults=True)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(v) for v in value if v is not None]
    return value


def _first_problem(kind: type, error: ValidationError, document: Any) -> str:
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == _UNKNOWN]
    problem = (unknown or problems)[0]  # a misspelt required field is missing as well: name the spelling
    *way, last = problem["loc"]
    if problem["type"] == _UNKNOWN:
        return f"{_place(way, document)}unknown field {last}{_nearest(str(last), _names(_kind_at(kind, way)))}"
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{_place(way, document)}field {last} is missing"
    said = problem["msg"][0].lower() + problem["msg"][1:].replace("tuple", "list")
    return f"{_place([*way, last], document)}{said}, not {_short(problem['input'])}"


def _place(way: Sequence[int | str], document: Any) -> str:
    """`jobs[3] (train-1).replicas: ` — with the id or name of a row, which people know better than its number."""
    text, value = "", document
    for step in way:
        parts: Any = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        value = parts.get(step) if isinstance(parts, Mapping) else None
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
        row = value if isinstance(step, int) and isinstance(value, Mapping) else {}
        name = row.get("id") or row.get("name")
        text += f" ({name})" if isinstance(name, str) else ""
    return text.removeprefix(".") + ": " if text else ""


def _kind_at(kind: type, way: Sequence[int | str]) -> type:
    is_key = False
    for step in way:
        if isinstance(step, int) or is_key:
            is_key = False
            continue
        hint = next(h for name, h in _hints(kind) if name == step)
        is_key = any(isinstance(get_origin(h), type) and issubclass(get_origin(h), Mapping) for h in _flat(hint))
        kind = next(h for h in _flat(hint) if isinstance(h, type) and is_dataclass(h))
    return kind


def _hints(kind: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return [(_alias(hints[f.name]) or f.name, hints[f.name]) for f in fields(kind)]


def _alias(hint: Any) -> str | None:
    return next((x.alias for x in get_args(hint) if isinstance(x, FieldInfo) and x.alias), None)


def _flat(hint: Any) -> list[Any]:
    return [hint] + [inner for arg in get_args(hint) for inner in _flat(arg)]


def _names(kind: type) -> list[str]:
    return [name for name, _ in _hints(kind)]


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; valid are {', '.join(valid)}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
