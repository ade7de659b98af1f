"""Does memory stay flat? 10,000 short jobs through a real server, scheduler and PostgreSQL, in this one process.

The cluster is played: an agent and runners that say at once what they were told to. Prints the resident memory after
each 2,000 jobs, and ends with 1 where it still grows after the first 4,000: `python benchmarks/memory.py [jobs]`.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import itertools
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from phalanx_server.actions.bootstrap import bootstrap
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.main import configure_logging, create_app
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.settings import Settings
from phalanx_server.store.embedded import EmbeddedPostgres
from phalanx_server.store.engine import create_engine
from phalanx_server.store.migrate import upgrade
from pydantic import SecretStr

NODES, GPUS = 25, 8
SAMPLE_JOBS = 2_000
GROWTH_MAX = 0.05  # of what it was after the first 4,000
MIB = 1 << 20


class Cluster:
    """An agent with its runners, over the API."""

    def __init__(self, client: httpx.AsyncClient, token: str) -> None:
        self._client, self._token, self._seq = client, token, itertools.count(1)
        self._node_tokens: dict[str, str] = {}

    async def call(self, method: str, path: str, body: Any = None, token: str = "") -> Any:
        headers = {"Authorization": f"Bearer {token or self._token}"}
        answer = await self._client.request(method, path, json=body, headers=headers)
        assert answer.is_success, answer.text
        return answer.json()

    async def join(self) -> None:
        facts = {"gpu_type": "h100", "gpus": GPUS, "cpus": 64, "memory_bytes": 1 << 39, "address": "10.0.0.1"}
        nodes = [facts | {"name": f"n{n}", "ray_node_id": f"ray-n{n}"} for n in range(NODES)]
        body = {"instance": "a", "sent_at": time.time(), "nodes": nodes, "without_token": []}
        answer = await self.call("PUT", "/v1/agent/nodes", body)
        self._node_tokens |= answer["node_tokens"]

    async def play(self) -> int:
        """Start and end everything that should run; how many that were."""
        desired = (await self.call("GET", "/v1/agent/desired?instance=a"))["attempts"]
        await self._facts(desired, lambda attempt: [{"kind": "gang_ready"}, {"kind": "started", "ranks_started": []}])
        by_node: dict[str, list[Any]] = {}
        for attempt in desired:
            by_node.setdefault(attempt["groups"][0]["node"], []).append(attempt)
        for node, attempts in by_node.items():
            await self._report(node, attempts)
        exits = [{"rank": 0, "exit_code": 0}]
        await self._facts(desired, lambda attempt: [{"kind": "ended", "exits": exits}])
        return len(desired)

    async def _facts(self, attempts: list[Any], of: Any) -> None:
        facts = [
            {"attempt_id": attempt["attempt_id"], "epoch": attempt["epoch"], "at": time.time()} | fact
            for attempt in attempts
            for fact in of(attempt)
        ]
        await self.call("POST", "/v1/agent/reports", {"instance": "a", "sent_at": time.time(), "facts": facts})

    async def _report(self, node: str, attempts: list[Any]) -> None:
        parts = [
            {"attempt_id": each["attempt_id"], "epoch": each["epoch"], "rank": 0, "at": time.time()}
            for each in attempts
        ]
        data = base64.b64encode(b"hello\n").decode()
        report = {
            "boot": "b",
            "seq": next(self._seq),
            "sent_at": time.time(),
            "logs": [part | {"stream": "stdout", "offset": 0, "data": data} for part in parts],
            "metrics": [part | {"step": 1, "values": {"loss": 1.0}} for part in parts],
            "marks": [part | {"kind": "finished"} for part in parts],
        }
        await self.call("POST", "/v1/node/reports", report, self._node_tokens[node])


async def run(url: str, directory: Path, jobs: int) -> list[float]:
    """Resident MiB after each SAMPLE_JOBS."""
    settings = Settings(database_url=SecretStr(url), data_dir=directory, port=0, log_level="error")
    configure_logging(settings)
    await upgrade(url)
    engine = create_engine(url, pool_size=4)
    first = await bootstrap(engine)
    assert first is not None
    leader = Leader(engine, holder="benchmark", ttl_s=3600, renew_s=1)
    loop = ScheduleLoop(engine, leader, policy=Policy())
    app = create_app(settings)
    samples: list[float] = []
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://phalanx", timeout=60) as client:
            cluster = Cluster(client, first.cluster_token)
            await cluster.join()
            await leader.tick(datetime.now(UTC))
            done = submitted = 0
            while done < jobs:
                if submitted < jobs:
                    job = {"name": "short", "tenant": "default", "resources": {"gpus": 1}, "run": {"command": "true"}}
                    batch = {"jobs": [job] * (NODES * GPUS)}
                    await cluster.call("POST", "/v1/jobs/batch", batch, first.admin_token)
                    submitted += NODES * GPUS
                await loop.tick(datetime.now(UTC))
                await cluster.join()
                before, done = done, done + await cluster.play()
                if done // SAMPLE_JOBS > before // SAMPLE_JOBS:
                    gc.collect()
                    samples.append(psutil.Process().memory_info().rss / MIB)
                    print(f"{done:6d} jobs  {samples[-1]:7.1f} MiB", flush=True)
    await engine.dispose()
    return samples


def main() -> int:
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    directory = Path(tempfile.mkdtemp(prefix="phx-memory-"))
    server = EmbeddedPostgres(directory / "postgres", settings={"fsync": "off"})
    try:
        samples = asyncio.run(run(server.start(), directory / "data", jobs))
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
    growth = samples[-1] / samples[min(1, len(samples) - 1)] - 1
    print(f"growth since {2 * SAMPLE_JOBS} jobs: {growth:+.1%} ({'flat' if growth <= GROWTH_MAX else 'it grows'})")
    return int(growth > GROWTH_MAX)


if __name__ == "__main__":
    sys.exit(main())
