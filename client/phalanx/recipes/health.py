"""What a recipe looks for while it trains, and what it does about it: the job file's `health` as ranks are told it.

Owns the names and defaults on this side; `PHALANX_HEALTH` brings what the job file says (`tests/contract` compares
them). What each check means: docs/training.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

VARIABLE = "PHALANX_HEALTH"
"""The environment variable of ranks: the job file's `health` as JSON, all of it."""


@dataclass(frozen=True, slots=True)
class NotFinite:
    """NaN or infinity in the loss or the gradients."""

    action: str = "skip"  # off, warn, skip, rollback, stop
    most: int = 10  # steps in a row that are skipped, before it is rolled back


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss of more than `factor` typical deviations over the median of the last `window` steps."""

    action: str = "warn"  # off, warn, skip, rollback, stop
    factor: float = 10.0
    window: int = 64


@dataclass(frozen=True, slots=True)
class Divergence:
    """A loss that stays, for `steps` steps, over `factor` times the lowest median so far."""

    action: str = "warn"  # off, warn, rollback, stop
    factor: float = 1.5
    steps: int = 500


@dataclass(frozen=True, slots=True)
class Corruption:
    """Replicas whose parameters differ, compared by checksum every `every` steps."""

    action: str = "restart"  # off, warn, rollback, restart, stop
    every: int = 500


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank whose own work takes `factor` times the median of its pipeline stage, over `window`
    steps."""

    action: str = "warn"  # off, warn, restart, stop
    factor: float = 1.5
    window: int = 50


@dataclass(frozen=True, slots=True)
class Health:
    """The checks that ranks make themselves. Their node looks for hangs and GPU faults."""

    nan: NotFinite = field(default_factory=NotFinite)
    spike: Spike = field(default_factory=Spike)
    divergence: Divergence = field(default_factory=Divergence)
    corruption: Corruption = field(default_factory=Corruption)
    straggler: Straggler = field(default_factory=Straggler)
