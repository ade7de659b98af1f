"""Who is calling: bearer tokens, and what their roles allow.

Owns verification (constant time, cached for a few seconds) and the meaning of roles. Refuses to know resources: a route
says which role it needs, and asks `sees` for what the caller may look at.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.api.errors import Problem
from phalanx_server.domain.access import Actor, covers
from phalanx_server.store import ids
from phalanx_server.store.credentials import Credential, load_credential

_REALM = 'Bearer realm="phalanx"'
_CACHE_ENTRIES = 4096

# What a route needs -> the roles that may. Within a tenant's roles, only in their own subtree (`Principal.sees`).
ALLOWED: dict[str, frozenset[str]] = {
    "look": frozenset({"admin", "operator", "manager", "member", "viewer"}),
    "submit": frozenset({"admin", "manager", "member"}),
    "steer": frozenset({"admin", "operator", "manager", "member"}),  # cancel, hold and release jobs
    "operate": frozenset({"admin", "operator"}),  # nodes, server metrics, plans of given snapshots
    "manage": frozenset({"admin", "manager"}),  # tenants below one's own, and tokens for them
    "administer": frozenset({"admin"}),  # quotas, weights, clusters
    "agent": frozenset({"cluster"}),
    "node": frozenset({"node"}),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of one request, from its token."""

    credential: Credential
    request_id: str = ""

    @property
    def role(self) -> str:
        return self.credential.role

    @property
    def name(self) -> str:
        """How audit rows and `created_by` name the caller. Whoever makes a token chooses its name: it is never taken
        for a user's."""
        return self.credential.user or f"{self.credential.name} (token)"

    @property
    def actor(self) -> Actor:
        """The caller as actions know one."""
        token = self.credential
        return Actor(self.name, token.role, token_id=token.id.hex, tenant=token.tenant, request_id=self.request_id)

    @property
    def tenant(self) -> str | None:
        """Path of the tenant that the caller is confined to; None = sees all."""
        return self.credential.tenant

    def may(self, need: str) -> bool:
        """Whether the role allows `need`, a key of ALLOWED."""
        return self.credential.role in ALLOWED[need]

    def sees(self, tenant: str) -> bool:
        """Whether the caller may know of this tenant: roles are inherited down the tree, never up."""
        return covers(self.credential.tenant, tenant)


class Authenticator:
    """Verifies tokens. A verified one is trusted for `cache_s` without a query: that long a revoked one still works."""

    def __init__(self, engine: AsyncEngine, *, cache_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._cache_s = cache_s
        self._clock = clock
        self._trusted: dict[bytes, tuple[Credential, float]] = {}

    async def credential(self, authorization: str | None, *, engine: AsyncEngine | None = None) -> Credential:
        """What an Authorization header proves; `engine` is asked instead of the one for users' requests. Raises Problem
        401 `unauthorized` or `token_expired`."""
        text = _bearer(authorization)
        digest = hashlib.sha256(text.encode()).digest()
        trusted = self._trusted.get(digest)
        if trusted is None or trusted[1] < self._clock():
            credential = await self._verify(text, engine or self._engine)
            self._trust(digest, credential)
        else:
            credential = trusted[0]
        expires_at = credential.expires_at
        if expires_at is not None and expires_at <= datetime.now(UTC):
            raise _refused("token_expired", f"The token expired at {expires_at.isoformat(timespec='seconds')}.")
        return credential

    @property
    def trusted(self) -> int:
        """Tokens in the cache, of at most `trusted_limit`."""
        return len(self._trusted)

    @property
    def trusted_limit(self) -> int:
        return _CACHE_ENTRIES

    async def still_valid(self, credential: Credential) -> bool:
        """Whether a verified token works even now: for what outlives its request. Asks the database."""
        async with self._engine.connect() as conn:
            found = await load_credential(conn, credential.id)
        if found is None or found.revoked_at is not None:
            return False
        return found.expires_at is None or found.expires_at > datetime.now(UTC)

    async def _verify(self, text: str, engine: AsyncEngine) -> Credential:
        token_id, secret = _split(text)
        async with engine.connect() as conn:
            credential = await load_credential(conn, token_id)
        given = hashlib.sha256(secret.encode()).digest()
        stored = credential.hash if credential else b"\0" * len(given)
        if not hmac.compare_digest(given, stored) or credential is None:
            raise _unknown()
        if credential.revoked_at is not None:
            raise _refused("unauthorized", "The token has been revoked.")
        return credential

    def _trust(self, digest: bytes, credential: Credential) -> None:
        if len(self._trusted) >= _CACHE_ENTRIES:
            self._trusted.clear()
        self._trusted[digest] = (credential, self._clock() + self._cache_s)

    def forget(self, token_id: UUID) -> None:
        """Trust a token no more in this process, at once (it was revoked here)."""
        self._trusted = {key: item for key, item in self._trusted.items() if item[0].id != token_id}


def _bearer(authorization: str | None) -> str:
    scheme, _, text = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise Problem(
            "unauthorized",
            "Send a token: `Authorization: Bearer phx_…`.",
            headers={"WWW-Authenticate": _REALM},
        )
    return text.strip()


def _split(text: str) -> tuple[UUID, str]:
    """`phx_<id>_<secret>` as id and secret; the secret may itself hold underscores."""
    brand, _, rest = text.partition("_")
    digits, _, secret = rest.partition("_")
    try:
        token_id = ids.parse("token", f"tok_{digits}")
    except ValueError as error:
        raise _unknown() from error
    if brand != "phx" or not secret:
        raise _unknown()
    return token_id, secret


def _unknown() -> Problem:
    return _refused("unauthorized", "The token is not one of this server's.")


def _refused(code: str, detail: str) -> Problem:
    headers = {"WWW-Authenticate": f'{_REALM}, error="invalid_token", error_description="{detail}"'}
    return Problem(code, detail, headers=headers)
