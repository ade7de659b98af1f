"""Output files over HTTP: a node sends them of its live groups, users list and fetch those of their own jobs."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx
import pytest
from phalanx_server.api import stalls
from phalanx_server.settings import Settings
from phalanx_server.store import ids
from phalanx_server.store.outputs import OutputFiles
from sqlalchemy.exc import OperationalError
from starlette.requests import ClientDisconnect

BODY = b"weights" * 1000
HASH = hashlib.sha256(BODY).hexdigest()


@dataclass
class Live:
    """A job with live attempts on n0, and the node that sends their outputs."""

    world: Any
    runner: httpx.AsyncClient
    job: str
    attempt: UUID

    @property
    def job_id(self) -> UUID:
        return ids.parse("job", self.job)

    async def sql(self, statement: str) -> Any:
        async with self.world.engine.begin() as conn:
            return await conn.exec_driver_sql(statement)

    async def begin(self, number: int) -> None:
        """Another attempt takes the place of the one before."""
        self.attempt = ids.new_id()
        ended = "state = 'ended', outcome = 'preempted', ended_at = now()"
        await self.sql(f"UPDATE attempts SET {ended} WHERE job_id = '{self.job_id}'")
        await self.sql(
            "INSERT INTO attempts (id, job_id, cluster_id, number, epoch, state, gpu_type, replicas, created_at)"
            f" VALUES ('{self.attempt}', '{self.job_id}', '{self.world.cluster}', {number}, {number}, 'running',"
            " 'h100', 1, now())"
        )
        await self.place("n0", 0)

    async def place(self, node: str, group_rank: int) -> None:
        await self.sql(
            f"INSERT INTO placements VALUES ('{self.attempt}', '{self.world.nodes[node]}', {group_rank}, 1, '{{0}}',"
            " 0, 1, 0, 0)"
        )

    async def put(self, path: str, body: Any = BODY, *, sent: str | None = None, **query: Any) -> httpx.Response:
        name = ids.encode("attempt", self.attempt)
        asked = {"epoch": 1, "group_rank": 0, "sha256": hashlib.sha256(BODY).hexdigest()} | query
        if isinstance(body, bytes) and "sha256" not in query:
            asked["sha256"] = hashlib.sha256(body).hexdigest()
        url = f"/v1/node/attempts/{name}/outputs/{quote(path) if sent is None else sent}"
        return await self.runner.put(url, content=body, params=asked)

    async def give(self, *paths: str, **query: Any) -> None:
        for path in paths:
            answer = await self.put(path, **query)
            assert answer.status_code == 200, answer.text


@pytest.fixture
async def live(alice: httpx.AsyncClient, calls: Any, world: Any) -> Live:
    document = {"name": "x", "resources": {"gpus": 1}, "run": {"command": "x"}}
    job = (await alice.post("/v1/jobs", json=document)).json()["id"]
    live = Live(world, calls("n0"), job, ids.new_id())
    await live.begin(1)
    return live


async def listed(client: httpx.AsyncClient, live: Live, **query: Any) -> list[dict[str, Any]]:
    answer = await client.get(f"/v1/jobs/{live.job}/outputs", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


def stored(settings: Settings) -> list[Path]:
    root = Path(settings.storage_root.removeprefix("file://")) / "outputs"
    return [path for path in root.rglob("*") if path.is_file()]


async def test_what_a_node_sends_is_listed_and_fetched(live: Live, alice: httpx.AsyncClient) -> None:
    await live.give("out/ein Modell ü%2F.pt", "log.txt")
    first, second = await listed(alice, live)
    assert (first["path"], second["path"]) == ("log.txt", "out/ein Modell ü%2F.pt")
    assert second.items() >= {"bytes": len(BODY), "sha256": HASH, "attempt": 1, "group_rank": 0}.items()
    fetched = await alice.get(f"/v1/jobs/{live.job}/outputs/{quote(second['path'])}")
    assert fetched.status_code == 200 and fetched.content == BODY
    assert fetched.headers["content-length"] == str(len(BODY)) and fetched.headers["etag"] == f'"{HASH}"'
    assert fetched.headers["content-disposition"] == "attachment; filename*=UTF-8''ein%20Modell%20%C3%BC%252F.pt"
    assert fetched.headers["x-content-type-options"] == "nosniff"
    assert fetched.headers["content-type"] == "application/octet-stream"
    assert (await alice.get(f"/v1/jobs/{live.job}/outputs/absent")).status_code == 404


async def test_another_tenant_sees_none(live: Live, bob: httpx.AsyncClient, admin: httpx.AsyncClient) -> None:
    await live.give("model.pt")
    for url in (f"/v1/jobs/{live.job}/outputs", f"/v1/jobs/{live.job}/outputs/model.pt"):
        assert (await bob.get(url)).status_code == 404
        assert (await live.runner.get(url)).status_code == 403
        assert (await admin.get(url)).status_code == 200
    assert (await bob.put(f"/v1/node/attempts/x/outputs/y?epoch=1&group_rank=0&sha256={HASH}")).status_code == 403


async def test_a_list_goes_on_page_by_page(live: Live, alice: httpx.AsyncClient) -> None:
    paths = ["a/b", "a", "a.txt", "a/b/c", "ä", "Z", "z"]
    await live.give(*paths)
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await alice.get(f"/v1/jobs/{live.job}/outputs", params={"limit": 2, **cursor})).json()
        seen += [item["path"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert sorted(seen) == sorted(paths) and len(seen) == len(set(seen))
    assert (await alice.get(f"/v1/jobs/{live.job}/outputs", params={"cursor": "x"})).status_code == 422


@pytest.mark.parametrize("character", ["x", "ü", "🦜"])
async def test_a_list_goes_on_after_the_longest_path(live: Live, alice: httpx.AsyncClient, character: str) -> None:
    longest = character * (1024 // len(character.encode()))
    await live.give(longest, longest[:-1])
    url = f"/v1/jobs/{live.job}/outputs"
    seen: list[str] = []
    cursor: dict[str, str] = {}
    for _ in range(2):
        page = (await alice.get(url, params={"limit": 1, **cursor})).json()
        seen += [item["path"] for item in page["items"]]
        cursor = {"cursor": page["next_cursor"]}
    assert seen == [longest[:-1], longest] and cursor == {"cursor": None}


async def test_the_newest_attempt_that_left_a_path_is_meant(live: Live, alice: httpx.AsyncClient) -> None:
    await live.give("only-first", "both")
    await live.begin(2)
    await live.give("both", epoch=2, body=b"newer")
    assert [(item["path"], item["attempt"]) for item in await listed(alice, live)] == [("both", 2), ("only-first", 1)]
    assert [item["path"] for item in await listed(alice, live, attempt=1)] == ["both", "only-first"]
    url = f"/v1/jobs/{live.job}/outputs/both"
    assert (await alice.get(url)).content == b"newer"
    assert (await alice.get(url, params={"attempt": 1})).content == BODY
    assert (await alice.get(url, params={"attempt": 3})).status_code == 404


async def test_the_lowest_group_is_meant(live: Live, alice: httpx.AsyncClient, calls: Any) -> None:
    await live.give("x")
    await live.sql(f"UPDATE placements SET group_rank = 1 WHERE attempt_id = '{live.attempt}'")
    await live.give("x", "y", group_rank=1, body=b"of group 1")
    assert [(item["path"], item["group_rank"]) for item in await listed(alice, live)] == [("x", 0), ("x", 1), ("y", 1)]
    url = f"/v1/jobs/{live.job}/outputs"
    assert (await alice.get(f"{url}/x")).content == BODY
    assert (await alice.get(f"{url}/x", params={"group_rank": 1})).content == b"of group 1"
    assert (await alice.get(f"{url}/y")).content == b"of group 1"


async def test_sent_again_it_takes_the_place_of_the_one_before(
    live: Live, alice: httpx.AsyncClient, settings: Settings
) -> None:
    await live.give("x", "x")
    await live.give("x", body=b"changed")
    (item,) = await listed(alice, live)
    assert item["bytes"] == 7
    assert (await alice.get(f"/v1/jobs/{live.job}/outputs/x")).content == b"changed"
    assert len(stored(settings)) == 1, "what was replaced is not kept"


async def test_sent_again_while_it_is_still_coming_one_is_kept(
    live: Live, alice: httpx.AsyncClient, settings: Settings
) -> None:
    bodies = [bytes([number]) * 1000 for number in range(8)]
    answers = await asyncio.gather(*(live.put("x", body=body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200}
    assert (await alice.get(f"/v1/jobs/{live.job}/outputs/x")).content in bodies
    assert len(stored(settings)) == 1, "what was replaced is not kept"


async def test_an_empty_file_is_one(live: Live, alice: httpx.AsyncClient) -> None:
    await live.give("empty", body=b"")
    assert (await alice.get(f"/v1/jobs/{live.job}/outputs/empty")).content == b""


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a//b",
        "a/./b",
        "a/",
        "a\nb",
        "a\x1b[2Jb",
        "a\u2028b",
        "a\u202egpj.sh",
        "x" * 1025,
    ],
)
async def test_a_path_that_could_lead_elsewhere_is_refused(live: Live, settings: Settings, path: str) -> None:
    """Percent-encoded throughout: so no client and no proxy tidies it up on the way."""
    sent = "".join(f"%{byte:02X}" for byte in path.encode())
    assert (await live.put("", sent=sent)).status_code == (404 if "\n" in path else 422)  # no route has a line break
    assert stored(settings) == []


async def test_nul_is_refused(live: Live) -> None:
    assert (await live.put("", sent="a%00b")).status_code == 422


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"epoch": 2}, 404),
        ({"group_rank": 1}, 404),
        ({"sha256": "0" * 64}, 422),
        ({"sha256": "short"}, 422),
    ],
    ids=["another epoch", "a group of another node", "another hash", "no hash"],
)
async def test_what_does_not_fit_is_refused_and_not_kept(
    live: Live, alice: httpx.AsyncClient, settings: Settings, change: dict[str, Any], status: int
) -> None:
    assert (await live.put("x", **change)).status_code == status
    assert await listed(alice, live) == [] and stored(settings) == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE attempts SET state = 'ended', outcome = 'succeeded', ended_at = now()",
        "UPDATE attempts SET state = 'lost', outcome = 'node_lost', ended_at = now()",
        "UPDATE placements SET released_at = now()",
    ],
)
async def test_only_live_attempts_on_the_node_take_outputs(live: Live, settings: Settings, change: str) -> None:
    await live.sql(change)
    assert (await live.put("x")).status_code == 404
    assert stored(settings) == []


async def test_an_attempt_that_ends_while_a_file_comes_in_does_not_get_it(
    live: Live, alice: httpx.AsyncClient, settings: Settings
) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield BODY[:100]
        await live.sql("UPDATE attempts SET state = 'ended', outcome = 'succeeded', ended_at = now()")
        yield BODY[100:]

    answer = await live.runner.put(
        f"/v1/node/attempts/{ids.encode('attempt', live.attempt)}/outputs/x",
        params={"epoch": 1, "group_rank": 0, "sha256": HASH},
        content=slowly(),
        headers={"Content-Length": str(len(BODY))},
    )
    assert answer.status_code == 404, answer.text
    assert await listed(alice, live) == [] and stored(settings) == []


async def test_a_file_that_was_cut_off_is_none(live: Live, alice: httpx.AsyncClient, settings: Settings) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield BODY[:100]

    url = f"/v1/node/attempts/{ids.encode('attempt', live.attempt)}/outputs/x"
    query = {"epoch": 1, "group_rank": 0, "sha256": HASH}
    answer = await live.runner.put(url, params=query, content=broken(), headers={"Content-Length": str(len(BODY))})
    assert answer.status_code == 422
    answer = await live.runner.put(url, params=query, content=broken())
    assert answer.status_code == 422 and "Content-Length" in answer.json()["detail"]
    assert await listed(alice, live) == [] and stored(settings) == []


async def test_a_database_that_fails_over_a_row_leaves_no_file_that_nothing_names(
    live: Live, alice: httpx.AsyncClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any) -> None:
        raise OperationalError("INSERT", {}, ConnectionError("the server closed the connection"))

    monkeypatch.setattr("phalanx_server.actions.save_output.save_row", fails)
    assert (await live.put("x")).status_code == 503
    assert await listed(alice, live) == [] and stored(settings) == []


async def test_what_cannot_be_deleted_is_no_reason_to_send_a_file_again(
    live: Live, alice: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a file that was replaced, or refused, stays behind; the answer is the one that the node must know."""
    await live.give("x")

    def fails(*_: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(OutputFiles, "_delete", fails)
    await live.give("x", body=b"changed")
    assert [item["bytes"] for item in await listed(alice, live)] == [7]
    assert (await live.put("x", sha256="0" * 64)).status_code == 422


async def test_a_node_that_goes_silent_does_not_keep_its_place(
    app: Any, live: Live, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its power is gone, say: no connection tells that it will never send the rest."""
    monkeypatch.setattr(stalls, "STALLED_S", 0.1)

    async def silent() -> AsyncIterator[bytes]:
        yield BODY[:100]
        await asyncio.Event().wait()

    answer = await live.runner.put(
        f"/v1/node/attempts/{ids.encode('attempt', live.attempt)}/outputs/x",
        params={"epoch": 1, "group_rank": 0, "sha256": HASH},
        content=silent(),
        headers={"Content-Length": str(len(BODY))},
        timeout=10,
    )
    assert answer.status_code == 408 and answer.headers["connection"] == "close"
    assert stored(settings) == [] and app.state.gates.node_outputs.running == 0


async def test_outputs_have_gates_of_their_own(app: Any) -> None:
    """The files of a large gang that has ended, or of one who fetches many, take minutes; a start that does not get its
    code within seconds has failed."""
    gates = app.state.gates
    code = {gates.of("GET", f"/v1/node/bundles/{HASH}"), gates.of("PUT", f"/v1/bundles/{HASH}")}
    files = {gates.of("PUT", "/v1/node/attempts/att_1/outputs/x"), gates.of("GET", "/v1/jobs/job_1/outputs/x")}
    assert len(code | files) == 4 and not files & {gates.users, gates.reports} and code | files < set(gates.all)


async def test_a_reader_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "STALLED_S", 0.1)
    taken: list[Any] = []

    async def send(message: Any) -> None:
        taken.append(message)
        if len(taken) > 1:
            await asyncio.Event().wait()

    async def body() -> AsyncIterator[bytes]:
        yield BODY

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with pytest.raises(ClientDisconnect):
        await asyncio.wait_for(stalls.Sent(body())(scope, asyncio.Event().wait, send), 10)  # type: ignore[arg-type]
    assert [message["type"] for message in taken] == ["http.response.start", "http.response.body"]


async def test_a_file_over_the_limit_is_refused_before_it_comes(live: Live, settings: Settings) -> None:
    answer = await live.runner.put(
        f"/v1/node/attempts/{ids.encode('attempt', live.attempt)}/outputs/x",
        params={"epoch": 1, "group_rank": 0, "sha256": HASH},
        content=b"",
        headers={"Content-Length": str(settings.max_output_bytes + 1)},
    )
    assert answer.status_code == 413
    assert stored(settings) == []


async def test_an_output_whose_file_is_gone_is_none(live: Live, alice: httpx.AsyncClient, settings: Settings) -> None:
    await live.give("x")
    stored(settings)[0].unlink()
    assert (await alice.get(f"/v1/jobs/{live.job}/outputs/x")).status_code == 404
