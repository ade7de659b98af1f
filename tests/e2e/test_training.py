"""From HTTP to a trained model: real server, scheduler, PostgreSQL, Ray, agent, runners and torch."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import phalanx
import pytest
from phalanx import jobfile

EXAMPLES = Path(__file__).parents[2] / "examples"
END_S = 120.0
PHASES = ("accepted_s", "queued_s", "placed_s", "ranks_started_s", "rendezvous_s", "first_step_s")

pytestmark = pytest.mark.ray


def spec(command: str, *, replicas: int = 1, gpus_per_replica: int = 1, **more) -> dict:
    resources = {"replicas": replicas, "gpus_per_replica": gpus_per_replica}
    return {"name": "test", "tenant": "default", "resources": resources, "run": {"command": command}, **more}


def example(name: str) -> dict:
    return jobfile.read(EXAMPLES / name / "job.yaml").document


def wait_for(client: phalanx.Client, job_id: str, state: str) -> phalanx.models.Job:
    deadline = time.monotonic() + END_S
    while (job := client.job(job_id)).state != state:
        assert not job.ended, f"{job.state}: {job.message}"
        assert time.monotonic() < deadline, f"still {job.state}"
        time.sleep(0.05)
    return job


def wait_for_hold(client: phalanx.Client, job_id: str) -> phalanx.models.Explanation:
    deadline = time.monotonic() + END_S
    while (explanation := client.explain(job_id)).hold is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return explanation


def gpus_used(client: phalanx.Client) -> int:
    return sum(node.gpus_used for node in client.nodes())


def test_a_language_model_trains_on_two_nodes(client):
    document = example("lm")
    document["run"]["command"] = "python train.py --steps 30 --checkpoint-every 10"
    job = client.wait(client.submit(document, workdir=EXAMPLES / "lm").id, timeout_s=END_S)
    assert job.state == "succeeded", job.message
    (loss,) = client.metrics(job.id, names=["loss"])
    assert sum(point.count for point in loss.points) == 30
    assert loss.points[-1].min < loss.points[0].max - 0.5
    assert job.progress.step == job.progress.total_steps == 30
    assert job.checkpoint.step == 30
    assert Path(job.checkpoint.url.removeprefix("file://")).is_file()
    assert {(p.node, p.ranks) for p in job.attempt.placements} == {("node-0", 2), ("node-1", 2)}
    assert all(rank.warm for rank in job.attempt.ranks), job.attempt.ranks
    parts = [getattr(job.phases, name) for name in PHASES]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(job.phases.total_s, abs=1e-6)
    assert "30" in client.logs(job.id, rank=0)


# What is set of an example to end it sooner, and between what each number that it is judged by has to lie.
RECIPES = {
    "vision": (["train.steps=60"], {"accuracy": (0.5, 1.0)}),
    "recsys": (["train.steps=100", "data.paths=[CLICKS]"], {"auc": (0.6, 1.0), "normalized_entropy": (0.5, 1.0)}),
    "lm-recipe": (["train.steps=40", "evaluate.share=0.02"], {"perplexity": (2.0, 60.0)}),
}


@pytest.mark.slow
def test_the_examples_of_recipes_learn_and_say_how_good_they_are(up, client, tmp_path):
    clicks = tmp_path / "clicks.tsv"
    rows = ["--rows", "50000", "--values", "30"]
    subprocess.run([sys.executable, "-m", "phalanx_worker.training.data.click_log", *rows, str(clicks)], check=True)
    jobs = {}
    for name, (changes, _) in RECIPES.items():
        words = [f"--set=run.args.{change.replace('CLICKS', str(clicks))}" for change in changes]
        jobs[name] = up.cli("submit", str(EXAMPLES / name / "job.yaml"), *words).stdout.strip()
    for name, (_, judged) in RECIPES.items():
        job = client.wait(jobs[name], timeout_s=END_S)
        assert job.state == "succeeded", (name, job.message, client.logs(job.id))
        told = {series.name: series.points for series in client.metrics(job.id, names=["loss", *judged])}
        assert told["loss"][-1].min < 0.9 * told["loss"][0].max, name
        for number, (least, most) in judged.items():
            assert least < told[number][-1].mean <= most, (name, number)


def test_a_script_for_torchrun_runs_unmodified(client):
    job = client.wait(client.submit(example("torchrun"), workdir=EXAMPLES / "torchrun").id, timeout_s=END_S)
    assert job.state == "succeeded", job.message
    assert "step 100: loss" in client.logs(job.id)


def test_a_tree_with_its_own_server_worker_and_queue_gets_its_own(client):
    job = client.wait(client.submit(example("own_names"), workdir=EXAMPLES / "own_names").id, timeout_s=END_S)
    assert job.state == "succeeded", client.logs(job.id)
    assert "rank 1: total 3.0" in client.logs(job.id)


def test_the_same_tree_starts_cold_too(client):
    document = example("own_names")
    document["run"]["env"] = {"PYTHONHASHSEED": "0"}
    job = client.wait(client.submit(document, workdir=EXAMPLES / "own_names").id, timeout_s=END_S)
    assert job.state == "succeeded", client.logs(job.id)
    assert [(rank.warm, "PYTHONHASHSEED" in rank.cold_reason) for rank in job.attempt.ranks] == [(False, True)] * 2


def test_one_failed_rank_ends_the_gang_and_is_named(client):
    command = """sh -c 'if [ "$RANK" = 1 ]; then echo broken >&2; exit 3; fi; sleep 600'"""
    job = client.wait(client.submit(spec(command, replicas=2)).id, timeout_s=END_S)
    assert job.state == "failed"
    assert "rank 1" in job.message and "3" in job.message
    (attempt,) = client.attempts(job.id)
    assert next(e for e in attempt.exits if e.rank == 1).tail.strip() == "broken"
    assert gpus_used(client) == 0


def test_a_failure_is_retried_up_to_its_limit(client):
    job = client.submit(spec("sh -c 'exit 1'", retries={"max": 1, "backoff": "1s"}))
    job = client.wait(job.id, timeout_s=END_S)
    assert (job.state, job.attempts, job.failures) == ("failed", 2, 2)


def test_cancel_gives_the_ranks_their_grace_and_frees_the_gpus(client):
    command = """sh -c 'trap "echo bye; exit 0" TERM; echo ready; while :; do sleep 0.1; done'"""
    job = client.submit(spec(command, gpus_per_replica=2))
    wait_for(client, job.id, "running")
    lines = client.follow_logs(job.id)
    assert next(lines).text.strip() == "ready"
    client.cancel(job.id)
    job = client.wait(job.id, timeout_s=END_S)
    assert job.state == "cancelled"
    assert "bye" in client.logs(job.id)
    assert gpus_used(client) == 0


def test_a_time_limit_ends_the_job(client):
    job = client.wait(client.submit(spec("sleep 600", time_limit="1s", preemption={"grace": "1s"})).id, timeout_s=END_S)
    assert (job.state, job.reason) == ("failed", "time_limit")


def test_a_job_waits_for_its_gpus_says_why_and_starts_when_they_are_free(client):
    first = client.submit(spec("sleep 600", replicas=2, gpus_per_replica=2))
    wait_for(client, first.id, "running")
    second = client.submit(spec("true", gpus_per_replica=2))
    explanation = wait_for_hold(client, second.id)
    assert explanation.hold.reason == "capacity"
    assert explanation.text
    assert [item.job_id for item in client.queue()] == [second.id]
    client.cancel(first.id)
    assert client.wait(second.id, timeout_s=END_S).state == "succeeded"


def test_a_cpu_job_leaves_free_gpus_their_share_and_runs_beside_busy_ones(client):
    document = spec("sh -c 'echo cuda=$CUDA_VISIBLE_DEVICES.'", gpus_per_replica=0)
    document["resources"]["cpus_per_replica"] = 1
    waiting = client.submit(document)
    assert wait_for_hold(client, waiting.id).hold.reason == "capacity"
    busy = client.submit(spec("sleep 600", replicas=2, gpus_per_replica=2))
    job = client.wait(waiting.id, timeout_s=END_S)
    assert job.state == "succeeded", job.message
    assert "cuda=." in client.logs(job.id)
    client.cancel(busy.id)
    client.wait(busy.id, timeout_s=END_S)


def test_the_command_line_follows_a_job_and_exits_with_its_fate(up, tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(json.dumps(spec("echo hello")))
    bad.write_text(json.dumps(spec("sh -c 'echo oh no >&2; exit 7'")))
    done = up.cli("submit", str(good), "--follow")
    assert "succeeded" in done.stdout + done.stderr
    failed = up.cli("submit", str(bad), "--follow", check=False)
    assert failed.returncode == 1
    assert "oh no" in failed.stdout + failed.stderr
    jobs = json.loads(up.cli("jobs", "--limit", "2", "-o", "json").stdout)
    assert [job["state"] for job in jobs] == ["failed", "succeeded"]


def test_what_ranks_leave_is_collected_and_fetched_byte_for_byte(up, client, tmp_path):
    code = """
import os, pathlib, random
rank = int(os.environ["RANK"])
left = random.Random(rank).randbytes(3_000_001 + rank)
pathlib.Path(os.environ["PHALANX_OUTPUT_DIR"], f"model ü-{rank}.pt").write_bytes(left)
pathlib.Path(f"out/{rank}").mkdir(parents=True)
pathlib.Path(f"out/{rank}/log.txt").write_text(f"rank {rank}")
pathlib.Path("scratch").write_text("not asked for")
os.symlink("/etc/passwd", "out/passwd")
"""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(code)
    document = spec("python train.py")
    document["resources"] = {"replicas": 2, "gpus_per_replica": 2, "ranks_per_replica": 1}
    document["run"]["outputs"] = ["out/**"]
    job = client.wait(client.submit(document, workdir=tmp_path / "code").id, timeout_s=END_S)
    assert job.state == "succeeded", client.logs(job.id)
    expected = {f"model ü-{rank}.pt": random.Random(rank).randbytes(3_000_001 + rank) for rank in range(2)}
    expected |= {f"out/{rank}/log.txt": f"rank {rank}".encode() for rank in range(2)}
    listed = json.loads(up.cli("outputs", job.id, "-o", "json").stdout)
    assert {one["path"]: one["bytes"] for one in listed} == {path: len(left) for path, left in expected.items()}
    to = tmp_path / "fetched"
    up.cli("outputs", job.id, "--to", str(to))
    fetched = {str(path.relative_to(to)): path.read_bytes() for path in to.rglob("*") if path.is_file()}
    assert fetched == expected
    assert any("1 links, pipes or devices" in event.message for event in client.events(job.id))
    assert gpus_used(client) == 0
