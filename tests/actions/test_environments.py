"""Registered environments: made once, never changed, and copied into the jobs that name them."""

import asyncio
import contextlib
from datetime import UTC, datetime

import pytest
from phalanx_server.actions.bootstrap import bootstrap
from phalanx_server.actions.create_environment import NewEnvironment, create_environment
from phalanx_server.actions.create_tenant import NewTenant, create_tenant
from phalanx_server.actions.delete_environment import delete_environment
from phalanx_server.actions.submit_jobs import Submission, Submitter
from phalanx_server.domain.access import SYSTEM, Actor
from phalanx_server.domain.errors import Conflict, Forbidden, Invalid, NotFound
from phalanx_server.domain.spec import parse_job
from phalanx_server.store.ids import new_id
from phalanx_server.store.schema import audit, jobs
from sqlalchemy import event, select

NLP = ("einops==0.8.1", "tiktoken>=0.9")
MANAGER = Actor("mo", "manager", tenant="research")


@pytest.fixture
async def ready(engine):
    """Tenants default, research, research/nlp, research/nlp/chat and vision."""
    await bootstrap(engine)
    async with engine.begin() as conn:
        for path in ("research", "research/nlp", "research/nlp/chat", "vision"):
            await create_tenant(conn, NewTenant(path), actor=SYSTEM)
    return engine


async def register(engine, requirements=NLP, tenant: str | None = "research", actor=SYSTEM):
    async with engine.begin() as conn:
        return await create_environment(conn, NewEnvironment("nlp", requirements, tenant), actor=actor)


@pytest.fixture
async def submit(ready):
    submitter = Submitter(ready)
    await submitter.start()

    async def send(*environments, tenant="research/nlp", actor=SYSTEM, **options):
        documents = [
            {
                "name": "a",
                "tenant": tenant,
                "resources": {"gpus": 1},
                "run": {"command": "x", **({"environment": each} if each else {})},
            }
            for each in environments
        ]
        specs = [parse_job(document) for document in documents]
        submission = Submission(specs=specs, actor=actor, received_at=datetime.now(UTC), **options)
        return [job.spec for job in (await submitter.submit(submission)).jobs]

    yield send
    await submitter.close()


@contextlib.contextmanager
def statements_of(engine):
    seen = []

    def note(_conn, _cursor, statement, *_rest):
        seen.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine.sync_engine, "before_cursor_execute", note)


# ------------------------------------------------------------------ registered


async def test_an_environment_is_made_with_its_audit_row(ready):
    made = await register(ready, requirements=["einops==0.8.1  # shapes", "", "einops==0.8.1"], actor=MANAGER)
    async with ready.connect() as conn:
        row = (await conn.execute(select(audit).where(audit.c.action == "create_environment"))).one()
    assert (row.actor, row.target) == ("mo", f"env_{made.hex}")
    assert row.detail == {"name": "nlp", "tenant": "research", "requirements": 1}


async def test_a_name_is_taken_once_in_each_tenant(ready):
    await register(ready)
    with pytest.raises(Conflict, match="tenant research has an environment nlp already, and environments never change"):
        await register(ready, requirements=["other"])
    await register(ready, tenant="research/nlp")


async def test_of_two_that_take_a_name_at_once_one_is_told_of_the_conflict(ready):
    answers = await asyncio.gather(*(register(ready) for _ in range(2)), return_exceptions=True)
    assert sorted(isinstance(answer, Conflict) for answer in answers) == [False, True]


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"requirements": ["-r x.txt"]}, "requirements", "option that is not taken"),
        ({"requirements": ["# nothing"]}, "requirements", "name no package"),
        ({"tenant": "reserch"}, "tenant", "did you mean research?"),
        ({"tenant": "vision", "actor": MANAGER}, "tenant", "no tenant 'vision'"),
    ],
)
async def test_what_cannot_be_is_refused(ready, fields, field, said):
    with pytest.raises(Invalid) as refused:
        await register(ready, **fields)
    assert refused.value.errors[0].field == field and said in refused.value.detail


async def test_the_tenant_is_the_callers_own_unless_said(ready, submit):
    await register(ready, tenant=None, actor=MANAGER)
    (spec,) = await submit({"name": "nlp"}, tenant="research")
    assert spec["run"]["environment"]["requirements"] == list(NLP)


async def test_deleting_harms_no_job(ready, submit):
    made = await register(ready)
    await submit({"name": "nlp"})
    await delete_environment(ready, made, actor=MANAGER)
    async with ready.connect() as conn:
        spec = (await conn.execute(select(jobs.c.spec))).scalar_one()
        audited = (await conn.execute(select(audit).where(audit.c.action == "delete_environment"))).one()
    assert spec["run"]["environment"] == {"name": "nlp", "requirements": list(NLP), "image": None}
    assert (audited.target, audited.detail) == (f"env_{made.hex}", {"name": "nlp", "tenant": "research"})
    with pytest.raises(NotFound):
        await delete_environment(ready, made, actor=MANAGER)


async def test_only_who_manages_the_tenant_deletes(ready):
    made = await register(ready)
    with pytest.raises(Forbidden, match="nlp belongs to research, above research/nlp"):
        await delete_environment(ready, made, actor=Actor("ann", "manager", tenant="research/nlp"))
    with pytest.raises(NotFound):
        await delete_environment(ready, made, actor=Actor("vic", "manager", tenant="vision"))
    with pytest.raises(NotFound):
        await delete_environment(ready, new_id(), actor=SYSTEM)


# ------------------------------------------------------------------ named by jobs


async def test_a_job_gets_the_requirements_of_the_nearest_one(ready, submit):
    await register(ready, requirements=["above"], tenant="research")
    await register(ready, requirements=["nearest"], tenant="research/nlp")
    for tenant, expected in [("research/nlp/chat", "nearest"), ("research/nlp", "nearest"), ("research", "above")]:
        (spec,) = await submit({"name": "nlp"}, tenant=tenant)
        assert spec["run"]["environment"]["requirements"] == [expected]


async def test_what_is_stored_is_a_job_file_that_reads_back_and_can_be_submitted_again(ready, submit):
    await register(ready)
    (spec,) = await submit({"name": "nlp"})
    assert parse_job(spec).dump() == spec
    (again,) = await submit(spec["run"]["environment"])
    assert again["run"]["environment"] == spec["run"]["environment"]


async def test_requirements_that_contradict_the_name_are_refused(ready, submit):
    await register(ready)
    with pytest.raises(Invalid, match="contradict the environment 'nlp'") as refused:
        await submit({"name": "nlp", "requirements": ["einops"]})
    assert refused.value.errors[0].field == "run.environment.requirements"


async def test_an_unknown_name_is_refused_with_what_to_do(ready, submit):
    await register(ready)
    with pytest.raises(Invalid) as refused:
        await submit(None, {"name": "nlpp"}, batch=True)
    (error,) = refused.value.errors
    assert error.field == "jobs[1].run.environment.name" and "no environment 'nlpp'" in error.message
    assert (error.hint or "").startswith("did you mean nlp? If not, register it with: phalanx environment create nlpp")


async def test_another_tenants_environment_is_unknown_and_not_even_hinted_at(ready, submit):
    await register(ready, tenant="vision")
    await register(ready, tenant="research/nlp")
    for tenant in ("research", "default"):
        with pytest.raises(Invalid) as refused:
            await submit({"name": "nlp"}, tenant=tenant)
        assert "did you mean" not in refused.value.detail
    with pytest.raises(Invalid, match="no tenant 'vision'") as refused:
        await submit({"name": "nlp"}, tenant="vision", actor=MANAGER)
    assert [error.field for error in refused.value.errors] == ["tenant"]


async def test_names_cost_one_query_for_all_jobs_and_none_without(ready, submit):
    await register(ready)
    await submit(None)
    with statements_of(ready) as plain:
        await submit(None, {"requirements": ["einops"]}, batch=True)
    with statements_of(ready) as named:
        await submit(*[{"name": "nlp"}] * 50, None, batch=True)
    assert len(named) == len(plain) + 1
    assert not any("environments" in statement for statement in plain)
