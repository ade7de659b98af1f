"""Every message of the worker protocol, as a golden file, means the same to both sides."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from phalanx_server.domain import messages
from phalanx_worker import protocol
from pydantic import ValidationError

GOLDEN = Path(__file__).parent / "golden"
KINDS = sorted(name for name, kind in vars(protocol).items() if dataclasses.is_dataclass(kind))


def golden(kind: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{kind}.json").read_text())


def test_every_message_has_a_golden_file_and_a_type_on_both_sides() -> None:
    server = {
        name
        for name, kind in vars(messages).items()
        if isinstance(kind, type) and issubclass(kind, messages.Message) and kind is not messages.Message
    }
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(KINDS) == server


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_read_and_write_the_same_json(kind: str) -> None:
    data = golden(kind)
    assert protocol.encode(protocol.decode(getattr(protocol, kind), data)) == data
    assert getattr(messages, kind).read(json.dumps(data)).encode() == data


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_have_the_same_fields_and_defaults(kind: str) -> None:
    ours, theirs = getattr(messages, kind).model_fields, dataclasses.fields(getattr(protocol, kind))
    assert list(ours) == [field.name for field in theirs]
    for field in theirs:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        assert ours[field.name].is_required() == required, field.name
        if not required:
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
            assert ours[field.name].get_default() == default, field.name


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_ignore_keys_of_a_newer_peer(kind: str) -> None:
    data = golden(kind)
    newer = {**data, "added_later": {"a": 1}}
    assert protocol.encode(protocol.decode(getattr(protocol, kind), newer)) == data
    assert getattr(messages, kind).read(json.dumps(newer)).encode() == data


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_refuse_a_missing_field_by_name(kind: str) -> None:
    for field in dataclasses.fields(getattr(protocol, kind)):
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
            continue
        data = {key: value for key, value in golden(kind).items() if key != field.name}
        with pytest.raises(ValueError, match=field.name):
            protocol.decode(getattr(protocol, kind), data)
        with pytest.raises(ValidationError, match=field.name):
            getattr(messages, kind).read(json.dumps(data))


def test_a_wrong_type_is_refused_by_both() -> None:
    data = {**golden("MetricPoint"), "rank": "0"}
    with pytest.raises(ValueError, match="rank"):
        protocol.decode(protocol.MetricPoint, data)
    with pytest.raises(ValidationError, match="rank"):
        messages.MetricPoint.read(json.dumps(data))


def test_a_nul_from_a_rank_does_not_reach_the_database() -> None:
    data = {**golden("RankExit"), "tail": "a\0b"}
    assert "\0" not in messages.RankExit.read(json.dumps(data)).tail
    assert messages.plain({"a\0": ["\0", float("nan"), 1]}) == {"a�": ["�", "nan", 1]}
