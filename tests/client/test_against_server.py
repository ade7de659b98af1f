"""The SDK and the command line against the real server on a socket, with a real database.

What a cluster does is played through the agent link by hand, so that no Ray is needed.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
import uvicorn
import yaml
from phalanx import errors
from phalanx.cli.app import app as cli
from phalanx.client import AsyncClient, Client
from phalanx_server.actions.bootstrap import Bootstrapped, bootstrap
from phalanx_server.main import create_app
from phalanx_server.settings import Settings
from phalanx_server.store.engine import create_engine
from played_cluster import PlayedCluster
from typer.testing import CliRunner, Result

DEADLINE_S = 20.0
JOB = {"name": "lm", "resources": {"replicas": 2, "gpus_per_replica": 2}, "run": {"command": "python train.py"}}


class Served:
    """The server in a thread of its own, on a free port."""

    def __init__(self, settings: Settings) -> None:
        config = uvicorn.Config(create_app(settings), log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Served:
        self._thread.start()
        deadline = time.monotonic() + DEADLINE_S
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(DEADLINE_S)
        self._socket.close()


async def first_run(database: str) -> Bootstrapped:
    engine = create_engine(database)
    try:
        created = await bootstrap(engine)
    finally:
        await engine.dispose()
    assert created is not None
    return created


@pytest.fixture
def tokens(database: str) -> Bootstrapped:
    return asyncio.run(first_run(database))


@pytest.fixture
def served(database: str, tokens: Bootstrapped, tmp_path: Path) -> Iterator[Served]:
    settings = Settings(database_url=database, data_dir=tmp_path / "data", token_cache_s=0)  # type: ignore[arg-type]
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # stdout is the command's
    with Served(settings) as served:
        yield served
    structlog.reset_defaults()


@pytest.fixture
def admin(served: Served, tokens: Bootstrapped) -> Iterator[Client]:
    with Client(served.url, tokens.admin_token) as client:
        yield client


Run = Callable[..., Result]


@pytest.fixture
def run(served: Served, tokens: Bootstrapped) -> Run:
    def call(*words: str, code: int = 0, token: str = tokens.admin_token) -> Result:
        result = CliRunner().invoke(cli, list(words), env={"PHALANX_URL": served.url, "PHALANX_TOKEN": token})
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return call


# ------------------------------------------------------------------ jobs


def test_a_job_from_submit_to_cancel(admin: Client, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text("print('hi')")
    job = admin.submit(JOB, workdir=tmp_path / "code")
    again = admin.submit(JOB, workdir=tmp_path / "code")
    assert (job.state, job.gpus, job.tenant) == ("queued", 4, "default") and len(job.bundle or "") == 64
    assert again.bundle == job.bundle and again.id != job.id
    assert [one.id for one in admin.jobs(name="lm", limit=1)] == [again.id, job.id]
    assert [one.job_id for one in admin.queue()] == [job.id, again.id]
    assert admin.hold(job.id).held and not admin.release(job.id).held
    assert admin.cancel(job.id).state == "cancelled"
    assert admin.wait(job.id).ended and admin.job(job.id).finished_at is not None
    kinds = [event.kind for event in admin.events(job.id)]
    assert kinds == [event.kind for event in admin.follow(job.id)] and len(kinds) >= 2
    assert admin.logs(job.id) == "" and admin.metrics(job.id) == [] and admin.attempts(job.id) == []
    assert list(admin.follow_logs(job.id)) == []


def test_an_idempotency_key_makes_one_job(admin: Client) -> None:
    first = admin.submit(JOB, idempotency_key="k1")
    assert admin.submit(JOB, idempotency_key="k1").id == first.id
    with pytest.raises(errors.Conflict) as raised:
        admin.submit({**JOB, "name": "other"}, idempotency_key="k1")
    assert raised.value.code == "idempotency_conflict"


def test_a_batch_is_all_or_nothing(admin: Client) -> None:
    assert len(admin.submit_many([JOB, JOB])) == 2
    with pytest.raises(errors.InvalidRequest) as raised:
        admin.submit_many([JOB, {**JOB, "resources": {"gpus": -1}}])
    assert raised.value.errors[0].field.startswith("jobs[1].resources")
    assert len(list(admin.jobs())) == 2


def test_a_dry_run_stores_nothing(admin: Client) -> None:
    tried = admin.dry_run(JOB)
    assert tried.valid and tried.would is not None
    assert list(admin.jobs()) == []


def test_explain_says_something(admin: Client) -> None:
    job = admin.submit(JOB)
    assert admin.explain(job.id).state == "queued"


async def test_the_async_client_speaks_to_the_same_server(served: Served, tokens: Bootstrapped) -> None:
    async with AsyncClient(served.url, tokens.admin_token) as client:
        job = await client.submit(JOB)
        await client.cancel(job.id)
        assert (await client.wait(job.id)).state == "cancelled"
        assert [one.id async for one in client.jobs()] == [job.id]
        assert [event async for event in client.follow(job.id)]


# ------------------------------------------------------------------ the command line


def test_wrong_fields_are_shown_with_their_place_and_the_nearest_name(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: lm\nresources:\n  gpus_per_replica: 1\n  replica: 2\nrun: {command: x}\n")
    result = run("submit", str(file), code=2)
    assert result.stderr.startswith(f"error: {file}:4:3: resources.replica: ")
    assert "replicas" in result.stderr.partition("resources.replica:")[2]


def test_all_wrong_arguments_of_a_recipe_are_shown_with_the_lines_of_their_fields(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "name: lm\nresources: {gpus: 1}\nrun:\n  recipe: lm\n  args:\n    data: {paths: [x]}\n    model:\n"
        "      layerz: 4\n      width: wide\n    train: {steps: 0}\n"
    )
    said = run("submit", str(file), code=2).stderr.removeprefix("error: ").split(f"; {file}")
    assert said[0] == f"{file}:8:7: run.args.model.layerz: is not a field; did you mean 'layers'?"
    assert said[1].startswith(":9:7: run.args.model.width: 'wide' is not a whole number")
    assert said[2].startswith(":10:13: run.args.train.steps: 0 is not positive")


def test_an_unknown_tenant_is_a_mistake_in_the_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    file = tmp_path / "job.yaml"
    file.write_text("name: lm\ntenant: nobody\nresources: {gpus: 1}\nrun: {command: x, workdir: .}\n")
    result = run("submit", str(file), code=2)
    assert result.stderr.startswith(f"error: {file}:2:1: tenant: ") and "nobody" in result.stderr


def test_the_command_line_over_a_job_s_life(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(JOB))
    assert run("submit", "--dry-run", str(file)).stdout.startswith("valid")
    id = run("submit", str(file)).stdout.strip()
    assert json.loads(run("jobs", "-o", "json").stdout)[0]["id"] == id
    assert id in run("queue").stdout and "lm" in run("show", "@last").stdout
    assert run("explain", "@last").stdout.strip()
    assert "cancelled" in run("cancel", "lm").stdout
    assert "cancel" in run("events", id[:20]).stdout
    run("events", "-f", "@last"), run("logs", "@last"), run("logs", "-f", "@last"), run("metrics", "@last")
    run("cancel", "job_" + "0" * 32, code=4)
    run("jobs", "--state", "nonsense", code=2)
    run("whoami", token="phx_" + "0" * 32 + "_" + "A" * 43, code=3)


def test_tenants_quotas_tokens_clusters(run: Run) -> None:
    run("tenants", "create", "research")
    run("tenants", "create", "research/nlp", "--weight", "2")
    run("tenants", "create", "research", code=5)
    run("quota", "set", "research/nlp", "h100", "--nominal", "8", "--borrowing-limit", "4")
    shown = run("quota", "set", "research/nlp", "h100", "--nominal", "16").stdout.splitlines()[1].split()
    assert shown == ["h100", "0", "16", "4", "no", "limit"]
    assert "research/nlp" in run("tenants").stdout
    token = run("tokens", "create", "ci", "--tenant", "research/nlp").stdout.strip()
    assert "research/nlp" in run("whoami", token=token).stdout
    made = next(t for t in json.loads(run("tokens", "-o", "json").stdout) if t["name"] == "ci")
    run("quota", "set", "research/nlp", "h100", "--nominal", "99", token=token, code=3)
    run("tokens", "revoke", made["id"])
    run("whoami", token=token, code=3)
    assert run("clusters", "create", "east").stdout.startswith("phx_")
    assert "east" in run("clusters").stdout and "main" in run("clusters").stdout


def test_an_environment_from_its_file_to_the_jobs_that_name_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "base.txt").write_text("einops==0.8.1  # shapes\n")
    (tmp_path / "reqs.txt").write_text("-r base.txt\ntiktoken\n")
    create = ("environment", "create", "nlp", "--requirements", str(tmp_path / "reqs.txt"))
    file = tmp_path / "job.yaml"
    text = "name: lm\nresources: {gpus: 1}\nrun:\n  command: x\n  environment: "
    file.write_text(text + "{name: nlp}\n")
    refused = run("submit", str(file), code=2)
    assert refused.stderr.startswith(f"error: {file}:5:17: run.environment.name: ")
    assert "phalanx environment create nlp" in refused.stderr
    assert "nlp is registered for default, with 2 requirements" in run(*create).stdout
    run(*create, code=5)
    run("submit", str(file)), run("submit", "--dry-run", str(file))
    assert "nlp, 2 requirements" in run("show", "@last").stdout
    spec = json.loads(run("show", "@last", "-o", "json").stdout)["spec"]
    assert spec["run"]["environment"]["requirements"] == ["einops==0.8.1", "tiktoken"]
    (tmp_path / "again.json").write_text(json.dumps(spec))
    run("submit", str(tmp_path / "again.json"))
    assert "einops==0.8.1" in run("environment", "show", "nlp").stdout
    run("environment", "delete", "nlp"), run("environment", "show", "nlp", code=4)
    file.write_text(text + "{requirements: reqs.txt}\n")
    run("submit", str(file))
    assert "2 requirements" in run("show", "@last").stdout
    (tmp_path / "base.txt").write_text("-e .\n")
    said = run("submit", str(file), code=2).stderr
    assert said.startswith(f"error: {file}:5:17: run.environment.requirements: ") and "'-e .'" in said


# ------------------------------------------------------------------ a whole life


@pytest.fixture
def job_yaml(tmp_path: Path) -> str:
    (tmp_path / "train.py").touch()
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**JOB, "run": {"command": "python train.py", "workdir": "."}}))
    return str(file)


def test_following_a_job_to_its_end(
    run: Run, served: Served, tokens: Bootstrapped, database: str, job_yaml: str
) -> None:
    with PlayedCluster(database, served.url, tokens.cluster_token):
        result = run("submit", job_yaml, "--follow")
        watched = [run(*words, "@last").stdout for words in (("logs", "-f"), ("metrics", "-f"), ("events", "-f"))]
    summary = " ".join(result.stdout.split())
    assert "✔ lm succeeded" in summary and "loss 4 → 0.5" in summary and "steps 8/8" in summary, result.stdout
    assert "node-0 ranks 0,1 GPUs 0,1" in summary and "node-1 ranks 2,3 GPUs 0,1" in summary
    assert "warm: forked" in summary and "file:///ckpt/8 (step 8)" in summary
    milliseconds = [float(ms.replace(",", "")) for ms in re.findall(r"([\d,.]+) ms", summary)]
    assert len(milliseconds) == 7 and sum(milliseconds[:-1]) == pytest.approx(milliseconds[-1], abs=0.7)
    logs, metrics, events = watched
    assert sorted(logs.split("\n")) == ["", *(f"[{rank}] hello from {rank}" for rank in range(4))]
    assert "loss 0.5" in metrics and len(events.splitlines()) >= 5
    assert sorted(run("logs", "@last", "--rank", "2").stdout.split("\n")) == ["", "hello from 2"]
    assert "loss" in run("metrics", "@last").stdout and "4 │" in run("metrics", "@last", "-m", "loss").stdout
    assert "node-0" in run("nodes").stdout
    shown = run("show", "@last").stdout
    assert "succeeded" in shown and "after submit = accepted" in shown


def test_following_a_job_that_fails(
    run: Run, served: Served, tokens: Bootstrapped, database: str, job_yaml: str
) -> None:
    with PlayedCluster(database, served.url, tokens.cluster_token, exit_code=3):
        result = run("submit", job_yaml, "--follow", code=1)
    assert "✘ lm failed" in result.stdout
    assert "rank 1 exited with 3\n  ValueError: played\n" in result.stderr
