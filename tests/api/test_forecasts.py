"""Between when and when a job starts, as it is told, and how good that was."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from phalanx_server.store import ids
from phalanx_server.store.schema import attempts, forecasts, holds, jobs
from sqlalchemy import insert, update


async def test_a_waiting_job_tells_between_when_and_when_it_starts(
    alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    job = (await alice.post("/v1/jobs", json=job_file())).json()["id"]
    low, at, high = (datetime(2030, 1, 1, hour, tzinfo=UTC) for hour in (1, 2, 3))
    hold = {"reason": "capacity", "message": "needs 8 h100", "since": low, "job_id": ids.parse("job", job)}
    said = {"estimated_start": at, "estimated_start_low": low, "estimated_start_high": high, "unblocks": []}
    async with world.engine.begin() as conn:
        await conn.execute(insert(holds).values(hold | said))
    why = (await alice.get(f"/v1/jobs/{job}/explain")).json()
    assert {key: datetime.fromisoformat(why["hold"][key]) for key in said if key != "unblocks"} == {
        key: value for key, value in said.items() if key != "unblocks"
    }
    assert "at 2030-01-01T02:00:00Z, in four cases of five from 2030-01-01T01:00:00Z to 2030-01-01T03" in why["text"]


async def test_nothing_was_forecast_yet(alice: httpx.AsyncClient) -> None:
    report = (await alice.get("/v1/scheduler/calibration")).json()
    nothing = {"jobs": 0, "within_interval": None, "median_error_s": None, "median_relative_error": None}
    assert report == {"starts": nothing, "runs": nothing}


async def test_forecasts_are_counted_within_what_the_caller_may_see(calls: Any, world: Any, job_file: Any) -> None:
    submits = {"alice": "research/nlp", "bob": "vision"}
    said = datetime(2030, 1, 1, tzinfo=UTC)
    for name, count in (("alice", 2), ("bob", 3)):
        for _ in range(count):
            job = (await calls(name).post("/v1/jobs", json=job_file(tenant=submits[name]))).json()["id"]
            attempt = ids.parse("attempt", await world.place(job))
            row = {"job_id": ids.parse("job", job), "said_at": said, "start": said, "run_s": 60.0}
            async with world.engine.begin() as conn:
                await conn.execute(insert(forecasts).values(row))
                ran = {
                    "replicas": 2,
                    "started_at": said,
                    "ended_at": said + timedelta(seconds=60),
                    "state": "ended",
                    "outcome": "failed",
                }
                await conn.execute(update(attempts).where(attempts.c.id == attempt).values(ran))
                over = {"state": "failed", "finished_at": said}
                await conn.execute(update(jobs).where(jobs.c.id == row["job_id"]).values(over))

    async def counted(name: str) -> tuple[int, int]:
        report = (await calls(name).get("/v1/scheduler/calibration")).json()
        return report["starts"]["jobs"], report["runs"]["jobs"]

    expected = {"viewer": 2, "alice": 2, "manager": 2, "bob": 3, "operator": 5, "admin": 5}
    assert {name: await counted(name) for name in expected} == {name: (n, n) for name, n in expected.items()}
