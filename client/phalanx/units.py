"""Durations and sizes as people write and read them; the server and the workers speak so too.

Owns the units: durations become seconds and words, sizes become bytes. ValueError says what was expected.
"""

import math
import re
from collections.abc import Mapping

SECONDS: Mapping[str, float] = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
BYTES: Mapping[str, int] = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("k", "M", "G", "T", "P"), start=1)},
    "KB": 1000,
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T", "P"), start=1)},
}
TEXT_MAX_CHARS = 64

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhdw]))+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_duration(given: object) -> float:
    """Seconds: a number, or text like `30s`, `4h`, `1h30m`."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        return _finite(given)
    text = given.replace(" ", "") if isinstance(given, str) and len(given) <= TEXT_MAX_CHARS else ""
    if not _DURATION.fullmatch(text):
        raise ValueError(f"expected a duration like 30s, 10m, 4h or a number of seconds, got {_shown(given)}")
    return _finite(sum(float(amount) * SECONDS[unit] for amount, unit in _PART.findall(text)))


def duration_text(seconds: float) -> str:
    """`0.231 s`, `2.5 s`, `42 s`, `7 min 03 s`, `3 h`, `5 h 12 min`, `3 d 4 h`."""
    if not math.isfinite(seconds):
        return f"{seconds:g} s"
    if seconds < 10 and seconds != int(seconds):
        return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60:02} s" if whole % 60 else "")
    if whole < 86400:
        hours, minutes = whole // 3600, whole % 3600 // 60
        return f"{hours} h" + (f" {minutes:02} min" if minutes else "")
    days, hours = whole // 86400, whole % 86400 // 3600
    return f"{days} d" + (f" {hours} h" if hours else "")


def parse_size(given: object) -> int:
    """Bytes: a whole number, or text like `64GiB`, `500MB`."""
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    match = _SIZE.fullmatch(given.strip()) if isinstance(given, str) and len(given) <= TEXT_MAX_CHARS else None
    if match is None or match[2] not in BYTES:
        raise ValueError(f"expected a size like 64GiB, 512MiB or a number of bytes, got {_shown(given)}")
    if match[2] == "" and "." in match[1]:
        raise ValueError(f"a size without a unit is a whole number of bytes, got {_shown(given)}")
    return round(_finite(float(match[1])) * BYTES[match[2]])


def _finite(seconds: float) -> float:
    """A float, refusing what no clock can show."""
    try:
        value = float(seconds)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _shown(given: object) -> str:
    return repr(given) if len(repr(given)) <= TEXT_MAX_CHARS else repr(given)[:TEXT_MAX_CHARS] + "…"
