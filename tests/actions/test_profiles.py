"""A profile from the request to its end, as the agent is told and the node reports."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.request_profile import Wanted, profile_state, request_profile
from phalanx_server.actions.save_trace import save_rank_trace
from phalanx_server.domain import profile as limits
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.errors import Conflict, Invalid, NotFound
from phalanx_server.domain.messages import ProfileRequest
from phalanx_server.domain.profile import ENDED, UNDELIVERED, UNDELIVERED_S, UNHEARD, UNHEARD_S
from phalanx_server.store import ids
from phalanx_server.store.outputs import OutputFiles
from phalanx_server.store.profiles import RankRef, load_profile
from phalanx_server.store.schema import audit
from sqlalchemy import Row

TRACE = b"trace"


async def request(plane: ControlPlane, job_id: UUID, *ranks: int, steps: int = 5) -> UUID:
    async with plane.engine.begin() as conn:
        return await request_profile(conn, job_id, Wanted(steps, ranks or None), actor=SYSTEM, now=plane.now)


async def state(plane: ControlPlane, job_id: UUID, profile: UUID) -> tuple[str, str]:
    async with plane.engine.connect() as conn:
        row = await load_profile(conn, job_id, profile)
    told = profile_state(row, now=plane.now)  # type: ignore[arg-type]
    return told.state.value, told.reason


async def wanted(plane: ControlPlane) -> list[ProfileRequest]:
    return [profile for attempt in (await plane.desired()).attempts for profile in attempt.profiles]


async def say(plane: ControlPlane, attempt: Row[Any], profile: UUID, rank: int = 0, **data: Any) -> None:
    mark = plane.mark(attempt, "profile", rank, id=ids.encode("profile", profile), **data)
    await plane.node_report("node-0", marks=[mark])


async def give(plane: ControlPlane, attempt: Row[Any], profile: UUID, rank: int = 0, node: str = "node-0") -> None:
    async def body() -> AsyncIterator[bytes]:
        yield TRACE

    await save_rank_trace(
        plane.engine,
        OutputFiles(plane.storage.as_uri()),
        RankRef(attempt.id, attempt.epoch, profile, rank),
        body(),
        sha256=hashlib.sha256(TRACE).hexdigest(),
        size_bytes=len(TRACE),
        node_id=(await plane.node(node)).id,
        now=plane.now,
    )


async def test_the_agent_is_told_until_every_rank_is_done(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(replicas=2)
    before = (await plane.desired()).version
    profile = await request(plane, job_id, 1, 0, steps=7)
    name = ids.encode("profile", profile)
    assert await wanted(plane) == [ProfileRequest(profile_id=name, steps=7, ranks=[0, 1])]
    assert (await plane.desired()).version != before
    assert await state(plane, job_id, profile) == ("requested", "")
    await say(plane, attempt, profile, 0, state="recording")
    await give(plane, attempt, profile, 0)
    assert await state(plane, job_id, profile) == ("recording", "")
    await say(plane, attempt, profile, 1, state="failed", reason="no step")
    assert await state(plane, job_id, profile) == ("ready", "no step")
    assert await wanted(plane) == [] and (await plane.desired()).version == before
    entries = await plane.rows(audit)
    assert [row.detail["profile"] for row in entries if row.action == "request_profile"] == [name]


async def test_what_comes_late_or_of_others_changes_nothing(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    job_id, attempt = await plane.run()
    profile = await request(plane, job_id)
    _, other = await plane.run()
    await say(plane, other, profile, 0, state="failed", reason="not mine")
    await say(plane, attempt, profile, 3, state="failed", reason="not asked")
    for data in ({"state": "ready"}, {"state": ["failed"]}, {}, {"id": "prof_x", "state": "failed"}):
        await plane.node_report("node-0", marks=[plane.mark(attempt, "profile", **data)])
    assert await state(plane, job_id, profile) == ("requested", "")
    with pytest.raises(NotFound):
        await give(plane, attempt, profile, 0, node="node-1")
    with pytest.raises(NotFound):
        await give(plane, attempt, profile, 1)
    with pytest.raises(NotFound):
        await give(plane, other, profile, 0)
    await give(plane, attempt, profile)
    await say(plane, attempt, profile, 0, state="failed", reason="late")
    assert await state(plane, job_id, profile) == ("ready", "")


async def test_a_trace_that_is_sent_again_takes_the_place_of_the_first(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    profile = await request(plane, job_id)
    await give(plane, attempt, profile)
    await give(plane, attempt, profile)
    assert len([path for path in (plane.storage / "profiles").rglob("*") if path.is_file()]) == 1


async def test_only_a_job_that_runs_is_profiled(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit(name="gpt")
    with pytest.raises(Conflict, match="gpt is queued: only a job that runs can be profiled"):
        await request(plane, job_id)
    await plane.tick()
    with pytest.raises(Conflict, match="gpt is starting"):
        await request(plane, job_id)
    attempt = await plane.start(job_id)
    with pytest.raises(Invalid, match=r"ranks\[0\]: there is no rank 1"):
        await request(plane, job_id, 1)
    profile = await request(plane, job_id)
    await plane.report(plane.ended(attempt, 0))
    assert await state(plane, job_id, profile) == ("failed", ENDED)
    with pytest.raises(Conflict, match="already succeeded"):
        await request(plane, job_id)
    with pytest.raises(NotFound):
        await give(plane, attempt, profile)


async def test_one_is_recorded_at_a_time_and_one_that_nothing_is_heard_of_is_given_up(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(name="gpt")
    first = await request(plane, job_id)
    with pytest.raises(Conflict, match=f"{ids.encode('profile', first)} of gpt is not done yet"):
        await request(plane, job_id)
    plane.later(UNHEARD_S + 1)
    assert await state(plane, job_id, first) == ("failed", UNHEARD)
    second = await request(plane, job_id)
    assert [each.profile_id for each in await wanted(plane)] == [ids.encode("profile", second)]
    await say(plane, attempt, first, state="recording")
    assert await state(plane, job_id, first) == ("failed", UNHEARD)


@pytest.mark.parametrize(("ready", "told"), [(False, "failed"), (True, "ready")])
async def test_one_whose_trace_never_comes_is_given_up(plane: ControlPlane, ready: bool, told: str) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(replicas=2)
    first = await request(plane, job_id, 0, 1)
    for rank in (0, 1):
        await say(plane, attempt, first, rank, state="recording")
    if ready:
        await give(plane, attempt, first, 0)
    plane.later(UNDELIVERED_S - 1)
    with pytest.raises(Conflict, match="not done yet"):
        await request(plane, job_id)
    plane.later(2)
    assert await state(plane, job_id, first) == (told, UNDELIVERED)
    second = await request(plane, job_id)
    assert [each.profile_id for each in await wanted(plane)] == [ids.encode("profile", second)]
    assert await state(plane, job_id, first) == (told, UNDELIVERED)


async def test_traces_that_are_too_large_together_are_refused_before_their_bytes_and_fail_their_rank(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "JOB_TRACES_MAX_BYTES", 2 * len(TRACE) - 1)
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(replicas=2)
    profile = await request(plane, job_id, 0, 1)
    await give(plane, attempt, profile, 0)
    await give(plane, attempt, profile, 0)  # again: it takes the place of the first
    with pytest.raises(Invalid, match="with these 5 bytes the traces of the job would have 10; at most 9"):
        await give(plane, attempt, profile, 1)
    told, reason = await state(plane, job_id, profile)
    assert told == "ready" and "the traces of the job would have 10" in reason
    assert await wanted(plane) == []
    assert len([path for path in (plane.storage / "profiles").rglob("*") if path.is_file()]) == 1
