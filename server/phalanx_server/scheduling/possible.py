"""Owns what could ever be: the GPU types on which a job could run if nothing else did, or why there is none.

Refuses to know what runs. Nodes of any state count, and the quotas with everybody else idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from phalanx_server.domain.reason import Impossible, in_slices
from phalanx_server.domain.resources import Demand
from phalanx_server.scheduling.fit import EmptyCluster
from phalanx_server.scheduling.order import Ask, ClassKey, JobClass
from phalanx_server.scheduling.world import World


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a job: a GPU type (None = a CPU job), and what that takes of its tenant's quotas, with all its
    replicas and with the least number of them. What is not limited is left out."""

    gpu_type: str | None
    demand: Demand
    least_demand: Demand


@dataclass(frozen=True, slots=True)
class _Remembered:
    of: EmptyCluster
    options: tuple[Option, ...]


def options_of(world: World, group: JobClass) -> tuple[Option, ...]:
    """The options of a class, best first; () = it can never start. Remembered until nodes or quotas change."""
    if not isinstance(group.options, _Remembered) or group.options.of is not world.empty:
        group.options = _Remembered(world.empty, possible_options(world, group.key))
    return group.options.options


def possible_options(world: World, key: ClassKey) -> tuple[Option, ...]:
    """The options of jobs of this class, best first; () = they can never start."""
    ask = key.ask
    types = [t for t in _named_types(world, ask) if _limit(world, key.tenant, ask, t) is None]
    most = [world.forest.limited(key.tenant, ask.shape.demand(t, ask.replicas)) for t in types]
    least = [world.forest.limited(key.tenant, ask.shape.demand(t, ask.least_replicas)) for t in types]
    return tuple(map(Option, types, most, least))


def explain_impossible(world: World, key: ClassKey) -> Impossible:
    """Why a class without options can never start."""
    limits = [_limit(world, key.tenant, key.ask, t) for t in _named_types(world, key.ask)]
    return Impossible(key.ask.describe(), tuple(x for x in limits if x) or ("there is no node with GPUs",))


def _named_types(world: World, ask: Ask) -> Sequence[str | None]:
    if ask.shape.is_cpu_only:
        return [None]
    return ask.gpu_types or world.table.gpu_types


def _limit(world: World, tenant: str, ask: Ask, gpu_type: str | None) -> str | None:
    largest = world.empty.largest_gang(ask, gpu_type)
    if largest < ask.least_replicas:
        replicas = f"{largest} of {ask.least_replicas} replicas" + (f" on {gpu_type}" if gpu_type else "")
        if ask.bound == "cluster":
            return f"all nodes together hold {replicas} in one cluster{in_slices(ask.slices)}"
        return f"the largest {ask.bound} holds {replicas}{in_slices(ask.slices)}"
    for resource, amount in ask.shape.demand(gpu_type, ask.least_replicas):
        most = world.forest.most(tenant, resource)
        if most is not None and amount > most:
            return f"the quotas allow {tenant} at most {most} {resource}"
    return None
