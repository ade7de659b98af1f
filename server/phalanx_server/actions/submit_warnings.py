"""What is accepted and may still not be as it was meant: said with the answer to a submit."""

from __future__ import annotations

import math

from phalanx_server.actions.hardware import GIB, Hardware
from phalanx_server.domain.resources import Shape
from phalanx_server.domain.spec import JobSpec, Resources


def warnings_of(spec: JobSpec, hardware: Hardware) -> list[str]:
    """In sentences without an end, like errors."""
    return [*_more_than_all(spec.resources, hardware), *_unshared_checkpoints(spec, hardware)]


def _more_than_all(asked: Resources, hardware: Hardware) -> list[str]:
    """Nodes may come: so it is accepted."""
    if not hardware.kinds or (most := hardware.most_replicas(asked)) >= asked.replicas:
        return []
    shape = Shape(asked.gpus_per_replica, asked.cpus_per_replica, math.ceil(asked.memory_per_replica / GIB))
    types = " or ".join(asked.gpu_types)
    return [
        f"it asks for {asked.replicas} × ({shape.describe(types or None)}), but all {types + ' ' if types else ''}nodes"
        f" of one cluster together hold at most {most} of these, empty and in any state: it waits until there are more"
    ]


def _unshared_checkpoints(spec: JobSpec, hardware: Hardware) -> list[str]:
    if spec.checkpoint.url is not None or spec.resources.replicas == 1 or not hardware.unshared:
        return []
    return [
        f"PHALANX_CHECKPOINT_DIR is not shared between nodes ({', '.join(hardware.unshared[:3])}): a restart elsewhere"
        " would not find its checkpoints; set checkpoint.url"
    ]
