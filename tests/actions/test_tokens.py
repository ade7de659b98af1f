"""Tokens, clusters and the first run."""

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from phalanx_server.actions.bootstrap import bootstrap
from phalanx_server.actions.create_cluster import create_cluster
from phalanx_server.actions.create_tenant import NewTenant, create_tenant
from phalanx_server.actions.create_token import NewToken, create_token
from phalanx_server.actions.idempotency import Idempotency, once
from phalanx_server.actions.revoke_token import revoke_token
from phalanx_server.domain.access import SYSTEM, Actor, Role, covers, may_mint
from phalanx_server.domain.errors import Conflict, Forbidden, IdempotencyConflict, Invalid, NotFound
from phalanx_server.store import ids
from phalanx_server.store.credentials import load_credential
from phalanx_server.store.schema import idempotency_keys, tokens, users
from phalanx_server.store.tokens import list_tokens
from sqlalchemy import func, select, text

NOW = datetime(2026, 11, 21, tzinfo=UTC)
MANAGER = Actor("mo", "manager", tenant="research")


@pytest.fixture
async def first(engine):
    return await bootstrap(engine)


@pytest.fixture
async def ready(engine, first):
    async with engine.begin() as conn:
        for path in ("research", "research/nlp"):
            await create_tenant(conn, NewTenant(path), actor=SYSTEM)
    return engine


async def create(engine, actor=SYSTEM, **fields):
    async with engine.begin() as conn:
        return await create_token(conn, NewToken(**{"name": "t", **fields}), actor=actor, now=NOW)


async def credential(engine, text):
    _, digits, secret = text.split("_", 2)
    async with engine.connect() as conn:
        found = await load_credential(conn, ids.parse("token", f"tok_{digits}"))
    assert found is not None and found.hash == hashlib.sha256(secret.encode()).digest()
    return found


async def test_the_first_run_makes_what_is_needed_once(engine, first):
    admin = await credential(engine, first.admin_token)
    cluster = await credential(engine, first.cluster_token)
    assert (admin.role, admin.user, admin.tenant) == ("admin", "admin", None)
    assert (cluster.role, cluster.kind, cluster.cluster) == ("cluster", "cluster", "main")
    assert await bootstrap(engine) is None


async def test_of_two_first_runs_at_once_one_makes_it(engine):
    made = await asyncio.gather(bootstrap(engine), bootstrap(engine), bootstrap(engine))
    assert sum(each is not None for each in made) == 1


async def test_a_token_stands_for_its_role_tenant_and_user(ready):
    made = await create(ready, role="member", tenant="research/nlp", user="ann", expires_in_s=3600)
    found = await credential(ready, made.text)
    assert (found.role, found.tenant, found.user, found.kind) == ("member", "research/nlp", "ann", "user")
    assert found.expires_at == made.expires_at == NOW + timedelta(hours=1)
    await create(ready, role="viewer", tenant="research", user="ann")
    async with ready.connect() as conn:
        assert await conn.scalar(select(func.count()).select_from(users).where(users.c.name == "ann")) == 1


async def test_no_secret_is_stored_anywhere(ready):
    made = await create(ready, role="admin")
    secret = made.text.split("_", 2)[2]
    async with ready.connect() as conn:
        for table in ("tokens", "audit", "events", "idempotency_keys", "outbox", "users"):
            rows = (await conn.execute(text(f"SELECT t::text FROM {table} t"))).scalars().all()
            assert not any(secret in row for row in rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "root"},
        {"role": "node", "cluster": "main"},
        {"role": "member"},
        {"role": "admin", "tenant": "research"},
        {"role": "member", "tenant": "nope"},
        {"role": "cluster"},
        {"role": "cluster", "cluster": "nope"},
        {"role": "admin", "cluster": "main"},
        {"role": "admin", "expires_in_s": 0},
        {"role": "admin", "expires_in_s": -5},
        {"role": "admin", "expires_in_s": float("inf")},
        {"role": "admin", "expires_in_s": float("nan")},
        {"role": "admin", "name": ""},
        {"role": "admin", "name": "x" * 129},
        {"role": "admin", "name": "nul\0"},
        {"role": "admin", "user": " "},
    ],
)
async def test_what_cannot_be_is_refused(ready, fields):
    with pytest.raises(Invalid):
        await create(ready, **fields)


async def test_a_manager_makes_tokens_for_their_own_subtree_only(ready):
    assert await create(ready, actor=MANAGER, role="manager", tenant="research/nlp")
    for fields in ({"role": "admin"}, {"role": "member", "tenant": "default"}, {"role": "cluster", "cluster": "main"}):
        with pytest.raises(Forbidden):
            await create(ready, actor=MANAGER, **fields)


async def test_a_manager_cannot_make_tokens_in_the_name_of_others(ready):
    """Audit rows and `created_by` go by the user's name."""
    await create(ready, role="member", tenant="default", user="dora")
    await create(ready, role="member", tenant="research/nlp", user="nell")
    member = {"actor": MANAGER, "role": "member", "tenant": "research"}
    for taken in ("admin", "dora"):
        with pytest.raises(Forbidden, match=taken):
            await create(ready, **member, user=taken)
    for own in ("nell", "new"):
        assert await create(ready, **member, user=own)
    assert await create(ready, role="member", tenant="research", user="admin")


def test_nobody_makes_a_token_that_allows_more_than_their_own():
    for role in Role:
        actor = Actor("x", role, tenant="research" if role in ("manager", "member", "viewer") else None)
        mintable = {to for to in Role if may_mint(actor, role=to, tenant="research/nlp")}
        expected = {"admin": set(Role) - {Role.NODE}, "manager": {Role.MANAGER, Role.MEMBER, Role.VIEWER}}
        assert mintable == expected.get(role, set())


@pytest.mark.parametrize(
    ("own", "path", "reached"),
    [
        (None, "any", True),
        ("a", "a", True),
        ("a", "a/b/c", True),
        ("a/b", "a", False),
        ("a", "ab", False),
        ("a", "b", False),
    ],
)
def test_roles_go_down_the_tree_and_never_up(own, path, reached):
    assert covers(own, path) is reached


async def test_revoking_is_for_good_and_twice_is_harmless(ready):
    made = await create(ready, role="member", tenant="research")
    await revoke_token(ready, made.id, actor=MANAGER, now=NOW)
    await revoke_token(ready, made.id, actor=MANAGER, now=NOW + timedelta(hours=1))
    assert (await credential(ready, made.text)).revoked_at == NOW


async def test_tokens_of_others_are_not_found(ready):
    made = await create(ready, role="admin")
    for token_id in (made.id, ids.new_id()):
        with pytest.raises(NotFound):
            await revoke_token(ready, token_id, actor=MANAGER, now=NOW)


async def test_tokens_are_listed_newest_first_within_the_callers_subtree(ready):
    made = [await create(ready, role="viewer", tenant=path) for path in ("research", "research/nlp", "default")]
    async with ready.connect() as conn:
        mine = await list_tokens(conn, within="research", after=None, limit=10)
        rest = await list_tokens(conn, within="research", after=mine[0].id, limit=10)
        everything = await list_tokens(conn, within=None, after=None, limit=10)
    assert [row.id for row in mine] == [made[1].id, made[0].id]
    assert [row.id for row in rest] == [made[0].id]
    assert len(everything) == 5
    assert "hash" not in mine[0]._fields


async def test_a_cluster_comes_with_its_token_and_its_name_is_its_own(ready):
    async with ready.begin() as conn:
        made = await create_cluster(conn, "site-b", actor=SYSTEM, now=NOW)
    assert (await credential(ready, made.token)).cluster == "site-b"
    for name, error in (("site-b", Conflict), ("Site B", Invalid)):
        with pytest.raises(error):
            async with ready.begin() as conn:
                await create_cluster(conn, name, actor=SYSTEM, now=NOW)


async def test_a_create_under_a_key_is_done_once_and_its_secret_shown_once(ready):
    key = Idempotency("admin tokens", "k", b"body")

    async def work(conn):
        made = await create_token(conn, NewToken(name="t", role="admin"), actor=SYSTEM, now=NOW)
        return {"id": str(made.id), "token": made.text}

    answers = await asyncio.gather(*(once(ready, key, work, secrets=["token"]) for _ in range(4)))
    assert sorted(each.replayed for each in answers) == [False, True, True, True]
    assert len({each.response["id"] for each in answers}) == 1
    assert [each.response["token"] is not None for each in answers].count(True) == 1
    async with ready.connect() as conn:
        assert await conn.scalar(select(func.count()).select_from(tokens).where(tokens.c.name == "t")) == 1
        assert (await conn.scalar(select(idempotency_keys.c.response)))["token"] is None
    with pytest.raises(IdempotencyConflict):
        await once(ready, Idempotency("admin tokens", "k", b"other"), work)


async def test_a_create_that_fails_keeps_no_key(ready):
    key = Idempotency("x", "k", b"body")

    async def fails(conn):
        raise Conflict("not now")

    async def works(conn):
        return {"ok": True}

    with pytest.raises(Conflict):
        await once(ready, key, fails)
    assert not (await once(ready, key, works)).replayed
