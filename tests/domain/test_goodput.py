"""How an attempt's time is split: the parts add up, and nothing counts twice."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phalanx_server.domain.goodput import PARTS, AttemptTime, goodput_of

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float | None) -> datetime | None:
    return None if seconds is None else T0 + timedelta(seconds=seconds)


def attempt(
    begin: float = 0.0,
    *,
    started: float | None = 2,
    rendezvous: float | None = 3,
    step: float | None = 5,
    stop: float | None = None,
    end: float | None = 105,
    weight: int = 1,
    **known: Any,
) -> AttemptTime:
    return AttemptTime(
        weight=weight,
        created_at=T0 + timedelta(seconds=begin),
        started_at=at(started),
        rendezvous_at=at(rendezvous),
        first_step_at=at(step),
        stop_requested_at=at(stop),
        ended_at=at(end),
        **known,
    )


def parts(*attempts: AttemptTime, now: float = 1_000) -> dict[str, float]:
    now_at = at(now)
    assert now_at is not None
    return {part: round(seconds, 6) for part, seconds in goodput_of(attempts, now_at).parts.items() if seconds}


TABLE: dict[str, tuple[tuple[AttemptTime, ...], dict[str, float]]] = {
    "a job that says itself how long its steps took": (
        (attempt(productive_s=80, data_wait_s=6, checkpoint_s=4, rolled_back_s=3),),
        {
            "start": 2,
            "rendezvous": 1,
            "setup": 2,
            "productive": 80,
            "data_wait": 6,
            "checkpoint": 4,
            "rolled_back": 3,
            "other": 7,
        },
    ),
    "one that does not": ((attempt(),), {"start": 2, "rendezvous": 1, "setup": 2, "productive": 100}),
    "what comes after the last step it reported is not productive": (
        (replace(attempt(), last_step_at=T0 + timedelta(seconds=45)),),
        {"start": 2, "rendezvous": 1, "setup": 2, "productive": 40, "other": 60},
    ),
    "time counts for each GPU": (
        (attempt(weight=8),),
        {"start": 16, "rendezvous": 8, "setup": 16, "productive": 800},
    ),
    "one that has not got to its ranks": (
        (attempt(started=None, rendezvous=None, step=None, end=None),),
        {"start": 1_000},
    ),
    "one that never took a step": ((attempt(step=None),), {"start": 2, "rendezvous": 1, "setup": 102}),
    "no process group, but steps": ((attempt(rendezvous=None),), {"start": 2, "rendezvous": 3, "productive": 100}),
    "stopping is told apart": (
        (attempt(stop=95, productive_s=90),),
        {"start": 2, "rendezvous": 1, "setup": 2, "productive": 90, "stopping": 10},
    ),
    "what the next attempt does again was in vain": (
        (
            attempt(productive_s=100, first_step=1, last_step=100),
            attempt(
                200, started=202, rendezvous=203, step=205, end=305, productive_s=100, first_step=76, last_step=175
            ),
        ),
        {"start": 4, "rendezvous": 2, "setup": 4, "productive": 175, "redone": 25},
    ),
    "an attempt that begins anew makes all in vain": (
        (
            attempt(first_step=1, last_step=50),
            attempt(200, started=202, rendezvous=203, step=205, end=255, first_step=1, last_step=25),
        ),
        {"start": 4, "rendezvous": 2, "setup": 4, "productive": 50, "redone": 100},
    ),
    "an attempt that took no step hides nothing of what is taken again": (
        (
            attempt(first_step=1, last_step=100),
            attempt(200, started=202, rendezvous=203, step=None, end=210),
            attempt(300, started=302, rendezvous=303, step=305, end=355, first_step=51, last_step=100),
        ),
        {"start": 6, "rendezvous": 3, "setup": 11, "productive": 100, "redone": 50},
    ),
    "a later attempt may go back further than the next": (
        (
            attempt(first_step=1, last_step=100),
            attempt(200, started=202, rendezvous=203, step=205, end=225, first_step=81, last_step=100),
            attempt(300, started=302, rendezvous=303, step=305, end=385, first_step=21, last_step=100),
        ),
        {"start": 6, "rendezvous": 3, "setup": 6, "productive": 100, "redone": 100},
    ),
    "a later attempt may go back behind its own beginning": (
        (
            attempt(first_step=1, last_step=100),
            attempt(
                200,
                started=202,
                rendezvous=203,
                step=205,
                end=305,
                productive_s=80,
                rolled_back_s=20,
                first_step=61,
                last_step=140,
            ),
        ),
        {"start": 4, "rendezvous": 2, "setup": 4, "productive": 140, "rolled_back": 20, "redone": 40},
    ),
    "clocks of ranks that run ahead make no more time than there was": (
        (attempt(productive_s=500, data_wait_s=20),),
        {"start": 2, "rendezvous": 1, "setup": 2, "productive": 80, "data_wait": 20},
    ),
}


@pytest.mark.parametrize("sentence", TABLE)
def test_time_goes(sentence: str) -> None:
    attempts, expected = TABLE[sentence]
    assert parts(*attempts) == expected


def test_is_measured_only_if_every_attempt_that_trained_says_so() -> None:
    now = T0 + timedelta(hours=1)
    never = attempt(step=None)
    assert goodput_of([attempt(productive_s=10), never], now).is_measured
    assert not goodput_of([attempt(productive_s=10), attempt()], now).is_measured
    assert goodput_of([], now).share is None


moments, amounts = st.none() | st.integers(-50, 500), st.none() | st.integers(-5, 1_000)
TIMES = dict.fromkeys(("started", "rendezvous", "step", "stop", "end"), moments)
STEPS = dict.fromkeys(("first_step", "last_step", "productive_s"), amounts)
TOTALS = dict.fromkeys(("data_wait_s", "checkpoint_s", "rolled_back_s"), st.integers(-5, 1_000))


@given(st.lists(st.fixed_dictionaries({**TIMES, **STEPS, **TOTALS, "weight": st.integers(1, 8)}), max_size=3))
def test_parts_are_never_negative_and_add_up_to_all_the_time_there_was(attempts: list[dict[str, Any]]) -> None:
    now = T0 + timedelta(seconds=600)
    told = [attempt(**each) for each in attempts]
    found = goodput_of(told, now)
    assert set(found.parts) == set(PARTS)
    assert min(found.parts.values()) >= -1e-6
    whole = sum(each.weight * max(((each.ended_at or now) - each.created_at).total_seconds(), 0) for each in told)
    assert found.allocated == pytest.approx(whole, abs=1e-3)
