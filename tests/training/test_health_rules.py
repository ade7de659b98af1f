"""When a run of numbers is sick, as tables."""

import random
import statistics

import pytest
from phalanx_worker.training.health.rules import (
    Divergence,
    Edge,
    Odd,
    Spikes,
    farthest_out,
    odd_ones,
    slow_rank,
)

NAN, INF = float("nan"), float("inf")
STEADY = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0]


@pytest.mark.parametrize(
    ("story", "before", "loss", "is_spike"),
    [
        ("a loss like the others is none", STEADY, 2.1, False),
        ("ten deviations over the median is one", STEADY, 3.2, True),
        ("just below is none", STEADY, 2.9, False),
        ("far below is none", STEADY, 0.1, False),
        ("too few losses say nothing", STEADY[:7], 1000.0, False),
        ("losses that never move still leave some room", [2.0] * 10, 2.01, False),
        ("but not much", [2.0] * 10, 2.03, True),
        ("one old spike does not hide a new one", [*STEADY, 50.0], 40.0, True),
        ("losses that are not finite are not remembered", [*STEADY, NAN, INF, NAN], 3.2, True),
        ("a falling loss has wide deviations", [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0], 9.5, False),
        ("losses below 0 work too", [-loss for loss in STEADY], -0.5, True),
        ("only the window counts", [*[100.0] * 20, *STEADY], 20.0, True),
    ],
)
def test_spike(story, before, loss, is_spike):
    spikes = Spikes(factor=10, window=10)
    for one in before:
        spikes.remember(one)
    assert spikes.is_spike(loss) is is_spike, story


@pytest.mark.parametrize(
    ("story", "losses", "at"),
    [
        ("a falling loss never diverges", [10 - i / 10 for i in range(90)], None),
        ("one that stays high does, once the median and then the steps are over", [2.0] * 40 + [4.0] * 60, 40 + 16 + 5),
        ("a short hill is forgiven", [2.0] * 40 + [4.0] * 14 + [2.0] * 60, None),
        ("a spike is no divergence", [2.0] * 40 + [1e9] + [2.0] * 40, None),
        ("less than the factor is none", [2.0] * 40 + [2.9] * 60, None),
        ("steps without a finite loss are left out", [2.0] * 40 + [NAN] * 60, None),
        ("below 0 the factor is of the magnitude", [-2.0] * 40 + [-0.5] * 60, 40 + 16 + 5),
    ],
)
def test_divergence(story, losses, at):
    rule = Divergence(factor=1.5, steps=5)
    found = [number for number, loss in enumerate(losses, 1) if rule.remember(loss)]
    assert (found[0] if found else None) == at, story


def test_a_divergence_knows_when_it_began():
    rule = Divergence(factor=1.5, steps=5)
    step = next(step for step, loss in enumerate([2.0] * 40 + [4.0] * 60, 1) if rule.remember(loss))
    assert step - rule.steps_since + 1 == 41


@pytest.mark.parametrize("missing", [(50,), (62, 63), (62, 70)])
def test_steps_without_a_finite_loss_are_no_less_part_of_a_divergence(missing):
    losses = [2.0] * 40 + [4.0] * 60
    for step in missing:
        losses[step - 1] = NAN
    rule = Divergence(factor=1.5, steps=20)
    step = next(step for step, loss in enumerate(losses, 1) if rule.remember(loss))
    assert step == 76 + len(missing)
    assert step - rule.steps_since + 1 == 41


def test_before_a_divergence_shows_the_step_where_it_would_have_begun_never_goes_back():
    dice = random.Random(3)
    rule, began = Divergence(factor=1.5, steps=50), []
    for step in range(1, 1000):
        rule.remember(NAN if dice.random() < 0.1 else 2.0 + 4.0 * (step % 200 > 150))
        began.append(step - rule.steps_since + 1)
    assert began == sorted(began)
    assert began[-1] > 900


@pytest.mark.parametrize("at", [3, 35, 50, 70])
def test_rules_go_on_from_their_state_as_if_nothing_had_been(at):
    dice = random.Random(7)
    losses = [2.0 + dice.random() / 10 + 4.0 * (step > 45) for step in range(90)]
    losses[60] = NAN
    whole, first, second = (rules_of_the_loss() for _ in range(3))
    seen = [remember(whole, loss) for loss in losses]
    assert [remember(first, loss) for loss in losses[:at]] == seen[:at]
    for rule, earlier in zip(second, first, strict=True):
        rule.load_state_dict(earlier.state_dict())
    assert [remember(second, loss) for loss in losses[at:]] == seen[at:]
    assert seen[-1][2]


def rules_of_the_loss():
    return Spikes(factor=10, window=16), Divergence(factor=1.5, steps=20)


def remember(rules, loss):
    spikes, divergence = rules
    spikes.remember(loss)
    return spikes.limit, divergence.steps_since, divergence.remember(loss), divergence.lowest


@pytest.mark.parametrize(
    ("story", "values", "odd"),
    [
        ("all alike", [1, 1, 1], None),
        ("one alone has nobody to differ from", [1], None),
        ("one of three", [1, 2, 1], Odd((1,), decided=True)),
        ("two of five", [1, 2, 1, 3, 1], Odd((1, 3), decided=True)),
        ("one of two", [1, 2], Odd((0, 1), decided=False)),
        ("half of four", [1, 1, 2, 2], Odd((0, 1, 2, 3), decided=False)),
    ],
)
def test_the_majority_decides_who_is_odd(story, values, odd):
    assert odd_ones(values) == odd, story


@pytest.mark.parametrize(
    ("story", "values", "place"),
    [
        ("an exponent's bit makes a value enormous", [0.01, 3e30], 1),
        ("or not finite", [NAN, 0.01], 0),
        ("a small difference says nothing", [0.01, 0.02], None),
        ("two enormous ones say nothing", [1e9, 1e30], None),
    ],
)
def test_a_value_out_of_all_proportion_is_wrong(story, values, place):
    assert farthest_out(values, usual=0.1) == place, story


@pytest.mark.parametrize(
    ("story", "work_s", "found"),
    [
        ("alike", [1.0, 1.1, 0.9, 1.0], None),
        ("one that takes twice as long", [1.0, 1.0, 2.0, 1.0], (2, 2.0)),
        ("of two, the slower one against the faster one", [1.0, 3.0], (1, 3.0)),
        ("a fast one is no fault of the others", [1.0, 1.0, 0.1, 1.0], None),
        ("a rank alone is never slow", [9.0], None),
        ("nothing measured yet", [0.0, 0.0], None),
    ],
)
def test_slow_rank(story, work_s, found):
    assert slow_rank(work_s, factor=1.5) == found, story


@pytest.mark.parametrize(
    ("story", "work_s", "found"),
    [
        ("a heavy stage is no fault of its ranks", [1.0, 1.0, 3.0, 3.0], None),
        ("one that is slow for its stage", [1.0, 1.0, 3.0, 6.0], (3, 2.0)),
        ("one of a light stage, though the other stage takes longer", [1.0, 2.0, 9.0, 9.0], (1, 2.0)),
        ("of two the one farthest from its own stage", [1.0, 2.0, 3.0, 9.0], (3, 3.0)),
    ],
)
def test_ranks_are_compared_with_those_of_their_own_stage(story, work_s, found):
    assert slow_rank(work_s, factor=1.5, alike=[[0, 1], [2, 3]]) == found, story


def test_ranks_that_are_alone_in_their_stage_are_not_compared():
    assert slow_rank([1.0, 9.0], factor=1.5, alike=[[0], [1]]) is None


def test_a_condition_is_told_when_it_begins_or_changes():
    edge = Edge()
    assert [edge.begins(what) for what in (None, "a", "a", "b", None, "b", False, True, True)] == [
        *(False, True, False, True),
        *(False, True, False, True, False),
    ]


def test_divergence_goes_by_the_median_of_the_last_32_losses():
    dice = random.Random(5)
    losses = [float(dice.randint(1, 40) - i // 10) for i in range(300)]  # falling, and many are equal
    rule = Divergence(factor=2.0, steps=10)
    for loss in losses:
        rule.remember(loss)
    medians = [statistics.median(losses[max(0, i - 32) : i]) for i in range(8, len(losses) + 1)]
    assert rule.lowest == min(medians)
