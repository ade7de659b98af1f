"""Batches that could not be sent, on disk, oldest first, until the server is back; they survive the runner.

Owns `<data>/spool`: one file per batch, its name giving the order. Bounded: over the limit the oldest files lose their
metrics, then their logs, at last their marks, down to half the limit at once, and `dropped` marks in the newest say
what went. What each file holds is counted in memory, so that one that loses all of it need not be read. Knows no
network.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from phalanx_worker.node.outbox import GIVEN_UP_IN_ORDER, KINDS, AttemptKey, Batch, Item, Losses
from phalanx_worker.protocol import Fill


@dataclass
class Contents:
    """What one file holds: of whom, and by kind the bytes and what to tell should they be given up."""

    attempts: set[AttemptKey] = field(default_factory=set)
    bytes_by_kind: Counter[str] = field(default_factory=Counter)
    losses: dict[str, Losses] = field(default_factory=lambda: {kind: Losses() for kind in KINDS})
    count_by_kind: Counter[str] = field(default_factory=Counter)

    def add(self, item: Item, size_bytes: int) -> None:
        self.attempts.add(item.attempt)
        self.bytes_by_kind[item.kind] += size_bytes
        self.losses[item.kind].add([item])
        self.count_by_kind[item.kind] += not item.tells_of_losses


class Spool:
    """A queue of batches in files. A file that cannot be read is set aside, not sent and not fatal."""

    def __init__(self, directory: Path, *, limit_bytes: int = 256 << 20):
        self._directory = directory
        self._limit_bytes = limit_bytes
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for partial in directory.glob("*.part"):  # of a runner that died while it wrote
            partial.unlink(missing_ok=True)
        self._sizes = {path: path.stat().st_size for path in sorted(directory.glob("*.batch"))}
        self._contents: dict[Path, Contents] = {}  # not yet of an earlier runner's files
        self.dropped: Counter[str] = Counter()
        """How many items were given up, by kind."""
        last = max((path.name for path in self._sizes), default="0-")
        self._next_number = int(last.partition("-")[0]) + 1

    def within(self, name: str) -> Spool:
        """Another one, below this one's directory and with its bound."""
        return Spool(self._directory / name, limit_bytes=self._limit_bytes)

    @property
    def size_bytes(self) -> int:
        return sum(self._sizes.values())

    @property
    def fill(self) -> Fill:
        return Fill(self.size_bytes, self._limit_bytes)

    def __len__(self) -> int:
        return len(self._sizes)

    def holds(self, attempt: AttemptKey) -> bool:
        """Of an attempt of this runner: it knows its own files by heart."""
        return any(attempt in contents.attempts for contents in self._contents.values())

    def append(self, batch: Batch) -> Path:
        """Keep a batch behind all others. Raises OSError when the disk refuses."""
        path = self._directory / f"{self._next_number:012d}-{batch.boot}-{batch.seq}.batch"
        self._next_number += 1
        self.replace(path, batch)
        if self.size_bytes > self._limit_bytes:
            self._shrink(path, batch)
        return path

    def replace(self, path: Path, batch: Batch) -> None:
        """Let a file hold this batch, in its place in the queue. Raises OSError when the disk refuses."""
        head = {"boot": batch.boot, "seq": batch.seq, "postponed": batch.postponed}
        lines, contents = [json.dumps(head)], Contents()
        for item in batch.items:
            lines.append(f"{item.kind} {json.dumps([*item.attempt, item.rank])} {item.text}")
            contents.add(item, len(lines[-1]) + 1)
        data = "\n".join(lines).encode()
        partial = path.with_suffix(".part")
        partial.write_bytes(data)
        partial.replace(path)
        self._sizes[path] = len(data)
        self._contents[path] = contents

    def oldest(self) -> tuple[Path, Batch] | None:
        while self._sizes:
            path = next(iter(self._sizes))
            if (batch := self._read(path)) is not None:
                return path, batch
        return None

    def remove(self, path: Path) -> None:
        self._forget(path)
        path.unlink(missing_ok=True)

    def _shrink(self, newest: Path, batch: Batch) -> None:
        """Down to half the limit: what went file by file with each batch would stop the runner each time."""
        lost = Losses()
        for path, kinds in self._doomed(self.size_bytes - self._limit_bytes // 2).items():
            self._strip(path, kinds, lost)
        left = self._read(newest) if newest in self._sizes else None
        self.replace(newest, replace(batch, items=[*(left.items if left else ()), *lost.marks()]))

    def _doomed(self, excess_bytes: int) -> dict[Path, set[str]]:
        """Which kinds go from which files so that this much goes."""
        doomed: dict[Path, set[str]] = {}
        for kind in GIVEN_UP_IN_ORDER:
            for path in list(self._sizes):
                if excess_bytes <= 0:
                    return doomed
                contents = self._contents_of(path)
                if contents is not None and contents.bytes_by_kind[kind]:
                    doomed.setdefault(path, set()).add(kind)
                    excess_bytes -= contents.bytes_by_kind[kind]
        return doomed

    def _strip(self, path: Path, kinds: set[str], lost: Losses) -> None:
        contents = self._contents[path]
        if contents.bytes_by_kind.keys() <= kinds:
            self.remove(path)
        elif (batch := self._read(path)) is not None:
            self.replace(path, replace(batch, items=[item for item in batch.items if item.kind not in kinds]))
        for kind in kinds:
            lost.update(contents.losses[kind])
            self.dropped[kind] += contents.count_by_kind[kind]

    def _contents_of(self, path: Path) -> Contents | None:
        """None for a file that cannot be read."""
        if path not in self._contents and (batch := self._read(path)) is not None:
            contents = self._contents[path] = Contents()
            for item in batch.items:
                contents.add(item, len(item.text))
        return self._contents.get(path)

    def _read(self, path: Path) -> Batch | None:
        """None for a file that cannot be read, which is set aside."""
        try:
            return _read(path)
        except (OSError, ValueError):
            self._forget(path)
            path.rename(path.with_suffix(".unreadable"))
            return None

    def _forget(self, path: Path) -> None:
        self._sizes.pop(path, None)
        self._contents.pop(path, None)


def _read(path: Path) -> Batch:
    head, *lines = path.read_bytes().decode().split("\n")
    header = json.loads(head)
    items = [_read_item(line) for line in lines]
    return Batch(header["boot"], header["seq"], items, header.get("postponed", 0))


def _read_item(line: str) -> Item:
    kind, _, rest = line.partition(" ")
    (attempt_id, epoch, *rank), end = json.JSONDecoder().raw_decode(rest)
    key: AttemptKey = (attempt_id, epoch)
    return Item(kind, key, rest[end + 1 :], rank[0] if rank else 0)
