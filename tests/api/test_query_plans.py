"""No hot path reads a big table from end to end: the statements that are really executed, explained on a full database.

Statements are caught on their way to the driver while routes and loops run, then explained with the parameters that
they had. A statement that comes with a new feature is caught without anybody adding it here.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from phalanx_server.loops.deliver_outbox import DeliverOutbox
from phalanx_server.loops.enforce import Enforce
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.measure_speeds import MeasureSpeeds
from phalanx_server.loops.retain import Keep, Retain
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.loops.watch_nodes import Patience, WatchNodes
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.store import ids
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.logs import LogFiles
from phalanx_server.store.outputs import OutputFiles
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

pytestmark = pytest.mark.slow

BIG_ROWS = 5_000
JOBS, QUEUED, LIVE, NODES = 20_000, 6_000, 600, 200
SECONDS_AGO = "now() - make_interval(secs => :jobs - n)"

# Every ten minutes the holds of all that waits are compared with the queue.
MAY_READ_ALL = {"Retain": {"holds"}}

# `n` is a job's number, oldest first; the last QUEUED wait, and LIVE before those run.
LOAD = (
    """
    CREATE TABLE numbered AS SELECT n, gen_random_uuid() AS attempt_id, CAST(lpad(to_hex(n), 32, '0') AS uuid) AS id,
        CASE WHEN n > :jobs - :queued THEN 'queued' WHEN n > :jobs - :queued - :live THEN 'running'
             ELSE 'succeeded' END AS state
    FROM generate_series(1, :jobs) n
    """,
    """
    INSERT INTO nodes (id, cluster_id, name, ray_node_id, gpu_type, gpus, cpus, memory_bytes, address, runner_seen_at)
    SELECT gen_random_uuid(), :cluster, 'm' || n, 'ray-m' || n, 'h100', 8, 64, 1::bigint << 39, '10.0.0.1', now()
    FROM generate_series(1, :nodes) n
    """,
    f"""
    INSERT INTO jobs (id, tenant_id, name, state, epoch, priority, spec, labels, created_by, received_at, submitted_at,
                      queued_at, started_at, finished_at, attempts)
    SELECT id, (SELECT t.id FROM tenants t ORDER BY md5(t.path || n % 7) LIMIT 1), 'job-' || n % 500, state,
           CASE state WHEN 'queued' THEN 0 ELSE 1 END, n % 5 * 10, CAST(:spec AS jsonb),
           jsonb_build_object('team', 't' || n % 1000), 'load', {SECONDS_AGO}, {SECONDS_AGO}, {SECONDS_AGO},
           CASE WHEN state <> 'queued' THEN {SECONDS_AGO} END, CASE state WHEN 'succeeded' THEN {SECONDS_AGO} END,
           CASE state WHEN 'queued' THEN 0 ELSE 1 END
    FROM numbered ORDER BY n
    """,
    """
    INSERT INTO holds (job_id, reason, message, since)
    SELECT id, 'no_fit', 'Waits for 8 GPUs.', now() FROM numbered WHERE state = 'queued'
    """,
    f"""
    INSERT INTO attempts (id, job_id, cluster_id, number, epoch, state, gpu_type, replicas, created_at, started_at,
                          ended_at, released_at, outcome)
    SELECT attempt_id, id, :cluster, 1, 1, CASE state WHEN 'running' THEN 'running' ELSE 'ended' END, 'h100', 1,
           {SECONDS_AGO}, {SECONDS_AGO}, CASE state WHEN 'succeeded' THEN {SECONDS_AGO} END,
           CASE state WHEN 'succeeded' THEN {SECONDS_AGO} END, CASE state WHEN 'succeeded' THEN 'succeeded' END
    FROM numbered WHERE state <> 'queued'
    """,
    f"""
    INSERT INTO placements (attempt_id, node_id, group_rank, replicas, gpu_indices, first_rank, ranks, cpus,
                            memory_bytes, released_at)
    SELECT attempt_id, (ARRAY(SELECT id FROM nodes ORDER BY name))[1 + n % :nodes], 0, 1, ARRAY[n / :nodes % 8], 0, 1,
           8, 1::bigint << 30, CASE state WHEN 'succeeded' THEN {SECONDS_AGO} END
    FROM numbered WHERE state <> 'queued'
    """,
    f"""
    INSERT INTO events (job_id, attempt_id, at, kind, message)
    SELECT id, attempt_id, {SECONDS_AGO}, 'submitted', 'x' FROM numbered, generate_series(1, 3)
    """,
    """
    INSERT INTO progress (job_id, attempt_id, step, at) SELECT id, attempt_id, n, now() FROM numbered
    WHERE state <> 'queued'
    """,
    f"""
    INSERT INTO checkpoints (job_id, attempt_id, step, url, registered_at)
    SELECT id, attempt_id, step, 's3://b/' || step, {SECONDS_AGO} FROM numbered, generate_series(1, 2) step
    WHERE state <> 'queued'
    """,
    f"""
    INSERT INTO logs (job_id, attempt_id, rank, stream, start_bytes, length_bytes, url, url_offset, at)
    SELECT id, attempt_id, 0, 'stdout', piece * 100, 100, 'logs/x', 0, {SECONDS_AGO} FROM numbered,
           generate_series(0, CASE WHEN n = :jobs - :queued THEN 20000 ELSE 1 END) piece WHERE state <> 'queued'
    """,
    """
    INSERT INTO metrics (job_id, attempt_id, rank, name, step, value, at)
    SELECT id, attempt_id, 0, name, 1, 1.0, now() FROM numbered, unnest(ARRAY['loss', 'lr']) name
    WHERE state <> 'queued'
    """,
    """
    INSERT INTO metric_rollups (job_id, name, resolution_s, bucket, min, max, sum, count)
    SELECT id, name, resolution_s, date_trunc('hour', now()), 1, 1, 1, 1 FROM numbered,
           unnest(ARRAY['loss', 'lr']) name, unnest(ARRAY[10, 60, 600]) resolution_s WHERE state <> 'queued'
    """,
    """
    INSERT INTO audit (actor, action, target) SELECT 'load', 'submit_jobs', 'job' FROM numbered
    """,
    """
    INSERT INTO idempotency_keys (scope, key, body_hash, status, response)
    SELECT 'scope', 'key-' || n, '\\x00', 201, '{}' FROM numbered
    """,
    """
    INSERT INTO outbox (topic, payload, created_at, due_at, delivered_at) SELECT 'job', '{}', now(), now(), now()
    FROM numbered
    """,
    """
    INSERT INTO outputs (job_id, attempt_id, group_rank, path, bytes, hash, url, created_at)
    SELECT id, attempt_id, 0, 'out', 1, repeat('0', 64), 'outputs/x', now() FROM numbered WHERE state <> 'queued'
    """,
    """
    INSERT INTO tokens (id, kind, role, hash, name) SELECT gen_random_uuid(), 'user', 'admin', '\\x00', 'x'
    FROM numbered WHERE n <= 6000
    """,
    "DROP TABLE numbered",
    "UPDATE nodes SET runner_seen_at = now()",
    "UPDATE clusters SET agent_seen_at = now(), agent_instance = 'a'",
)


@dataclass
class Statements:
    """What was executed, each text once with its last parameters, and by whom."""

    seen: dict[str, tuple[Any, str]] = field(default_factory=dict)
    doing: str = ""

    def listen(self, *engines: AsyncEngine) -> None:
        for engine in engines:
            event.listen(engine.sync_engine, "before_cursor_execute", self._on_execute)

    @contextlib.contextmanager
    def of(self, doing: str) -> Iterator[None]:
        self.doing = doing
        yield
        self.doing = ""

    def _on_execute(
        self, _conn: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, executemany: bool
    ) -> None:
        if self.doing and statement.lstrip().split(None, 1)[0].upper() in (
            "SELECT",
            "INSERT",
            "UPDATE",
            "DELETE",
            "WITH",
        ):
            self.seen[statement] = (parameters[0] if executemany else parameters, self.doing)


@pytest.fixture
async def full(world: Any, job_file: Any, alice: httpx.AsyncClient) -> AsyncIterator[None]:
    """The database after a busy time."""
    spec = (await alice.post("/v1/jobs?dry_run=true", json=job_file())).json()["spec"]
    values: dict[str, Any] = {"jobs": JOBS, "queued": QUEUED, "live": LIVE, "nodes": NODES}
    values |= {"cluster": f"'{world.cluster}'", "spec": "'" + json.dumps(spec).replace("'", "''") + "'"}
    for statement in LOAD:
        for name, value in values.items():
            statement = statement.replace(f":{name}", str(value))
        async with world.engine.begin() as conn:  # each in its own: transaction ids tell what changed when
            await conn.exec_driver_sql(statement)
    async with world.engine.connect() as conn:
        await (await conn.execution_options(isolation_level="AUTOCOMMIT")).execute(text("VACUUM ANALYZE"))
    yield


async def big_tables(engine: AsyncEngine) -> set[str]:
    query = text("SELECT relname FROM pg_class WHERE relkind = 'r' AND reltuples >= :rows")
    async with engine.connect() as conn:
        return set((await conn.execute(query, {"rows": BIG_ROWS})).scalars())


def scanned(plan: dict[str, Any]) -> Iterator[str]:
    """Tables that a plan reads from end to end."""
    if plan["Node Type"] == "Seq Scan":
        yield plan["Relation Name"]
    for part in plan.get("Plans", ()):
        yield from scanned(part)


async def offences(engine: AsyncEngine, statements: Statements) -> list[str]:
    """What was executed that reads a big table from end to end."""
    big, found = await big_tables(engine), []
    assert {"jobs", "events", "logs", "attempts", "holds", "audit"} <= big
    for statement, (parameters, doing) in statements.seen.items():
        async with engine.connect() as conn:
            answer = await conn.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
            plan = answer.scalar_one()
        plan = json.loads(plan) if isinstance(plan, str) else plan
        if read := big.intersection(scanned(plan[0]["Plan"])) - MAY_READ_ALL.get(doing, set()):
            found.append(f"{doing}: reads all of {', '.join(sorted(read))}: {' '.join(statement.split())[:300]}")
    return found


async def some(world: Any, condition: str) -> tuple[str, str]:
    """The newest job for which `condition` holds, and its attempt."""
    query = f"SELECT j.id, a.id FROM jobs j LEFT JOIN attempts a ON a.job_id = j.id WHERE {condition} LIMIT 1"
    async with world.engine.connect() as conn:
        job, attempt = (await conn.exec_driver_sql(query)).one()
    return ids.encode("job", job), ids.encode("attempt", attempt) if attempt else ""


async def read(client: httpx.AsyncClient, url: str) -> None:
    """A page, and the next one where there is one."""
    answer = await client.get(url)
    assert answer.status_code in (200, 404), answer.text
    is_page = answer.status_code == 200 and "json" in answer.headers["content-type"]
    if is_page and (cursor := answer.json().get("next_cursor")):
        more = await client.get(f"{url}{'&' if '?' in url else '?'}cursor={cursor}")
        assert more.status_code == 200, more.text


async def test_routes_of_users(full: None, app: FastAPI, calls: Any, world: Any, job_file: Any) -> None:
    statements, services = Statements(), app.state.services
    statements.listen(services.engine)
    waiting, _ = await some(world, "j.state = 'queued' AND j.tenant_id = " + f"'{world.tenants['research/nlp']}'")
    chatty, _ = await some(world, "j.state = 'running' ORDER BY (SELECT count(*) FROM logs WHERE job_id = j.id) DESC")
    reads = [
        "/v1/queue",
        "/v1/jobs",
        "/v1/jobs?state=running",
        "/v1/jobs?state=failed",
        "/v1/jobs?state=queued&state=running",
        "/v1/jobs?label=team%3Dt7",
        "/v1/jobs?label=team%3Dnone",
        "/v1/jobs?tenant=research/nlp",
        "/v1/jobs?tenant=research/nlp&state=running&label=team%3Dt7",
        "/v1/jobs?name=job-7",
        "/v1/nodes",
        f"/v1/jobs/{waiting}",
        f"/v1/jobs/{waiting}/explain",
        *(f"/v1/jobs/{chatty}{what}" for what in ("", "/attempts", "/events", "/logs", "/metrics", "/outputs")),
        f"/v1/jobs/{chatty}/logs?tail_lines=10",
        f"/v1/jobs/{chatty}/logs?rank=0&stream=stdout&attempt=1&start_bytes=100000",
        f"/v1/jobs/{chatty}/metrics?name=loss",
    ]
    for name in ("admin", "alice"):
        for url in reads:
            with statements.of(f"GET {url} by {name}"):
                await read(calls(name), url)
    alice = calls("alice")
    with statements.of("submitting"):
        made = await alice.post("/v1/jobs", json=job_file(), headers={"Idempotency-Key": "k"})
        again = await alice.post("/v1/jobs/batch", json={"jobs": [job_file()] * 3})
        assert made.status_code == again.status_code == 201
    with statements.of("steering"):
        for verb in ("hold", "release", "cancel"):
            assert (await alice.post(f"/v1/jobs/{made.json()['id']}/{verb}")).is_success
    assert len(statements.seen) > 20
    assert await offences(services.engine, statements) == []


async def test_links(full: None, app: FastAPI, calls: Any, world: Any) -> None:
    statements, services = Statements(), app.state.services
    statements.listen(services.links)
    async with world.engine.begin() as conn:
        await conn.exec_driver_sql(
            f"UPDATE placements SET node_id = '{world.nodes['n0']}' WHERE attempt_id IN"
            " (SELECT id FROM attempts WHERE state = 'running' LIMIT 8)"
        )
    _, attempt = await some(world, f"a.id IN (SELECT attempt_id FROM placements WHERE node_id = '{world.nodes['n0']}')")
    agent, runner, part = calls("agent"), calls("n0"), {"attempt_id": attempt, "epoch": 1, "at": time.time()}
    with statements.of("asking what should run"):
        version = (await agent.get("/v1/agent/desired?instance=a")).json()["version"]
        await agent.get(f"/v1/agent/desired?instance=a&version={version}&wait_s=0.05")
    with statements.of("a runner's report"):
        report = {
            "boot": "b",
            "seq": 1,
            "sent_at": time.time(),
            "heartbeat": {
                "attempts": [{"attempt_id": attempt, "epoch": 1}],
                "stats": {"cpu_utilization": 0.5, "memory_bytes": 1},
                "warm_ready": True,
            },
            "logs": [part | {"rank": 0, "stream": "stdout", "offset": 0, "data": base64.b64encode(b"x").decode()}],
            "metrics": [part | {"rank": 0, "step": 2, "values": {"loss": 1.0}}],
            "marks": [part | {"rank": 0, "kind": "checkpoint", "data": {"url": "s3://b/9", "step": 9}}],
        }
        answer = await runner.post("/v1/node/reports", json=report)
        assert answer.json()["refused"] == [], answer.text
    exits = [{"rank": 0, "exit_code": 0, "at": time.time(), "node": "n0"}]
    with statements.of("an agent's report"):
        facts = [part | {"kind": "gang_ready"}, part | {"kind": "ended", "exits": exits}]
        answer = await agent.post("/v1/agent/reports", json={"instance": "a", "sent_at": time.time(), "facts": facts})
        assert answer.status_code == 200 and answer.json()["refused"] == [], answer.text
    assert {doing for _, doing in statements.seen.values()} >= {"asking what should run", "an agent's report"}
    assert await offences(services.links, statements) == []


def retain_of(world: Any, leader: Leader) -> Retain:
    """Some hours of jobs are to be forgotten, and most are not."""
    keep = Keep(
        metrics=timedelta(days=7), events=timedelta(hours=5), logs=timedelta(hours=5), outputs=timedelta(hours=5)
    )
    return Retain(
        world.engine,
        leader,
        keep=keep,
        files=LogFiles("memory://"),
        bundles=BundleFiles("memory://"),
        outputs=OutputFiles("memory://"),
    )


async def test_the_scheduler(full: None, calls: Any, world: Any, job_file: Any) -> None:
    statements, now = Statements(), datetime.now(UTC)
    leader = Leader(world.engine, holder="a test", ttl_s=600, renew_s=1)
    loop = ScheduleLoop(world.engine, leader, policy=Policy())
    patience = Patience(node_timeout_s=20, startup_grace_s=15, fence_s=60, loss_grace_s=5)
    await leader.tick(now)
    await loop.tick(now)  # a new leader reads everything
    await loop.tick(now)
    statements.listen(world.engine)
    for _ in range(2):
        with statements.of("a pass"):
            for name in ("alice", "bob"):
                job = job_file(tenant=None, priority="high") | {"resources": {"gpus": 1}}
                job.pop("tenant")
                assert (await calls(name).post("/v1/jobs", json=job)).status_code == 201
            assert await loop.tick(datetime.now(UTC)) is not None
    async with httpx.AsyncClient() as client:
        for each in (
            leader,
            WatchNodes(world.engine, leader, patience),
            Enforce(world.engine, leader, policy=Policy()),
            MeasureSpeeds(world.engine, leader),
            DeliverOutbox(world.engine, leader, webhook_url="http://127.0.0.1:9", client=client),
            retain_of(world, leader),
        ):
            with statements.of(type(each).__name__):
                await each.tick(datetime.now(UTC))
    assert await offences(world.engine, statements) == []
