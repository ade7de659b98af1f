"""`/metrics`: who may read it, that every bound is shown, and that the page about it is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
BEAT = {"attempts": [], "stats": {"cpu_utilization": 0.5, "memory_bytes": 1}, "warm_ready": True, "spool_bytes": 77}


async def test_it_needs_an_operator(calls: Any) -> None:
    answers = [await calls(name).get("/metrics") for name in ("", "alice", "n0", "operator")]
    assert [answer.status_code for answer in answers] == [401, 403, 403, 200]


async def test_the_page_lists_what_there_is(calls: Any) -> None:
    text = (await calls("operator").get("/metrics")).text
    there = set(re.findall(r"^# TYPE (\w+) \w+$", text, re.MULTILINE))
    there = {name for name in there if not name.endswith("_created")}
    page = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert {name for name in page if not name.startswith("phalanx_scheduler_")} == there
    for name in there:
        assert re.fullmatch(r"(phalanx|process)_[a-z_]+", name)
        if name.endswith("_limit"):
            assert name.removesuffix("_limit") in there, "a bound of nothing"


async def test_what_fills_up_shows(calls: Any, app: FastAPI) -> None:
    report = {"boot": "b", "seq": 1, "sent_at": 0.0, "heartbeat": BEAT}
    assert (await calls("n0").post("/v1/node/reports", json=report)).status_code == 200
    held = await app.state.services.engine.connect()
    app.state.gates.users.refused["overloaded"] += 1
    lines = (await calls("operator").get("/metrics")).text.splitlines()
    await held.close()
    for line in (
        'phalanx_node_spool_bytes{cluster="main",node="n0"} 77.0',
        'phalanx_database_connections{pool="users"} 1.0',
        'phalanx_database_connections_limit{pool="users"} 5.0',
        'phalanx_http_requests_running{gate="reports"} 1.0',
        'phalanx_http_requests_refused_total{code="overloaded",gate="users"} 1.0',
        "phalanx_submit_waiting_jobs 0.0",
    ):
        assert line in lines, line
