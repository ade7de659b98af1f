"""Owns the look ahead: what is expected to end and to start, and what would be free at each of these moments.

Refuses to know who waits for it. The changes are kept as arrays, so that one look at a few hundred of them costs as
much as one at a few nodes: `moments_with_room` counts for all moments at once, `Outlook.book` makes the book of one.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from phalanx_server.scheduling.draft import Book, Draft
from phalanx_server.scheduling.fit import room
from phalanx_server.scheduling.nodes import CPUS, GPUS, Amounts, Mask, usable
from phalanx_server.scheduling.order import Ask
from phalanx_server.scheduling.world import Load

Indexes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Change:
    """At a moment a job gives back what it takes (`times` -1), or takes it (1)."""

    at: float
    load: Load
    times: int
    is_reserved: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Flat:
    """Changes by what they free on each node (negative: take), in no particular order. `whose`: the number of the
    change that each column belongs to."""

    changes: tuple[Change, ...]
    at: NDArray[np.float64]
    whose: Indexes
    columns: Indexes
    freed: Amounts

    @staticmethod
    def of(changes: Iterable[Change]) -> "_Flat":
        found = tuple(changes)
        columns = [c.load.columns for c in found]
        return _Flat(
            found,
            at=np.array([c.at for c in found]),
            whose=np.repeat(np.arange(len(found)), [len(on) for on in columns]),
            columns=np.array([column for on in columns for column in on], dtype=np.int64),
            freed=np.concatenate([np.zeros((3, 0), np.int64), *(-c.times * c.load.amounts for c in found)], axis=1),
        )

    def and_those(self, other: "_Flat") -> "_Flat":
        """Both."""
        return _Flat(
            self.changes + other.changes,
            at=np.concatenate([self.at, other.at]),
            whose=np.concatenate([self.whose, other.whose + len(self.changes)]),
            columns=np.concatenate([self.columns, other.columns]),
            freed=np.concatenate([self.freed, other.freed], axis=1),
        )


class Outlook:
    """What is expected after *soon*: the next `most_ends` ends of running jobs, and up to the last of them what
    else the pass has decided and reserved."""

    def __init__(self, draft: Draft, most_ends: int) -> None:
        self._draft = draft
        ends = _ends(draft, most_ends)
        self.is_whole = len(ends.changes) < most_ends
        """Is there nothing after it?"""
        until = inf if self.is_whole else float(ends.at.max())
        self._flat = ends.and_those(_Flat.of(c for c in _decided(draft) if c.at <= until))
        windows = [at for at in draft.windows.ends if at <= until]
        self.moments: NDArray[np.float64] = np.unique(np.concatenate([self._flat.at, windows]))

    def book(self, at: float, *, but_reserved: bool = False) -> Book:
        """The book of a moment. `but_reserved`: as if nothing were reserved."""
        draft, flat = self._draft, self._flat
        over = np.array([c.at <= at and not (but_reserved and c.is_reserved) for c in flat.changes], dtype=np.bool_)
        on = over[flat.whose]
        columns = flat.columns[on]
        free = draft.soon.free.copy()
        for row, freed in zip(free, flat.freed[:, on], strict=True):
            np.add.at(row, columns, freed)
        passed = [c for c, is_over in zip(flat.changes, over.tolist(), strict=True) if is_over]
        use = draft.soon.use.after((c.load.tenant, c.load.demand, c.times) for c in passed)
        occupants = None if draft.soon.occupants is None else draft.soon.occupants.copy()
        if occupants is not None:
            for change in passed:
                load = change.load
                occupants.enter(load.account, load.columns, load.replicas, times=change.times)
        return Book(at, free, use, occupants)

    def books(self, moments: Sequence[float]) -> Iterator[tuple[float, Book]]:
        """The books of moments one after the other, each made from the one before."""
        changes = sorted(self._flat.changes, key=attrgetter("at"))
        book = None
        for at in moments:
            if book is None:
                book = self.book(at)
            else:
                first, last = (bisect_right(changes, moment, key=attrgetter("at")) for moment in (book.at, at))
                book = book.copy(at)
                for change in changes[first:last]:
                    book.take(change.load, change.times)
            yield at, book

    def moments_with_room(self, ask: Ask, allowed: Mask) -> Indexes:
        """The numbers of the moments at which the allowed nodes, all together, have room for the least number of
        replicas."""
        flat, free, total = self._flat, self._draft.soon.free, self._draft.table.total
        shape, wanted, cpus = ask.shape, ask.least_replicas, ask.shape.is_cpu_only
        on = np.flatnonzero(allowed[flat.columns])
        moment = np.searchsorted(self.moments, flat.at)[flat.whose[on]]
        order = np.lexsort((moment, flat.columns[on]))
        moment, columns, freed = moment[order], flat.columns[on][order], flat.freed[:, on[order]]
        # What is free on a node after each of its changes: sums that begin anew with each node.
        is_first = np.ones(len(columns), dtype=np.bool_)
        is_first[1:] = columns[1:] != columns[:-1]
        sums = np.cumsum(freed, axis=1)
        before_node = (sums - freed)[:, is_first][:, np.cumsum(is_first) - 1]
        after = free[:, columns] + sums - before_node
        counts = room(usable(after, total[:, columns], by_cpu_jobs=cpus), shape, wanted)
        before = np.zeros_like(counts)
        before[1:] = counts[:-1]
        firsts = columns[is_first]
        before[is_first] = room(usable(free[:, firsts], total[:, firsts], by_cpu_jobs=cpus), shape, wanted)
        grown = np.bincount(moment, weights=counts - before, minlength=len(self.moments))
        row, each = (CPUS, shape.cpus) if cpus else (GPUS, shape.gpus)
        fitting = np.flatnonzero(allowed & (free[row] >= each) if each else allowed)
        now = room(usable(free[:, fitting], total[:, fitting], by_cpu_jobs=cpus), shape, wanted).sum()
        return np.flatnonzero(np.cumsum(grown) + now >= wanted)


def _ends(draft: Draft, most: int) -> _Flat:
    """Remembered until somebody is made to stop."""
    question = ("ends", most)
    if question not in draft.memo:
        draft.memo[question] = _Flat.of(islice(_running_ends(draft), most))
    flat: _Flat = draft.memo[question]
    return flat


def _running_ends(draft: Draft) -> Iterator[Change]:
    for at, id_ in draft.world.upcoming_ends():
        if id_ in draft.following:
            yield Change(at, draft.following[id_], -1)
        elif id_ not in draft.disturbed:
            yield Change(at, draft.world.running[id_].load, -1)


def _decided(draft: Draft) -> Iterator[Change]:
    """The ends of what was started or kept in this pass, and what is reserved."""
    for at, id_ in draft.ends:
        if at < inf:
            yield Change(at, draft.taken[id_], -1)
    for r in draft.reservations:
        yield Change(r.starts_at, r.load, 1, is_reserved=True)
        if r.ends_at < inf:
            yield Change(r.ends_at, r.load, -1, is_reserved=True)
