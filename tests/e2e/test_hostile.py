"""Jobs that mean no good, through HTTP on one running Phalanx: what their owners are told, what they cannot reach."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import phalanx
import pytest

END_S = 120.0

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def up(make_up: Any) -> Iterator[Any]:
    with make_up(mode=0o755) as machine:
        yield machine


def document(command: str, *, memory: str | None = None, **run: Any) -> dict[str, Any]:
    resources = {"replicas": 1, "gpus_per_replica": 1} | ({"memory_per_replica": memory} if memory else {})
    run = {"command": command, **run}
    return {"name": "hostile", "tenant": "default", "resources": resources, "run": run, "retries": {"max": 0}}


def ended(client: phalanx.Client, spec: dict[str, Any]) -> Any:
    return client.wait(client.submit(spec).id, timeout_s=END_S)


def python(code: str) -> str:
    assert '"' not in code
    return f'python -c "{code}"'


def running(client: phalanx.Client, spec: dict[str, Any]) -> Any:
    job_id = client.submit(spec).id
    deadline = time.monotonic() + END_S
    while (job := client.job(job_id)).state != "running":
        assert not job.ended and time.monotonic() < deadline, job
        time.sleep(0.1)
    return job


def test_a_job_over_its_memory_ends_as_oom_and_its_neighbour_goes_on(client: phalanx.Client) -> None:
    neighbour = running(client, document("sleep 300"))
    job = ended(client, document(python("x = [b'x' * (1 << 20) for _ in range(1000)]"), memory="256MiB"))
    assert (job.state, job.attempt.outcome) == ("failed", "oom")
    assert "rank 0 ran out of memory: the limit is 256 MiB" in job.message
    assert client.job(neighbour.id).state == "running"
    client.cancel(neighbour.id)


def test_a_mount_that_nobody_allowed_is_refused_in_words(client: phalanx.Client) -> None:
    """In the end; and while it waits to be tried again, as another node might allow it."""
    said = "could not start: mount /etc: the operator allows nothing to be mounted (--allow-mount)"
    spec = document("true", mounts=[{"source": "/etc", "target": "/data"}])
    waits = client.submit(spec).id
    deadline = time.monotonic() + END_S / 6
    while said not in client.explain(waits).text:
        assert time.monotonic() < deadline, client.job(waits)
        time.sleep(0.1)
    job = ended(client, spec | {"retries": {"max": 0, "backoff": 0}})
    assert (job.state, job.failures) == ("failed", 4) and said in job.message
    assert client.job(waits).state == "queued"
    client.cancel(waits)


def test_a_job_reaches_no_token_of_the_control_plane(up: Any, client: phalanx.Client) -> None:
    if not all(node.own_users for node in client.nodes()):
        pytest.skip("ranks have no users of their own on this machine")
    secrets = [path for path in up.data.rglob("*token*") if path.is_file()]
    assert {"admin-token", "cluster-token"} <= {path.name for path in secrets}
    environments = "/proc/[0-9]*/environ"
    script = f"""
for path in {" ".join(map(str, secrets))}; do cat $path && echo REACHED $path; done
for path in {up.data}/postgres {up.data}/logs {up.data}/storage {up.data}/ray; do ls $path && echo REACHED $path; done
for path in {environments}; do tr '\\0' '\\n' < $path | grep -a -E '^(RAY_|PHALANX_CLUSTER)' && echo REACHED $path; done
echo done
"""
    job = ended(client, document(script))
    assert job.state == "succeeded", job.message
    said = client.logs(job.id)
    assert "REACHED" not in said and "done" in said


def test_a_job_cannot_join_the_ray_cluster(up: Any, client: phalanx.Client) -> None:
    address = _gcs_address(up.data)
    code = f"import ray; ray.init(address='{address}', logging_level='ERROR'); print('JOINED', ray.nodes())"
    spec = document(f"timeout 90 {python(code)}", env={"RAY_AUTH_MODE": "token"})
    job = ended(client, spec)
    assert job.state == "failed"
    assert "JOINED" not in client.logs(job.id)


def _gcs_address(data: Path) -> str:
    return json.loads((data / "ray" / "ray.json").read_text())["address"]


def test_a_loss_that_is_no_number_is_told_and_does_not_spoil_the_chart(client: phalanx.Client) -> None:
    code = "import phalanx; [phalanx.report(step=s, loss=float('nan') if s > 5 else 1.0) for s in range(10)]"
    job = ended(client, document(python(code)))
    assert job.state == "succeeded", job.message
    (loss,) = client.metrics(job.id, names=["loss"])
    assert [point.mean for point in loss.points] == [1.0] * 6
    assert any("loss" in event.message and "finite" in event.message for event in client.events(job.id))
