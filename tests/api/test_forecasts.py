"""Between when and when a job starts, as it is told, and how good that was."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import httpx
from phalanx_server.store import ids
from phalanx_server.store.schema import holds
from sqlalchemy import insert


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
