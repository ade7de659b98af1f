"""Owns "what if": the books of a waiting job's run with some running jobs, or parts of them, taken away.

Refuses to know whom one may take away. A trial changes copies; what comes of it is decided with `Draft.make`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

import numpy as np

from phalanx_server.scheduling.draft import Book, Draft
from phalanx_server.scheduling.fit import room
from phalanx_server.scheduling.nodes import Amounts, Mask
from phalanx_server.scheduling.order import Bid
from phalanx_server.scheduling.place import Spot
from phalanx_server.scheduling.possible import Option
from phalanx_server.scheduling.world import Load, Running


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What a running job would give up: all of it, or replicas that it can spare."""

    running: Running
    load: Load
    reason: str = ""
    ends_at: float = inf
    spared: tuple[str, int] | None = None
    """The node and the number of replicas, if it is not all of it."""


class Trial:
    """One waiting job, one way to run it, and what is taken away for it."""

    def __init__(self, draft: Draft, bid: Bid, option: Option) -> None:
        self.draft, self.key, self.option, self.replicas = draft, bid.key, option, bid.key.ask.least_replicas
        self.demand = option.least_demand
        soon, *self._later = draft.soon_until(draft.ends_at(bid))
        self.books = [soon.copy()]
        self.taken: list[Piece] = []
        self._counts: Amounts | None = None
        self._mask: Mask = draft.table.ready

    @property
    def book(self) -> Book:
        """That of the moment when all has gone."""
        return self.books[0]

    def lift(self, piece: Piece, times: int = 1) -> None:
        """Take a piece away; `times` -1 puts it back."""
        self.book.take(piece.load, -times)
        for book in self.books[1:]:
            if book.at < piece.ends_at:
                book.take(piece.load, -times)
        if self._counts is None or self.book.occupants is not None:
            self._counts = None  # others may enter nodes that it leaves
            return
        columns = piece.load.columns
        self._counts[columns] = self._room(columns) * self._mask[columns]

    def is_in_quota(self) -> bool:
        """Do the quotas leave the job its demand?"""
        return self.draft.is_in_quota(self.key.tenant, self.demand, self.books)

    def spot(self) -> Spot | None:
        """Where the job would go, quotas apart."""
        return self.draft.spot(self.key, self.option.gpu_type, self.books, replicas=self.replicas)

    def _may_fit(self) -> bool:
        """Is there room for it, all domains together? Asked often, so only where the books have changed."""
        if self._counts is None:
            self._mask = self.draft.table.of_type(self.option.gpu_type) & self.draft.allowed(self.key, self.books)
            self._counts = self._room(slice(None)) * self._mask
        return int(self._counts.sum()) >= self.replicas

    def _room(self, columns: slice | list[int]) -> Amounts:
        if self.key.ask.shape.is_cpu_only:
            return room(self.draft.usable(self.key.ask, self.books)[:, columns], self.key.ask.shape, self.replicas)
        free = self.books[0].free[:, columns]
        for book in self.books[1:]:
            free = np.minimum(free, book.free[:, columns])
        return room(free, self.key.ask.shape, self.replicas)

    def fits(self, ends_well: Callable[[], bool]) -> bool:
        """Would the job be in order now?"""
        return self.is_in_quota() and self._may_fit() and ends_well() and self.spot() is not None

    def take_until_it_fits(self, pieces: Iterable[Piece], ends_well: Callable[[], bool]) -> bool:
        """Take pieces in order until the job fits, then give back in reverse order whatever it does not need. What is
        taken in the end is in `taken`. False, and nothing taken, if all of them are not enough."""
        for piece in pieces:
            self.lift(piece)
            self.taken.append(piece)
            if not self.fits(ends_well):
                continue
            if self._later:
                self.look_ahead()
                if not self.fits(ends_well):
                    continue
            self._spare(ends_well)
            return True
        for piece in self.taken:
            self.lift(piece, -1)
        self.taken = []
        return False

    def look_ahead(self) -> None:
        """From now on what is reserved counts as well. Few jobs fit without, so this comes last."""
        for book in self._later:
            mine = book.copy()
            for piece in self.taken:
                if mine.at < piece.ends_at:
                    mine.take(piece.load, -1)
            self.books.append(mine)
        self._later, self._counts = [], None

    def _spare(self, ends_well: Callable[[], bool]) -> None:
        """Again from the end as long as anybody is spared: once one is, who was needed before may not be any more."""
        while [piece for piece in reversed(list(self.taken)) if self._is_spared(piece, ends_well)]:
            pass

    def _is_spared(self, piece: Piece, ends_well: Callable[[], bool]) -> bool:
        at = self.taken.index(piece)
        self.lift(piece, -1)
        del self.taken[at]
        if self.fits(ends_well):
            return True
        self.lift(piece)
        self.taken.insert(at, piece)
        return False
