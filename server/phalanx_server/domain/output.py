"""Names of output files: what a job may call the files that it leaves behind.

Owns which names are taken. They are shown in terminals and browsers and become paths on the machines of those who
download them, so nothing that steers one of these passes.
"""

from __future__ import annotations

import unicodedata

from phalanx_server.domain.errors import Invalid

PATH_MAX_BYTES = 1024
GROUP_RANK_MAX = (1 << 31) - 1

_STEERING = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, lone surrogates, line and paragraph separators
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # what follows is shown elsewhere


def check_output_path(path: str) -> str:
    """The path of an output file, relative to where it was collected. Raises Invalid unless it can only lie below."""
    if any(character in _REORDERING or unicodedata.category(character) in _STEERING for character in path):
        raise Invalid.field("path", f"{path[:80]!r} holds a control character")
    if not 0 < len(path.encode()) <= PATH_MAX_BYTES:
        raise Invalid.field("path", f"is {len(path.encode())} bytes long, at most {PATH_MAX_BYTES} and not empty")
    if not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise Invalid.field("path", f"{path[:80]!r} is not a relative path without '.', '..' and empty parts")
    return path
