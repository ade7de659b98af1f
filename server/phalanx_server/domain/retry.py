"""Whether a failed job is tried again, and when.

Owns the arithmetic only: pure, without jitter, because starts are spread by the scheduler.
"""

from dataclasses import dataclass

BACKOFF_MAX_S = 3600.0


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """`delay_s` is how long to wait first; 0 when there is no retry."""

    retry: bool
    delay_s: float = 0.0


def decide_retry(*, failures: int, max_retries: int, backoff_s: float) -> RetryDecision:
    """After the `failures`-th failure: exponential backoff from `backoff_s`, doubling, at most an hour."""
    if failures > max_retries:
        return RetryDecision(retry=False)
    doublings = min(max(failures - 1, 0), 32)
    return RetryDecision(retry=True, delay_s=min(backoff_s * 2**doublings, BACKOFF_MAX_S))
