"""Batches that could not be sent, on disk, oldest first, until the server is back; they survive the runner.

Owns `<data>/spool`: one file per batch, its name giving the order. Bounded: over the limit the oldest files lose their
metrics, then their logs, at last their marks, and a `dropped` mark says what went. Knows no network.
"""

from __future__ import annotations

import json
from pathlib import Path

from phalanx_worker.node.outbox import GIVEN_UP_IN_ORDER, AttemptKey, Batch, Item, dropped_marks


class Spool:
    """A queue of batches in files. A file that cannot be read is set aside, not sent and not fatal."""

    def __init__(self, directory: Path, *, limit_bytes: int = 256 << 20):
        self._directory = directory
        self._limit_bytes = limit_bytes
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sizes = {path: path.stat().st_size for path in sorted(directory.glob("*.batch"))}
        last = max((path.name for path in self._sizes), default="0-")
        self._next_number = int(last.partition("-")[0]) + 1

    @property
    def size_bytes(self) -> int:
        return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._sizes)

    def append(self, batch: Batch) -> None:
        """Keep a batch. Raises OSError when the disk refuses."""
        path = self._directory / f"{self._next_number:012d}-{batch.boot}-{batch.seq}.batch"
        self._next_number += 1
        self._write(path, batch)
        if self.size_bytes > self._limit_bytes:
            self._shrink()

    def oldest(self) -> tuple[Path, Batch] | None:
        while self._sizes:
            path = next(iter(self._sizes))
            try:
                return path, _read(path)
            except (OSError, ValueError):
                self._set_aside(path)
        return None

    def remove(self, path: Path) -> None:
        self._sizes.pop(path, None)
        path.unlink(missing_ok=True)

    def _write(self, path: Path, batch: Batch) -> None:
        lines = [json.dumps({"boot": batch.boot, "seq": batch.seq})]
        lines += [f"{item.kind} {json.dumps(item.attempt)} {item.text}" for item in batch.items]
        data = "\n".join(lines).encode()
        partial = path.with_suffix(".part")
        partial.write_bytes(data)
        partial.replace(path)
        self._sizes[path] = len(data)

    def _shrink(self) -> None:
        for kind in GIVEN_UP_IN_ORDER:
            for path in list(self._sizes):
                if self.size_bytes <= self._limit_bytes:
                    return
                self._strip(path, kind)

    def _strip(self, path: Path, kind: str) -> None:
        try:
            batch = _read(path)
        except (OSError, ValueError):
            self._set_aside(path)
            return
        lost = [item for item in batch.items if item.kind == kind]
        if lost:
            kept = [item for item in batch.items if item.kind != kind]
            self._write(path, Batch(batch.boot, batch.seq, [*kept, *dropped_marks(lost)]))

    def _set_aside(self, path: Path) -> None:
        self._sizes.pop(path, None)
        path.rename(path.with_suffix(".unreadable"))


def _read(path: Path) -> Batch:
    head, *lines = path.read_bytes().decode().split("\n")
    header = json.loads(head)
    return Batch(header["boot"], header["seq"], [_read_item(line) for line in lines])


def _read_item(line: str) -> Item:
    kind, _, rest = line.partition(" ")
    (attempt_id, epoch), end = json.JSONDecoder().raw_decode(rest)
    key: AttemptKey = (attempt_id, epoch)
    return Item(kind, key, rest[end + 1 :])
