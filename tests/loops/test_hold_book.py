"""Which holds are news: everybody has their turn, and no figure is an error."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import pytest
from phalanx_server.domain.reason import Explanation, Held, HoldReason
from phalanx_server.loops.hold_book import HoldBook
from phalanx_server.scheduling.plan import HoldGroup, Plan


@dataclass(frozen=True, slots=True)
class Counted(Explanation):
    """A cause whose words differ in every pass."""

    reason = HoldReason.CAPACITY
    figure: int

    def message(self) -> str:
        return f"{self.figure} are free"

    def unblocks(self) -> tuple[str, ...]:
        return ()


def tell(book: HoldBook, *groups: HoldGroup) -> list[str]:
    news = book.news(Plan(hold_groups=groups))
    book.stored(news, over=())
    return [row.job_id.hex for row, _ in news]


def test_words_that_change_in_every_pass_keep_nobody_from_theirs() -> None:
    book, waiting = HoldBook(limit=2), [f"{number:032x}" for number in range(5)]
    first = [tell(book, HoldGroup(waiting, Counted(0))) for _ in range(3)]
    assert [*chain(*first)] == waiting
    later = [tell(book, HoldGroup(waiting, Counted(figure))) for figure in range(1, 6)]
    assert sorted(chain(*later)) == sorted(waiting * 2), "each has its turn, and then again"


def test_a_reason_that_changed_comes_first() -> None:
    book, (a, b, c, d) = HoldBook(limit=2), [f"{number:032x}" for number in range(4)]
    assert tell(book, HoldGroup([a, b], Counted(0))) + tell(book, HoldGroup([a, b, c, d], Counted(0))) == [a, b, c, d]
    assert tell(book, HoldGroup([a, b, c], Counted(1)), HoldGroup([d], Held())) == [d, a]


@pytest.mark.parametrize("at", [float("inf"), float("nan"), 1e300, -1e300])
def test_an_expected_start_that_no_date_can_say_is_no_error(at: float) -> None:
    book, job = HoldBook(), f"{1:032x}"
    group = HoldGroup([job], Counted(0), expected_start=at)
    ((row, _),) = book.news(Plan(hold_groups=(group,)))
    assert row.estimated_start is None or row.estimated_start.year in (1, 9999)
