"""What Kueue and KAI-Scheduler publish of their own scale tests: what is submitted, and what they measured.

Figures of theirs were measured on their machines, without a real node or GPU, like ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

GPU = "h100"


@dataclass(frozen=True)
class JobSet:
    """Equal jobs of one queue, submitted at an interval."""

    name: str
    count: int
    gpus: int
    run_s: float
    every_s: float
    priority: int


@dataclass(frozen=True)
class Published:
    """What the others' run took: seconds from the first submit to the last end, share of the quota in use, and mean
    seconds from a job's submit to its admission, by name. None: not published."""

    source: str
    wall_s: float
    use: float | None = None
    admission_s: dict[str, float | None] | None = None


@dataclass(frozen=True)
class QueueShape:
    """Cohorts of equal queues, which lend to each other: in Phalanx a root tenant with a leaf for each queue. Within a
    queue jobs of higher priority evict, and any borrower gives back what a queue owns: the defaults of a tenant."""

    title: str
    cohorts: int
    queues: int
    nominal: int
    borrowing_limit: int
    sets: tuple[JobSet, ...]
    published: Published | None

    @property
    def tenants(self) -> list[str]:
        return [f"cohort{c}/q{q}" for c in range(self.cohorts) for q in range(self.queues)]

    @property
    def gpus(self) -> int:
        return self.cohorts * self.queues * self.nominal

    @property
    def jobs(self) -> int:
        return len(self.tenants) * sum(each.count for each in self.sets)

    @property
    def least_s(self) -> float:
        """What it takes when all GPUs are in use all the time, or the last job comes later."""
        work = sum(each.count * each.gpus * each.run_s for each in self.sets) / self.nominal
        last = max((each.count - 1) * each.every_s + each.run_s for each in self.sets)
        return max(work, last)

    def submits(self) -> Iterator[tuple[float, str, JobSet]]:
        """(seconds from the beginning, tenant, what kind of job), earliest first."""
        times = [
            (i * each.every_s, tenant, each) for tenant in self.tenants for each in self.sets for i in range(each.count)
        ]
        return iter(sorted(times, key=lambda entry: entry[0]))


BASELINE = QueueShape(
    title="Kueue's baseline",
    cohorts=5,
    queues=6,
    nominal=20,
    borrowing_limit=100,
    sets=(
        JobSet("small", count=350, gpus=1, run_s=0.2, every_s=0.1, priority=50),
        JobSet("medium", count=100, gpus=5, run_s=0.5, every_s=0.5, priority=100),
        JobSet("large", count=50, gpus=20, run_s=1.0, every_s=1.2, priority=200),
    ),
    published=Published(
        "kubernetes-sigs/kueue, test/performance/scheduler/configs/baseline/rangespec.yaml",
        wall_s=351.1,
        use=0.587,
        admission_s={"small": 215.5, "medium": 76.8, "large": 6.7},
    ),
)
LARGE = QueueShape(
    title="Kueue's large scale",
    cohorts=10,
    queues=100,
    nominal=20,
    borrowing_limit=100,
    sets=(
        JobSet("small", count=35, gpus=1, run_s=0.15, every_s=0.06, priority=50),
        JobSet("medium", count=11, gpus=5, run_s=0.35, every_s=0.3, priority=100),
        JobSet("large", count=4, gpus=20, run_s=0.7, every_s=0.7, priority=200),
    ),
    published=Published(
        "kubernetes-sigs/kueue, test/performance/scheduler/configs/large-scale (10 cohorts × 100 queues)",
        wall_s=1_179.0,
    ),
)


def smaller(shape: QueueShape, *, cohorts: int, part: int) -> QueueShape:
    """Fewer cohorts, and of each set of jobs one in `part`. There is nothing published to compare that with."""
    sets = tuple(replace(each, count=max(1, each.count // part)) for each in shape.sets)
    return replace(shape, title=f"{shape.title}, smaller", cohorts=cohorts, sets=sets, published=None)


@dataclass(frozen=True)
class KaiShape:
    """KAI-Scheduler's `test/e2e/scale`: a cluster filled with one-GPU jobs; one gang with a pod on every node of a
    cluster of zones × blocks × racks, racks preferred; and a gang that reclaims, but can get one GPU too few: how long
    until somebody says that it cannot be."""

    nodes: int = 500
    gpus_per_node: int = 8
    zones: int = 4
    blocks: int = 8
    racks: int = 8
    nodes_per_rack: int = 2
    verdict_nodes: int = 10
    published_s: tuple[float | None, float | None, float | None] = (398.0, 49.0, 249.0)

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def verdict_gpus(self) -> int:
        return self.verdict_nodes * self.gpus_per_node

    @property
    def gang_nodes(self) -> int:
        return self.zones * self.blocks * self.racks * self.nodes_per_rack

    def labels(self) -> list[dict[str, str]]:
        """Of each node of the gang's cluster."""
        out: list[dict[str, str]] = []
        for i in range(self.gang_nodes):
            rack = i // self.nodes_per_rack
            block, zone = rack // self.racks, rack // self.racks // self.blocks
            out.append({"zone": f"z{zone}", "block": f"b{block}", "rack": f"r{rack}"})
        return out


KAI = KaiShape()
KAI_QUICK = KaiShape(nodes=50, zones=2, blocks=2, racks=8, published_s=(None, None, None))
