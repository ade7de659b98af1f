"""Owns `phalanx simulate`: a trace replayed through the scheduler's own planner, one JSON object out. Needs no server.

Refuses to decide anything, and to know how the replay goes (`simulation`).
"""

import gc
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

from phalanx_server.scheduling.documents import read_record
from phalanx_server.scheduling.snapshot import RECOMMENDED, Policy
from phalanx_server.simulation.figures import Summary, figures_of, summary_of
from phalanx_server.simulation.replay import Rules, Stuck, replay
from phalanx_server.simulation.trace import Cluster, TraceJob, read_clusters, read_json, read_profiles, read_trace

INVALID_INPUT = 2
STUCK = 1
WORTH_PROCESSES_JOBS = 5_000
"""With fewer jobs it takes longer to start processes than it saves."""

Share = tuple[Cluster, list[TraceJob]]
_Document = TypeVar("_Document")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("simulate")(simulate)


def simulate(
    trace: Annotated[Path, typer.Option(help="The jobs: a CSV file, perhaps with .gz.")],
    cluster: Annotated[Path, typer.Option(help="The nodes: a JSON file.")],
    policy: Annotated[
        Path | None,
        typer.Option(help="The `policy` of a snapshot, as a JSON file. Default: shortest, longer ones yield."),
    ] = None,
    clairvoyant: Annotated[
        bool, typer.Option("--clairvoyant", help="Let the planner know the true run times, for a bound.")
    ] = False,
    elastic: Annotated[
        Path | None, typer.Option(help="Run times by GPUs (JSON): jobs of these models are elastic.")
    ] = None,
    restart_s: Annotated[
        float | None, typer.Option(min=0, help="What each start after the first costs. Default: the policy's.")
    ] = None,
    min_runtime_s: Annotated[
        float, typer.Option(min=0, help="Nothing is evicted, resized or moved before it has run so long.")
    ] = 0.0,
    stop_s: Annotated[float, typer.Option(min=0, help="How long a job takes to stop.")] = 0.0,
    tenant: Annotated[
        list[str] | None, typer.Option("--tenant", "--vc", help="Only the jobs of this tenant; may be repeated.")
    ] = None,
) -> None:
    """Replay a trace through the scheduler and print what became of it."""
    chosen = RECOMMENDED if policy is None else _read(policy, lambda path: read_record(Policy, read_json(path)))
    rules = Rules(
        policy=chosen if restart_s is None else replace(chosen, restart_s=restart_s),
        clairvoyant=clairvoyant,
        profiles={} if elastic is None else _read(elastic, read_profiles),
        min_runtime_s=min_runtime_s,
        stop_s=stop_s,
    )
    jobs, clusters = _read(trace, read_trace), _read(cluster, read_clusters)
    if tenant:
        jobs = [job for job in jobs if job.tenant in tenant]
        clusters = [c for c in clusters if c.tenant is None or c.tenant in tenant]
        if not jobs:
            _fail(trace, f"it has no job of {', '.join(tenant)}")
    try:
        parts = _replay(_shared_out(jobs, clusters), rules)
    except Stuck as stuck:
        typer.echo(f"phalanx simulate: {trace}: {stuck}", err=True)
        raise typer.Exit(STUCK) from None
    skipped = len(jobs) - sum(len(part.outcomes) for part in parts)
    typer.echo(json.dumps(figures_of(parts, skipped=skipped), indent=2, ensure_ascii=False))


def _replay(shares: Sequence[Share], rules: Rules) -> list[Summary]:
    """All clusters, beside one another if that is worth the processes."""
    workers = min(len(shares), os.cpu_count() or 1)
    if workers == 1 or sum(len(rows) for _, rows in shares) < WORTH_PROCESSES_JOBS:
        return [_replay_one(share, rules) for share in shares]
    longest_first = sorted(shares, key=lambda share: -len(share[1]))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        replays = {share[0].name: pool.submit(_replay_one, share, rules) for share in longest_first}
        return [replays[cluster.name].result() for cluster, _ in shares]


def _replay_one(share: Share, rules: Rules) -> Summary:
    cluster, rows = share
    gc.freeze()  # the trace stays to the end: no need to look through it again and again
    return summary_of(replay(rows, cluster, rules))


def _shared_out(jobs: list[TraceJob], clusters: list[Cluster]) -> list[Share]:
    """Each cluster with the jobs that run there."""
    return [(its, [job for job in jobs if its.tenant in (None, job.tenant)]) for its in clusters]


def _read(path: Path, read: Callable[[Path], _Document]) -> _Document:
    try:
        return read(path)
    except OSError as error:
        _fail(path, error.strerror or str(error))
    except UnicodeDecodeError:
        _fail(path, "not UTF-8 text")
    except EOFError:
        _fail(path, "the compressed file ends too early")
    except ValueError as error:
        _fail(path, str(error))


def _fail(path: Path, problem: str) -> NoReturn:
    typer.echo(f"phalanx simulate: {path}: {problem}", err=True)
    raise typer.Exit(INVALID_INPUT)
