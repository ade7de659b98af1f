"""A server's side of the agent link that a test plays: it says what is desired and collects the facts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import replace
from typing import Any

import uvicorn
from phalanx_worker.protocol import (
    AgentReport,
    AttemptFact,
    Desired,
    DesiredAttempt,
    GroupPlacement,
    Inventory,
    InventoryAnswer,
    Launch,
    NodeFacts,
    Refused,
    ReportAnswer,
    decode,
    encode,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


class FakeServer:
    """Runs in a thread of its own; its methods may be called from any other."""

    def __init__(self) -> None:
        self.wanted: dict[str, DesiredAttempt] = {}
        self.version = 0
        self.facts: list[tuple[float, AttemptFact]] = []  # with the monotonic time of arrival
        self.nodes: list[NodeFacts] = []
        self.instance = ""
        self.superseded: set[str] = set()
        self.refuse: set[str] = set()  # attempts of which no fact is taken
        self.away = False
        self.node_reports: list[dict[str, Any]] = []
        self._arrived = threading.Condition()
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        routes = [
            Route("/v1/agent/nodes", self._put_nodes, methods=["PUT"]),
            Route("/v1/agent/desired", self._desired),
            Route("/v1/agent/reports", self._reports, methods=["POST"]),
            Route("/v1/node/reports", self._node_reports, methods=["POST"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), host="127.0.0.1", port=0, log_level="error", ws="none", lifespan="off"
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    # ------------------------------------------------------------ for the test

    def start(self) -> None:
        self._thread.start()
        deadline_s = time.monotonic() + 10
        while not self._uvicorn.started:
            assert time.monotonic() < deadline_s, "the fake server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self._change({})  # lets go of whoever waits
        self._uvicorn.should_exit = True
        self._thread.join(10)

    @property
    def url(self) -> str:
        port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def want(self, *attempts: DesiredAttempt) -> float:
        """Desire these too; returns the monotonic time."""
        return self._change(self.wanted | {attempt.attempt_id: attempt for attempt in attempts})

    def want_stopped(self, attempt_id: str, grace_s: float) -> None:
        stopped = replace(self.wanted[attempt_id], action="stop", grace_s=grace_s)
        self._change(self.wanted | {attempt_id: stopped})

    def drop(self, *attempt_ids: str) -> None:
        self._change({name: attempt for name, attempt in self.wanted.items() if name not in attempt_ids})

    def wait_for(self, what: Any, timeout_s: float = 20.0) -> Any:
        """The first truthy result of `what()`, looked at after each arrival."""
        deadline_s = time.monotonic() + timeout_s
        with self._arrived:
            while not (found := what()):
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, f"not within {timeout_s} s; facts: {[fact for _, fact in self.facts]}"
                self._arrived.wait(min(left_s, 0.25))
        return found

    def fact(self, attempt_id: str, kind: str, timeout_s: float = 20.0, **equal: Any) -> AttemptFact:
        return self.arrival(attempt_id, kind, timeout_s, **equal)[1]

    def arrival(self, attempt_id: str, kind: str, timeout_s: float = 20.0, **equal: Any) -> tuple[float, AttemptFact]:
        return self.wait_for(lambda: self.seen(attempt_id, kind, **equal), timeout_s)[0]

    def seen(self, attempt_id: str, kind: str, **equal: Any) -> list[tuple[float, AttemptFact]]:
        return [
            (at, fact)
            for at, fact in self.facts
            if fact.attempt_id == attempt_id
            and fact.kind == kind
            and all(getattr(fact, name) == value for name, value in equal.items())
        ]

    # ------------------------------------------------------------ the routes

    def _serve(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            await self._uvicorn.serve()

        asyncio.run(main())

    def _change(self, wanted: dict[str, DesiredAttempt]) -> float:
        assert self._loop is not None

        def swap() -> None:
            self.wanted, self.version = wanted, self.version + 1
            self._changed.set()
            self._changed = asyncio.Event()

        now_s = time.monotonic()
        self._loop.call_soon_threadsafe(swap)
        return now_s

    def _unfit(self, instance: str) -> JSONResponse | None:
        if self.away:
            return JSONResponse({"code": "unavailable"}, 503)
        if instance in self.superseded:
            document = {"code": "superseded", "detail": "another agent reports for this cluster"}
            return JSONResponse(document, 409, media_type="application/problem+json")
        return None

    async def _put_nodes(self, request: Request) -> JSONResponse:
        message = decode(Inventory, await request.json())
        if (refusal := self._unfit(message.instance)) is not None:
            return refusal
        with self._arrived:
            self.nodes, self.instance = message.nodes, message.instance
            self._arrived.notify_all()
        ids = {node.name: f"node_{node.name}" for node in message.nodes}
        tokens = {node.name: f"token-of-{node.name}" for node in message.nodes}
        return JSONResponse(encode(InventoryAnswer(time.time(), ids, tokens, fence_s=60.0, heartbeat_s=1.0)))

    async def _desired(self, request: Request) -> JSONResponse:
        if (refusal := self._unfit(request.query_params["instance"])) is not None:
            return refusal
        changed = self._changed
        if request.query_params["version"] == str(self.version):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), min(float(request.query_params["wait_s"]), 2.0))
        return JSONResponse(encode(Desired(str(self.version), list(self.wanted.values()), time.time())))

    async def _reports(self, request: Request) -> JSONResponse:
        arrived_s = time.monotonic()
        message = decode(AgentReport, await request.json())
        if (refusal := self._unfit(message.instance)) is not None:
            return refusal
        with self._arrived:
            self.facts += [(arrived_s, fact) for fact in message.facts]
            for fact in message.facts:
                if fact.kind in ("ended", "start_failed"):
                    self.wanted.pop(fact.attempt_id, None)
                    self.version += 1
            self._arrived.notify_all()
        refused = [
            Refused(f.attempt_id, f.epoch, "unknown_attempt") for f in message.facts if f.attempt_id in self.refuse
        ]
        return JSONResponse(encode(ReportAnswer(time.time(), refused)))

    async def _node_reports(self, request: Request) -> JSONResponse:
        body = await request.json()
        with self._arrived:
            self.node_reports.append(body)
            self._arrived.notify_all()
        return JSONResponse({"server_time": time.time(), "accepted_seq": body["seq"], "refused": []})


def attempt_of(
    attempt_id: str, command: str, nodes: dict[str, list[int]], *, epoch: int = 1, cpus: float = 0.0, **launch: Any
) -> DesiredAttempt:
    """An attempt with one rank for each GPU index given by node."""
    groups, first_rank = [], 0
    for group_rank, (node, gpus) in enumerate(nodes.items()):
        groups.append(
            GroupPlacement(
                node=node,
                replicas=len(gpus),
                gpu_indices=gpus,
                group_rank=group_rank,
                first_rank=first_rank,
                ranks=len(gpus),
            )
        )
        first_rank += len(gpus)
    return DesiredAttempt(
        attempt_id=attempt_id,
        job_id="job_" + "0" * 32,
        job_name="test",
        tenant="root",
        tenant_uid=71000,
        number=1,
        epoch=epoch,
        action="run",
        grace_s=5.0,
        groups=groups,
        launch=Launch(
            command=command,
            env=launch.pop("env", {}),
            world_size=first_rank,
            bundle=None,
            cpus_per_group=[cpus] * len(groups),
            memory_bytes_per_group=[0] * len(groups),
            **launch,
        ),
    )
