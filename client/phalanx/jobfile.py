"""Reads job files (YAML or JSON) into the document that the server takes. It owns syntax, places (line, column) and
overrides from the command line; it refuses to know what the fields mean: the server checks them, and `place` says
where in the file a field that it refused stands.

YAML is read by the core schema of YAML 1.2, so `no` is a word, `1:30` is a string and dates stay text.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from phalanx.errors import JobFileError

MAX_FILE_BYTES = 1 << 20
MAX_PLACES = 20_000
MAX_DEPTH = 64
TOO_DEEP = f"is nested more than {MAX_DEPTH} deep"
Place = tuple[int, int]  # line and column, from 1


@dataclass(frozen=True)
class JobFile:
    """A job as it was written: the document, where its fields stand, and the directory that its paths start from."""

    document: dict[str, Any]
    path: Path | None = None
    places: Mapping[str, Place] = field(default_factory=dict)

    def place(self, field_path: str) -> str:
        """`job.yaml:4:3` for a dotted path, or for its nearest parent that the file has; "" where there is none."""
        steps = field_path.split(".")
        while self.path and steps:
            if found := self.places.get(".".join(steps)):
                return f"{self.path}:{found[0]}:{found[1]}"
            steps.pop()
        return str(self.path or "")

    def directory(self) -> Path:
        """The file's own directory, which its paths count from."""
        return self.path.parent if self.path else Path()

    def workdir(self) -> Path | None:
        """The directory to upload: `run.workdir`, counted from the file's own directory."""
        run = self.document.get("run")
        given = run.get("workdir") if isinstance(run, dict) else None
        if given is None:
            return None
        if not isinstance(given, str):
            raise JobFileError(f"run.workdir is {given!r}: expected a path", path=self.place("run.workdir"))
        try:
            return self.directory() / Path(given).expanduser()
        except RuntimeError as error:
            raise JobFileError(f"run.workdir is {given!r}: {error}", path=self.place("run.workdir")) from None


def read(path: Path) -> JobFile:
    """Read a job file; JobFileError says what is wrong and where."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise JobFileError(f"cannot read it: {error.strerror}", path=str(path)) from None
    if len(raw) > MAX_FILE_BYTES:
        raise JobFileError(f"is {len(raw)} bytes; a job file has at most {MAX_FILE_BYTES}", path=str(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise JobFileError("is not UTF-8 text", path=str(path), line=line, column=1) from None
    document, places = _parse_json(text, path) if path.suffix == ".json" else _parse_yaml(text, path)
    _check_plain(document, str(path))
    if not isinstance(document, dict):
        kind = "empty" if document is None else f"a {type(document).__name__}"
        raise JobFileError(f"is {kind}: expected keys like name, resources and run", path=str(path), line=1, column=1)
    return JobFile(document, path, places)


def override(document: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The document with `key.path=value` settings applied; values are read as YAML scalars."""
    changed = copy.deepcopy(dict(document))
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        if not equals or not all(dotted.split(".")):
            raise JobFileError(f"{setting!r} is no setting: expected something like resources.replicas=4")
        put(changed, dotted.split("."), _scalar(text, f"{setting:.80}"))
    _check_depth(changed, "--set")
    return changed


def put(document: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set one field by its path, making the objects on the way."""
    inner = document
    for step in path[:-1]:
        if inner.get(step) is None:
            inner[step] = {}
        inner = inner[step]
        if not isinstance(inner, dict):
            raise JobFileError(f"{'.'.join(path)} cannot be set: {step} is {inner!r}, not a group of fields")
    inner[path[-1]] = value


def _scalar(text: str, setting: str) -> Any:
    try:
        value = yaml.load(text, _CoreLoader)
    except RecursionError:
        raise JobFileError(TOO_DEEP, path=setting) from None
    except (yaml.YAMLError, ValueError):  # a number of thousands of digits is no number to Python
        raise JobFileError(f"{setting!r}: the value is not valid YAML; quote it") from None
    _check_plain(value, setting)
    return value


def _check_plain(document: Any, where: str) -> None:
    _check_depth(document, where)
    try:
        json.dumps(document, allow_nan=False)
    except ValueError:
        raise JobFileError("holds a number that is not finite, or a loop", path=where) from None


def _check_depth(document: Any, where: str, *, left: int = MAX_DEPTH) -> None:
    """What is within bounds here is so for every encoder on its way."""
    if isinstance(document, dict | list):
        if left == 0:
            raise JobFileError(TOO_DEEP, path=where)
        for inner in document.values() if isinstance(document, dict) else document:
            _check_depth(inner, where, left=left - 1)


# ------------------------------------------------------------------ JSON


def _parse_json(text: str, path: Path) -> tuple[Any, dict[str, Place]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise JobFileError(f"{key!r} is given twice", path=str(path))
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique), {}
    except json.JSONDecodeError as error:
        raise JobFileError(
            f"not valid JSON: {error.msg}", path=str(path), line=error.lineno, column=error.colno
        ) from None
    except RecursionError:
        raise JobFileError(TOO_DEEP, path=str(path)) from None
    except ValueError:
        raise JobFileError("holds a number that is too long", path=str(path)) from None


# ------------------------------------------------------------------ YAML


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema)."""


_CORE_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
)
_CoreLoader.yaml_implicit_resolvers = {}
_CoreLoader.yaml_constructors = {  # without binary, sets, timestamps: JSON has none
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or str(tag).rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
for _tag, _pattern, _starts in _CORE_SCALARS:
    _CoreLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _starts])


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)))


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _parse_yaml(text: str, path: Path) -> tuple[Any, dict[str, Place]]:
    try:
        loader = _CoreLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        said = f"not valid YAML: it has the control character #x{error.character:02x}"
        raise JobFileError(said, path=str(path), line=line) from None
    try:
        node = loader.get_single_node()
        places: dict[str, Place] = {}
        if node is not None:
            _note_places(node, "", places, path)
        return (loader.construct_document(node) if node is not None else None), places
    except yaml.YAMLError as error:
        raise _syntax_error(error, path) from None
    except RecursionError:
        raise JobFileError(TOO_DEEP, path=str(path)) from None
    except ValueError as error:
        raise JobFileError(f"not valid YAML: {error}", path=str(path)) from None
    finally:
        loader.dispose()


def _syntax_error(error: yaml.YAMLError, path: Path) -> JobFileError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
    return JobFileError(f"not valid YAML: {' '.join(str(problem).split())}", path=str(path), line=line, column=column)


def _note_places(node: yaml.Node, prefix: str, places: dict[str, Place], path: Path) -> None:
    """Where each key stands, by dotted path; a key given twice is an error (YAML 1.2 says so, PyYAML does not)."""
    if len(places) > MAX_PLACES:  # aliases within aliases
        raise JobFileError(f"has more than {MAX_PLACES} fields", path=str(path))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[f"{prefix}[{index}]"] = item.start_mark.line + 1, item.start_mark.column + 1
            _note_places(item, f"{prefix}[{index}]", places, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}.{key.value}" if prefix else str(key.value)
        place = key.start_mark.line + 1, key.start_mark.column + 1
        if dotted in places:
            said = f"{dotted} is given twice, first in line {places[dotted][0]}"
            raise JobFileError(said, path=str(path), line=place[0], column=place[1])
        places[dotted] = place
        _note_places(value, dotted, places, path)
