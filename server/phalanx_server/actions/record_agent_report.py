"""Take what an agent reports of attempts: gang ready, started, ended, failed to start, gone from a node.

Owns the fencing of these facts, and that taking one twice changes nothing. What an end means is the domain's decision.
One transaction per report, set-based: its cost hardly depends on how many facts there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.agent_instance import expect_instance
from phalanx_server.actions.attempt_change import AttemptChange, rank_ends, write
from phalanx_server.actions.clock import Clock
from phalanx_server.actions.recover_nodes import recover_nodes
from phalanx_server.domain.attempt import AttemptState, RankEnd, decide_end
from phalanx_server.domain.job import JobState
from phalanx_server.domain.messages import AgentReport, AttemptFact, Refused, ReportAnswer
from phalanx_server.store import ids
from phalanx_server.store.attempts import load_groups, lock_attempts, release, update_jobs
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify

TAIL_CHARS = 2048
Groups = Mapping[UUID, Sequence[Row[Any]]]
_OVER = frozenset({"ended", "start_failed"})


@rerun_on_deadlock
async def record_agent_report(
    engine: AsyncEngine, report: AgentReport, *, cluster_id: UUID, now: datetime
) -> ReportAnswer:
    """Raises Superseded for an agent that was replaced. Facts that are refused are named in the answer."""
    clock = Clock(now=now, sent_at=report.sent_at)
    wanted = {attempt_id for fact in report.facts if (attempt_id := attempt_id_of(fact.attempt_id))}
    async with engine.begin() as conn:
        await expect_instance(conn, cluster_id=cluster_id, instance=report.instance)
        rows = [row for row in await lock_attempts(conn, wanted) if row.cluster_id == cluster_id]
        changes = {ids.encode("attempt", row.id): AttemptChange(row, now) for row in rows}
        groups = await _groups(conn, report, changes)
        refused = [refused for fact in report.facts if (refused := _take(fact, changes, clock, groups))]
        await write(conn, list(changes.values()), now=now)
        await _release_gone(conn, report, changes, groups, now=now)
    if any(fact.kind == "gone" for fact in report.facts):
        await recover_nodes(engine, now=now)  # by itself: nodes are locked before jobs
    return ReportAnswer(server_time=now.timestamp(), refused=refused)


async def _groups(conn: AsyncConnection, report: AgentReport, changes: Mapping[str, AttemptChange]) -> Groups:
    """Where the ranks are of those attempts whose facts say something of a node."""
    concerned = {fact.attempt_id for fact in report.facts if fact.kind in _OVER or fact.kind == "gone"}
    attempt_ids = [change.row.id for text, change in changes.items() if text in concerned]
    return await load_groups(conn, attempt_ids) if attempt_ids else {}


def attempt_id_of(text: str) -> UUID | None:
    """The attempt that a report names; None where the text cannot be an id."""
    try:
        return ids.parse("attempt", text)
    except ValueError:
        return None


def refusal(change: AttemptChange | None, fact: AttemptFact) -> str | None:
    """Why a fact is refused; None if it is taken. Of a lost attempt only `gone` is news. An attempt that ended is not
    refused for hearing of its end again."""
    if change is None:
        return "unknown_attempt"
    row = change.row
    late = row.job_epoch != row.epoch and fact.kind in ("gang_ready", "started")
    lost = change.state is AttemptState.LOST and fact.kind != "gone"
    return "stale_epoch" if fact.epoch != row.epoch or late or lost else None


def _take(fact: AttemptFact, changes: Mapping[str, AttemptChange], clock: Clock, groups: Groups) -> Refused | None:
    """Apply one fact, or refuse it. `gone` comes later; kinds that a newer agent may know are passed over."""
    change = changes.get(fact.attempt_id)
    reason = refusal(change, fact)
    if change is None or reason is not None:
        return Refused(attempt_id=fact.attempt_id, epoch=fact.epoch, reason=reason or "unknown_attempt")
    earliest = change.get("started_at") or change.get("gang_ready_at") or change.row.created_at
    at = clock.time(fact.at, earliest=earliest)
    if fact.kind == "gang_ready":
        change.gang_ready(at)
    elif fact.kind == "started":
        change.started(at, [each.encode() | {"started_at": clock.iso(each.started_at)} for each in fact.ranks_started])
    elif fact.kind in _OVER and change.live:
        _end(change, fact, clock, at, groups.get(change.row.id, ()))
    return None


def _end(change: AttemptChange, fact: AttemptFact, clock: Clock, at: datetime, groups: Sequence[Row[Any]]) -> None:
    failed_to_start = fact.kind == "start_failed"
    facts = replace(
        change.end_facts(at=at),
        exits=_every_rank(rank_ends(fact.exits), groups),
        first_failed_rank=fact.first_failed_rank,
        start_error=(fact.message or "no reason was given") if failed_to_start else None,
        permanent=failed_to_start and fact.permanent,
    )
    end = decide_end(facts)
    exits = [
        each.encode() | {"ended_at": clock.iso(each.ended_at), "tail": each.tail[-TAIL_CHARS:]} for each in fact.exits
    ]
    blamed = _node_of_name(groups, fact.node) if failed_to_start else _node_of_rank(groups, end.failed_rank)
    change.end(end, at=at, exits=exits, avoid=blamed)


def _every_rank(exits: Sequence[RankEnd], groups: Sequence[Row[Any]]) -> list[RankEnd]:
    """The reported ends, and for each rank of the gang that is not among them one that nobody saw."""
    reported = {end.rank for end in exits}
    ranks = (rank for g in groups for rank in range(g.first_rank, g.first_rank + g.ranks))
    return [*exits, *(RankEnd(rank=rank) for rank in ranks if rank not in reported)]


def _node_of_rank(groups: Sequence[Row[Any]], rank: int | None) -> UUID | None:
    if rank is None:
        return None
    return next((g.node_id for g in groups if g.first_rank <= rank < g.first_rank + g.ranks), None)


def _node_of_name(groups: Sequence[Row[Any]], name: str | None) -> UUID | None:
    return next((g.node_id for g in groups if g.node == name), None)


async def _release_gone(
    conn: AsyncConnection,
    report: AgentReport,
    changes: Mapping[str, AttemptChange],
    groups: Groups,
    *,
    now: datetime,
) -> None:
    """Free what lost attempts held on nodes of which a fact says that nothing is left there."""
    nodes: dict[UUID, list[UUID]] = {}
    for fact in report.facts:
        change = changes.get(fact.attempt_id)
        if (
            fact.kind == "gone"
            and change is not None
            and change.state is AttemptState.LOST
            and not refusal(change, fact)
        ):
            node_id = _node_of_name(groups.get(change.row.id, ()), fact.node)
            nodes.setdefault(change.row.id, []).extend([node_id] if node_id else [])
    if nodes:
        await release_lost(conn, {change.row.id: change.row for change in changes.values()}, nodes, now=now)


async def release_lost(
    conn: AsyncConnection, rows: Mapping[UUID, Row[Any]], nodes: Mapping[UUID, Sequence[UUID]], *, now: datetime
) -> None:
    """Free what lost attempts (locked rows, by id) hold on nodes where they are confirmed gone. A job whose old ranks
    are gone everywhere waits no longer for its fence."""
    certain: list[UUID] = []
    for attempt_id, node_ids in nodes.items():
        if await release(conn, [attempt_id], node_ids=node_ids, now=now):
            certain.append(attempt_id)
    waiting = [rows[i] for i in certain if rows[i].job_state == JobState.QUEUED and rows[i].job_epoch == rows[i].epoch]
    await update_jobs(conn, [{"id": row.job_id, "backoff_until": None} for row in waiting])
    await notify(conn, "queue", "node")
