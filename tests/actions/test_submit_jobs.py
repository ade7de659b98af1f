"""Submits share transactions, and each gets its own answer."""

import asyncio
import contextlib
import hashlib
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from phalanx_server.actions.bootstrap import bootstrap
from phalanx_server.actions.create_tenant import NewTenant, create_tenant
from phalanx_server.actions.idempotency import Idempotency
from phalanx_server.actions.save_bundle import save_bundle
from phalanx_server.actions.submit_jobs import LARGE_JOBS, SHARED_MAX_JOBS, Submission, Submitter
from phalanx_server.domain.access import SYSTEM, Actor
from phalanx_server.domain.errors import IdempotencyConflict, Impossible, Invalid, Unavailable
from phalanx_server.domain.spec import parse_job
from phalanx_server.store.attempts import lock_jobs
from phalanx_server.store.ids import new_id
from phalanx_server.store.job_views import load_jobs
from phalanx_server.store.schema import audit, clusters, events, idempotency_keys, jobs, nodes
from phalanx_server.store.wakeups import Wakeups
from sqlalchemy import event, func, insert, select

RECEIVED = datetime(2020, 1, 1, tzinfo=UTC)  # the past, whatever day it is: jobs are submitted by the real clock
MEMBER = Actor("ann", "member", tenant="research/nlp")


def job(name="a", *, resources=None, **fields):
    document = {"name": name, "resources": resources or {"gpus": 1}, "run": {"command": "true"}}
    return parse_job(document | fields)


def submission(*specs, actor=SYSTEM, key=None, body=b"", **fields):
    idempotency = Idempotency("ann", key, hashlib.sha256(body).digest()) if key else None
    return Submission(
        specs=specs or [job()],
        actor=actor,
        received_at=RECEIVED,
        idempotency=idempotency,
        render=lambda made: {"ids": [str(each.id) for each in made]},
        **fields,
    )


@pytest.fixture
async def ready(engine):
    """Tenants default, research and research/nlp."""
    await bootstrap(engine)
    async with engine.begin() as conn:
        for path in ("research", "research/nlp"):
            await create_tenant(conn, NewTenant(path), actor=SYSTEM)
    return engine


@pytest.fixture
async def submitter(ready):
    submitter = Submitter(ready)
    await submitter.start()
    yield submitter
    await submitter.close()


async def count(engine, table, *conditions) -> int:
    async with engine.connect() as conn:
        return await conn.scalar(select(func.count()).select_from(table).where(*conditions))


@contextlib.contextmanager
def commits_of(engine):
    seen = []
    hook = lambda _: seen.append(1)  # noqa: E731
    event.listen(engine.sync_engine, "commit", hook)
    yield seen
    event.remove(engine.sync_engine, "commit", hook)


async def test_an_accepted_job_is_there_with_its_event_audit_row_and_wakeup(ready, submitter, database):
    async with Wakeups(database) as wakeups, wakeups.subscribe("queue") as queue:
        await wakeups.wait_listening(10)
        await queue.wait(0)
        accepted = await submitter.submit(submission(job(priority="high", labels={"team": "nlp"}, held=True)))
        assert await queue.wait(5)
    (made,) = accepted.jobs
    async with ready.connect() as conn:
        (row,) = await load_jobs(conn, [made.id])
        kinds = (await conn.execute(select(events.c.kind).where(events.c.job_id == made.id))).scalars().all()
        actions = (
            (await conn.execute(select(audit.c.action).where(audit.c.target == f"job_{made.id.hex}"))).scalars().all()
        )
    assert (kinds, actions) == (["submitted"], ["submit_jobs"])
    assert (row.state, row.priority, row.tenant, row.held) == ("queued", 10, "default", True)
    assert row.received_at == RECEIVED < row.submitted_at == row.queued_at
    same = {name: getattr(made, name) for name in row._fields}
    assert same == dict(row._mapping), "what a submit answers is what a look at the job shows"


async def test_submits_that_come_together_share_a_commit(ready, submitter):
    with commits_of(ready) as commits:
        answers = await asyncio.gather(*(submitter.submit(submission(job(f"j{n}"))) for n in range(200)))
    assert await count(ready, jobs) == 200
    assert len({answer.jobs[0].id for answer in answers}) == 200
    assert len(commits) <= 3


async def test_a_shared_transaction_is_bounded(ready):
    flushed = []
    submitter = Submitter(ready, on_flush=flushed.append)
    await submitter.start()
    try:
        await asyncio.gather(*(submitter.submit(submission(job(f"j{n}"))) for n in range(SHARED_MAX_JOBS + 50)))
        await submitter.submit(submission(*[job()] * (LARGE_JOBS + 1), batch=True))
    finally:
        await submitter.close()
    assert flushed == [SHARED_MAX_JOBS, 50, LARGE_JOBS + 1], "and none is empty"


@pytest.mark.parametrize("large", ["array", "batch"])
async def test_nobody_waits_for_a_large_submit_which_stays_all_or_nothing(ready, submitter, large):
    """It waits itself, for what another transaction holds."""
    (first,) = (await submitter.submit(submission())).jobs
    more = {"after": {"any": [f"job_{first.id.hex}"]}}
    size = LARGE_JOBS + 1
    specs = [job("many", array={"indices": f"0-{size - 1}"}, **more)] if large == "array" else [job(**more)] * size
    async with ready.begin() as conn:
        await lock_jobs(conn, [first.id], held=())
        slow = asyncio.create_task(submitter.submit(submission(*specs, batch=large == "batch")))
        for n in range(3):
            await asyncio.wait_for(submitter.submit(submission(job(f"other-{n}"))), 5)
        assert not slow.done() and await count(ready, jobs) == 4
    with commits_of(ready) as commits:
        await slow
    assert len(commits) == 1 and await count(ready, jobs) == 4 + size


async def test_one_that_is_refused_fails_alone(ready, submitter):
    good, unknown, other = await asyncio.gather(
        submitter.submit(submission(job("good"))),
        submitter.submit(submission(job("bad", tenant="reserch/nlp"))),
        submitter.submit(submission(job("other"))),
        return_exceptions=True,
    )
    assert isinstance(unknown, Invalid)
    assert unknown.errors[0].field == "tenant"
    assert "did you mean research/nlp?" in unknown.detail
    assert not isinstance(good, BaseException) and not isinstance(other, BaseException)
    assert await count(ready, jobs) == 2


async def test_one_that_the_database_refuses_fails_alone_in_its_savepoint(ready, submitter):
    """Text that the job file refuses, put past it."""
    poisoned = job("bad").model_copy(update={"labels": {"a": "nul\0"}})
    answers = await asyncio.gather(
        *(submitter.submit(submission(each, key=each.name)) for each in (job("one"), poisoned, job("two"))),
        return_exceptions=True,
    )
    assert [isinstance(answer, Invalid) for answer in answers] == [False, True, False]
    assert await count(ready, jobs) == 2
    assert await count(ready, idempotency_keys) == 2, "the key of the one that failed may be used again"


async def test_a_batch_is_all_or_nothing_and_its_errors_name_the_job(ready, submitter):
    specs = [job("a"), job("b", tenant="nope"), job("c"), job("d", tenant="nada")]
    with pytest.raises(Invalid) as refused:
        await submitter.submit(submission(*specs, batch=True))
    assert [error.field for error in refused.value.errors] == ["jobs[1].tenant", "jobs[3].tenant"]
    assert await count(ready, jobs) == 0
    accepted = await submitter.submit(submission(*[job(f"j{n}") for n in range(1000)], batch=True))
    assert len(accepted.jobs) == await count(ready, jobs) == await count(ready, events) == 1000


async def test_the_same_key_and_body_get_the_same_answer_once(ready, submitter):
    first = await submitter.submit(submission(key="k", body=b"x"))
    again = await submitter.submit(submission(key="k", body=b"x"))
    assert (first.replayed, again.replayed) == (False, True)
    assert again.response == first.response == {"ids": [str(first.jobs[0].id)]}
    assert await count(ready, jobs) == 1


async def test_the_same_key_at_the_same_time_makes_one_job(ready, submitter):
    second = Submitter(ready)
    await second.start()
    both = [submitter, second]
    answers = await asyncio.gather(*(both[n % 2].submit(submission(key="k", body=b"x")) for n in range(20)))
    await second.close()
    assert len({str(answer.response) for answer in answers}) == 1
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 19
    assert await count(ready, jobs) == 1


async def test_the_same_key_with_another_body_is_a_conflict(ready, submitter):
    await submitter.submit(submission(key="k", body=b"x"))
    with pytest.raises(IdempotencyConflict, match="another body"):
        await submitter.submit(submission(key="k", body=b"y"))
    assert await count(ready, jobs) == 1


async def test_what_was_accepted_is_replayed_even_if_it_would_be_refused_by_now(ready, submitter):
    first = await submitter.submit(submission(job(), key="k"))
    again = await submitter.submit(submission(job(tenant="gone"), key="k"))
    assert again.replayed and again.response == first.response


async def test_a_refused_submit_takes_no_key(ready, submitter):
    with pytest.raises(Invalid):
        await submitter.submit(submission(job(tenant="nope"), key="k"))
    assert not (await submitter.submit(submission(key="k"))).replayed


async def test_another_tenants_name_is_as_unknown_as_one_that_does_not_exist(submitter):
    with pytest.raises(Invalid) as refused:
        await submitter.submit(submission(job(tenant="research"), actor=MEMBER))
    assert "there is no tenant 'research'" in refused.value.detail
    with pytest.raises(Invalid) as typo:
        await submitter.submit(submission(job(tenant="defaul"), actor=MEMBER))
    assert "default" not in typo.value.detail
    (made,) = (await submitter.submit(submission(actor=MEMBER))).jobs
    assert made.tenant == made.spec["tenant"] == "research/nlp", "a job that names no tenant is for the caller's own"


@pytest.fixture
async def with_nodes(ready):
    """Two nodes of 4 h100 and one of 8 a100; the largest has 64 CPUs and 256 GiB."""
    async with ready.begin() as conn:
        cluster = await conn.scalar(select(clusters.c.id))
        for name, gpu_type, gpus, state in (
            ("n0", "h100", 4, "ready"),
            ("n1", "h100", 4, "lost"),
            ("n2", "a100", 8, "lost"),
        ):
            facts = {"cpus": 64, "memory_bytes": 256 << 30, "address": "10.0.0.1", "ray_node_id": name}
            row = {
                "id": new_id(),
                "cluster_id": cluster,
                "name": name,
                "gpu_type": gpu_type,
                "gpus": gpus,
                "state": state,
            }
            await conn.execute(insert(nodes).values(**row, **facts))
    return ready


IMPOSSIBLE = {
    "more GPUs than any node has": ({"gpus_per_replica": 9}, "gpus_per_replica", "largest node has 8"),
    "more than a node of that type has": (
        {"gpus_per_replica": 8, "gpu_types": ["h100"]},
        "gpus_per_replica",
        "largest node has 4",
    ),
    "more CPUs": ({"gpus_per_replica": 1, "cpus_per_replica": 65}, "cpus_per_replica", "largest node has 64"),
    "more memory": ({"gpus_per_replica": 1, "memory_per_gpu": "1TiB"}, "memory_per_replica", "1,024.0 GiB of memory"),
}


@pytest.mark.parametrize("sentence", IMPOSSIBLE)
async def test_what_no_node_could_ever_hold_is_refused(with_nodes, submitter, sentence):
    resources, field, message = IMPOSSIBLE[sentence]
    with pytest.raises(Impossible) as refused:
        await submitter.submit(submission(job(resources=resources)))
    assert refused.value.errors[0].field == f"resources.{field}"
    assert message in refused.value.detail


@pytest.mark.parametrize(
    ("shm", "memory", "said"),
    [("300GiB", None, "the largest node has 256.0 GiB"), ("3GiB", "1GiB", "more than the 2.0 GiB of memory")],
)
async def test_shared_memory_is_memory_of_the_node_and_of_the_job(with_nodes, submitter, shm, memory, said):
    resources = {"replicas": 2, "gpus_per_replica": 1, "memory_per_replica": memory}
    with pytest.raises(Impossible, match=said) as refused:
        await submitter.submit(submission(job(resources=resources, run={"command": "true", "shm": shm})))
    assert refused.value.errors[0].field == "run.shm"


async def test_an_unknown_gpu_type_is_answered_with_the_known_ones(with_nodes, submitter):
    with pytest.raises(Invalid) as refused:
        await submitter.submit(submission(job(resources={"gpus": 1, "gpu_types": ["h1000"]})))
    assert refused.value.errors[0].field == "resources.gpu_types"
    assert "known: a100, h100" in refused.value.detail


@pytest.mark.parametrize(
    "resources",
    [
        {"gpus_per_replica": 8},
        {"gpus_per_replica": 4, "replicas": 10_000, "gpu_types": ["h100"]},
        {"gpus": 1, "gpu_types": ["h100", "b200"]},
        {"gpus": 0, "cpus_per_replica": 64},
    ],
)
async def test_what_could_run_some_day_is_accepted(with_nodes, submitter, resources):
    assert (await submitter.submit(submission(job(resources=resources)))).jobs


async def test_while_no_node_was_ever_seen_everything_is_accepted(submitter):
    assert (await submitter.submit(submission(job(resources={"gpus_per_replica": 512, "gpu_types": ["x"]})))).jobs


async def test_a_larger_node_that_has_just_come_is_seen_at_once(with_nodes, submitter):
    big = job(resources={"gpus_per_replica": 16})
    with pytest.raises(Impossible):
        await submitter.submit(submission(big))
    async with with_nodes.begin() as conn:
        await conn.execute(nodes.update().where(nodes.c.name == "n2").values(gpus=16))
    assert (await submitter.submit(submission(big))).jobs


async def test_code_must_be_uploaded_for_the_tenant_first(ready, submitter):
    digest = "ab" * 32
    wants = job(run={"command": "true", "bundle": digest})
    with pytest.raises(Invalid) as refused:
        await submitter.submit(submission(wants))
    assert refused.value.errors[0].field == "run.bundle"
    assert await save_bundle(ready, "default", digest=digest, size_bytes=10, actor=SYSTEM)
    assert not await save_bundle(ready, "default", digest=digest, size_bytes=10, actor=SYSTEM)
    (made,) = (await submitter.submit(submission(wants))).jobs
    assert made.bundle == digest
    with pytest.raises(Invalid, match="not uploaded for tenant 'research'"):
        await submitter.submit(submission(job(tenant="research", run={"command": "true", "bundle": digest})))


async def test_a_database_that_is_away_fails_the_submits_and_not_the_flusher(ready, submitter, monkeypatch):
    async def away(*_, **__):
        raise ConnectionRefusedError("away")

    with monkeypatch.context() as patch:
        patch.setattr("phalanx_server.actions.submit_jobs.check_jobs", away)
        with pytest.raises(ConnectionRefusedError):
            await submitter.submit(submission())
    assert (await submitter.submit(submission())).jobs


async def test_a_caller_that_gave_up_does_not_disturb_the_others(ready, submitter):
    gone = asyncio.create_task(submitter.submit(submission(job("gone"))))
    stays = asyncio.create_task(submitter.submit(submission(job("stays"))))
    await asyncio.sleep(0)
    gone.cancel()
    assert (await stays).jobs
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_a_submitter_that_is_closed_or_full_says_so(ready, submitter, monkeypatch):
    monkeypatch.setattr("phalanx_server.actions.submit_jobs.WAITING_MAX_JOBS", 1)
    with pytest.raises(Unavailable):
        await submitter.submit(submission(job(), job()))
    await submitter.close()
    with pytest.raises(Unavailable):
        await submitter.submit(submission())


async def test_a_request_time_from_a_clock_ahead_never_makes_a_job_older_than_it_is(ready, submitter):
    ahead = datetime(2940, 1, 1, tzinfo=UTC)
    (made,) = (await submitter.submit(replace(submission(), received_at=ahead))).jobs
    assert made.submitted_at == ahead
