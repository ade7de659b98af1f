"""Saving and restoring the state of training while it goes on.

Owns when the training thread is held, which checkpoint is resumed from, and that all ranks agree on it. What lies in a
checkpoint is torch's Distributed Checkpoint (tensors with their global shape and place, so that any layout and world
size reads it), where it lies is `checkpoint_store`'s.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import phalanx
import torch
import torch.distributed as dist
from phalanx.recipes.checkpoint import CheckpointConfig
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save
from torch.distributed.checkpoint.stateful import Stateful

from phalanx_worker.training import checkpoint_store
from phalanx_worker.training.checkpoint_reader import CheckpointPlanner, CheckpointReader
from phalanx_worker.training.checkpoint_store import CheckpointError, Entry, Manifest, Store, damage, unreadable
from phalanx_worker.training.checkpoint_writer import CheckpointWriter, Sums
from phalanx_worker.training.health.life import LONGEST_WAIT_S, life

log = logging.getLogger("phalanx.training.checkpoint")

SAVE_TIMEOUT = timedelta(seconds=LONGEST_WAIT_S)  # a rank's share may take its time, and training goes on meanwhile

State = Mapping[str, Stateful]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete. `took_s` is from the call to the manifest; known on rank 0 alone."""

    step: int
    url: str
    bytes: int
    took_s: float


def open_checkpointer(config: CheckpointConfig, *, replicas_differ: bool = False) -> Checkpointer | None:
    """A checkpointer for `config.url`, else for the job's own directory; None where there is neither."""
    url = config.url or os.environ.get("PHALANX_CHECKPOINT_DIR")
    if not url:
        return None
    resume_from = os.environ.get("PHALANX_RESUME_FROM")
    return Checkpointer(config, url, resume_from=resume_from, replicas_differ=replicas_differ)


class Checkpointer:
    """Every rank makes one, after the default process group, and calls each method at the same step.

    A save that fails is logged and counted in `failures`, and training goes on; `last` is then still the one before.
    Only the last one must not fail: see `finish`.
    `stall_s` is how long the training thread was held by saves, in all.

    What several ranks hold is written by one of them, each as much as the others. `replicas_differ`: they do not hold
    the same (moments, where replicas train alone), so the first writes all of it, for no mixture is anyone's state.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        url: str,
        *,
        resume_from: str | None = None,
        replicas_differ: bool = False,
        register: Callable[..., None] = phalanx.checkpoint,
    ):
        self.last: Saved | None = None
        self.failures = 0
        self.stall_s = 0.0
        self._config = config
        self._store = Store(url)
        self._resume_from = resume_from
        self._replicas_differ = replicas_differ
        self._register = register
        self._group = _own_group()
        self._rank = dist.get_rank(self._group) if self._group else 0
        self._stager = _stager()
        self._pending: tuple[int, AsyncSaveResponse] | None = None
        self._newest: int | None = None  # the step that was saved or restored last
        self._given: tuple[int, State, dict[str, float], int | None] | None = None  # to save last
        self._rating = threading.Lock()  # whether a rating or the manifest comes first
        self._rated: tuple[int, Mapping[str, float]] | None = None  # the last rating
        self._written: int | None = None  # the step of the last manifest
        self._failure: str | None = None  # why that save failed, if it did

    def save(
        self,
        step: int,
        state: State,
        *,
        metrics: Mapping[str, float] | None = None,
        keep_before: int | None = None,
        wait: bool = True,
    ) -> float:
        """Save the state as of `step`; how many seconds this thread was held: for a copy to the CPU, and for the save
        before where that is still being written. `metrics` decide which checkpoints are the best; the newest that is
        older than step `keep_before`, which never goes down, is kept too. Saving the same step again does nothing.

        Without `wait` the copy too is made aside, and the caller calls `staged()` before anything of the state
        changes: for most models before the next optimizer step, but a batch norm changes with the forward pass.
        """
        began = time.perf_counter()
        if step != self._newest:
            self._settle()
            self._newest = step
            self._given = (step, state, dict(metrics or {}), keep_before)
            self._start(*self._given)
            if not self._config.asynchronous:
                self._settle()
            elif wait:
                self._await_copy()
        return self._held(began)

    def staged(self) -> float:
        """Wait until the state is copied and may change; how many seconds this thread was held."""
        began = time.perf_counter()
        self._await_copy()
        return self._held(began)

    def rate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what was found later of the state that was saved or restored last to the metrics by which the best are
        kept. Never raises: at worst a checkpoint is not among them."""
        if self._rank or step != self._newest:
            return
        with self._rating:
            self._rated = (step, metrics)
            is_written = self._written == step
        if is_written:
            self._store.rate(step, metrics)

    def restore(self, state: State, *, before: int | None = None) -> int | None:
        """Load the newest complete and undamaged checkpoint (older than step `before`, to go back) into the state; its
        step, or None where nothing has been saved.

        What is newer no longer counts afterwards. Raises CheckpointError where the state does not fit the checkpoint,
        where the storage cannot be read, or where there are only damaged ones: starting anew is then for a person to
        decide.
        """
        self._settle()
        entry = self._choose(before)
        if entry is None:
            return None
        try:
            reader = CheckpointReader(entry.url)
            parts = cast(dict[str, Any], dict(state))
            load(parts, storage_reader=reader, planner=CheckpointPlanner(), process_group=self._group)
        except CheckpointException as error:
            raise CheckpointError(
                f"{entry.url} is whole but does not fit what is trained now ({_reason(error)}); restore the "
                "settings of model and optimizer, or save to another checkpoint.url"
            ) from error
        self._newest = entry.step
        self._written = entry.step if entry.url == self._store.url_of(entry.step) else None
        self._given = self._failure = self._rated = None
        log.info("resumed from %s, step %d", entry.url, entry.step)
        return entry.step

    def finish(self) -> None:
        """Wait until the last save is complete; nothing can be saved afterwards. One that failed is tried once more,
        so the state must still be as it was given. Raises CheckpointError, on every rank, if it fails again."""
        self._settle()
        try:
            if self._given is not None and self._failures():
                self._start(*self._given)
                self._settle()
                self._demand_saved(self._given[0])
        finally:
            self._stager.close()

    def _failures(self) -> list[str]:
        """Why the last save failed, from each rank where it did."""
        return [failure for failure in self._from_all(self._failure) if failure is not None]

    def _demand_saved(self, step: int) -> None:
        if failures := self._failures():
            raise CheckpointError(
                f"the last checkpoint, of step {step}, could not be saved to {self._store.url_of(step)}, tried twice "
                f"({failures[0]}); mend the storage and start again: it goes on from the checkpoint before"
            )

    def _start(self, step: int, state: State, metrics: dict[str, float], keep_before: int | None) -> None:
        writer = CheckpointWriter(
            self._store.url_of(step),
            sync=self._store.is_local,
            clear=partial(self._store.clear, step),
            complete=partial(self._complete, step, metrics, keep_before, time.perf_counter()),
        )
        if torch.accelerator.is_available():
            torch.accelerator.current_stream().synchronize()  # the copy is made on a stream that does not wait for it
        saving = async_save(
            cast(dict[str, Any], dict(state)),
            storage_writer=writer,
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=self._replicas_differ),
            process_group=self._group,
            async_stager=self._stager,
        )
        self._pending = (step, cast(AsyncSaveResponse, saving))

    def _await_copy(self) -> None:
        if self._pending is not None:
            wait_for([self._pending[1].staging_completion])  # if it failed, so does the save

    def _held(self, began: float) -> float:
        stall_s = time.perf_counter() - began
        self.stall_s += stall_s
        return stall_s

    def _settle(self) -> None:
        """Wait for the save that is under way, if any."""
        if self._pending is None:
            return
        (step, saving), self._pending, self._failure = self._pending, None, None
        try:
            saving.upload_completion.result()
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            self.failures += 1
            self._failure = _reason(error)
            log.error("the checkpoint of step %d could not be saved: %s", step, self._failure)

    def _complete(
        self, step: int, metrics: dict[str, float], keep_before: int | None, began: float, sums: Sums
    ) -> None:
        """On rank 0, in the thread that saves: every file is there."""
        with self._rating:
            if self._rated is not None and self._rated[0] == step:
                metrics = {**metrics, **self._rated[1]}
            manifest = Manifest(step=step, files=sums, metrics=metrics)
            self._store.complete(manifest)
            self._written = step
        url = self._store.url_of(step)
        self.last = Saved(step=step, url=url, bytes=manifest.bytes, took_s=time.perf_counter() - began)
        self._register(url, **{**metrics, "step": step, "bytes": manifest.bytes})
        self._store.prune(self._config, newest=step, keep_before=keep_before)

    def _choose(self, before: int | None) -> Entry | None:
        """The newest that can be used, the same on every rank."""
        entries = self._from_first(self._candidates)
        damaged: list[Entry] = []
        for entry in entries:
            if before is not None and entry.step >= before:
                continue
            if entry.fault == "unreadable":
                raise unreadable(f"{entry.url}: {entry.problem}")
            problems = [entry.problem] if entry.fault else self._damage(entry)
            if not problems:
                self._set_aside([other for other in entries if other.step > entry.step])
                return entry
            damaged += [entry] if entry.fault != "unfinished" else []
            self._say_unusable(entry, problems)
        if damaged:
            raise CheckpointError(
                f"{damaged[0].url} is damaged, and so is every one before it; remove them to start from the beginning"
            )
        return None

    def _candidates(self) -> list[Entry]:
        """What this job saved, newest first; where it has nothing yet, what it was told to resume from."""
        entries = self._store.entries(checkpoint_store.READ_PAUSES_S)
        if not self._resume_from or any(entry.manifest for entry in entries):
            return entries
        told = self._store.entry(self._resume_from, checkpoint_store.READ_PAUSES_S)
        if told.url in {entry.url for entry in entries}:
            return entries
        if told.manifest is None:
            raise CheckpointError(f"{told.url} cannot be resumed from: {told.problem}")
        return [*entries, told]

    def _damage(self, entry: Entry) -> list[str]:
        """What is wrong with the files of a complete checkpoint, each read by one of the ranks. Raises CheckpointError
        on every rank where one of them could not read its share."""
        assert entry.manifest is not None
        ranks = dist.get_world_size(self._group) if self._group else 1
        mine = sorted(entry.manifest.files)[self._rank :: ranks]
        found: list[str] | CheckpointError
        try:
            with life.at_storage():
                found = damage(entry, mine, whole=self._config.verify, moved=life.moved)
        except CheckpointError as error:
            found = error
        parts = self._from_all(found)
        for part in parts:
            if isinstance(part, CheckpointError):
                raise part
        return [problem for part in parts if isinstance(part, list) for problem in part]

    def _set_aside(self, entries: list[Entry]) -> None:
        """They are not on the way from here on: a restart must not go there."""
        self._from_first(lambda: [self._store.set_aside(entry.url) for entry in entries])

    def _say_unusable(self, entry: Entry, problems: list[str]) -> None:
        if self._rank == 0:
            for problem in problems:
                log.warning("checkpoint %s is not used: %s; trying the one before", entry.url, problem)

    def _from_all(self, value: _Value) -> list[_Value]:
        """What each rank gives, in their order."""
        if self._group is None:
            return [value]
        everyones: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyones, value, group=self._group)
        return everyones

    def _from_first(self, make: Callable[[], _Value]) -> _Value:
        """What `make` gives, or raises, on rank 0: on every rank."""
        if self._group is None:
            return make()
        box: list[Any] = [None, None]
        if self._rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]


def _reason(error: BaseException) -> str:
    """The error itself, or what the first rank said of which torch tells with all tracebacks."""
    if not isinstance(error, CheckpointException) or not error.failures:
        return f"{type(error).__name__}: {error}"
    rank, (inner, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(inner).__name__}: {inner}"


def _own_group() -> dist.ProcessGroup | None:
    """All ranks, on the CPU, for saves alone: in another thread they must not get between training's collectives."""
    if dist.is_initialized():
        return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT))
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return None


def _stager() -> DefaultStager:
    """Copies the state to the CPU in a thread, to the same memory each time; on CUDA to pinned memory."""
    cuda = torch.cuda.is_available()
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=cuda
        )
    )
