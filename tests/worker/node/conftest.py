"""Real runners with real warm processes, and a small HTTP server that records what they send.

Two runners stand for two nodes and are shared by the whole session, because a warm process takes seconds to load.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import sys
import textwrap
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import pytest_asyncio
from phalanx_worker import protocol
from phalanx_worker.node.service import Runner
from phalanx_worker.protocol import DesiredAttempt, GroupPlacement, Launch

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it out

ENDED_WITHIN_S = 60.0
# The last digits of an attempt's id name its directory in /tmp, and runners clear up what bears their attempts' ids:
# two suites on one host must not meet.
_attempt_numbers = itertools.count(secrets.randbits(40) << 16)


class FakeServer:
    """The node link of a server: takes reports, serves bundles, can be away, can refuse an attempt."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []  # answered with another status than 200
        self.bundles: dict[str, bytes] = {}
        self.outputs: dict[tuple[str, int, str], bytes] = {}  # by attempt, group rank and path
        self.traces: dict[tuple[str, str, int], bytes] = {}  # by attempt, profile and rank
        self.output_answers: list[int] = []  # statuses of the next to files, the last one for ever; 0 hangs up
        self.output_tries = 0
        self.refused: list[dict[str, Any]] = []
        self.status = 200
        self.answers_as_a_proxy = False
        self.port = 0
        self.is_up = False
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=8 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        self.is_up = True

    async def stop(self) -> None:
        assert self._server is not None
        self.is_up = False
        self._server.close()
        for writer in list(self._clients):
            writer.close()
        await self._server.wait_closed()

    def items(self, kind: str, attempt_id: str) -> list[dict[str, Any]]:
        return [item for report in self.reports for item in report[kind] if item["attempt_id"] == attempt_id]

    def marks(self, attempt_id: str, kind: str) -> list[dict[str, Any]]:
        return [mark for mark in self.items("marks", attempt_id) if mark["kind"] == kind]

    def text(self, attempt_id: str, *, rank: int, stream: str = "stdout") -> str:
        """The stream put together by offset, as a server would; a repeated chunk changes nothing."""
        chunks = [
            chunk for chunk in self.items("logs", attempt_id) if (chunk["rank"], chunk["stream"]) == (rank, stream)
        ]
        data = bytearray()
        for chunk in sorted(chunks, key=lambda chunk: chunk["offset"]):
            assert chunk["offset"] <= len(data), "a gap in the log"
            data[chunk["offset"] :] = base64.b64decode(chunk["data"])
        return data.decode()

    async def next_report(self) -> None:
        await self._changed.wait()

    async def until(self, condition: Any, timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await self._changed.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (int(line[15:]) for line in head.lower().split("\r\n") if line[:15] == "content-length:"), 0
                )
                status, body = self._answer(head.split(" ")[1], await reader.readexactly(length))
                writer.write(self._head(status, body) + body)
                await writer.drain()
        self._clients.discard(writer)
        writer.close()

    def _head(self, status: int, body: bytes) -> bytes:
        kind = "application/json" if status == 200 else "application/problem+json"
        kind = "text/html" if self.answers_as_a_proxy else kind
        return f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    def _answer(self, target: str, body: bytes) -> tuple[int, bytes]:
        if target.startswith("/v1/node/bundles/"):
            bundle = self.bundles.get(target.split("/")[4].split("?")[0])
            return (404, b"") if bundle is None else (200, bundle)
        if "/outputs/" in target or "/profiles/" in target:
            return self._take_file(target, body)
        report = json.loads(body)
        (self.reports if self.status == 200 else self.rejected).append(report)
        self._changed.set()
        self._changed = asyncio.Event()
        if self.status != 200:
            return self.status, b'{"code": "a_code"}'
        protocol.decode(protocol.NodeReport, report)
        answer = {"server_time": 0.0, "accepted_seq": report["seq"], "refused": self.refused}
        return 200, json.dumps(answer).encode()

    def _take_file(self, target: str, body: bytes) -> tuple[int, bytes]:
        self.output_tries += 1
        status = self.output_answers[0] if self.output_answers else self.status
        self.output_answers = self.output_answers[1:] or self.output_answers
        if status == 0:
            raise ConnectionResetError
        if status == 200:
            url = urlsplit(target)
            query = {name: value for name, (value,) in parse_qs(url.query).items()}
            assert hashlib.sha256(body).hexdigest() == query["sha256"]
            attempt_id, kind, path = url.path.removeprefix("/v1/node/attempts/").split("/", 2)
            if kind == "outputs":
                self.outputs[attempt_id, int(query["group_rank"]), unquote(path)] = body
            else:
                profile_id, _, rank = path.split("/")
                self.traces[attempt_id, profile_id, int(rank)] = body
            self._changed.set()
            self._changed = asyncio.Event()
        return status, b'{"code": "a_code"}'


@dataclass
class Attempt:
    """One attempt on some runners, from order to exits."""

    desired: DesiredAttempt
    runners: list[Runner]
    server: FakeServer
    starts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.desired.attempt_id

    async def order(self, group_rank: int, master: dict[str, Any]) -> dict[str, Any]:
        return {
            "desired": protocol.encode(self.desired),
            "group_rank": group_rank,
            "master_addr": master["host"],
            "master_port": master["port"],
            "hosts_rendezvous": group_rank == 0,
        }

    async def start(self) -> Attempt:
        master = await self.runners[0].reserve_rendezvous(self.id)
        orders = [await self.order(index, master) for index in range(len(self.runners))]
        answers = await asyncio.gather(
            *(runner.start_group(order) for runner, order in zip(self.runners, orders, strict=True))
        )
        self.starts = [start for answer in answers for start in answer["ranks"]]
        return self

    async def group(self, runner: Runner | None = None, *, state: str = "ended") -> dict[str, Any]:
        """The group on a runner once it is in `state`."""
        runner, seq = runner or self.runners[0], -1
        async with asyncio.timeout(ENDED_WITHIN_S):
            while True:
                facts = await runner.next_facts(seq, 5)
                seq = facts["seq"]
                for group in facts["groups"]:
                    if group["attempt_id"] == self.id and group["state"] == state:
                        return group

    async def exits(self) -> list[dict[str, Any]]:
        """How its ranks ended; what they said has reached the server then, if that answers."""
        groups = [await self.group(runner) for runner in self.runners]
        if self.server.is_up and self.server.status == 200:
            await self._delivered()
        return sorted((end for group in groups for end in group["exits"]), key=lambda end: end["rank"])

    async def _delivered(self) -> None:
        async with asyncio.timeout(ENDED_WITHIN_S):
            for duties in filter(None, [runner._duties for runner in self.runners]):
                await duties.link.flush(ENDED_WITHIN_S)
                while duties.outbox.size_bytes or duties.link._spool.size_bytes:
                    await self.server.next_report()
                    await duties.link.flush(ENDED_WITHIN_S)

    async def run(self) -> list[dict[str, Any]]:
        await self.start()
        return await self.exits()

    async def printed(self, text: str, rank: int = 0) -> None:
        await self.server.until(lambda: text in self.server.text(self.id, rank=rank))

    async def forget(self) -> None:
        for runner in self.runners:
            await runner.forget_group(self.id)


class Workbench:
    """Makes attempts on the given runners; everything it made is forgotten at the end of a test."""

    def __init__(self, runners: list[Runner], server: FakeServer, directory: Path):
        self.runners = runners
        self.server = server
        self.directory = directory
        self.attempts: list[Attempt] = []

    def script(self, text: str, name: str = "train.py") -> str:
        path = self.directory / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    def attempt(
        self,
        command: str,
        *,
        nodes: int = 1,
        ranks: int = 1,
        env: dict[str, str] | None = None,
        memory_bytes: int = 0,
        uid: int = 70001,
        cpus: float = 1.0,
        **launch: Any,
    ) -> Attempt:
        number = next(_attempt_numbers)
        groups = [
            GroupPlacement(f"node-{index}", 1, list(range(ranks)), index, index * ranks, ranks)
            for index in range(nodes)
        ]
        desired = DesiredAttempt(
            attempt_id=f"att_{number:032x}",
            job_id=f"job_{number:032x}",
            job_name="test",
            tenant="research/nlp",
            tenant_uid=uid,
            number=1,
            epoch=number & 0xFFFF,
            action="run",
            grace_s=5.0,
            groups=groups,
            launch=Launch(
                command=command,
                env=env or {},
                world_size=nodes * ranks,
                bundle=launch.pop("bundle", None),
                cpus_per_group=[cpus] * nodes,
                memory_bytes_per_group=[memory_bytes] * nodes,
                **launch,
            ),
        )
        attempt = Attempt(desired, self.runners[:nodes], self.server)
        self.attempts.append(attempt)
        return attempt


def settings(server: FakeServer, data_dir: Path, **more: Any) -> dict[str, Any]:
    return {
        "server_url": server.url,
        "node_token": "phx_token",
        "data_dir": str(data_dir),
        "checkpoint_root": str(data_dir.parent / "checkpoints"),
        "heartbeat_s": 0.5,
        **more,
    }


@pytest.fixture
def runner_settings() -> Any:
    return settings


@pytest.fixture
def make_workbench() -> type[Workbench]:
    return Workbench


SECRETS = {"RAY_AUTH_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret", "PHALANX_CLUSTER_TOKEN": "s3cret"}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def fake_server() -> AsyncIterator[FakeServer]:
    server = FakeServer()
    await server.start()
    yield server
    await server.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def two_nodes(fake_server: FakeServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[Runner]]:
    root = tmp_path_factory.mktemp("nodes")
    runners = [Runner(environ={**os.environ, **SECRETS}) for _ in range(2)]
    for index, runner in enumerate(runners):
        await runner.configure(settings(fake_server, root / f"node-{index}"))
    yield runners
    for runner in runners:
        await runner.close()


@pytest_asyncio.fixture(loop_scope="session")
async def workbench(two_nodes: list[Runner], fake_server: FakeServer, tmp_path: Path) -> AsyncIterator[Workbench]:
    bench = Workbench(two_nodes, fake_server, tmp_path)
    yield bench
    for attempt in bench.attempts:
        await attempt.forget()
    fake_server.reports.clear()


SYSTEM_PYTHON = "/usr/bin/python3"
SOURCES = [str(Path(protocol.__file__).parents[1]), str(Path(protocol.__file__).parents[2] / "client")]


@pytest.fixture
def light_python() -> tuple[str, dict[str, str]]:
    """An interpreter without torch, and the environment in which it finds what is ours."""
    if not Path(SYSTEM_PYTHON).exists():
        pytest.skip(f"no {SYSTEM_PYTHON} here")
    return SYSTEM_PYTHON, {"PYTHONPATH": ":".join(SOURCES)}


@pytest_asyncio.fixture(loop_scope="session")
async def light_runner(light_python: tuple[str, dict[str, str]], tmp_path: Path) -> AsyncIterator[Any]:
    """Makes runners whose warm process has no torch, so that it is there at once: for what needs its own runner."""
    python, warm_env = light_python
    made: list[Runner] = []

    async def make(server: FakeServer, *, name: str = "light", gcs_alive: Any = None, **more: Any) -> Runner:
        runner = Runner(python=python, warm_env=warm_env, gcs_alive=gcs_alive)
        made.append(runner)
        await runner.configure(settings(server, tmp_path / name, **more))
        return runner

    yield make
    for runner in made:
        await runner.close()


@pytest_asyncio.fixture(loop_scope="session")
async def server() -> AsyncIterator[FakeServer]:
    """A server of the test's own, to be stopped and started."""
    fake = FakeServer()
    await fake.start()
    yield fake
    await fake.stop()
