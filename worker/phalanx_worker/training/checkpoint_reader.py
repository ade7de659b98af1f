"""How torch's Distributed Checkpoint is read: in pieces that show that it goes on, and without what it lacks.

Owns the stream of these pieces, and what a checkpoint need not have. What is read, by which rank, is torch's planner's.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader  # where torch documents it
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from phalanx_worker.training.health.life import PIECE_BYTES, life

OPTIONAL = ("health", "outer")  # parts that checkpoints of earlier versions lack, or of jobs that went without


class CheckpointPlanner(DefaultLoadPlanner):
    """Leaves values of the OPTIONAL parts as they are where the checkpoint has none; all others it has to have."""

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        has = self.metadata.state_dict_metadata
        self.state_dict = {
            name: value
            for name, value in self.state_dict.items()
            if name in has or self.mappings[name][0] not in OPTIONAL
        }
        return super().create_local_plan()


class CheckpointReader(FsspecReader):
    """Reads one checkpoint."""

    def __init__(self, url: str):
        super().__init__(url)
        self.fs = Files(self.fs)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with life.at_storage():
            return super().read_data(plan, planner)


class Files(FileSystem):
    """torch's file system on fsspec, whose files are read in pieces."""

    def __init__(self, inner: FileSystem):
        super().__init__()
        self.fs = inner.fs

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:
            yield Pieces(stream)


class Pieces:
    """A stream that is read in pieces of PIECE_BYTES."""

    def __init__(self, stream: Any):
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        pieces: list[bytes] = []
        left = float("inf") if size is None or size < 0 else size
        while left > 0 and (piece := self._read_piece(int(min(left, PIECE_BYTES)))):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _read_piece(self, size: int) -> bytes:
        piece = self._stream.read(size)
        life.moved()
        return piece

    def readinto(self, buffer: Any) -> int:
        whole, done = memoryview(buffer).cast("B"), 0
        while done < whole.nbytes and (count := self._stream.readinto(whole[done : done + PIECE_BYTES])):
            life.moved()
            done += count
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
