"""The rules of reconciling, as a table: what is desired, held and shown, and the steps that follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from link_server import attempt_of
from phalanx_worker.agent.desired import (
    DELIVERY_WAIT_S,
    READY_DEADLINE_S,
    Abort,
    Adopt,
    Clear,
    Close,
    Forget,
    Gang,
    Group,
    GroupState,
    Phase,
    Profile,
    Refuse,
    Start,
    Step,
    Stop,
    World,
    all_exits,
    first_failed_rank,
    reconcile,
)
from phalanx_worker.protocol import ProfileRequest, RankExit

RUN = attempt_of("att_1", "true", {"a": [0, 1], "b": [0, 1]}, epoch=3)
WIDE = attempt_of("att_1", "true", {"a": [0, 1], "b": [0, 1], "c": [0, 1]}, epoch=3)
RAN = replace(RUN, started=True)
STOP = replace(RUN, action="stop", grace_s=42.0)
UP = Group(epoch=3, state=GroupState.RUNNING)
FAILING = Group(epoch=3, state=GroupState.FAILING, exits=(RankExit(2, exit_code=1, ended_at=9.0),), first_failed_rank=2)
OK = Group(epoch=3, state=GroupState.ENDED, exits=(RankExit(0, exit_code=0), RankExit(1, exit_code=0)))
UNTOLD = replace(OK, delivered=False)
VANISHED = replace(UP, state=GroupState.VANISHED)
LOST = replace(UP, state=GroupState.LOST)
PREPARING = Group(epoch=3, state=GroupState.PREPARING)
OLD = replace(UP, epoch=2)
BOTH = frozenset({"a", "b"})


def gang(phase: Phase = Phase.RUNNING, a: Group = UP, b: Group = UP, **more: object) -> Gang:
    return Gang("att_1", 3, phase, RUN, groups={"a": a, "b": b}, **more)


def world(
    wanted: object = None,
    held: Gang | None = None,
    shown: dict[str, dict[str, Group]] | None = None,
    *,
    living: frozenset[str] = BOTH,
    placed: frozenset[str] = frozenset(),
    waited_s: float = 0.0,
    answered_s: float = 0.0,
) -> World:
    """`shown` None: both nodes show what is held."""
    if shown is None:
        shown = {node: {"att_1": held.groups[node]} if held and node in held.groups else {} for node in living}
    return World(
        now_s=100.0 + waited_s,
        desired={"att_1": wanted} if wanted else {},
        desired_since_s={"att_1": 100.0},
        gangs={"att_1": held} if held else {},
        living=living,
        tables=shown,
        placement_groups=placed,
        answered_s=answered_s,
    )


TABLE: dict[str, tuple[World, list[Step]]] = {
    "nothing desired, nothing held": (world(), []),
    "a new attempt is started": (world(RUN), [Start(RUN, remains=False)]),
    "a new attempt whose placement group exists is cleared first": (
        world(RUN, placed=frozenset({"att_1"})),
        [Start(RUN, remains=True)],
    ),
    "a new attempt waits for a runner that has not answered": (world(RUN, shown={"a": {}}), []),
    "but not for ever": (
        world(RUN, shown={"a": {}}, waited_s=READY_DEADLINE_S + 1),
        [Refuse(RUN, "the runner of node b did not answer within 30 s", "b")],
    ),
    "a new attempt on a dead node is left to the server": (
        world(RUN, shown={"a": {}}, living=frozenset({"a"}), waited_s=READY_DEADLINE_S + 1),
        [],
    ),
    "an attempt stopped before it was started is refused": (world(STOP), [Refuse(STOP, "stopped before it started")]),
    "what an earlier agent started is adopted": (
        world(RUN, shown={"a": {"att_1": UP}, "b": {"att_1": FAILING}}),
        [Adopt(RUN, {"a": UP, "b": FAILING})],
    ),
    "adoption waits until every living node has shown its groups": (world(RUN, shown={"a": {"att_1": UP}}), []),
    "half a gang that did run is adopted too, and ended afterwards": (
        world(RAN, shown={"a": {"att_1": UP}, "b": {}}),
        [Adopt(RAN, {"a": UP})],
    ),
    "half a gang that never ran whole is cleared and started again": (
        world(RUN, shown={"a": {"att_1": UP}, "b": {}}),
        [Start(RUN, remains=True)],
    ),
    "unless it is to be stopped": (world(STOP, shown={"a": {"att_1": UP}, "b": {}}), [Adopt(STOP, {"a": UP})]),
    "what is prepared on every node has no ranks to adopt": (
        world(RUN, shown={"a": {"att_1": PREPARING}, "b": {"att_1": PREPARING}}),
        [Start(RUN, remains=True)],
    ),
    "nor is it adopted to be stopped, but cleared before it is given up": (
        world(STOP, shown={"a": {"att_1": PREPARING}, "b": {}}),
        [Refuse(STOP, "stopped before it started", remains=True)],
    ),
    "nor is a gang that is to be stopped while one of its nodes still starts it": (
        world(STOP, shown={"a": {"att_1": UP}, "b": {"att_1": PREPARING}}),
        [Refuse(STOP, "stopped before it started", remains=True)],
    ),
    "a placement group may be all that is to be seen of a start that is to be stopped": (
        world(STOP, placed=frozenset({"att_1"})),
        [Refuse(STOP, "stopped before it started", remains=True)],
    ),
    "a start that an earlier agent began is cleared too when it is given up for a silent runner": (
        world(RUN, shown={"a": {"att_1": PREPARING}}, waited_s=READY_DEADLINE_S + 1),
        [Refuse(RUN, "the runner of node b did not answer within 30 s", "b", remains=True)],
    ),
    "also where only its placement group is to be seen": (
        world(STOP, shown={"a": {}}, placed=frozenset({"att_1"}), waited_s=READY_DEADLINE_S + 1),
        [Refuse(STOP, "the runner of node b did not answer within 30 s", "b", remains=True)],
    ),
    "what one node still starts is not adopted for a silent runner of another": (
        world(
            WIDE,
            shown={"a": {"att_1": UP}, "b": {"att_1": PREPARING}},
            living=frozenset({"a", "b", "c"}),
            waited_s=READY_DEADLINE_S + 1,
        ),
        [Refuse(WIDE, "the runner of node c did not answer within 30 s", "c", remains=True)],
    ),
    "what did run is never started again": (world(RAN), [Adopt(RAN, {})]),
    "adoption does not wait for a dead node": (
        world(RAN, shown={"a": {"att_1": UP}}, living=frozenset({"a"})),
        [Adopt(RAN, {"a": UP})],
    ),
    "nor for ever for a silent runner": (
        world(RUN, shown={"a": {"att_1": UP}}, waited_s=READY_DEADLINE_S + 1),
        [Adopt(RUN, {"a": UP})],
    ),
    "what did run is not given up for a silent runner": (
        world(RAN, shown={"a": {}}, waited_s=READY_DEADLINE_S + 1),
        [],
    ),
    "what runs under another epoch is cleared before the start": (
        world(RUN, shown={"a": {"att_1": OLD}, "b": {}}),
        [Clear("att_1", 2, frozenset({"a"}))],
    ),
    "a running gang is left alone": (world(RUN, gang()), []),
    "a failing group ends the rest": (world(RUN, gang(b=FAILING)), [Stop("att_1", 5.0)]),
    "once": (world(RUN, gang(b=FAILING, stopping=True)), []),
    "a vanished group ends the rest": (world(RUN, gang(b=VANISHED)), [Stop("att_1", 5.0)]),
    "a group that ended well leaves the others running": (world(RUN, gang(a=OK)), []),
    "a lost group is the server's to judge": (world(RUN, gang(b=LOST), {"a": {"att_1": UP}}), []),
    "a gang with a lost group never closes": (world(RUN, gang(a=OK, b=LOST), {"a": {"att_1": OK}}), []),
    "stop is passed on with its grace": (world(STOP, gang()), [Stop("att_1", 42.0)]),
    "and not repeated": (world(STOP, gang(stopping=True)), []),
    "a gang that is over is closed": (world(RUN, gang(a=OK, b=OK)), [Close("att_1")]),
    "also one that vanished in part": (world(RUN, gang(a=OK, b=VANISHED, stopping=True)), [Close("att_1")]),
    "its end waits for what it left behind": (
        world(RUN, gang(a=OK, b=UNTOLD, over_at_answered_s=5.0), answered_s=5.0 + DELIVERY_WAIT_S - 1),
        [],
    ),
    "but that wait ends": (
        world(RUN, gang(a=OK, b=UNTOLD, over_at_answered_s=5.0), answered_s=5.0 + DELIVERY_WAIT_S + 1),
        [Close("att_1")],
    ),
    "and counts only while the server is there": (
        world(RUN, gang(a=OK, b=UNTOLD, over_at_answered_s=5.0), waited_s=1000.0, answered_s=6.0),
        [],
    ),
    "a failed gang that is over is not stopped meanwhile": (
        world(RUN, gang(a=OK, b=replace(FAILING, state=GroupState.ENDED, delivered=False))),
        [],
    ),
    "what it left behind is not waited for when it is no longer desired": (
        world(None, gang(a=OK, b=UNTOLD, over_at_answered_s=5.0)),
        [Clear("att_1", 3, BOTH)],
    ),
    "a gang no longer desired is cleared": (world(None, gang()), [Clear("att_1", 3, BOTH)]),
    "a gang of another epoch is cleared": (world(replace(RUN, epoch=4), gang()), [Clear("att_1", 3, BOTH)]),
    "clearing is not repeated": (world(None, gang(Phase.CLEARING)), []),
    "closing goes on though no longer desired": (world(None, gang(Phase.CLOSING, OK, OK)), []),
    "a start is given up when stopped": (world(STOP, gang(Phase.STARTING)), [Abort("att_1")]),
    "a start is given up when no longer desired": (world(None, gang(Phase.STARTING)), [Abort("att_1")]),
    "once only": (world(None, gang(Phase.STARTING, aborting=True)), []),
    "a reported end is remembered while the server still asks for it": (world(RUN, gang(Phase.DONE, OK, OK)), []),
    "and forgotten afterwards": (world(None, gang(Phase.DONE, OK, OK)), [Forget("att_1")]),
    "a stranger on the nodes is cleared": (
        world(None, None, {"a": {"att_1": UP}, "b": {"att_1": UP}}),
        [Clear("att_1", 3, BOTH)],
    ),
    "an ended stranger too": (world(None, None, {"a": {"att_1": OK}, "b": {}}), [Clear("att_1", 3, frozenset({"a"}))]),
    "also one that is only prepared": (
        world(None, None, {"a": {"att_1": PREPARING}, "b": {}}),
        [Clear("att_1", 3, frozenset({"a"}))],
    ),
    "a placement group without an attempt is cleared": (
        world(placed=frozenset({"att_9"})),
        [Clear("att_9", 0, frozenset())],
    ),
}


@pytest.mark.parametrize("sentence", TABLE)
def test_steps(sentence: str) -> None:
    given, steps = TABLE[sentence]
    assert reconcile(given) == steps


def test_the_first_failure_is_the_earliest_one() -> None:
    late = replace(FAILING, exits=(RankExit(0, exit_code=1, ended_at=9.5),), first_failed_rank=0)
    assert first_failed_rank({"a": late, "b": FAILING}) == 2
    assert first_failed_rank({"a": OK}) is None


def test_of_a_gang_that_hung_whoever_failed_for_that_is_not_to_blame() -> None:
    exits = (RankExit(0, signal=9, ended_at=10.0, fault="hang"),)
    hung = replace(FAILING, exits=exits, first_failed_rank=None)
    assert first_failed_rank({"a": hung, "b": FAILING}) is None
    assert first_failed_rank({"a": replace(hung, first_failed_rank=0), "b": FAILING}) == 0


def test_ranks_whose_end_nobody_saw_are_reported_without_code() -> None:
    exits = all_exits(RUN, {"a": OK, "b": VANISHED})
    assert [(end.rank, end.exit_code, end.signal) for end in exits] == [
        (0, 0, None),
        (1, 0, None),
        (2, None, None),
        (3, None, None),
    ]


def test_a_profile_is_asked_for_once_of_a_gang_that_runs() -> None:
    request = ProfileRequest("prof_1", 5, [0])
    wanted = replace(RUN, profiles=[request])
    assert reconcile(world(wanted, gang())) == [Profile("att_1", request)]
    assert reconcile(world(wanted, gang(profiles={"prof_1"}))) == []
    assert reconcile(world(wanted, gang(Phase.STARTING))) == []
    assert reconcile(world(replace(wanted, action="stop", grace_s=42.0), gang())) == [Stop("att_1", 42.0)]
