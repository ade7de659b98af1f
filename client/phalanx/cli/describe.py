"""A job in words: short texts that tables, the live display and the summary share. Pure."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from phalanx.cli import output
from phalanx.models import Attempt, Checkpoint, Job, Phases, Progress, RankExit, Speed
from phalanx.units import duration_text

GIVING_WAY = {
    "preemption": "gives way",
    "drain": "is moved off its node",
    "resize": "is resized",
    "migration": "is moved",
}
PHASE_NAMES = tuple(field.name for field in fields(Phases) if field.name not in ("raw", "total_s"))


def state(job: Job) -> str:
    asked = " (cancel requested)" if job.cancel_requested_at and not job.ended else ""
    held = " (held)" if job.held else ""
    why = f" ({job.reason})" if job.reason and job.reason != job.state else ""
    return f"{job.state}{why}{held}{asked}"


def hold(job: Job) -> str | None:
    """What a waiting job waits for; None where it does not."""
    if job.state != "queued" or job.hold is None:
        return None
    place = f"position {job.position}: " if job.position is not None else ""
    start = f"; expected to start {output.ago(job.hold.estimated_start)}" if job.hold.estimated_start else ""
    return f"{place}{job.hold.message or job.hold.reason} [{job.hold.reason}]{start}"


def last_end(job: Job) -> str | None:
    """How the last attempt of a waiting job ended; None where it has had none, or does not wait."""
    return f"its last attempt: {job.message}" if job.state == "queued" and job.message else None


def asked(job: Job) -> str:
    resources = job.spec.get("resources") or {}
    replicas, gpus = resources.get("replicas") or 1, resources.get("gpus_per_replica") or 0
    kinds = f" of {' or '.join(resources['gpu_types'])}" if resources.get("gpu_types") else ""
    kinds += _elastic(resources.get("elastic")) + _topology(resources.get("topology"))
    return f"{replicas} {'replica' if replicas == 1 else 'replicas'} × {gpus} {'GPU' if gpus == 1 else 'GPUs'}{kinds}"


def _elastic(asked: Mapping[str, Any] | None) -> str:
    return f", {asked['min_replicas']} to {asked['max_replicas']} replicas" if asked else ""


def _topology(asked: Mapping[str, Any] | None) -> str:
    if not asked:
        return ""
    level = f"within one {asked['required']}" if asked.get("required") else f"within one {asked['preferred']} if it can"
    slices = asked.get("slice")
    return f", {level}" + (f", each {slices['replicas']} within one {slices['level']}" if slices else "")


def array(job: Job) -> str | None:
    """Which job of which array it is."""
    if job.array is None:
        return None
    at_once = f", {job.array.max_running} at once" if job.array.max_running else ""
    return f"{job.array.id}, index {job.array.index} ({job.array.size} jobs{at_once})"


def after(job: Job) -> str | None:
    """What it was to wait for."""
    asked = job.spec.get("after") or {}
    parts = [
        f"{', '.join(asked[kind])} {verb}" for kind, verb in (("ok", "succeeded"), ("any", "ended")) if asked.get(kind)
    ]
    return "; ".join(parts) or None


def deadline(job: Job) -> datetime | None:
    given = job.spec.get("deadline")
    return datetime.fromisoformat(given) if given else None


def recipe(run: Mapping[str, Any]) -> str | None:
    """`recipe lm {"model": …}`."""
    return f"recipe {run['recipe']} {json.dumps(run.get('args') or {})}" if run.get("recipe") else None


def environment(job: Job) -> str | None:
    """The name of the job's environment, and how many requirements it has."""
    asked = (job.spec.get("run") or {}).get("environment") or {}
    count = len(asked.get("requirements") or ())
    parts = [asked.get("name"), f"{count} requirement{'' if count == 1 else 's'}" if count else None]
    return ", ".join(filter(None, parts)) or None


def gives_way(job: Job) -> str | None:
    """Why a job that is stopping does, where the scheduler decided it, and where it goes on."""
    found = job.attempt
    if job.state != "stopping" or found is None or found.stop_cause not in GIVING_WAY:
        return None
    to = "to" if found.stop_cause == "preemption" else "for"
    whom = f" {to} {found.stop_for}" if found.stop_for else ""
    why = f" ({found.stop_reason})" if found.stop_reason else ""
    return f"{GIVING_WAY[found.stop_cause]}{whom}{why}{_goes_on(found)}"


def _goes_on(found: Attempt) -> str:
    if found.next is None:
        return ""
    replicas = sum(item.replicas for item in found.next.placement)
    counted = "1 replica" if replicas == 1 else f"{replicas} replicas"
    return f", goes on with {counted} on {', '.join(item.node for item in found.next.placement)}"


def attempt(job: Job) -> str | None:
    if job.attempt is None:
        return None
    number = f"{job.attempt.number} of {job.attempts}" if job.attempts > 1 else str(job.attempt.number)
    failures = f", {job.failures} failed" if job.failures else ""
    resumed = f", went on from {job.attempt.resume_from}" if job.attempt.resume_from else ""
    return f"{number}: {job.attempt.outcome or job.attempt.state}{failures}{resumed}"


def places(found: Attempt | None) -> list[str]:
    """One line for each node that ranks ran on."""
    return [
        f"{place.node}  {span('rank', range(place.first_rank, place.first_rank + place.ranks))}"
        + (f"  {span('GPU', place.gpu_indices)}" if place.gpu_indices else "")
        for place in (found.placements if found else [])
    ]


def span(noun: str, numbers: Sequence[int]) -> str:
    """`rank 0`, `ranks 0–3`, `GPUs 0,2,5`."""
    plural = "" if len(numbers) == 1 else "s"
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{noun}{plural} {numbers[0]}–{numbers[-1]}"
    return f"{noun}{plural} {','.join(map(str, numbers))}"


def warmth(found: Attempt | None) -> str | None:
    """Whether ranks were forked from a warm process, and why not."""
    if found is None or not found.ranks:
        return None
    cold: dict[str, list[int]] = {}
    for rank in found.ranks:
        if not rank.warm:
            cold.setdefault(rank.cold_reason or "no reason given", []).append(rank.rank)
    if not cold:
        return "warm: forked with torch imported"
    said = "; ".join(f"{span('rank', ranks)} cold: {why}" for why, ranks in cold.items())
    warm = len(found.ranks) - sum(map(len, cold.values()))
    return f"{warm} warm; {said}" if warm else said


def step(progress: Progress | None) -> str | None:
    if progress is None or progress.step is None:
        return None
    return f"{progress.step}/{progress.total_steps}" if progress.total_steps else str(progress.step)


def values(progress: Progress | None) -> list[str]:
    """`loss 2.113`, `12,345 tokens/s`: what a person follows; other metrics are left to `phalanx metrics`."""
    found = progress.values if progress else {}
    said = [f"loss {output.number(found['loss'])}"] if "loss" in found else []
    rate = next((name for name in ("tokens_per_s", "samples_per_s") if name in found), None)
    return [*said, f"{output.number(found[rate])} {rate.removesuffix('_per_s')}/s"] if rate else said


def progress(found: Progress | None) -> str | None:
    parts = [f"step {step(found)}"] if step(found) else []
    return "  ".join(parts + values(found)) or None


def speeds(job: Job) -> list[str]:
    """One line for each number of replicas with which an elastic job, or an earlier one of its name, was measured."""
    kinds = {found.gpu_type for found in job.speeds}
    return [_speed(found, named=len(kinds) > 1) for found in job.speeds]


def _speed(found: Speed, *, named: bool) -> str:
    counted = "1 replica" if found.replicas == 1 else f"{found.replicas} replicas"
    on = f" of {found.gpu_type}" if named and found.gpu_type else ""
    rate = f"{output.number(found.per_s)} {(found.unit or '').removesuffix('_per_s')}/s" if found.per_s else None
    times = f"{found.relative:.2f} × one" if found.relative is not None and found.replicas > 1 else None
    said = ", ".join(filter(None, [rate, times])) or "1.00"
    return f"{counted}{on}: {said}{'' if found.per_s else ' (an earlier job of this name)'}"


def checkpoint(found: Checkpoint | None) -> str | None:
    if found is None:
        return None
    return f"{found.url} (step {found.step})" if found.step is not None else found.url


def reached(found: Phases | None) -> list[tuple[str, float]]:
    """The phases that the job has been through, in order, with their seconds."""
    if found is None:
        return []
    known = [(name, getattr(found, name)) for name in PHASE_NAMES]
    return [(name.removesuffix("_s").replace("_", " "), seconds) for name, seconds in known if seconds is not None]


def phases(found: Phases | None) -> str | None:
    parts = [f"{name} {duration_text(seconds)}" for name, seconds in reached(found)]
    if not parts or found is None:
        return None
    total = f"{duration_text(found.total_s)} after {start_of(found)} = " if found.total_s is not None else ""
    return total + " + ".join(parts)


def start_of(found: Phases) -> str:
    """What the phases count from: only a first attempt was accepted."""
    return "submit" if found.accepted_s is not None else "return to the queue"


def exits(found: Attempt | None) -> list[str]:
    """One line for each rank that did not end well."""
    return [f"rank {end.rank} {ending(end)}" for end in (found.exits if found else []) if not ended_well(end)]


def ended_well(end: RankExit) -> bool:
    return end.exit_code == 0


def ending(end: RankExit) -> str:
    if end.reason:
        return end.reason
    if end.oom:
        return "was ended for using more memory than it asked for"
    if end.signal is not None:
        return f"was ended by {_signal_name(end.signal)}"
    return "ended unseen" if end.exit_code is None else f"exited with {end.exit_code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def first_failure(found: Attempt | None) -> RankExit | None:
    """The rank whose end took the others with it: the first that failed by itself, by time, then by rank."""
    bad = [end for end in (found.exits if found else []) if not ended_well(end)]
    return min(bad, key=lambda end: (str(end.ended_at or "~"), end.rank), default=None)  # "~" sorts after any time
