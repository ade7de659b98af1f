"""Takes a JSON document apart at its outermost commas, without reading what lies between them.

Owns that alone: however deep or odd a part is, it costs neither recursion nor its neighbours. Whether a part is valid
JSON finds out who reads it.
"""

import re

# A quote alone is a string without an end: found at once, not by looking for its end from each later quote.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|"|[{}\[\],]', re.DOTALL)


def parts_of(document: bytes) -> list[bytes]:
    """The members of an object (`"key": value`) or of an array, as they are written. ValueError if it is neither."""
    parts: list[bytes] = []
    depth, start, end = 0, 0, 0
    for token in _TOKEN.finditer(document):
        mark = token[0]
        if mark == b'"':
            raise ValueError("a string without an end")
        if mark in (b"{", b"["):
            depth += 1
            start = token.end() if depth == 1 else start
        elif mark in (b"}", b"]"):
            depth -= 1
            end = token.end()
        if depth == 0 or (depth == 1 and mark == b","):
            parts.append(document[start : token.start()])
            start = token.end()
        if depth == 0:
            break
    if depth or not end or document[end:].strip() or document.strip()[:1] not in (b"{", b"["):
        raise ValueError("not one whole object or array")
    return [part for part in map(bytes.strip, parts) if part]


def members_of(document: bytes) -> dict[bytes, bytes]:
    """The values of an object by their keys, both as they are written. ValueError if it is none."""
    pairs = (part.partition(b":") for part in parts_of(document))
    return {key.strip(): value.strip() for key, _, value in pairs}
