"""Every request of the SDK is one that the server's OpenAPI document knows, parameter by parameter."""

from __future__ import annotations

import inspect
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from phalanx import array_requests as arrays
from phalanx import environments as packages
from phalanx import fleet_requests as fleet
from phalanx import job_requests as work
from phalanx import maintenance as upkeep
from phalanx import outputs as files
from phalanx import profiles as traces
from phalanx.bundle import Bundle
from phalanx.calls import Call, Stream
from phalanx_server.main import create_app
from phalanx_server.settings import Settings

JOB, ARRAY, NOW = "job_" + "0" * 32, "array_" + "0" * 32, datetime.now(UTC)
PROFILE = "prof_" + "0" * 32
JOB_FILE = {"name": "lm"}

ASKED: dict[str, Any] = {
    "submit": next(work.submit(JOB_FILE)),
    "dry_run": work.dry_run(JOB_FILE),
    "submit_many": next(work.submit_many([JOB_FILE])),
    "has_bundle": next(work.upload(Bundle(None, "0" * 64, 1, 1), tenant="a")),  # type: ignore[arg-type]
    "jobs": work.jobs(
        tenant="a", state=["queued"], name="n", labels={"k": "v"}, submitted_after=NOW, limit=5, array=ARRAY
    )("c"),
    "job": work.job(JOB),
    "cancel": work.cancel(JOB),
    "hold": work.hold(JOB),
    "release": work.release(JOB),
    "requeue": work.requeue(JOB),
    "set_priority": work.set_priority(JOB, "high"),
    "array": arrays.array(ARRAY),
    "cancel_array": arrays.cancel_array(ARRAY),
    "hold_array": arrays.hold_array(ARRAY),
    "release_array": arrays.release_array(ARRAY),
    "requeue_array": arrays.requeue_array(ARRAY),
    "set_array_priority": arrays.set_array_priority(ARRAY, 3),
    "attempts": work.attempts(JOB),
    "explain": work.explain(JOB),
    "goodput": work.goodput(JOB),
    "events": work.events(JOB, after=3)("7"),
    "follow": work.follow(JOB, after=3),
    "logs": work.logs(JOB, rank=0, stream="stdout", attempt=1, tail_lines=5),
    "iter_logs": work.iter_logs(JOB, rank=0)("0"),
    "follow_logs": work.follow_logs(JOB, rank=0, stream="stderr", tail_lines=5),
    "metrics": work.metrics(JOB, names=["loss"], start=NOW, end=NOW, max_points=9),
    "follow_metrics": work.follow_metrics(JOB, names=["loss"]),
    "environments": packages.environments(tenant="a", name="n")("c"),
    "environment": packages.environment("env_1"),
    "create_environment": packages.create_environment("n", ["x"], tenant="a"),
    "delete_environment": packages.delete_environment("env_1"),
    "outputs": files.outputs(JOB, attempt=1)("c"),
    "download_output": files.download_output(JOB, "x", Path(), attempt=1, group_rank=0),
    "request_profile": traces.request_profile(JOB, steps=3, ranks=[0]),
    "profiles": traces.profiles(JOB),
    "profile": traces.profile(JOB, PROFILE),
    "download_trace": traces.download_trace(JOB, PROFILE, 0, Path()),
    "calibration": fleet.calibration(),
    "queue": fleet.queue(tenant="a", limit=5)("c"),
    "plan": fleet.plan(jobs=[JOB_FILE]),
    "nodes": fleet.nodes()("c"),
    "node": fleet.node("n"),
    "cordon": fleet.cordon("n"),
    "uncordon": fleet.uncordon("n"),
    "drain": fleet.drain("n"),
    "maintenance_windows": upkeep.maintenance_windows(over=True)("c"),
    "maintenance_window": upkeep.maintenance_window("mnt_1"),
    "create_maintenance": upkeep.create_maintenance(starts_at=NOW, ends_at=NOW, nodes=["n"]),
    "change_maintenance": upkeep.change_maintenance("mnt_1", ends_at=NOW),
    "end_maintenance": upkeep.end_maintenance("mnt_1"),
    "delete_maintenance": upkeep.delete_maintenance("mnt_1"),
    "clusters": fleet.clusters()(None),
    "create_cluster": fleet.create_cluster("c"),
    "tenants": fleet.tenants()(None),
    "tenant": fleet.tenant("a"),
    "create_tenant": fleet.create_tenant("a", weight=2),
    "quotas": fleet.quotas("a"),
    "quota_set": next(fleet.quota_set("a", "h100", nominal=1)),
    "quota_unset": next(fleet.quota_unset("a", "h100")),
    "change_tenant": next(fleet.change_tenant("a", weight=2)),
    "policy": fleet.policy(),
    "policy_set": next(fleet.policy_set({"order": "fifo"})),
    "tokens": fleet.tokens()(None),
    "create_token": fleet.create_token("t", role="member"),
    "revoke_token": fleet.revoke_token("tok_1"),
    "whoami": fleet.whoami(),
}

UNPAGED = {"limit"}  # sent to every list; those without pages pass over it


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def operation(document: dict[str, Any], method: str, path: str) -> dict[str, Any] | None:
    for template, operations in document["paths"].items():
        pattern = re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(template))
        if re.fullmatch(pattern, path) and method.lower() in operations:
            return operations[method.lower()]
    return None


@pytest.mark.parametrize("name", ASKED)
def test_the_server_knows_the_request(document: dict[str, Any], name: str) -> None:
    asked: Call[Any] | Stream[Any] = ASKED[name]
    found = operation(document, asked.method if isinstance(asked, Call) else "GET", asked.path)
    assert found is not None, f"{asked.path} is no operation"
    known = {parameter["name"] for parameter in found.get("parameters", []) if parameter["in"] == "query"}
    assert set(asked.params) - UNPAGED <= known
    if isinstance(asked, Call) and asked.json is not None:
        assert "requestBody" in found


def test_every_operation_of_the_sdk_is_among_them() -> None:
    composed = {
        "wait",
        "wait_array",
        "upload",
        "download_outputs",
        "chosen",
        "arrived",
        "explained",
        "wait_profile",
        "download_traces",
    }  # of others, or with a body that is streamed
    described = {
        name
        for module in (work, arrays, files, traces, packages, fleet)
        for name, f in vars(module).items()
        if _is_request(module, f)
    }
    assert described - composed <= set(ASKED)


def _is_request(module: Any, value: Any) -> bool:
    own = inspect.isfunction(value) and value.__module__ == module.__name__
    return own and not value.__name__.startswith("_")
