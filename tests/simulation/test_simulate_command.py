"""`phalanx simulate`: files in, one JSON object out, one clear line for whatever cannot be read; and a real trace."""

import gzip
import json
from pathlib import Path

import pytest
import typer
from phalanx_server import simulate_command
from typer.testing import CliRunner

TRACES = Path(__file__).resolve().parents[2].parent / "shared" / "traces"
HEAD = "job_id,submit_s,duration_s,gpus,cpus,gpu_type,tenant,user,status,model,time_limit_s,more\n"
TRACE = HEAD + "a,0,10,1,,,x,,,m,60,1\nb,1,10,2,,,y,,,,60,\n\nc,12,3,1,,,x,u,,m,,\n"
CLUSTER = {"name": "two", "total_gpus": 2, "pools": [{"nodes": 1, "gpus_per_node": 2, "gpu_type": "g"}]}
KEYS = {
    "jobs", "avg_jct_s", "p50_jct_s", "p99_jct_s", "avg_wait_s", "p99_wait_s", "makespan_s", "utilization",
    "preemptions", "resizes", "migrations", "lost_gpu_s", "fairness", "pass_p50_ms", "pass_p99_ms",
}  # fmt: skip

with_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"the traces are not at {TRACES}")


def simulate(*words):
    app = typer.Typer()
    simulate_command.register(app)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["simulate", *map(str, words)])


@pytest.fixture
def run(tmp_path):
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "cluster.json").write_text(json.dumps(CLUSTER))

    def run(*words, trace="trace.csv", cluster="cluster.json"):
        return simulate("--trace", tmp_path / trace, "--cluster", tmp_path / cluster, *words)

    return run


def figures(done):
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_one_object_with_every_figure(run):
    said = figures(run())
    assert said.keys() >= KEYS
    assert (said["jobs"], said["avg_jct_s"], said["makespan_s"]) == (3, 13.333, 23)
    assert said["fairness"]["tenants"]["x"]["jobs"] == 2
    assert said["fairness"]["tenants"]["y"]["avg_wait_s"] == 9


def test_a_compressed_trace_is_the_same(run, tmp_path):
    with gzip.open(tmp_path / "trace.csv.gz", "wt") as file:
        file.write(TRACE)
    assert figures(run(trace="trace.csv.gz"))["avg_jct_s"] == 13.333


def test_one_tenant_alone(run):
    said = figures(run("--tenant", "x"))
    assert (said["jobs"], said["avg_wait_s"]) == (2, 0)


def test_virtual_clusters_are_apart(run, tmp_path):
    (tmp_path / "cluster.json").write_text(json.dumps(CLUSTER | {"vc_nodes": {"x": 1}}))
    said = figures(run())
    assert (said["jobs"], said["never_started"], said["gpus"]) == (2, 1, 2)


def test_several_processes_give_what_one_gives(run, tmp_path, monkeypatch):
    (tmp_path / "cluster.json").write_text(json.dumps(CLUSTER | {"vc_nodes": {"x": 1, "y": 1}}))
    alone = figures(run())
    monkeypatch.setattr(simulate_command, "WORTH_PROCESSES_JOBS", 0)
    monkeypatch.setattr(simulate_command.os, "cpu_count", lambda: 2)
    beside = figures(run())
    assert {k: v for k, v in beside.items() if "pass" not in k} == {k: v for k, v in alone.items() if "pass" not in k}


def test_a_policy_and_profiles_from_files(run, tmp_path):
    (tmp_path / "policy.json").write_text('{"order": "shortest", "elastic": false}')
    (tmp_path / "profiles.json").write_text('{"m": {"runtime_s": {"1": 20, "2": 30}}}')
    said = figures(run("--policy", tmp_path / "policy.json", "--elastic", tmp_path / "profiles.json", "--restart-s", 5))
    assert said["fairness"]["tenants"]["x"]["gpu_s"] == 40, "2 × 20 s by the profile, fastest on 1 GPU"
    assert figures(run("--clairvoyant", "--min-runtime-s", 5))["jobs"] == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("trace.csv", "job_id,submit_s\n", "the first line has no column duration_s"),
        ("trace.csv", HEAD + "a,0,ten,1\n", "line 2: duration_s: 'ten' is not a number of at least 0"),
        ("trace.csv", HEAD + "a,0,1,1\na,0,1,1\n", "line 3: job_id a is given twice"),
        ("trace.csv", HEAD + "a,,1,1\n", "line 2: submit_s is missing"),
        ("trace.csv", b"\xff\xfe", "not UTF-8 text"),
        ("cluster.json", "{", "not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ("cluster.json", "{}", "pools: not a list of pools"),
        ("cluster.json", '{"pools": [{"nodes": -1}]}', "pools[0].gpu_type: None is not a name"),
        ("cluster.json", '{"pools": [{"gpu_type": "g", "nodes": 1.5}]}', "pools[0].nodes: 1.5 is not a whole number"),
        ("policy.json", '{"ordr": "fifo"}', "unknown field ordr; did you mean order?"),
        ("profiles.json", '{"m": {}}', "m.runtime_s: not an object with a run time on 1 GPU"),
        ("profiles.json", '{"m": {"runtime_s": {"1": 0}}}', "m.runtime_s.1: 0 is not a run time"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(run, tmp_path, name, text, said):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    option = {"policy.json": ["--policy", path], "profiles.json": ["--elastic", path]}.get(name, [])
    done = run(*option)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"phalanx simulate: {path}: {said}") and done.stderr.count("\n") == 1


def test_files_and_tenants_that_are_not_there(run):
    done = run(trace="none.csv")
    assert (done.exit_code, done.stderr.split(": ", 2)[-1]) == (2, "No such file or directory\n")
    assert "it has no job of z" in run("--tenant", "z").stderr


@with_traces
def test_a_real_trace_ends_between_the_bound_and_strict_fifo():
    files = "--trace", TRACES / "philly.csv.gz", "--cluster", TRACES / "philly.cluster.json"
    said = figures(simulate(*files, "--vc", "2869ce"))
    assert said["jobs"] == 422
    assert 74_492 <= said["avg_jct_s"] <= 83_085, "shared/traces/README.md"
