"""`phalanx scaling fit`: on files, and on the finished jobs of a real server."""

from __future__ import annotations

import asyncio
import csv
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import played_cluster
import pytest
import structlog
import uvicorn
from phalanx.cli import plugins
from phalanx.cli.app import app
from phalanx.client import Client
from phalanx_server import scaling_command
from phalanx_server.actions.bootstrap import Bootstrapped, bootstrap
from phalanx_server.main import create_app
from phalanx_server.settings import Settings
from phalanx_server.store.engine import create_engine
from phalanx_worker import protocol
from typer.testing import CliRunner, Result

SIZES, COUNTS = (1e6, 4e6, 16e6), (1e8, 4e8, 16e8)
STEPS = 100
DEADLINE_S = 20.0

Fit = Callable[..., Result]


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Fit:
    """The command as it is plugged into `phalanx`, whether or not this tree is the one that is installed."""
    entry = EntryPoint("scaling", "phalanx_server.scaling_command:register", plugins.GROUP)
    monkeypatch.setattr(plugins, "_entries", lambda: {"scaling": entry})

    def call(*words: object, code: int = 0, env: dict[str, str] | None = None) -> Result:
        result = CliRunner().invoke(app, ["scaling", "fit", *map(str, words)], env=env)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return call


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No server and no login of the person who runs the tests."""
    for name in ("PHALANX_URL", "PHALANX_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def file(runs: Callable, tmp_path: Path) -> Path:
    with (tmp_path / "runs.csv").open("w") as opened:
        rows = csv.writer(opened)
        rows.writerow(["name", "parameters", "tokens", "loss"])
        rows.writerows([run.name, run.parameters, run.tokens, run.loss] for run in runs(noise=0.003))
    return tmp_path / "runs.csv"


def test_the_group_says_what_it_has(fit: Fit) -> None:
    assert "fit" in CliRunner().invoke(app, ["scaling"]).stdout


# ------------------------------------------------------------------ files


def test_a_file_to_a_table_and_a_picture(fit: Fit, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_command, "LINE_EVERY_S", 0.0)
    asked = ("--parameters", "7e10", "--tokens", "1.4e12", "--gpu-hours", "1e5", "--gpu", "h100", "--mfu", "0.5")
    result = fit("--runs", file, *asked, "--plot", tmp_path / "law.svg", "--resamples", "50")
    assert "50 of 50 resamples of 25 runs fitted\n" in result.stderr
    said = result.stdout
    assert "alpha" in said and "90 % intervals" in said and "Planned run" in said
    assert "Best use of the budget" in said and "100,000" in said and "h100-80gb bf16 at 50 % MFU (given)" in said
    assert "lm-24" in said and "doubt:" in said
    assert (tmp_path / "law.svg").read_text().startswith("<svg ")


@pytest.mark.slow
def test_json_can_be_read_again_and_gives_the_same(fit: Fit, file: Path, tmp_path: Path) -> None:
    first = json.loads(fit("--runs", file, "--json", "--resamples", "50", "--flops", "1e22").stdout)
    (tmp_path / "first.json").write_text(json.dumps(first))
    again = json.loads(
        fit("--runs", tmp_path / "first.json", "-o", "json", "--resamples", "50", "--flops", "1e22").stdout
    )
    assert again == first and first["law"]["alpha"]["value"] == pytest.approx(0.34, rel=0.1)


@pytest.mark.slow
def test_mistakes_are_one_line_that_says_what_to_do(fit: Fit, file: Path, tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("name,N,D,loss\na,1e6,1e8,3\nb,1e6,2e8,2.9\nc,,2e8,2.9\n")
    few = fit("--runs", tmp_path / "few.csv", code=2).stderr
    assert "left out: c: it has no parameters" in few and "add runs with N = 4e+06 and 2.5e+05" in few
    assert "--runs FILE" in fit(code=2).stderr and "--runs FILE" in fit("lm", "--runs", file, code=2).stderr
    assert "go together" in fit("--runs", file, "--parameters", "1e9", code=2).stderr
    assert "over 0" in fit("--runs", file, "--flops", "-1", code=2).stderr
    assert "not both" in fit("--runs", file, "--flops", "1e20", "--gpu-hours", "3", code=2).stderr
    assert "give --gpu h100" in fit("--runs", file, "--gpu-hours", "3", code=2).stderr
    assert "did you mean h100" in fit("--runs", file, "--gpu", "h1000", code=2).stderr
    assert "No such file" in fit("--runs", tmp_path / "none", code=2).stderr
    assert "cannot write" in fit("--runs", file, "--plot", tmp_path / "no" / "x.svg", code=2).stderr
    assert "KEY=VALUE" in fit("--label", "sweep", code=2).stderr


# ------------------------------------------------------------------ the service


class SweepAgent(played_cluster.Agent):
    """Each job trains a model of `N` parameters on `D` tokens (its env), and its loss is the law's at the end."""

    law: object

    async def _report(self, attempt: protocol.DesiredAttempt, group: protocol.GroupPlacement) -> None:
        env, of, now = attempt.launch.env, (attempt.attempt_id, attempt.epoch), time.time()
        size, count = float(env["N"]), float(env["D"])
        values = [
            {
                "loss": float(self.law.loss(size, count * step / STEPS)),  # type: ignore[attr-defined]
                "tokens_total": count * step / STEPS,
                "parameters": size,
                "tokens_per_s": 1e14 / (6 * size),
            }
            for step in range(1, STEPS + 1)
        ]
        if env.get("FORGETS"):
            values = [{name: value for name, value in one.items() if name != "tokens_total"} for one in values]
        points = [protocol.MetricPoint(*of, 0, now + step / 1000, step, one) for step, one in enumerate(values, 1)]
        beat = protocol.Heartbeat([protocol.AttemptRef(*of)], protocol.NodeStats(0.1, 1 << 20), warm_ready=True)
        message = protocol.NodeReport(f"boot-{group.node}-{of[0]}", 1, now, beat, logs=[], metrics=points, marks=[])
        headers = {"Authorization": f"Bearer {self._node_tokens[group.node]}"}
        answer = await self._http.post("/v1/node/reports", json=protocol.encode(message), headers=headers)
        assert answer.raise_for_status().json()["refused"] == [], answer.text


@pytest.fixture
def tokens(database: str) -> Bootstrapped:
    async def first() -> Bootstrapped:
        engine = create_engine(database)
        try:
            created = await bootstrap(engine)
        finally:
            await engine.dispose()
        assert created is not None
        return created

    return asyncio.run(first())


@pytest.fixture
def url(database: str, tokens: Bootstrapped, tmp_path: Path) -> Iterator[str]:
    """A server in a thread of its own, on a free port."""
    settings = Settings(database_url=database, data_dir=tmp_path / "data", token_cache_s=0)  # type: ignore[arg-type]
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # stdout is the command's
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="error", timeout_graceful_shutdown=1))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    deadline = time.monotonic() + DEADLINE_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(DEADLINE_S)
    listening.close()
    structlog.reset_defaults()


@pytest.mark.parametrize("terminal", [False, True])
def test_how_far_it_is_is_said_on_stderr_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(scaling_command, "LINE_EVERY_S", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    with scaling_command._progress("jobs read", 2) as told:
        told(1)
        told(2)
    said = capsys.readouterr()
    assert said.out == "" and "2 of 2 jobs read" in said.err
    assert (said.err == "1 of 2 jobs read\n2 of 2 jobs read\n") is not terminal, "a terminal's line goes away"


def sweep_job(name: str, **env: object) -> dict[str, object]:
    run = {"command": "python train.py", "env": {key: str(value) for key, value in env.items()}}
    return {"name": name, "labels": {"sweep": "a"}, "resources": {"gpus_per_replica": 1}, "run": run}


def test_the_sweep_of_a_service_from_jobs_to_a_law(
    fit: Fit,
    url: str,
    tokens: Bootstrapped,
    database: str,
    hoffmann: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SweepAgent, "law", hoffmann, raising=False)
    monkeypatch.setattr(played_cluster, "Agent", SweepAgent)
    grid = [sweep_job("lm", N=n, D=d) for n in SIZES for d in COUNTS]
    with Client(url, tokens.admin_token) as client:
        jobs = client.submit_many([*grid, sweep_job("forgetful", N=1e6, D=1e8, FORGETS=1)])
        with played_cluster.PlayedCluster(database, url, tokens.cluster_token):
            assert {client.wait(job.id, timeout_s=60).state for job in jobs} == {"succeeded"}
        waits = client.submit(sweep_job("lm", N=1e6, D=1e9))

    env = {"PHALANX_URL": url, "PHALANX_TOKEN": tokens.admin_token}
    asked = ("--tail", "0", "--gpu-hours", "10", "--resamples", "50")
    said = json.loads(fit("--label", "sweep=a", *asked, "--json", env=env).stdout)
    assert said["law"]["alpha"]["value"] == pytest.approx(0.34, rel=1e-3)
    assert said["law"]["beta"]["value"] == pytest.approx(0.28, rel=1e-3)
    assert sorted((run["parameters"], run["tokens"]) for run in said["runs"]) == [(n, d) for n in SIZES for d in COUNTS]
    reasons = {one["name"].split()[1]: one["reason"] for one in said["left_out"]}
    assert reasons == {
        waits.id: "it is queued: only runs that succeeded count",
        jobs[-1].id: "it did not report tokens_total",
    }
    assert said["recommendation"]["flops"] == pytest.approx(10 * 3600 * 1e14, rel=1e-3), "what the runs achieved"
    named = fit(*(job.id for job in jobs[:9]), "--tail", "0", "--resamples", "50", env=env).stdout
    assert "0.34" in named and "left out" not in named
    assert "lm" in fit("--name", "lm", "--tokens-metric", "tokens_seen", code=2, env=env).stderr
