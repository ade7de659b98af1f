"""Owns the files that a replay reads: the trace (CSV), the cluster and the profiles of elastic models (JSON).

Refuses to know the pass. Whatever is wrong with a file is a ValueError of one line that names the line or field.
The formats are plan-format's ("Traces"); columns and fields that are not named there are ignored.
"""

import csv
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NO_TENANT = "default"
COLUMNS = ("job_id", "submit_s", "duration_s", "gpus")
"""Those that a trace must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceJob:
    """One job as it was: it ran `duration_s` on `gpus` GPUs. None = not published."""

    id: str
    submit_s: float
    duration_s: float
    gpus: int
    cpus: int = 0
    gpu_type: str | None = None
    tenant: str = NO_TENANT
    user: str | None = None
    model: str | None = None
    time_limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """Identical nodes. `cpus_per_node` None = CPUs limit nothing."""

    nodes: int
    gpus_per_node: int
    gpu_type: str
    cpus_per_node: int | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes that one scheduler has. `tenant`: it is a virtual cluster, for this tenant alone."""

    name: str
    pools: tuple[Pool, ...]
    tenant: str | None = None

    @property
    def gpus(self) -> int:
        return sum(pool.nodes * pool.gpus_per_node for pool in self.pools)


Profiles = Mapping[str, Mapping[int, float]]
"""By model: the run time in seconds by number of GPUs."""


def read_trace(path: Path) -> list[TraceJob]:
    """The jobs, oldest first."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        head = [name.strip() for name in next(rows, [])]
        missing = [name for name in COLUMNS if name not in head]
        if missing:
            raise ValueError(f"the first line has no column {missing[0]}")
        jobs = list(_jobs(head, rows))
    jobs.sort(key=lambda job: (job.submit_s, job.id))
    return jobs


def _jobs(head: Sequence[str], rows: Any) -> Iterator[TraceJob]:
    seen: set[str] = set()
    for row in rows:
        if not row:
            continue
        try:
            job = _job(dict(zip(head, row, strict=False)))
        except ValueError as error:
            raise ValueError(f"line {rows.line_num}: {error}") from None
        if job.id in seen:
            raise ValueError(f"line {rows.line_num}: job_id {job.id} is given twice")
        seen.add(job.id)
        yield job


def _job(row: Mapping[str, str]) -> TraceJob:
    gpus = math.ceil(_number(row, "gpus"))  # a part of a GPU takes a whole one
    return TraceJob(
        id=row.get("job_id") or _lacks("job_id"),
        submit_s=_number(row, "submit_s"),
        duration_s=_number(row, "duration_s"),
        gpus=gpus,
        cpus=math.ceil(_number(row, "cpus")) if row.get("cpus") else 0,
        gpu_type=row.get("gpu_type") or None,
        tenant=row.get("tenant") or NO_TENANT,
        user=row.get("user") or None,
        model=row.get("model") or None,
        time_limit_s=_number(row, "time_limit_s") if row.get("time_limit_s") else None,
    )


def _lacks(column: str) -> str:
    raise ValueError(f"{column} is missing")


def _number(row: Mapping[str, str], column: str) -> float:
    text = row.get(column) or _lacks(column)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{column}: {text!r} is not a number of at least 0")
    return value


def read_clusters(path: Path) -> list[Cluster]:
    """The clusters: one, or with `vc_nodes` one for each of these tenants."""
    document = _object(path)
    pools = document.get("pools")
    if not isinstance(pools, list) or not pools:
        raise ValueError("pools: not a list of pools")
    read = tuple(_pool(pool, f"pools[{i}]") for i, pool in enumerate(pools))
    virtual = document.get("vc_nodes")
    if not virtual:
        return [Cluster(str(document.get("name") or "cluster"), read)]
    if not isinstance(virtual, Mapping):
        raise ValueError("vc_nodes: not an object")
    largest = max(read, key=lambda pool: pool.gpus_per_node)
    return [
        Cluster(name, (Pool(_count(virtual, name, "vc_nodes"), largest.gpus_per_node, largest.gpu_type),), tenant=name)
        for name in sorted(virtual)
    ]


def _pool(document: Any, where: str) -> Pool:
    if not isinstance(document, Mapping):
        raise ValueError(f"{where}: not an object")
    gpu_type = document.get("gpu_type")
    if not isinstance(gpu_type, str) or not gpu_type:
        raise ValueError(f"{where}.gpu_type: {gpu_type!r} is not a name")
    cpus = _count(document, "cpus_per_node", where) if "cpus_per_node" in document else None
    return Pool(_count(document, "nodes", where), _count(document, "gpus_per_node", where), gpu_type, cpus)


def _count(document: Mapping[str, Any], name: str, where: str) -> int:
    value = document.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{where}.{name}: {value!r} is not a whole number of at least 0")
    return value


def read_profiles(path: Path) -> Profiles:
    """Run times by model and number of GPUs."""
    return {name: _profile(name, profile) for name, profile in _object(path).items()}


def _profile(name: str, document: Any) -> Mapping[int, float]:
    times = document.get("runtime_s") if isinstance(document, Mapping) else None
    if not isinstance(times, Mapping) or "1" not in times:
        raise ValueError(f"{name}.runtime_s: not an object with a run time on 1 GPU")
    for gpus, seconds in times.items():
        if not gpus.isdecimal() or isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
            raise ValueError(f"{name}.runtime_s.{gpus}: {seconds!r} is not a run time")
    return {int(gpus): float(seconds) for gpus, seconds in sorted(times.items(), key=lambda item: int(item[0]))}


def _object(path: Path) -> Mapping[str, Any]:
    document = read_json(path)
    if not isinstance(document, Mapping):
        raise ValueError("not a JSON object")
    return document


def read_json(path: Path) -> Any:
    """The document in a file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
