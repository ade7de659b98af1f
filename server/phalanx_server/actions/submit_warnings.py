"""What is accepted and may still not be as it was meant: said with the answer to a submit.

Owns that a warning never costs more than it is worth: one that cannot be worked out is left out, and so are those of
memory that would keep others waiting.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from phalanx_server.actions.hardware import GIB, Hardware
from phalanx_server.domain.health_spec import OF_RECIPES
from phalanx_server.domain.memory_estimate import estimate_of
from phalanx_server.domain.resources import Shape
from phalanx_server.domain.spec import JobSpec, Resources

log = structlog.get_logger("phalanx.submits")

ESTIMATES_S = 0.25
"""So long the memory of recipes is worked out for jobs that are checked together, some milliseconds each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warnings:
    """What to say of one job, by what it is about: an answer that says a part of it elsewhere leaves that out. In
    sentences without an end, like errors."""

    never: Sequence[str] = ()  # why it cannot start on the nodes that there are
    memory: Sequence[str] = ()  # that its recipe needs
    others: Sequence[str] = ()

    @property
    def all(self) -> list[str]:
        return [*self.never, *self.others, *self.memory]


def warnings_of(spec: JobSpec, hardware: Hardware) -> Warnings:
    """What follows from the hardware, or from the job alone: all but `memory`."""
    never = _found(lambda: _more_than_all(spec.resources, hardware))
    unshared = _found(lambda: _unshared_checkpoints(spec, hardware))
    return Warnings(never=never, others=[*unshared, *_checks_of_recipes(spec)])


async def memory_warnings(specs: Sequence[JobSpec], most_s: float = ESTIMATES_S) -> list[list[str]]:
    """For each job what follows from the memory that its recipe needs; nothing for those that come after `most_s` of
    work. Others have their turn between two jobs."""
    found: list[list[str]] = []
    spent_s = 0.0
    for spec in specs:
        if spec.run.recipe is None or spent_s >= most_s:
            found.append([])
            continue
        await asyncio.sleep(0)
        started = time.perf_counter()
        found.append(_found(lambda spec=spec: _too_large(spec)))
        spent_s += time.perf_counter() - started
    return found


def _found(warnings: Callable[[], list[str]]) -> list[str]:
    try:
        return warnings()
    except Exception:  # whatever is wrong with a warning, the job is not refused for it, nor any that came with it
        log.warning("warning_left_out", exc_info=True)
        return []


def _checks_of_recipes(spec: JobSpec) -> list[str]:
    """A command's ranks make no checks of their own."""
    if spec.health is None or spec.run.recipe is not None:
        return []
    asked = sorted(spec.health.model_fields_set & OF_RECIPES)
    return [f"health.{name} is looked for in recipes only: nobody looks for it in a command" for name in asked]


def _too_large(spec: JobSpec) -> list[str]:
    """Of the GPU types that the job names: an estimate, so it is accepted."""
    found = estimate_of(spec, ())
    return [f"each rank {message}" for _, fits, message in found.on if not fits] if found else []


def _more_than_all(asked: Resources, hardware: Hardware) -> list[str]:
    """Nodes may come: so it is accepted."""
    if not hardware.kinds or (most := hardware.most_replicas(asked)).replicas >= asked.replicas:
        return []
    shape = Shape(asked.gpus_per_replica, asked.cpus_per_replica, math.ceil(asked.memory_per_replica / GIB))
    types = " or ".join(asked.gpu_types)
    nodes = f"{types} nodes" if types and most.gpu_type is None else "nodes"
    on_type = f" on {most.gpu_type}" if most.gpu_type else ""
    one_type = ", and a gang lies on one GPU type" if most.of_several_types else ""
    return [
        f"it asks for {asked.replicas} × ({shape.describe(types or None)}), but all {nodes} together hold at most"
        f" {most.replicas} of these{on_type} in one cluster{one_type}, empty and in any state:"
        " it waits until there are more"
    ]


def _unshared_checkpoints(spec: JobSpec, hardware: Hardware) -> list[str]:
    asked = spec.resources
    if spec.checkpoint.url is not None or not hardware.unshared or hardware.most_on_one_node(asked) >= asked.replicas:
        return []
    some = ", ".join(hardware.unshared[:3]) + (", …" if len(hardware.unshared) > 3 else "")
    return [
        f"some nodes ({some}) do not share PHALANX_CHECKPOINT_DIR with others: ranks there would not find the"
        " checkpoints that other nodes wrote, nor others theirs; set checkpoint.url"
    ]
