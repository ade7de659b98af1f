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
    known = {name: device for name in wanted if (device := _device(name)) is not None}
    said = memory.verdicts(config, spec.world_size, needed, list(known.values()))
    judged = [(name, memory.fits(needed, known[name]), text) for name, text in zip(known, said, strict=True)]
    return Estimate(asdict(needed), needed.total, tuple(judged))


def _device(name: str) -> devices.Device | None:
    try:
        return devices.find(name)
    except ValueError:
        return None
