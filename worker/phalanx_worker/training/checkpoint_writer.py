"""The storage end of torch's Distributed Checkpoint: files are summed as they are written, and the last word is ours.

Owns the stream that sums, in pieces that show that it goes on, and where in a save the directory is cleared and the
checkpoint declared complete. What is saved, by which rank, is torch's planner's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecWriter  # where torch documents them
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from phalanx_worker.training.checkpoint_store import Sum
from phalanx_worker.training.health.life import PIECE_BYTES, life

SYNC_BYTES = 1 << 30  # what a local file is ahead of its disk at most: else one fsync at its end could take very long

Sums = dict[str, Sum]


@dataclass(frozen=True)
class SummedResult(WriteResult):
    """What a rank tells the coordinator of a part it wrote: also the sum of the file that it is in."""

    sum: Sum


class CheckpointWriter(FsspecWriter):
    """Writes one checkpoint to an empty directory. On the coordinator `clear()` is called before any rank writes, and
    `complete(sums)` after every rank has written and torch's metadata is there."""

    def __init__(self, url: str, *, sync: bool, clear: Callable[[], None], complete: Callable[[Sums], None]):
        super().__init__(url, sync_files=sync)
        self._clear = clear
        self._complete = complete
        self._files = SummingFiles(self.fs, sync=sync)
        self.fs = self._files

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            self._clear()  # the others write only when they have the coordinator's plan

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.fs.mkdir(self.path)
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with life.at_storage():
            results = super().write_data(plan, planner).wait()
        summed: Future[list[WriteResult]] = Future()
        summed.set_result([self._summed(result) for result in results])
        return summed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        parts = cast(list[SummedResult], [result for rank in results for result in rank])
        self._complete({part.storage_data.relative_path: part.sum for part in parts} | self._files.sums_of_metadata())

    def _summed(self, result: WriteResult) -> SummedResult:
        total = self._files.sums[result.storage_data.relative_path]
        return SummedResult(result.index, result.size_in_bytes, result.storage_data, total)


class SummingFiles(FileSystem):
    """torch's file system on fsspec, which remembers the sum of every file that it wrote, by name."""

    def __init__(self, inner: FileSystem, *, sync: bool):
        super().__init__()
        self.fs = inner.fs
        self._sync = sync
        self.sums: Sums = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            summing = SummingStream(stream, sync=self._sync)
            yield summing
        self.sums[_name(path)] = summing.sum()

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.sums[_name(new_path)] = self.sums.pop(_name(path))

    def sums_of_metadata(self) -> Sums:
        return {name: total for name, total in self.sums.items() if name == ".metadata"}


class SummingStream:
    """A stream that is written from front to back, and the SHA-256 of what went through. `sync`: to the disk now and
    then, and not only in the end."""

    def __init__(self, stream: Any, *, sync: bool):
        self._stream = stream
        self._sync = sync
        self._digest = hashlib.sha256()
        self._bytes = self._synced_bytes = 0

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        for begin in range(0, whole.nbytes, PIECE_BYTES):
            self._write_piece(whole[begin : begin + PIECE_BYTES])
        return whole.nbytes

    def _write_piece(self, piece: memoryview) -> None:
        self._digest.update(piece)
        self._stream.write(piece)
        self._bytes += piece.nbytes
        if self._sync and self._bytes - self._synced_bytes >= SYNC_BYTES:
            os.fdatasync(self.fileno())
            self._synced_bytes = self._bytes
        life.moved()

    def sum(self) -> Sum:
        return Sum(self._bytes, self._digest.hexdigest())

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        """For fsync: what Python still holds back goes out first, which torch does not see to."""
        self._stream.flush()
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()


def _name(path: Any) -> str:
    return PurePosixPath(str(path)).name
