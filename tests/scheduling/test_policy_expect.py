"""When a waiting job is expected to start: a look ahead at the time limits of those that run."""

from phalanx_server.scheduling.planner import schedule
from phalanx_server.scheduling.snapshot import parse_snapshot


def running(name: str, node: str, *, limit_s: float | None) -> dict:
    place = [{"node": node, "replicas": 1}]
    job = {"id": name, "tenant": "t", "replicas": 1, "gpus_per_replica": 2, "submitted_at": 0, "state": "running"}
    return job | {"started_at": 50, "time_limit_s": limit_s, "placement": place}


def queued(name: str, *, at: float, gpus: int = 2) -> dict:
    return {
        "id": name,
        "tenant": "t",
        "replicas": 1,
        "gpus_per_replica": gpus,
        "gpu_types": ["h"],
        "submitted_at": at,
        "state": "queued",
    }


def expected(*jobs: dict, quota: int | None = None) -> dict[str, float | None]:
    quotas = {} if quota is None else {"h": {"nominal": quota, "borrowing_limit": 0}}
    nodes = [{"name": name, "gpu_type": "h", "gpus": 2} for name in ("n0", "n1")]
    snapshot = {"now": 100, "tenants": [{"name": "t", "quotas": quotas}], "nodes": nodes, "jobs": list(jobs)}
    return {hold.job: hold.estimated_start for hold in schedule(parse_snapshot(snapshot)).holds}


def test_each_waiting_job_takes_the_place_of_the_next_to_reach_its_limit() -> None:
    both = running("a", "n0", limit_s=200), running("b", "n1", limit_s=100)
    waiting = queued("first", at=60), queued("second", at=61), queued("third", at=62)
    assert expected(*both, *waiting) == {"first": 150, "second": 250, "third": None}


def test_a_job_that_may_run_for_ever_decides_nothing() -> None:
    both = running("a", "n0", limit_s=None), running("b", "n1", limit_s=100)
    assert expected(*both, queued("first", at=60), queued("second", at=61)) == {"first": 150, "second": None}


def test_a_job_past_its_limit_ends_now() -> None:
    both = running("a", "n0", limit_s=10), running("b", "n1", limit_s=None)
    assert expected(*both, queued("first", at=60)) == {"first": 100}


def test_quota_is_given_back_too() -> None:
    assert expected(running("a", "n0", limit_s=100), queued("first", at=60), quota=2) == {"first": 150}
