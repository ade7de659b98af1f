"""What is wrong with a snapshot is said in one line that names the field."""

import pytest
from phalanx_server.scheduling.snapshot import parse_changes, parse_snapshot

JOB = {"id": "a", "tenant": "t", "replicas": 1, "gpus_per_replica": 1, "submitted_at": 0, "state": "queued"}
NODE = {"name": "n0", "gpu_type": "h100", "gpus": 8}
TENANT = {"name": "t"}
HERE = [{"node": "n0", "replicas": 1}]


def snapshot(job=None, node=None, tenant=None, **more):
    rows = {"jobs": [JOB | (job or {})], "nodes": [NODE | (node or {})], "tenants": [TENANT | (tenant or {})]}
    return {"now": 0, **rows, **more}


WRONG = {
    "not an object": ([1], "not a JSON object"),
    "a required field": ({"jobs": []}, "field now is missing"),
    "a misspelt field": (
        snapshot({"gpu_per_replica": 1}),
        "jobs[0] (a): unknown field gpu_per_replica; did you mean gpus_per_replica?",
    ),
    "a field like no other": (
        snapshot(node={"zzz": 1}),
        "nodes[0] (n0): unknown field zzz; valid are name, gpu_type, gpus, cluster, cpus, memory_gib, labels, state",
    ),
    "a field within a field": (
        snapshot(tenant={"quotas": {"h100": {"nominl": 1}}}),
        "tenants[0] (t).quotas.h100: unknown field nominl; did you mean nominal?",
    ),
    "a word out of a few": (
        snapshot({"state": "runing"}),
        "jobs[0] (a).state: input should be 'queued', 'running' or 'stopping', not \"runing\"",
    ),
    "text for a number": (
        snapshot({"replicas": "1"}),
        'jobs[0] (a).replicas: input should be a valid integer, not "1"',
    ),
    "true for a number": (
        snapshot({"replicas": True}),
        "jobs[0] (a).replicas: input should be a valid integer, not true",
    ),
    "nothing of a gang": (
        snapshot({"replicas": 0}),
        "jobs[0] (a).replicas: input should be greater than or equal to 1, not 0",
    ),
    "not a number": (snapshot(now=float("nan")), "now: input should be a finite number, not NaN"),
    "an object for a list": (snapshot(jobs={}), "jobs: input should be a valid list, not {}"),
    "a tenant that is not there": (snapshot({"tenant": "u"}), "job a: tenant: there is no tenant u"),
    "a node that is not there": (snapshot({"avoid_nodes": ["n9"]}), "job a: avoid_nodes: there is no node n9"),
    "a window on no node": (
        snapshot(maintenance=[{"nodes": ["n9"], "starts_at": 0, "ends_at": 1}]),
        "maintenance[0].nodes: there is no node n9",
    ),
    "an id twice": (snapshot(jobs=[JOB, JOB]), "jobs: a is given twice"),
    "a circle of tenants": (snapshot(tenant={"parent": "t"}), "tenant t: parent: its ancestors form a circle"),
    "a queued job somewhere": (snapshot({"placement": HERE}), "job a: placement: a queued job has none"),
    "a running job nowhere": (
        snapshot({"state": "running"}),
        "job a: field placement is missing: the job is running",
    ),
    "half a gang": (
        snapshot({"state": "running", "placement": HERE, "replicas": 2}),
        "job a: placement: 1 replicas are placed, but its gang is 2",
    ),
    "next of a running job": (
        snapshot({"state": "running", "placement": HERE, "next": {"placement": HERE}}),
        "job a: next: only a stopping job has it",
    ),
    "an unknown level": (
        snapshot({"topology": {"required": "rack"}}),
        "job a: topology: rack is not one of node",
    ),
    "a slice that does not divide": (
        snapshot({"topology": {"required": "node", "slice": {"level": "node", "replicas": 2}}}),
        "job a: topology.slice: 2 does not divide the gang",
    ),
    "replicas outside the range": (
        snapshot({"min_replicas": 2}),
        "job a: replicas: 1 is outside min_replicas..max_replicas",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("document", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_snapshot_is_refused(document, said):
    with pytest.raises(ValueError) as refusal:
        parse_snapshot(document)
    assert str(refusal.value) == said


def test_null_means_absent():
    given = snapshot({"priority": None, "topology": None}, {"labels": None}, maintenance=None, policy=None)
    assert parse_snapshot(given) == parse_snapshot(snapshot())


def test_changes_are_read_like_snapshots():
    changes = parse_changes({"now": 1, "jobs": [JOB], "removed_jobs": ["b"]})
    assert (changes.jobs[0].id, changes.removed_jobs, changes.tenants) == ("a", ("b",), None)
    with pytest.raises(ValueError, match="unknown field remove_jobs; did you mean removed_jobs"):
        parse_changes({"now": 1, "remove_jobs": []})
