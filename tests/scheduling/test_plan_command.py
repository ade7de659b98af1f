"""`phalanx plan`: snapshots in, plans out, and one clear line for whatever cannot be read."""

import contextlib
import json

import pytest
import typer
import yaml
from phalanx.models import PlanAnswer
from phalanx_server import plan_command
from typer.testing import CliRunner

SNAPSHOT = {
    "now": 0,
    "tenants": [{"name": "t"}],
    "nodes": [{"name": "n0", "gpu_type": "h100", "gpus": 8}],
    "jobs": [
        {"id": i, "tenant": "t", "replicas": 1, "gpus_per_replica": 8, "submitted_at": 0, "state": "queued"}
        for i in "ab"
    ],
}


@pytest.fixture
def run():
    app = typer.Typer()
    plan_command.register(app)
    app.callback()(lambda: None)

    def invoke(*words, stdin=None):
        return CliRunner().invoke(app, ["plan", *map(str, words)], input=stdin)

    return invoke


def test_one_plan_per_line_in_the_order_of_the_files(run, tmp_path):
    for name, jobs in (("first", 1), ("second", 2)):
        (tmp_path / name).write_text(json.dumps(SNAPSHOT | {"jobs": SNAPSHOT["jobs"][-jobs:]}))
    done = run(tmp_path / "first", tmp_path / "second")
    plans = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0
    assert [[s["job"] for s in p["starts"]] for p in plans] == [["b"], ["a"]]
    assert plans[1]["holds"] == [
        {
            "job": "b",
            "reason": "capacity",
            "message": "needs 1 × (8 h100): 8 h100, of which 0 are free",
            "unblocks": ["8 more h100 become free"],
            "estimated_start": None,
        }
    ]


def test_a_dash_reads_standard_input(run):
    done = run("-", stdin=json.dumps(SNAPSHOT))
    assert json.loads(done.stdout)["starts"][0]["placement"] == [{"node": "n0", "replicas": 1}]


def test_a_table_and_yaml_for_people(run):
    table = run("-", "-o", "table", stdin=json.dumps(SNAPSHOT)).stdout
    assert "1 on n0" in table and "hold: capacity" in table
    document = yaml.safe_load(run("-", "--output", "yaml", stdin=json.dumps(SNAPSHOT)).stdout)
    assert [h["job"] for h in document["holds"]] == ["b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ("[]", "not a JSON object"),
        ('{"now": 0, "jbos": []}', "unknown field jbos; did you mean jobs?"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(run, tmp_path, text, said):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run(path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"phalanx plan: {path}: ") and done.stderr.rstrip().endswith(said)
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_not_there(run, tmp_path):
    done = run(tmp_path / "none.json")
    assert (done.exit_code, done.stderr) == (2, f"phalanx plan: {tmp_path / 'none.json'}: No such file or directory\n")


def test_live_asks_the_server_and_names_what_would_happen(run, tmp_path, monkeypatch):
    job, node, asked = f"job_{'a' * 32}", f"node_{'b' * 32}", {}
    place = [{"node": node, "replicas": 2}]
    plan = {
        "starts": [{"job": "job_new", "gpu_type": "h100", "replicas": 2, "placement": place}],
        "preemptions": [{"job": job, "for": "job_new", "reason": "reclaim", "lost_gpu_s": 15.0}],
        "resizes": [{"job": job, "for": None, "replicas": 2, "placement": place}],
        "migrations": [{"job": job, "for": "job_new", "placement": place}],
        "holds": [{"job": job, "reason": "quota", "message": "waits", "unblocks": [], "estimated_start": 0.0}],
    }

    class Client:
        def plan(self, **given):
            asked.update(given)
            return PlanAnswer(plan, jobs=["job_new"], names={job: "old", "job_new": "new", node: "n0"})

    monkeypatch.setattr("phalanx.cli.session.connected", lambda: contextlib.nullcontext(Client()))
    (tmp_path / "job.yaml").write_text("name: new\n")
    words = ["--live", "--job", tmp_path / "job.yaml", "--quota", "research/nlp:h100=8", "--drain", "n1"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert asked == {
        "jobs": [{"name": "new"}],
        "quotas": {"research/nlp": {"h100": {"nominal": 8}}},
        "nodes": {"n1": "draining"},
    }
    flat = " ".join(done.stdout.split())
    for part in ("new submitted", "new start 2 on n0", "stop reclaim, for new", "resize to 2", "move 2 on n0, for new"):
        assert part in flat
    assert "expected to start at 1970-01-01T00:00:00Z" in flat
    assert json.loads(run(*words, "-o", "json").stdout) == plan
    for wrong in ([], ["--drain", "n1", "-"], ["--live", "--quota", "x=1"], ["--live", "-"]):
        assert run(*wrong).exit_code == 2
