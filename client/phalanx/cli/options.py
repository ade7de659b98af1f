"""What commands share: how the value of an option is read. A value that cannot be is a CommandError that names the
option."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from phalanx.cli.failures import INVALID, CommandError
from phalanx.units import parse_duration


def labels(given: Iterable[str] | None) -> dict[str, str]:
    """What `--label KEY=VALUE` says, however often it is given."""
    pairs = [(text, *text.partition("=")) for text in given or ()]
    for text, key, equals, _ in pairs:
        if not key or not equals:
            raise CommandError(f"--label is {text!r}: expected KEY=VALUE, such as rack=r1", exit_code=INVALID)
    return {key: value for _, key, _, value in pairs}


def span(option: str, given: str) -> timedelta:
    """A duration."""
    try:
        return timedelta(seconds=parse_duration(given))
    except (ValueError, OverflowError):
        said = f"{option} is {given!r}: expected a duration such as 90m or 1h30m"
        raise CommandError(said, exit_code=INVALID) from None


def time(option: str, given: str, now: datetime) -> datetime:
    """A time as RFC 3339 has it, with a zone, or `+2h` from now on."""
    if given.startswith("+"):
        return after(now, span(option, given[1:]), f"{option} is {given!r}")
    try:
        at = datetime.fromisoformat(given)
    except ValueError:
        said = f"{option} is {given!r}: expected a time such as 2026-11-21T00:00:00Z, or +2h from now"
        raise CommandError(said, exit_code=INVALID) from None
    if at.tzinfo is None:
        raise CommandError(f"{option} has no time zone: end it with Z or an offset like +01:00", exit_code=INVALID)
    return at


def after(at: datetime, lasts: timedelta, said: str) -> datetime:
    """The time so much later; `said` begins the sentence where there is none."""
    try:
        return at + lasts
    except OverflowError:
        raise CommandError(f"{said}: that is after the year 9999", exit_code=INVALID) from None
