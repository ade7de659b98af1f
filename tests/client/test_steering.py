"""Arrays, dependencies, priorities, requeues, tenants' rules and the policy: the command line and the SDK against the
real server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from phalanx import errors
from phalanx.client import Client
from phalanx_server.actions.bootstrap import Bootstrapped
from phalanx_server.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it out
from played_cluster import PlayedCluster
from test_against_server import JOB, Run, Served, first_run, run

__all__ = ["run"]  # a fixture


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


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(JOB))
    return str(path)


def test_an_array_on_the_command_line(run: Run, file: str, admin: Client) -> None:
    submitted = run("submit", file, "--array", "0-9", "--max-running", "3")
    array = submitted.stdout.strip()
    assert array.startswith("array_") and "lm is 10 jobs" in submitted.stderr
    shown = run("show", "@last").stdout
    assert "10: 0-9, 3 at once" in shown and "10 queued" in shown
    assert "index 7 (10 jobs, 3 at once)" in " ".join(run("show", "lm[7]").stdout.split())
    queue = run("queue").stdout.splitlines()
    assert len(queue) == 2 and "lm[0–9] (10 jobs)" in queue[1] and "1–10" in queue[1] and array in queue[1]
    assert len(json.loads(run("jobs", "--array", array, "-o", "json").stdout)) == 10
    assert "10 on hold" in run("hold", array).stdout + run("show", array).stdout
    run("release", array), run("priority", array, "high")
    run("hold", "lm[3]")
    assert {job.priority for job in admin.jobs(array=array)} == {10}
    assert "name one of its jobs" in run("logs", "@last", code=2).stderr
    assert "10 cancelled" in run("cancel", "@last", "--wait").stdout
    run("hold", array, code=5), run("show", "array_" + "0" * 32, code=4)
    assert "indices" in run("submit", file, "--array", "9-0", code=2).stderr


def test_jobs_that_wait_for_others(run: Run, file: str, admin: Client) -> None:
    first = run("submit", file).stdout.strip()
    second = run("submit", file, "--name", "eval", "--after", "@last").stdout.strip()
    third = run("submit", file, "--name", "report", "--after-any", first, "--after-any", "eval").stdout.strip()
    shown = " ".join(run("show", third).stdout.split())
    assert f"after {first}, {second} ended" in shown
    assert run("submit", file, "--dry-run", "--after", first).stdout.startswith("valid")
    assert "there is no job" in run("submit", file, "--after", "job_" + "0" * 32, code=2).stderr
    run("cancel", first)
    ended = admin.job(second)
    assert (ended.state, ended.reason) == ("cancelled", "dependency_failed")
    assert f"dependency failed: lm ({first}) was cancelled" in run("show", second).stdout
    assert admin.job(third).state == "queued"
    assert "Cancelled: dependency failed" in run("events", second).stdout
    assert "can never be met" in run("submit", file, "--after", first, code=2).stderr


def test_a_deadline_and_a_shape_are_shown(run: Run, file: str, admin: Client) -> None:
    run("policy", "set", "topology_levels=[block, rack]")
    asked = (
        "--set",
        "resources.elastic={min_replicas: 1, max_replicas: 4}",
        "--set",
        "resources.topology.required=rack",
    )
    run("submit", file, *asked, "--set", "deadline=2030-01-01T00:00:00Z")
    shown = " ".join(run("show", "@last").stdout.split())
    assert "1 to 4 replicas, within one rack" in shown and "deadline" in shown
    refused = run("submit", file, "--set", "resources.topology.required=rak", code=2).stderr
    assert "resources.topology.required: there is no level 'rak' (did you mean rack?" in refused


def test_a_priority_and_a_requeue(
    run: Run, file: str, admin: Client, served: Served, tokens: Bootstrapped, database: str
) -> None:
    job = run("submit", file, "--set", "held=true").stdout.strip()
    assert "has priority 100" in run("priority", job, "urgent").stdout
    assert "has priority -5" in run("priority", job, "--", "-5").stdout
    assert "no priority class" in run("priority", job, "highest", code=2).stderr
    assert "waits already" in run("requeue", job, code=5).stderr
    with pytest.raises(errors.Conflict):
        admin.requeue(job)
    with PlayedCluster(database, served.url, tokens.cluster_token):
        run("release", job)
        assert admin.wait(job, timeout_s=20).state == "succeeded"
    run("priority", job, "high", code=5)


def test_following_an_array_to_its_end(
    run: Run, file: str, served: Served, tokens: Bootstrapped, database: str
) -> None:
    with PlayedCluster(database, served.url, tokens.cluster_token):
        result = run("submit", file, "--array", "0-2", "--follow")
        assert "3 succeeded" in result.stdout
    with PlayedCluster(database, served.url, tokens.cluster_token, exit_code=3):
        assert "2 failed" in run("submit", file, "--array", "0-1", "--follow", code=1).stdout


def test_the_policy_is_set_field_by_field(run: Run, admin: Client, tokens: Bootstrapped) -> None:
    assert "fair_sharing" in run("policy").stdout
    run("policy", "set", "fair_sharing=true", "order=shortest")
    run("policy", "set", "restart_s=45")
    assert admin.policy().settings == {"fair_sharing": True, "order": "shortest", "restart_s": 45}
    rows = {line.split()[0]: line.split()[1:] for line in run("policy", "get").stdout.splitlines()}
    assert rows["restart_s"] == ["45", "set"] and rows["backfill"][0] == "true"
    run("policy", "unset", "order", "restart_s")
    assert admin.policy().settings == {"fair_sharing": True}
    assert "did you mean order?" in run("policy", "set", "ordr=fifo", code=2).stderr
    assert "no field ordr" in run("policy", "unset", "ordr", code=2).stderr
    assert json.loads(run("policy", "get", "-o", "json").stdout)["version"] == 4


def test_a_tenant_s_rules_and_quotas(run: Run, admin: Client) -> None:
    run("tenants", "create", "research")
    shown = run("tenants", "set", "research", "--weight", "3", "--reclaim", "never", "--borrow", "5").stdout
    assert "never" in shown and "up to priority 5" in shown
    run("tenants", "set", "research", "--within-tenant", "lower_or_newer_equal")
    tenant = admin.tenant("research")
    assert tenant.weight == 3 and tenant.preemption == {
        "reclaim": "never",
        "borrow": {"max_priority": 5},
        "within_tenant": "lower_or_newer_equal",
    }
    assert "never" in run("tenants", "set", "research", "--borrow", "none").stdout
    assert "lower_or_newer_equal" in run("tenants", "show", "research").stdout
    run("tenants", "set", "research", code=2), run("tenants", "set", "research", "--reclaim", "sometimes", code=2)
    run("quota", "set", "research", "h100", "--nominal", "8", "--lending-limit", "2")
    run("quota", "set", "research", "cpu", "--nominal", "64")
    assert "h100" not in run("quota", "unset", "research", "h100").stdout
    assert set(admin.quotas("research")) == {"cpu"}
