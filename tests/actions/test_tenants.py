"""Tenants and quotas: the tree holds together, and changes rest on what the caller saw."""

import asyncio

import pytest
from phalanx_server.actions.bootstrap import bootstrap
from phalanx_server.actions.create_tenant import NewTenant, create_tenant
from phalanx_server.actions.set_quotas import set_quotas
from phalanx_server.actions.update_tenant import update_tenant
from phalanx_server.domain.access import SYSTEM, Actor
from phalanx_server.domain.errors import Conflict, EtagMismatch, Invalid, NotFound
from phalanx_server.domain.tenant import QuotaLimits
from phalanx_server.store.schema import audit
from phalanx_server.store.tenant_views import load_tenant
from sqlalchemy import select


@pytest.fixture
async def ready(engine):
    await bootstrap(engine)
    return engine


async def create(engine, path, actor=SYSTEM, **fields):
    async with engine.begin() as conn:
        return await create_tenant(conn, NewTenant(path, **fields), actor=actor)


async def load(engine, path):
    async with engine.connect() as conn:
        return await load_tenant(conn, path)


async def test_a_tenant_is_made_below_its_parent(ready):
    await create(ready, "research")
    await create(ready, "research/nlp", weight=2.0, preemption={"reclaim": "never"})
    tenant = await load(ready, "research/nlp")
    assert (tenant.parent, tenant.weight, tenant.version) == ("research", 2.0, 1)
    assert tenant.preemption == {"reclaim": "never"}


async def test_each_tenant_has_a_unix_user_of_its_own(ready):
    await create(ready, "a")
    await create(ready, "b")
    async with ready.connect() as conn:
        uids = (await conn.exec_driver_sql("SELECT uid FROM tenants")).scalars().all()
    assert len(set(uids)) == 3 and min(uids) >= 71000


async def test_the_parent_must_exist(ready):
    await create(ready, "research")
    with pytest.raises(Invalid, match=r"no tenant 'reserch' above it; did you mean research\?"):
        await create(ready, "reserch/nlp")


async def test_a_tenant_that_exists_is_a_conflict(ready):
    with pytest.raises(Conflict, match="exists already"):
        await create(ready, "default")


async def somebody_waits(engine):
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with engine.connect() as conn:
        return (await conn.exec_driver_sql(query)).scalar_one() > 0


async def test_of_two_that_make_one_tenant_at_once_one_is_told_of_the_conflict(ready):
    async with asyncio.timeout(20), ready.begin() as first:
        await create_tenant(first, NewTenant("research"), actor=SYSTEM)
        second = asyncio.create_task(create(ready, "research"))
        while not await somebody_waits(ready):  # noqa: ASYNC110 - the database has no event for it
            await asyncio.sleep(0.01)
    with pytest.raises(Conflict, match="exists already"):
        await second


@pytest.mark.parametrize(
    "limits", [{"h100": QuotaLimits(-1)}, {"h 100": QuotaLimits(1)}, {"h": QuotaLimits(1, 1 << 60)}]
)
async def test_quotas_that_cannot_be_are_refused(ready, limits):
    with pytest.raises(Invalid):
        await set_quotas(ready, "default", limits, if_version=1, actor=SYSTEM)
    assert (await load(ready, "default")).quotas == {}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("A", {}),
        ("a/", {}),
        ("a b", {}),
        ("x" * 300, {}),
        ("/".join("a" * 17), {}),
        ("ok", {"weight": -1}),
        ("ok", {"weight": float("nan")}),
        ("ok", {"preemption": {"reclaim": "sometimes"}}),
        ("ok", {"preemption": {"reklaim": "any"}}),
    ],
)
async def test_what_cannot_be_is_refused(ready, path, fields):
    with pytest.raises(Invalid):
        await create(ready, path, **fields)
    assert await load(ready, "ok") is None


async def test_a_manager_makes_tenants_below_their_own_only(ready):
    await create(ready, "research")
    await create(ready, "eng")
    manager = Actor("mo", "manager", tenant="research")
    await create(ready, "research/nlp", actor=manager)
    with pytest.raises(Invalid, match="no tenant 'eng'"):
        await create(ready, "eng/web", actor=manager)


async def test_quotas_are_replaced_as_a_whole_and_the_version_moves_by_one(ready):
    first = {"h100": QuotaLimits(8), "cpu": QuotaLimits(64, 0, 0)}
    assert await set_quotas(ready, "default", first, if_version=1, actor=SYSTEM) == 2
    assert await set_quotas(ready, "default", {"h100": QuotaLimits(4)}, if_version=2, actor=SYSTEM) == 3
    tenant = await load(ready, "default")
    assert (set(tenant.quotas), tenant.quotas["h100"]["nominal"], tenant.version) == ({"h100"}, 4, 3)
    async with ready.connect() as conn:
        rows = (await conn.execute(select(audit.c.detail).where(audit.c.action == "set_quotas"))).scalars().all()
    assert rows[-1] == {"h100": {"nominal": 4, "borrowing_limit": None, "lending_limit": None}}


async def test_a_change_that_rests_on_an_old_look_is_refused(ready):
    await set_quotas(ready, "default", {}, if_version=1, actor=SYSTEM)
    with pytest.raises(EtagMismatch, match="version 2, not 1"):
        await set_quotas(ready, "default", {"h100": QuotaLimits(1)}, if_version=1, actor=SYSTEM)
    with pytest.raises(EtagMismatch):
        await update_tenant(ready, "default", if_version=1, weight=3, actor=SYSTEM)


async def test_of_two_changes_at_once_one_wins(ready):
    limits = [{"h100": QuotaLimits(n)} for n in range(2)]
    changes = (set_quotas(ready, "default", each, if_version=1, actor=SYSTEM) for each in limits)
    answers = await asyncio.gather(*changes, return_exceptions=True)
    assert sorted(isinstance(answer, EtagMismatch) for answer in answers) == [False, True]


async def test_weight_and_preemption_change_and_what_is_not_named_stays(ready):
    assert await update_tenant(ready, "default", if_version=1, weight=0.5, actor=SYSTEM) == 2
    assert await update_tenant(ready, "default", if_version=2, preemption={"reclaim": "never"}, actor=SYSTEM) == 3
    tenant = await load(ready, "default")
    assert (tenant.weight, tenant.preemption) == (0.5, {"reclaim": "never"})


async def test_a_tenant_that_does_not_exist_is_not_found(ready):
    with pytest.raises(NotFound):
        await set_quotas(ready, "nope", {}, if_version=1, actor=SYSTEM)
