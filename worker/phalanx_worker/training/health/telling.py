"""How a rank says what a check found, and how it ends itself for it.

Owns who speaks: every rank comes to the same finding, so the first tells it; where the attempt is to end, one rank of
each node does, since a node believes the rank that ends.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist
from phalanx import job

log = logging.getLogger("phalanx.training.health")

END_WAIT_S = 5.0  # at most, for the node to end the ranks that have said nothing themselves
LOOK_S = 0.02


@dataclass(frozen=True)
class Finding:
    """What a check found at a step, as a sentence without its full stop. `blamed`: the rank, where one is."""

    check: str
    step: int
    message: str
    blamed: int | None = None


class Unhealthy(SystemExit):
    """Ends this rank with exit code 1: a check found what the job file wants to end the attempt for."""


def tell(finding: Finding, action: str) -> None:
    """Tell it, once for the whole job, together with what is being done about it."""
    if dist.get_rank() == 0:
        _mark(finding, action)


def end(finding: Finding, action: str) -> NoReturn:
    """End the attempt for it: `restart`, or `stop` for good. Raises Unhealthy on every rank."""
    if int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0:
        _mark(finding, action)
    elif "PHALANX_JOB_ID" in os.environ:
        _wait_for_the_end()
    raise Unhealthy(f"{finding.message}: {action}")


def _wait_for_the_end() -> None:
    """Of this rank, which its node asks to stop as soon as the first has ended."""
    until = time.monotonic() + END_WAIT_S
    while time.monotonic() < until and not job.should_stop():
        time.sleep(LOOK_S)


def _mark(finding: Finding, action: str) -> None:
    log.warning("%s (%s)", finding.message, action)
    job.mark(
        "health",
        check=finding.check,
        action=action,
        message=finding.message,
        blamed=finding.blamed,
        step=finding.step,
    )
