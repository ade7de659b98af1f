"""Turns what a user wrote (a nested mapping, or `key.sub=value` words) into a recipe's frozen configuration.

Owns names, types and units: an unknown key names the nearest valid one; a wrong value names the field, the value and
what to write instead. It refuses to know what the fields mean: what a section demands of its own values stands in that
section's `__post_init__`, which raises `RecipeError` through `demand`. Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from phalanx.errors import PhalanxError

Config = TypeVar("Config")

# Types of fields that take units: `64MiB` becomes bytes, `10m` seconds.
Bytes = Annotated[int, "bytes"]
Seconds = Annotated[float, "seconds"]

BYTES = {"": 1, "B": 1, **{f"{p}B": 1000**k for k, p in enumerate("kMGT", 1)}, "KB": 1000}
BYTES |= {f"{p}iB": 1024**k for k, p in enumerate("KMGT", 1)}
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhd]))+")


class RecipeError(PhalanxError, ValueError):
    """A recipe's arguments cannot be used: which field (dotted), and what to do about it. `others`: what else is wrong
    with them, each error with none of its own."""

    def __init__(self, field: str, problem: str, others: tuple[RecipeError, ...] = ()):
        said = f"{field} {problem}" if field else problem
        super().__init__("; ".join([said, *map(str, others)]))
        self.field = field
        self.problem = problem
        self.others = others

    @property
    def all(self) -> tuple[RecipeError, ...]:
        """This error and the others."""
        return (RecipeError(self.field, self.problem), *self.others)

    def inside(self, section: str) -> RecipeError:
        """The same errors, as seen from outside `section`."""
        field = f"{section}.{self.field}" if self.field else section
        return RecipeError(field, self.problem, tuple(other.inside(section) for other in self.others))


def _raise(errors: Sequence[RecipeError]) -> None:
    """Raise these errors as one; nothing where there are none."""
    found = [each for error in errors for each in error.all]
    if found:
        raise RecipeError(found[0].field, found[0].problem, tuple(found[1:]))


def demand(holds: bool, field: str, value: object, problem: str) -> None:
    """Raise `RecipeError` "FIELD = VALUE PROBLEM" unless it holds; for use in a section's `__post_init__`."""
    if not holds:
        raise RecipeError(field, f"= {_shown(value)} {problem}")


def demand_sizes(section: object, *, least: int, **most: int) -> None:
    """Raise `RecipeError` of all of these fields of the section that do not lie from `least` to the most that is given:
    no run needs more, and what follows from it stays cheap to work out. Texts and None are left alone."""
    errors = []
    for name, largest in most.items():
        value = getattr(section, name)
        if isinstance(value, int) and not least <= value <= largest:
            below = f"is {'not positive' if least else 'negative'}; use {least} or more"
            problem = below if value < least else f"is too large; use {largest} or less"
            errors.append(RecipeError(name, f"= {_shown(value)} {problem}"))
    _raise(errors)


def parse(kind: type[Config], given: Mapping[str, Any], words: Sequence[str] = ()) -> Config:
    """The configuration of type `kind` (a frozen dataclass) that `given` describes; `words` (`model.layers=4`, values
    as JSON or else plain text) go over it. What is not given keeps its default. Raises `RecipeError`, of all that is
    wrong with names, types and units; what sections demand of their values, they say of those that are right so far."""
    return _section(kind, _with_words(given, words))


def document(config: Any) -> dict[str, Any]:
    """The configuration as nested plain values; `parse` takes it back."""
    return dataclasses.asdict(config)


def _with_words(given: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    whole = json.loads(json.dumps(given))  # a deep copy of plain data
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise RecipeError("", f"{word!r} is not KEY=VALUE; write for example model.layers=4")
        _put(whole, path, _plain(text))
    return whole


def _put(whole: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    place = whole
    for name in sections:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise RecipeError(path, f"cannot be set: {name} is a value, not a section")
    place[last] = value


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _section(kind: type[Config], given: Any) -> Config:
    if not isinstance(given, Mapping):
        raise RecipeError("", f"= {_shown(given)} is not a section; write keys and values, such as {_example(kind)}")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # pyright: ignore[reportArgumentType]
    errors, values = [], {}
    for name, value in given.items():
        if name not in fields:
            errors.append(RecipeError(str(name), f"is not a field; {_nearest(str(name), fields)}"))
            continue
        try:
            values[name] = _value(hints[name], value)
        except RecipeError as error:
            errors.append(error.inside(name))
    for name, field in fields.items():
        if name not in given and field.default is field.default_factory is dataclasses.MISSING:
            errors.append(RecipeError(name, "is missing; it has no default"))
    _raise(errors)
    return kind(**values)


def _value(hint: Any, given: Any) -> Any:
    """`given` as a value of the type `hint`: a section, a choice, a union, a tuple or a plain value with or without
    unit."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _section(hint, given)  # pyright: ignore[reportArgumentType]
    if origin is Annotated:
        return _with_unit(hint.__metadata__[0], given)
    if origin in (typing.Union, types.UnionType):
        return _one_of(typing.get_args(hint), given)
    if origin is Literal:
        return _choice(typing.get_args(hint), given)
    if origin is tuple:
        return _tuple(typing.get_args(hint), given)
    return _scalar(hint, given)


def _one_of(hints: tuple[Any, ...], given: Any) -> Any:
    if given is None and type(None) in hints:
        return None
    problem: RecipeError | None = None
    for hint in hints:
        if hint is type(None):
            continue
        try:
            return _value(hint, given)
        except RecipeError as error:
            problem = problem or error
    assert problem is not None
    words = [repr(choice) for hint in hints if typing.get_origin(hint) is Literal for choice in typing.get_args(hint)]
    raise RecipeError(problem.field, problem.problem + (f", or {' or '.join(words)}" if words else ""), problem.others)


def _choice(choices: tuple[Any, ...], given: Any) -> Any:
    if given in choices and not (isinstance(given, bool) and not any(isinstance(c, bool) for c in choices)):
        return given
    near = difflib.get_close_matches(str(given), [str(choice) for choice in choices], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError("", f"= {_shown(given)} is unknown; {hint}use {_alternatives(choices)}")


def _tuple(hints: tuple[Any, ...], given: Any) -> tuple[Any, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise RecipeError("", f"= {_shown(given)} is not a list; write [...]")
    if hints[-1] is not Ellipsis and len(given) != len(hints):
        raise RecipeError("", f"= {_shown(given)} has {len(given)} values; write {len(hints)}")
    kinds = [hints[0]] * len(given) if hints[-1] is Ellipsis else hints
    return tuple(_value(kind, value) for kind, value in zip(kinds, given, strict=True))


def _scalar(kind: Any, given: Any) -> Any:
    if kind is float and isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    if kind is float and isinstance(given, str) and (number := _float(given)) is not None:
        return number  # YAML reads 3e-4 as text
    if isinstance(given, kind) and isinstance(given, bool) == (kind is bool):
        return given
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, kind.__name__)
    raise RecipeError("", f"= {_shown(given)} is not {expected}; write {expected}")


def _with_unit(unit: str, given: Any) -> float | int:
    if isinstance(given, int | float) and not isinstance(given, bool):
        return given if unit == "seconds" or isinstance(given, int) else round(given)
    text = given.strip() if isinstance(given, str) else ""
    if unit == "seconds" and _DURATION.fullmatch(text):
        return sum(float(amount) * SECONDS[name] for amount, name in _DURATION_PART.findall(text))
    if unit == "bytes" and (match := _SIZE.fullmatch(text)) and match[2] in BYTES:
        return round(float(match[1]) * BYTES[match[2]])
    expected = {"seconds": "a duration; write 30s, 10m or seconds", "bytes": "a size; write 64MiB, 2GB or bytes"}[unit]
    raise RecipeError("", f"= {_shown(given)} is not {expected}")


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _nearest(name: str, valid: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"use {_alternatives(tuple(valid))}"


def _alternatives(choices: Sequence[Any]) -> str:
    shown = [str(choice) for choice in choices]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _example(kind: Any) -> str:
    names = [field.name for field in dataclasses.fields(kind)]
    return f"{{{names[0]}: …}}" if names else "{}"


def _shown(given: object) -> str:
    text = repr(given)
    return text if len(text) <= 64 else text[:64] + "…"
