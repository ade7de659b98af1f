"""Which holds are news: everybody has their turn, and no figure is an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import pytest
from phalanx_server.domain.reason import Explanation, Held, HoldReason, Reserved, WaitsForVictims
from phalanx_server.loops.hold_book import HoldBook
from phalanx_server.scheduling.plan import HoldGroup, Plan
from phalanx_server.scheduling.snapshot import PlacementItem, Seat


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


def test_what_is_news_of_a_kept_place_is_stored_at_once() -> None:
    """Whatever else is: others give way for that place in the same commit."""
    book, waiting = HoldBook(limit=1), [f"{number:032x}" for number in range(4)]
    seat, other = (Seat(placement=(PlacementItem(node, 1),)) for node in ("n0", "n1"))
    groups = [HoldGroup([job], Counted(0), kept) for job, kept in zip(waiting, (None, seat, seat, None), strict=True)]
    news = book.news(Plan(hold_groups=tuple(groups)), kept={waiting[2]: other, waiting[3]: seat})
    assert [(row.job_id.hex, row.kept) for row, _ in news] == [
        (waiting[1], seat),
        (waiting[2], seat),
        (waiting[3], None),
        (waiting[0], None),
    ]
    book.stored(news, over=())
    kept = dict.fromkeys(waiting[1:3], seat)
    assert book.news(Plan(hold_groups=tuple(groups)), kept=kept) == []


@pytest.mark.parametrize("at", [float("inf"), float("nan"), 1e300, -1e300])
def test_an_expected_start_that_no_date_can_say_is_no_error(at: float) -> None:
    book, job = HoldBook(), f"{1:032x}"
    group = HoldGroup([job], Counted(0), expected_start=at)
    ((row, _),) = book.news(Plan(hold_groups=(group,)))
    assert row.estimated_start is None or row.estimated_start.year in (1, 9999)


@pytest.mark.parametrize("cause", [lambda jobs: WaitsForVictims(jobs, 0.0), Reserved])
def test_only_jobs_of_its_own_tenant_and_below_are_named_to_a_waiting_one(
    cause: Callable[[tuple[str, ...]], Explanation],
) -> None:
    whose = ("eng/nlp", "eng/nlp", "eng/nlp/deep", "eng", "eng/nlpx", "vision")
    waiting, *others = (f"{number:032x}" for number in range(len(whose)))
    tenants = dict(zip((waiting, *others), whose, strict=True))
    unknown = f"{99:032x}"
    group = HoldGroup([waiting], cause((*others, unknown)))
    ((row, _),) = HoldBook().news(Plan(hold_groups=(group,)), tenant_of=tenants.get)
    said = " ".join((row.message, *row.unblocks))
    assert [job for job in (*others, unknown) if job in said] == others[:2]
    assert "4 jobs of other tenants" in row.message
    ((row, _),) = HoldBook().news(Plan(hold_groups=(group,)))
    assert "job_" not in row.message, "who is not known is named to nobody"
