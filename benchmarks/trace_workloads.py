"""The traces that policies are compared on, each with its cluster, and what others recorded or proved for it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phalanx_server.simulation.trace import Cluster, Pool, TraceJob, read_clusters, read_trace

ROOT = Path(__file__).resolve().parents[1]
TRACES = ROOT.parent / "shared" / "traces"
T4, V100 = "T4 (AWS g4dn.12xlarge)", "V100 profile"
POLLUX, TIRESIAS, EASY = "Pollux (elastic)", "Tiresias", "EASY, true"


@dataclass(frozen=True)
class Workload:
    """A trace on a cluster. `recorded`: average JCT by others, in seconds; `bound`: what no schedule can beat."""

    name: str
    trace: str
    clusters: Sequence[Cluster]
    tenants: Sequence[str] = ()
    profiles: str | None = None
    bound: float | None = None
    recorded: Mapping[str, float] = field(default_factory=dict)
    is_slow: bool = False
    """It takes long to replay."""

    def jobs(self) -> list[TraceJob]:
        return [job for job in read_trace(TRACES / self.trace) if not self.tenants or job.tenant in self.tenants]

    def aim(self, *, elastic: bool, srsf_s: float) -> float | None:
        """The mean that a policy without an oracle should stay below: Pollux, Tiresias less 15 %, EASY with true run
        times, or one and a half times what an oracle could do."""
        if elastic:
            return self.recorded.get(POLLUX)
        if TIRESIAS in self.recorded:
            return 0.85 * self.recorded[TIRESIAS]
        return self.recorded.get(EASY, 1.5 * srsf_s)


def workloads() -> Iterator[Workload]:
    """All of them; of Philly those virtual clusters that are short of GPUs."""
    for vc, bound, recorded in (
        ("2869ce", 74_492, {"first fit": 78_204, EASY: 78_281, "SJF, true": 77_883, "SRTF, true": 77_877}),
        ("103959", 25_743, {"first fit": 26_207, EASY: 26_195, "SJF, true": 25_976, "SRTF, true": 25_882}),
    ):
        its = [c for c in read_clusters(TRACES / "philly.cluster.json") if c.tenant == vc]
        yield Workload(f"Philly {vc}", "philly.csv.gz", its, tenants=[vc], bound=bound, recorded=recorded)
    small = ("103959", "2869ce", "e13805", "ed69ec")
    shared = [Cluster("shared", (Pool(12, 8, "24GB"),))]
    yield Workload("Philly, four VCs on a quarter of their nodes", "philly.csv.gz", shared, tenants=small, is_slow=True)
    for jobs, nodes, bound, recorded in (
        (120, 8, 5_511, {"first fit": 8_636, "SJF, true": 7_772, "SRTF, true": 7_150}),
        (460, 32, 5_766, {"first fit": 9_738, "SJF, true": 7_885, "SRTF, true": 7_471}),
    ):
        its = [Cluster("shockwave", (Pool(nodes, 4, V100),))]
        trace = f"shockwave/shockwave_{jobs}.csv"
        yield Workload(f"Shockwave {jobs}", trace, its, bound=bound, recorded=recorded, is_slow=jobs > 400)
    for number, ours, tiresias in ((1, 2_089, 2_474), (2, 3_323, 5_145), (3, 2_189, 3_876), (4, 2_721, 3_280)):
        yield _pollux(number, {POLLUX: ours, TIRESIAS: tiresias})


def _pollux(number: int, recorded: Mapping[str, float]) -> Workload:
    its = [Cluster("pollux", (Pool(16, 4, T4),))]
    trace, profiles = f"pollux/pollux_tuned_w{number}.csv", "pollux/profiles.json"
    return Workload(f"Pollux w{number}", trace, its, profiles=profiles, recorded=recorded)
