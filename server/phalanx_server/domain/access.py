"""Who acts, and how far a role reaches.

Owns the roles and their inheritance down the tenant tree. Refuses to know tokens, and how anybody proved who they are.
"""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """`admin` and `operator` reach everywhere; `manager`, `member`, `viewer` have a tenant and reach its subtree."""

    ADMIN = "admin"
    OPERATOR = "operator"
    MANAGER = "manager"
    MEMBER = "member"
    VIEWER = "viewer"
    CLUSTER = "cluster"
    NODE = "node"


TENANT_ROLES = frozenset({Role.MANAGER, Role.MEMBER, Role.VIEWER})
MACHINE_ROLES = frozenset({Role.CLUSTER, Role.NODE})

# Which roles a caller may hand out: nobody can make a token that allows more than their own.
MINTABLE: dict[Role, frozenset[Role]] = {
    Role.ADMIN: frozenset(Role) - {Role.NODE},
    Role.MANAGER: TENANT_ROLES,
}


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something, for the audit. `tenant` None = reaches every tenant; `token_id` is 32 hex digits."""

    name: str
    role: str = Role.ADMIN
    token_id: str | None = None
    tenant: str | None = None
    request_id: str | None = None

    def reaches(self, tenant: str) -> bool:
        """Whether the actor's role holds for `tenant`."""
        return covers(self.tenant, tenant)


SYSTEM = Actor("phalanx")


def covers(own: str | None, path: str) -> bool:
    """Whether `path` lies in the subtree of tenant `own` (None = the whole tree). Roles go down the tree, never up."""
    return own is None or path == own or path.startswith(own + "/")


def in_line(own: str | None, path: str) -> bool:
    """Whether tenant `path` is in the subtree of tenant `own`, or above it: what is inherited is seen from below."""
    return covers(own, path) or (own is not None and covers(path, own))


def may_mint(actor: Actor, *, role: str, tenant: str | None) -> bool:
    """Whether `actor` may make a token of `role` for `tenant`."""
    allowed = MINTABLE.get(Role(actor.role), frozenset())
    return role in allowed and (actor.tenant is None or (tenant is not None and actor.reaches(tenant)))
