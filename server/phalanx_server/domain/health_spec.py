"""The job file's say on health: what is looked for while a job trains, and what is done about it.

Owns these keys, their defaults and which action goes with which check; `nan: stop` is short for `nan: {action: stop}`.
What a check means and how it is made is the worker's (docs/training.md), which is told all of this: the node runner
`hang`, `gpu` and `preflight`, for any script that reports its steps; the ranks of a recipe the others.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from phalanx_server.domain.field_types import Duration, Part, Whole

Factor = Annotated[float, Field(gt=1, le=1_000_000)]
Steps = Annotated[Whole, Field(ge=1, le=1_000_000_000)]


class Check(Part):
    """One thing that is looked for."""

    @model_validator(mode="before")
    @classmethod
    def _action_alone(cls, given: Any) -> Any:
        return {"action": given} if isinstance(given, str) else {"action": "off"} if given is False else given


class NotFinite(Check):
    """NaN or infinity in the loss or the gradients. `skip`: that step changes nothing; after `most` in a row it is
    rolled back."""

    action: Literal["off", "warn", "skip", "rollback", "stop"] = "skip"
    most: Steps = 10


class Spike(Check):
    """A loss of more than `factor` typical deviations over the median of the last `window` steps."""

    action: Literal["off", "warn", "skip", "rollback", "stop"] = "warn"
    factor: Factor = 10.0
    window: Annotated[Steps, Field(ge=8, le=100_000)] = 64


class Divergence(Check):
    """A loss that stays, for `steps` steps, over `factor` times the lowest median so far."""

    action: Literal["off", "warn", "rollback", "stop"] = "warn"
    factor: Factor = 1.5
    steps: Steps = 500


class Corruption(Check):
    """Replicas whose parameters differ, compared by checksum every `every` steps."""

    action: Literal["off", "warn", "rollback", "restart", "stop"] = "restart"
    every: Steps = 500


class Hang(Check):
    """No step for `factor` times the median time of a step, and for `at_least`: the stacks of every rank are kept."""

    action: Literal["off", "warn", "restart", "stop"] = "warn"
    factor: Factor = 20.0
    at_least: Annotated[Duration, Field(ge=1)] = 300.0


class Straggler(Check):
    """A rank whose own work takes `factor` times the median of its pipeline stage, over `window`
    steps."""

    action: Literal["off", "warn", "restart", "stop"] = "warn"
    factor: Factor = 1.5
    window: Annotated[Steps, Field(ge=8, le=100_000)] = 50


class Gpu(Check):
    """What the driver says of the job's GPUs: faults (Xid), memory errors that could not be corrected, heat."""

    action: Literal["off", "warn", "restart", "stop"] = "warn"


class Preflight(Check):
    """Before the ranks of each attempt begin: memory, speed and all-reduces of its nodes, against each other. A node
    that does worse than `factor` times the others is left out, and the gang placed again."""

    action: Literal["off", "replace"] = "off"
    factor: Factor = 1.5


OF_RECIPES = frozenset({"nan", "spike", "divergence", "corruption", "straggler"})
"""The checks that the ranks of a recipe make; the others are the node's."""


class Health(Part):
    nan: NotFinite = NotFinite()
    spike: Spike = Spike()
    divergence: Divergence = Divergence()
    corruption: Corruption = Corruption()
    hang: Hang = Hang()
    straggler: Straggler = Straggler()
    gpu: Gpu = Gpu()
    preflight: Preflight = Preflight()
