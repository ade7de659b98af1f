"""Owns what a replica takes and what quotas count: GPUs of a type, `cpu` and `memory_gib`.

Refuses to know nodes, tenants and who holds what.
"""

from dataclasses import dataclass

CPU = "cpu"
MEMORY = "memory_gib"

Demand = tuple[tuple[str, int], ...]
"""Amounts by resource as quotas name them, none of them zero."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What one replica takes on its node."""

    gpus: int
    cpus: int
    memory_gib: int

    @property
    def is_cpu_only(self) -> bool:
        return self.gpus == 0

    def demand(self, gpu_type: str | None, replicas: int) -> Demand:
        """What so many replicas take of a tenant's quotas. Without a `gpu_type` GPUs count against none."""
        amounts = ((gpu_type, self.gpus), (CPU, self.cpus), (MEMORY, self.memory_gib))
        return tuple((name, each * replicas) for name, each in amounts if name is not None and each)

    def describe(self, gpu_type: str | None) -> str:
        """For people: `8 h100, 64 cpu`."""
        amounts = ((gpu_type or "gpu", self.gpus), (CPU, self.cpus), ("GiB memory", self.memory_gib))
        return ", ".join(f"{each} {name}" for name, each in amounts if each) or "nothing"
