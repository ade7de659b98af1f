"""Ids: UUIDv7 in the database, a prefix and 32 hex digits in the API.

Owns how ids are made, written and read. Knows nothing about what they name.
"""

import os
import threading
import time
from typing import Final, Literal
from uuid import UUID

Kind = Literal[
    "job", "attempt", "node", "tenant", "token", "cluster", "user", "environment", "array", "maintenance", "profile"
]

PREFIXES: Final[dict[str, str]] = {
    "job": "job",
    "attempt": "att",
    "node": "node",
    "tenant": "ten",
    "token": "tok",
    "cluster": "clu",
    "user": "usr",
    "environment": "env",
    "array": "array",
    "maintenance": "mnt",
    "profile": "prof",
}
_HEX = frozenset("0123456789abcdef")
_lock = threading.Lock()
_last_tick = 0


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562, section 5.7, with sub-millisecond bits in rand_a): ids of one process never go back."""
    tick = _next_tick()
    milliseconds, fraction = tick >> 12, tick & 0xFFF
    random_bits = int.from_bytes(os.urandom(8), "big") & ((1 << 62) - 1)
    return UUID(int=(milliseconds << 80) | (7 << 76) | (fraction << 64) | (2 << 62) | random_bits)


def _next_tick() -> int:
    """Milliseconds since the epoch with 12 bits of fraction, strictly growing."""
    global _last_tick
    tick = (time.time_ns() << 12) // 1_000_000
    with _lock:
        _last_tick = max(tick, _last_tick + 1)
        return _last_tick


def encode(kind: Kind, value: UUID) -> str:
    """The API form: `encode("job", id)` is `job_<32 hex digits>`."""
    return f"{PREFIXES[kind]}_{value.hex}"


def parse(kind: Kind, text: str) -> UUID:
    """Read the API form back. ValueError says what is wrong with it."""
    prefix, _, digits = text.partition("_")
    if prefix != PREFIXES[kind] or len(digits) != 32 or not _HEX.issuperset(digits):
        raise ValueError(f"{text[:64]!r} is no {kind} id: expected {PREFIXES[kind]}_ and 32 hex digits")
    return UUID(hex=digits)
