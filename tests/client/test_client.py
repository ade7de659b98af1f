"""The SDK against a fake server: what is sent, what is tried again, what comes back."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import io
import json
import tarfile
import traceback
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_server import AT, JOB_ID, FakeServer, answer, job, problem, stream
from phalanx import errors
from phalanx.client import AsyncClient, Client
from phalanx.errors import ProtocolError
from phalanx.models import Job, Tenant
from phalanx.retry import OUTAGE_TOLERANCE_S, RetryPolicy

JOB_FILE = {"name": "lm", "resources": {"gpus": 2}, "run": {"command": "python train.py"}}


def sent_json(request: httpx.Request) -> dict:
    return json.loads(request.content)


# ------------------------------------------------------------------ submit


def test_submit_sends_the_job_with_a_token_and_an_idempotency_key(server: FakeServer, client: Client) -> None:
    server.on("POST /v1/jobs", answer(job(), 201))
    submitted = client.submit(JOB_FILE)
    (request,) = server.requests
    assert submitted.id == JOB_ID and submitted.gpus == 4
    assert sent_json(request) == JOB_FILE
    assert request.headers["authorization"] == "Bearer phx_token"
    assert request.headers["idempotency-key"]


def test_a_retried_submit_repeats_its_idempotency_key(server: FakeServer, client: Client) -> None:
    server.on("POST /v1/jobs", httpx.ReadError("reset"), problem(503, "unavailable"), answer(job(), 201))
    client.submit(JOB_FILE)
    keys = {request.headers["idempotency-key"] for request in server.requests}
    assert len(server.requests) == 3 and len(keys) == 1


def test_submit_uploads_the_directory_and_names_its_bundle(server: FakeServer, client: Client, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text("print('hi')")
    server.on("POST /v1/jobs", answer(job(), 201))

    def head(request: httpx.Request) -> httpx.Response:
        server.on(f"PUT {request.url.path}", answer({}, 201))
        return httpx.Response(404, headers={"content-type": "application/problem+json"})

    server.routes = _AnyBundle(server.routes, head)
    client.submit({**JOB_FILE, "run": {"command": "python train.py", "workdir": "ignored"}}, workdir=tmp_path / "code")
    put, post = server.requests[1], server.requests[2]
    sha256 = hashlib.sha256(put.content).hexdigest()
    assert put.url.path == f"/v1/bundles/{sha256}" and put.headers["content-type"] == "application/gzip"
    assert put.headers["content-length"] == str(len(put.content))
    assert sent_json(post)["run"] == {"command": "python train.py", "bundle": sha256}
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(put.content))) as tar:
        assert tar.getnames() == ["train.py"]


def test_submit_uploads_nothing_that_the_server_has(server: FakeServer, client: Client, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text("print('hi')")
    server.on("POST /v1/jobs", answer(job(), 201))
    server.routes = _AnyBundle(server.routes, lambda _: httpx.Response(200))
    client.submit(JOB_FILE, workdir=tmp_path / "code")
    assert [request.method for request in server.requests] == ["HEAD", "POST"]


class _AnyBundle(dict):
    """Routes in which every HEAD of a bundle has one answer."""

    def __init__(self, routes: dict, head) -> None:
        super().__init__(routes)
        self.head = head

    def get(self, route: str, default=None):
        return [self.head] if route.startswith("HEAD /v1/bundles/") else super().get(route, default)


def test_submit_many_sends_one_batch_and_packs_a_shared_directory_once(
    server: FakeServer, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text("print('hi')")
    server.on("POST /v1/jobs/batch", answer({"items": [job(), job()]}, 201))
    server.routes = _AnyBundle(server.routes, lambda _: httpx.Response(200))
    jobs = client.submit_many([JOB_FILE, JOB_FILE], workdir=tmp_path)
    head, batch = server.requests
    bundle = head.url.path.rpartition("/")[2]
    assert len(jobs) == 2
    assert [sent["run"]["bundle"] for sent in sent_json(batch)["jobs"]] == [bundle, bundle]


def test_a_directory_that_cannot_be_packed_sends_nothing(server: FakeServer, client: Client, tmp_path: Path) -> None:
    with pytest.raises(errors.BundleError, match="is not a directory"):
        client.submit(JOB_FILE, workdir=tmp_path / "absent")
    assert server.requests == []


# ------------------------------------------------------------------ retries


def test_a_read_is_tried_again_after_503_and_waits_as_long_as_the_server_says(
    server: FakeServer, client: Client
) -> None:
    server.on(f"GET /v1/jobs/{JOB_ID}", problem(503, "unavailable", retry_after="3"), answer(job()))
    assert client.job(JOB_ID).state == "queued"
    assert len(server.naps_s) == 1 and server.naps_s[0] >= 3


def test_a_server_that_stays_away_ends_in_unavailable(server: FakeServer, client: Client) -> None:
    server.on("GET /v1/nodes", problem(503, "unavailable", "the database is away"))
    with pytest.raises(errors.Unavailable, match="the database is away"):
        list(client.nodes())
    assert len(server.requests) == 6


def test_nobody_answering_ends_in_connection_failed(server: FakeServer, client: Client) -> None:
    server.on("GET /v1/nodes", httpx.ConnectError("refused"))
    with pytest.raises(errors.ConnectionFailed, match=r"http://phalanx.test cannot be reached \(refused\)"):
        list(client.nodes())


def test_a_refusal_is_not_tried_again(server: FakeServer, client: Client) -> None:
    server.on("GET /v1/nodes", problem(403, "forbidden", "no"))
    with pytest.raises(errors.Forbidden):
        list(client.nodes())
    assert len(server.requests) == 1 and server.naps_s == []


def test_waiting_for_an_hour_is_not_done_in_silence(server: FakeServer, client: Client) -> None:
    server.on("GET /v1/nodes", problem(429, "rate_limited", "slow down", retry_after="3600"))
    with pytest.raises(errors.RateLimited):
        list(client.nodes())
    assert server.naps_s == []


@pytest.mark.parametrize("text", ["Illegal header value b'Bearer phx_secret\\n'", "Too little data"])
def test_a_request_that_is_no_http_is_neither_sent_again_nor_quoted(
    server: FakeServer, client: Client, text: str
) -> None:
    server.on("GET /v1/whoami", httpx.LocalProtocolError(text))
    with pytest.raises(ProtocolError, match="the request is not valid HTTP") as raised:
        client.whoami()
    assert len(server.requests) == 1 and "phx_secret" not in "".join(traceback.format_exception(raised.value))


# ------------------------------------------------------------------ errors


def test_a_problem_becomes_its_error_with_fields_and_request_id(server: FakeServer, client: Client) -> None:
    wrong = {"field": "resources.gpu", "message": "unknown field", "hint": "did you mean gpus?"}
    server.on("POST /v1/jobs", problem(422, "unknown_field", "not a job", [wrong]))
    with pytest.raises(errors.InvalidRequest) as raised:
        client.submit(JOB_FILE)
    error = raised.value
    assert str(error) == "resources.gpu: unknown field (did you mean gpus?)"
    assert (error.code, error.request_id, error.errors[0].field) == ("unknown_field", "req1", "resources.gpu")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.InvalidRequest),
        (401, errors.Unauthorized),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (412, errors.Conflict),
        (413, errors.InvalidRequest),
        (500, errors.ServerError),
    ],
)
def test_each_status_has_its_class(
    server: FakeServer, client: Client, status: int, kind: type[errors.ApiError]
) -> None:
    server.on("GET /v1/whoami", problem(status, "some_code", "because"))
    with pytest.raises(kind, match="because"):
        client.whoami()


def test_an_answer_that_is_no_problem_still_has_a_status(server: FakeServer, client: Client) -> None:
    server.on("GET /v1/whoami", httpx.Response(500, text="<html>nginx</html>"))
    with pytest.raises(errors.ServerError, match="the server answered 500"):
        client.whoami()


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, text="<html>a proxy</html>"),
        answer({"state": "queued"}),
        answer({"id": 7}),
        answer([1]),
        httpx.Response(302, headers={"location": "http://other/"}),
        httpx.Response(200, text="{", headers={"content-type": "application/json"}),
    ],
)
def test_an_answer_that_is_not_the_apis_is_a_protocol_error(
    server: FakeServer, client: Client, response: httpx.Response
) -> None:
    server.on(f"GET /v1/jobs/{JOB_ID}", response)
    with pytest.raises(ProtocolError):
        client.job(JOB_ID)


# ------------------------------------------------------------------ lists, waiting, quotas


def test_lists_follow_their_cursors(server: FakeServer, client: Client) -> None:
    pages = [answer({"items": [job(name="a")], "next_cursor": "c1"}), answer({"items": [job(name="b")]})]
    server.on("GET /v1/jobs", *pages)
    found = list(client.jobs(state=["queued", "running"], labels={"team": "nlp"}, limit=1))
    first, second = server.requests
    assert [one.name for one in found] == ["a", "b"]
    assert first.url.params.get_list("state") == ["queued", "running"] and first.url.params["label"] == "team=nlp"
    assert second.url.params["cursor"] == "c1" and second.url.params["limit"] == "1"


def test_wait_polls_until_the_job_has_ended(server: FakeServer, client: Client) -> None:
    server.on(f"GET /v1/jobs/{JOB_ID}", answer(job()), answer(job("running")), answer(job("succeeded")))
    assert client.wait(JOB_ID).state == "succeeded"
    assert server.naps_s == pytest.approx([0.1, 0.15])


def test_wait_gives_up_after_its_timeout(server: FakeServer, client: Client) -> None:
    server.on(f"GET /v1/jobs/{JOB_ID}", answer(job("running")))
    with pytest.raises(errors.WaitTimeout, match="still running after 5 s"):
        client.wait(JOB_ID, timeout_s=5)


def test_wait_outlasts_a_server_that_is_away_for_minutes(server: FakeServer, client: Client) -> None:
    def away(_: httpx.Request) -> httpx.Response:
        if server.clock() < OUTAGE_TOLERANCE_S - 60:
            raise httpx.ConnectError("refused")
        return answer(job("succeeded"))

    server.on(f"GET /v1/jobs/{JOB_ID}", answer(job("running")), away)
    assert client.wait(JOB_ID).state == "succeeded"


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), problem(503, "unavailable")])
def test_wait_gives_up_on_a_server_that_stays_away(server: FakeServer, client: Client, failure: Any) -> None:
    server.on(f"GET /v1/jobs/{JOB_ID}", failure)
    with pytest.raises((errors.ConnectionFailed, errors.Unavailable)):
        client.wait(JOB_ID)
    assert OUTAGE_TOLERANCE_S < server.clock() < OUTAGE_TOLERANCE_S + 60


def test_an_outage_does_not_prolong_a_wait(server: FakeServer, client: Client) -> None:
    server.on(f"GET /v1/jobs/{JOB_ID}", httpx.ConnectError("refused"))
    with pytest.raises(errors.WaitTimeout, match="is still out of reach, with its server, after 30 s"):
        client.wait(JOB_ID, timeout_s=30)
    assert server.clock() < 60


async def test_the_async_wait_outlasts_an_outage_too(server: FakeServer, async_client: AsyncClient) -> None:
    away = [httpx.ConnectError("refused")] * 7  # one more than a request is tried
    server.on(f"GET /v1/jobs/{JOB_ID}", *away, answer(job("succeeded")))
    assert (await async_client.wait(JOB_ID)).state == "succeeded"


def test_quota_set_keeps_what_it_does_not_change_and_starts_over_on_a_conflict(
    server: FakeServer, client: Client
) -> None:
    h100 = {"nominal": 8, "borrowing_limit": 4, "lending_limit": None}
    server.on("GET /v1/quotas/research/nlp", answer({"quotas": {"h100": h100}}, etag='"3"'))
    server.on("PUT /v1/quotas/research/nlp", problem(412, "etag_mismatch"), answer({"quotas": {"h100": h100}}))
    client.quota_set("research/nlp", "h100", nominal=16)
    put = server.seen("PUT /v1/quotas/research/nlp")[-1]
    assert put.headers["if-match"] == '"3"' and len(server.requests) == 4
    assert sent_json(put) == {"quotas": {"h100": {**h100, "nominal": 16}}}


def test_models_ignore_new_fields_and_keep_them_in_raw() -> None:
    tenant = Tenant.from_json({"path": "a", "colour": "blue", "quotas": {"h100": {"nominal": 2, "new": 1}}})
    assert tenant.quotas["h100"].nominal == 2 and tenant.raw["colour"] == "blue"


def test_times_are_aware() -> None:
    found = Job.from_json(job())
    assert found.received_at is not None and found.received_at.utcoffset() is not None


# ------------------------------------------------------------------ streams


def event(id: int, kind: str) -> tuple[str, str, dict]:
    return ("event", str(id), {"id": id, "kind": kind, "at": AT, "message": kind, "data": {}})


END = ("end", "", {"state": "succeeded"})


def test_a_broken_stream_resumes_after_the_last_event(server: FakeServer, client: Client) -> None:
    route = f"GET /v1/jobs/{JOB_ID}/events"
    server.on(route, stream(event(1, "submitted"), event(2, "started"), broken=True), stream(event(3, "ended"), END))
    assert [one.kind for one in client.follow(JOB_ID)] == ["submitted", "started", "ended"]
    first, second = server.seen(route)
    assert "last-event-id" not in first.headers and second.headers["last-event-id"] == "2"
    assert first.url.params["follow"] == "true"


def test_a_stream_that_is_refused_raises_at_once(server: FakeServer, client: Client) -> None:
    server.on(f"GET /v1/jobs/{JOB_ID}/events", problem(404, "not_found", "no such job"))
    with pytest.raises(errors.NotFound, match="no such job"):
        list(client.follow(JOB_ID))


def test_a_stream_that_never_comes_back_gives_up(server: FakeServer, client: Client) -> None:
    server.on(f"GET /v1/jobs/{JOB_ID}/logs", httpx.ConnectError("refused"))
    with pytest.raises(errors.ConnectionFailed):
        list(client.follow_logs(JOB_ID))
    assert OUTAGE_TOLERANCE_S < server.clock() < OUTAGE_TOLERANCE_S + 60


def test_a_stream_outlasts_a_server_that_is_away_for_minutes(server: FakeServer, client: Client) -> None:
    def away(_: httpx.Request) -> httpx.Response:
        if server.clock() < OUTAGE_TOLERANCE_S - 60:
            raise httpx.ConnectError("refused")
        return stream(event(1, "started"), END)

    server.on(f"GET /v1/jobs/{JOB_ID}/events", away)
    assert [one.kind for one in client.follow(JOB_ID)] == ["started"]


def test_failures_that_are_not_in_a_row_are_no_outage(server: FakeServer, client: Client) -> None:
    breaks = [stream(event(id, "started"), broken=True) for id in range(1, 400)]
    server.on(
        f"GET /v1/jobs/{JOB_ID}/events", *(one for each in breaks for one in (each, problem(503, "x"))), stream(END)
    )
    assert len(list(client.follow(JOB_ID))) == 399
    assert RetryPolicy(attempts=None).delay_s(tried=10_000, jitter=0.5) == 2.5


# ------------------------------------------------------------------ async


async def test_the_async_client_does_the_same(server: FakeServer, async_client: AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('hi')")
    server.on("POST /v1/jobs", problem(503, "unavailable"), answer(job(), 201))
    server.routes = _AnyBundle(server.routes, lambda _: httpx.Response(404))
    bundle = (await _packed(tmp_path)).sha256
    server.on(f"PUT /v1/bundles/{bundle}", answer({}, 201))
    server.on("GET /v1/jobs", answer({"items": [job(), job()], "next_cursor": None}))
    server.on(f"GET /v1/jobs/{JOB_ID}/events", stream(event(1, "submitted"), broken=True), stream(END))
    submitted = await async_client.submit(JOB_FILE, workdir=tmp_path)
    assert submitted.id == JOB_ID
    assert [one.id async for one in async_client.jobs()] == [JOB_ID, JOB_ID]
    assert [one.kind async for one in async_client.follow(JOB_ID)] == ["submitted"]
    (put,) = server.seen(f"PUT /v1/bundles/{bundle}")
    assert hashlib.sha256(put.content).hexdigest() == bundle


async def _packed(directory: Path):
    from phalanx.bundle import pack

    packed = pack(directory)
    packed.discard()
    return packed


def test_both_clients_have_the_same_operations() -> None:
    def operations(kind: type) -> dict[str, inspect.Signature]:
        return {name: inspect.signature(f) for name, f in vars(kind).items() if hasattr(f, "__wrapped__")}

    assert operations(Client) == operations(AsyncClient)
    assert len(operations(Client)) > 30
