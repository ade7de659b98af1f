"""The first run: a root tenant, a cluster, and the first tokens, made once and never again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.create_cluster import create_cluster
from phalanx_server.actions.create_tenant import NewTenant, create_tenant
from phalanx_server.actions.create_token import NewToken, create_token
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.tenant import ROOT
from phalanx_server.store.tenants import all_paths
from phalanx_server.store.tokens import Minted, mint

CLUSTER = "main"
_LOCK = text("LOCK TABLE tenants IN SHARE ROW EXCLUSIVE MODE")


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Made before the database, by whoever installs: a chart that has to have them as Secrets."""

    admin: Minted
    cluster: Minted

    @classmethod
    def make(cls) -> FirstTokens:
        return cls(mint(), mint())


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    """Shown once, and stored nowhere but as hashes."""

    admin_token: str
    cluster_token: str


async def bootstrap(engine: AsyncEngine, first: FirstTokens | None = None) -> Bootstrapped | None:
    """Tenant `default`, cluster `main`, an admin token and the cluster's; None where there are tenants already."""
    first = first or FirstTokens.make()
    now = datetime.now(UTC)
    async with engine.begin() as conn:
        await conn.execute(_LOCK)
        if await all_paths(conn):
            return None
        await create_tenant(conn, NewTenant(ROOT), actor=SYSTEM)
        wanted = NewToken(name="first admin", role="admin", user="admin")
        admin = await create_token(conn, wanted, actor=SYSTEM, now=now, minted=first.admin)
        cluster = await create_cluster(conn, CLUSTER, actor=SYSTEM, now=now, minted=first.cluster)
    return Bootstrapped(admin.text, cluster.token)
