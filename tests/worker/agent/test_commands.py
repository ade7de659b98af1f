"""`phalanx agent`, up to where it would connect to Ray: what its options become, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from phalanx_worker import commands
from phalanx_worker.agent import emulated, main, ray_environment
from phalanx_worker.agent.nodes import NodeSettings
from phalanx_worker.agent.service import RunnerSettings
from typer.testing import CliRunner, Result

NEEDED = ["--server", "http://server", "--data", "/data", "--checkpoint-root", "/ckpt", "--ray-address", "ray:6379"]
GIB = 1 << 30


class Agent:
    """Runs the command; `settings` are those that it would have run with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings: Any = None
        monkeypatch.setattr(ray_environment, "prepare", lambda address: None)
        monkeypatch.setattr(main, "run", self._run)
        monkeypatch.setattr(main, "leave", lambda code: None)

    def _run(self, settings: main.AgentSettings) -> int:
        self.settings = settings
        return 0

    def __call__(self, *options: str, token: str | None = "secret") -> Result:
        app = typer.Typer()
        commands.register(app)
        return CliRunner().invoke(app, ["agent", *NEEDED, *options], env={"PHALANX_CLUSTER_TOKEN": token})


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    return Agent(monkeypatch)


def test_sizes_are_given_as_people_write_them(agent: Agent) -> None:
    assert agent().exit_code == 0
    assert (agent.settings.runner.environments_bytes, agent.settings.runner.disk_bytes) == (20 * GIB, 64 * GIB)
    assert agent("--environments-disk", "12.5GiB", "--attempt-disk", "0").exit_code == 0
    assert (agent.settings.runner.environments_bytes, agent.settings.runner.disk_bytes) == (GIB * 25 // 2, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--environments-disk", "twenty"], "'twenty' is not a size"),
        (["--environments-disk", "20"], "--environments-disk is 20: give at least 1GiB"),
        (["--attempt-disk", "64GB"], "'64GB' is not a size"),
        (["--allow-mount", "datasets"], "'datasets' is no directory to allow"),
        (["--ray-file", "/ray.json"], "give either --ray-address or --ray-file"),
        (["--token-file", "/nowhere"], "/nowhere: no such file"),
        (["--require-own-users", "--no-own-users"], "exclude each other"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(agent: Agent, options: list[str], said: str) -> None:
    refused = agent(*options)
    assert refused.exit_code == commands.EXIT_USAGE
    assert refused.stderr.startswith("phalanx agent: ") and said in refused.stderr
    assert agent.settings is None


def test_the_token_comes_from_the_environment_or_again_and_again_from_its_file(agent: Agent, tmp_path: Path) -> None:
    refused = agent(token=None)
    assert refused.exit_code == commands.EXIT_USAGE and "no cluster token" in refused.stderr
    assert agent().exit_code == 0 and agent.settings.token() == "secret"
    kept = tmp_path / "token"
    kept.write_text("first\n")
    assert agent("--token-file", str(kept)).exit_code == 0 and agent.settings.token() == "first"
    kept.write_text("second\n")
    assert agent.settings.token() == "second"


def test_what_is_asked_for_reaches_the_agent_and_its_runners(agent: Agent) -> None:
    options = ["--gpu-type", "h100", "--local-checkpoints", "--no-own-users", "--runner-silent-s", "5"]
    assert agent(*options, "--allow-mount", "/sets:ro", "--allow-mount", "/scratch").exit_code == 0
    assert agent.settings.nodes == NodeSettings(gpu_type="h100", shared_checkpoints=False)
    runner = RunnerSettings("http://server", "/data", "/ckpt", own_users=False, allow_mounts=("/sets:ro", "/scratch"))
    assert agent.settings.runner == runner
    assert (agent.settings.ray_address, agent.settings.runner_silent_s) == ("ray:6379", 5.0)


def test_labels_of_emulated_nodes_are_dealt_out_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[emulated.Emulation] = []
    monkeypatch.setattr(emulated, "run", lambda emulation, out: made.append(emulation) or 0)
    app = typer.Typer()
    commands.register(app)
    words = ["local-ray", "--nodes", "4", "--gpus-per-node", "2", "--data", "/data"]
    result = CliRunner().invoke(app, [*words, "--node-labels", "rack=r0,r1", "--node-labels", "zone=z"])
    assert result.exit_code == 0, result.output
    labels = [made[0].labels_of(f"node-{index}", index) for index in range(4)]
    assert [(each["rack"], each["zone"]) for each in labels] == [("r0", "z"), ("r0", "z"), ("r1", "z"), ("r1", "z")]
    assert labels[2]["phalanx.io/node-name"] == "node-2"
    for wrong in ("rack", "=r0", "rack=r0,"):
        assert CliRunner().invoke(app, [*words, "--node-labels", wrong]).exit_code == 2
