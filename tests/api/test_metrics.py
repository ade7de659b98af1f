"""`/metrics`: who may read it, that every bound is shown, and that the page about it is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy import text

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
BEAT = {"attempts": [], "stats": {"cpu_utilization": 0.5, "memory_bytes": 1}, "warm_ready": True, "spool_bytes": 77}
GOLDEN = Path(__file__).parents[1] / "contract" / "golden"


async def test_it_needs_an_operator(calls: Any) -> None:
    answers = [await calls(name).get("/metrics") for name in ("", "alice", "n0", "operator")]
    assert [answer.status_code for answer in answers] == [401, 403, 403, 200]


async def test_the_page_lists_what_there_is(calls: Any) -> None:
    said = (await calls("operator").get("/metrics")).text
    there = set(re.findall(r"^# TYPE (\w+) \w+$", said, re.MULTILINE))
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


async def test_how_near_a_runner_is_to_its_bounds_shows(calls: Any) -> None:
    beat = BEAT | {"fullness": json.loads((GOLDEN / "Fullness.json").read_text())}
    report = {"boot": "b", "seq": 1, "sent_at": 0.0, "heartbeat": beat}
    assert (await calls("n0").post("/v1/node/reports", json=report)).status_code == 200
    lines = (await calls("operator").get("/metrics")).text.splitlines()
    for line in (
        'phalanx_node_spool_bytes{cluster="main",node="n0"} 77.0',
        'phalanx_node_bytes{cluster="main",node="n0",what="outbox"} 1024.0',
        'phalanx_node_bytes_limit{cluster="main",what="reports"} 2.68435456e+08',
        'phalanx_node_warm_processes{cluster="main",node="n0"} 2.0',
        'phalanx_node_warm_processes_limit{cluster="main"} 5.0',
        'phalanx_node_dropped_total{cluster="main",kind="metrics",node="n0"} 120.0',
    ):
        assert line in lines, line
    assert not [line for line in lines if line.startswith("phalanx_node_bytes_limit") and "outputs" in line]


async def test_how_many_facts_an_agent_keeps_shows(calls: Any) -> None:
    inventory = {"instance": "a1", "sent_at": 0.0, "nodes": []}
    shown = ('phalanx_agent_facts{cluster="main"} 3.0', 'phalanx_agent_facts_limit{cluster="main"} 96.0')
    for said, present in (({}, False), ({"backlog": {"facts": 3, "facts_limit": 96}}, True), ({}, False)):
        assert (await calls("agent").put("/v1/agent/nodes", json=inventory | said)).status_code == 200
        lines = (await calls("operator").get("/metrics")).text.splitlines()
        assert [line in lines for line in shown] == [present] * 2, "an agent of an older version says nothing of it"


async def test_a_runner_of_an_older_version_shows_what_it_says(calls: Any, app: FastAPI) -> None:
    report = {"boot": "b", "seq": 1, "sent_at": 0.0, "heartbeat": BEAT}
    assert (await calls("n0").post("/v1/node/reports", json=report)).status_code == 200
    async with app.state.services.engine.begin() as conn:  # as another version of the server would have stored it
        await conn.execute(
            text("UPDATE nodes SET stats = stats || '{\"fullness\": {\"outbox\": 1}}' WHERE name = 'n0'")
        )
    lines = (await calls("operator").get("/metrics")).text.splitlines()
    assert 'phalanx_node_spool_bytes{cluster="main",node="n0"} 77.0' in lines
    assert not [line for line in lines if line.startswith("phalanx_node_bytes{")]


async def test_figures_that_no_column_holds_are_refused(calls: Any) -> None:
    report = {"boot": "b", "seq": 1, "sent_at": 0.0, "heartbeat": BEAT | {"spool_bytes": 1 << 70}}
    assert (await calls("n0").post("/v1/node/reports", json=report)).status_code == 422
    assert (await calls("operator").get("/metrics")).status_code == 200
