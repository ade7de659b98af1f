"""What each rank of a recipe is expected to need of its GPU's memory, and whether the GPU types of a job have that.

Owns the pairing of a job's GPU types with known devices; the arithmetic is `phalanx.recipes.memory`, which the CLI and
workers share.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from phalanx.recipes import catalog, devices, memory

from phalanx_server.domain.spec import JobSpec


@dataclass(frozen=True, slots=True)
class Estimate:
    """`parts` are bytes of the rank that needs most. `on`: (GPU type, does it fit, in words)."""

    parts: dict[str, int]
    total_bytes: int
    on: tuple[tuple[str, bool, str], ...]


def estimate_of(spec: JobSpec, gpu_types: Sequence[str]) -> Estimate | None:
    """Of a job that runs a recipe; None of any other. `gpu_types` are judged where the job names none; types that
    nobody knows the memory of are left out."""
    if spec.run.recipe is None:
        return None
    config = catalog.read(spec.run.recipe, spec.run.args)
    needed = memory.estimate(config, spec.world_size)
    wanted = spec.resources.gpu_types or tuple(gpu_types) if spec.resources.gpus_per_replica else ()
    judged = []
    for name in wanted:
        try:
            device = devices.find(name)
        except ValueError:
            continue
        judged.append((name, memory.fits(needed, device), memory.verdict(config, spec.world_size, device)))
    return Estimate(asdict(needed), needed.total, tuple(judged))
