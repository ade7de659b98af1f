"""How fast an elastic job is with each number of replicas, as the API shows it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import httpx
from phalanx_server.store import ids
from phalanx_server.store.schema import speeds
from sqlalchemy import insert

ELASTIC = {"replicas": 2, "gpus_per_replica": 4, "elastic": {"min_replicas": 1, "max_replicas": 4}}


async def told(world: Any, job: str, *rows: dict[str, Any]) -> None:
    async with world.engine.begin() as conn:
        for row in rows:
            given = {"job_id": ids.parse("job", job), "gpu_type": "h100", "at": datetime.now(UTC)}
            await conn.execute(insert(speeds).values(given | row))


async def test_a_job_shows_how_fast_it_is_with_each_number_of_replicas(
    alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    job = (await alice.post("/v1/jobs", json=job_file(resources=ELASTIC))).json()
    assert job["speeds"] == []
    await told(
        world,
        job["id"],
        {"replicas": 1, "unit": "tokens_per_s", "speed": 1000.0, "seconds": 90.04},
        {"replicas": 2, "unit": "tokens_per_s", "speed": 1900.0, "seconds": 3600.0},
        {"replicas": 4, "unit": "tokens_per_s", "seconds": 20.0},
    )
    shown = (await alice.get(f"/v1/jobs/{job['id']}")).json()["speeds"]
    same = {"gpu_type": "h100", "unit": "tokens_per_s"}
    assert shown == [
        same | {"replicas": 1, "per_s": 1000.0, "relative": 1.0, "measured_s": 90.0},
        same | {"replicas": 2, "per_s": 1900.0, "relative": 1.9, "measured_s": 3600.0},
    ]
    (listed,) = (await alice.get("/v1/jobs")).json()["items"]
    assert listed["speeds"] == shown


async def test_what_an_earlier_job_had_has_no_rate(alice: httpx.AsyncClient, world: Any, job_file: Any) -> None:
    job = (await alice.post("/v1/jobs", json=job_file(resources=ELASTIC))).json()
    await told(world, job["id"], {"replicas": 1, "history": 1.0}, {"replicas": 4, "history": 3.0, "at": None})
    shown = (await alice.get(f"/v1/jobs/{job['id']}")).json()["speeds"]
    assert [(each["replicas"], each["per_s"], each["relative"]) for each in shown] == [(1, None, 1.0), (4, None, 3.0)]


async def test_one_number_alone_is_shown_and_compared_with_nothing(
    alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    job = (await alice.post("/v1/jobs", json=job_file(resources=ELASTIC))).json()
    await told(world, job["id"], {"replicas": 2, "unit": "steps_per_s", "speed": 2.5})
    (shown,) = (await alice.get(f"/v1/jobs/{job['id']}")).json()["speeds"]
    assert (shown["per_s"], shown["relative"]) == (2.5, None)
