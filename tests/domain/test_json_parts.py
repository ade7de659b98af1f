"""Documents taken apart: whole parts at their commas, whatever is in them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx_server.domain.json_parts import members_of, parts_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=50)
@given(st.lists(VALUES), st.sampled_from([None, 1]), st.booleans())
def test_a_list_is_its_parts(values: list, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    parts = parts_of(text.encode(errors="surrogatepass"))
    assert [json.dumps(json.loads(part)) for part in parts] == [json.dumps(value) for value in values]


@settings(max_examples=50)
@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), VALUES))
def test_an_object_is_its_members(values: dict) -> None:
    members = members_of(json.dumps(values).encode())
    assert {json.loads(key): json.dumps(json.loads(value)) for key, value in members.items()} == {
        key: json.dumps(value) for key, value in values.items()
    }


def test_depth_costs_nothing() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    assert parts_of(b"[1," + deep + b"]") == [b"1", deep]


@pytest.mark.parametrize(
    "document", [b"", b"1", b'"[]"', b"{", b"[1", b"[]]", b"[] []", b"x[]", b"]", b"[1]2", b"null"]
)
def test_what_is_not_whole_is_refused(document: bytes) -> None:
    with pytest.raises(ValueError, match="whole"):
        parts_of(document)


def test_a_string_without_an_end_is_found_at_once() -> None:
    """Looking for its end from each quote in it would take days for a report of 4 MiB."""
    with pytest.raises(ValueError, match="without an end"):
        parts_of(b'{"logs":["' + b'\\"' * (2 << 20))
