"""Declares maintenance windows, and changes those that are not over. The next pass follows.

Owns what a window may say: nodes that exist, labels that some node has, times that make sense. What becomes of jobs a
pass decides: what would run into a window does not start, and what still runs when it begins is stopped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import Conflict, FieldError, Invalid, NotFound
from phalanx_server.domain.maintenance import WindowState, check_times, state_at
from phalanx_server.domain.tenant import nearest
from phalanx_server.store import ids
from phalanx_server.store import maintenance as windows
from phalanx_server.store.audit import record_audit
from phalanx_server.store.wakeups import notify

TOLD_MAX = 20
"""Of so many names that are no node's each is told by itself."""
HINTED_MAX = 3
"""For so many of them what is near is sought, among all nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedWindow:
    """What somebody asks for. `nodes` are names or ids; a window covers them and the nodes with all of `labels`."""

    starts_at: datetime
    ends_at: datetime
    nodes: Sequence[str] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


async def declare_maintenance(conn: AsyncConnection, wanted: WantedWindow, *, actor: Actor, now: datetime) -> UUID:
    """The new window's id. Raises Invalid, which names every field that cannot be."""
    errors = check_times(now, starts_at=wanted.starts_at, ends_at=wanted.ends_at)
    node_ids = await _nodes(conn, wanted.nodes, errors)
    await _check_cover(conn, wanted.nodes, wanted.labels, errors)
    if errors:
        raise Invalid.fields(errors)
    row = windows.WindowRow(
        id=ids.new_id(),
        nodes=node_ids,
        labels=wanted.labels,
        starts_at=wanted.starts_at,
        ends_at=wanted.ends_at,
        reason=wanted.reason,
        created_by=actor.name,
    )
    await windows.insert_window(conn, row)
    said = {
        "nodes": list(wanted.nodes),
        "labels": dict(wanted.labels),
        "starts_at": wanted.starts_at,
        "ends_at": wanted.ends_at,
        "reason": wanted.reason,
    }
    await _tell(conn, actor, "create_maintenance", row.id, said)
    return row.id


async def change_maintenance(
    engine: AsyncEngine, window_id: UUID, changes: Mapping[str, Any], *, actor: Actor, now: datetime
) -> None:
    """Change fields of a `WantedWindow`; the others stay. Raises NotFound, Invalid, and Conflict for one that is
    over."""
    async with engine.begin() as conn:
        row = await lock_open_window(conn, window_id, now=now)
        values = dict(changes)
        times = {name: values.get(name, getattr(row, name)) for name in ("starts_at", "ends_at")}
        errors = check_times(now, **times)
        if "nodes" in values:
            values["nodes"] = await _nodes(conn, values["nodes"], errors)
        nodes, labels = (values.get(name, getattr(row, name)) for name in ("nodes", "labels"))
        if "nodes" in changes or "labels" in changes:
            await _check_cover(conn, changes.get("nodes", nodes), labels, errors)
        if errors:
            raise Invalid.fields(errors)
        if values:
            await windows.update_window(conn, window_id, values)
            await _tell(conn, actor, "change_maintenance", window_id, changes)


async def end_maintenance(engine: AsyncEngine, window_id: UUID, *, actor: Actor, now: datetime) -> None:
    """End an open window now. Raises NotFound, and Conflict for one that has not begun or is over."""
    async with engine.begin() as conn:
        row = await lock_open_window(conn, window_id, now=now)
        if row.starts_at >= now:
            raise Conflict("the window has not begun, so it cannot be ended: delete it instead")
        await windows.update_window(conn, window_id, {"ends_at": now})
        await _tell(conn, actor, "end_maintenance", window_id, {"ends_at": row.ends_at})


async def delete_maintenance(engine: AsyncEngine, window_id: UUID, *, actor: Actor) -> None:
    """Delete a window, in whatever state. Raises NotFound."""
    async with engine.begin() as conn:
        row = await windows.lock_window(conn, window_id)
        if row is None:
            raise _unknown(window_id)
        await windows.delete_window(conn, window_id)
        said = {"starts_at": row.starts_at, "ends_at": row.ends_at, "reason": row.reason}
        await _tell(conn, actor, "delete_maintenance", window_id, said)


async def lock_open_window(conn: AsyncConnection, window_id: UUID, *, now: datetime) -> Any:
    """A window that is not over, locked. Raises NotFound and Conflict."""
    row = await windows.lock_window(conn, window_id)
    if row is None:
        raise _unknown(window_id)
    if state_at(now, starts_at=row.starts_at, ends_at=row.ends_at) is WindowState.OVER:
        raise Conflict(f"the window was over at {row.ends_at:%Y-%m-%dT%H:%M:%SZ}: declare a new one")
    return row


def _unknown(window_id: UUID) -> NotFound:
    return NotFound(f"there is no maintenance window {ids.encode('maintenance', window_id)}")


async def _tell(conn: AsyncConnection, actor: Actor, action: str, window_id: UUID, detail: Mapping[str, Any]) -> None:
    """The audit row, and a wakeup for the scheduler."""
    plain = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in detail.items()}
    await record_audit(conn, actor, action, ids.encode("maintenance", window_id), plain)
    await notify(conn, "queue")


# ------------------------------------------------------------------ which nodes


async def _nodes(conn: AsyncConnection, given: Sequence[str], errors: list[FieldError]) -> list[UUID]:
    """The nodes of these names and ids, each once. What is wrong with those that are none goes to `errors`: of the
    first few each, and how many more there are."""
    by_id = {text: id_ for text in given if (id_ := _id_of(text)) is not None}
    found: defaultdict[str | UUID, list[Any]] = defaultdict(list)
    for row in await windows.nodes_called(conn, names=given, ids=list(by_id.values())):
        found[row.id].append(row)
        found[row.name].append(row)
    known: list[UUID] = []
    wrong: list[tuple[str, str, Sequence[Any]]] = []
    for index, text in enumerate(given):
        meant = (found.get(by_id[text]) if text in by_id else None) or found.get(text, [])
        if len(meant) == 1:
            known.append(meant[0].id)
        else:
            wrong.append((f"nodes[{index}]", text, meant))
    errors += await _no_nodes(conn, wrong)
    return list(dict.fromkeys(known))


def _id_of(text: str) -> UUID | None:
    try:
        return ids.parse("node", text)
    except ValueError:
        return None


async def _no_nodes(conn: AsyncConnection, wrong: Sequence[tuple[str, str, Sequence[Any]]]) -> list[FieldError]:
    """What is wrong with each field, its text, and the several nodes that it could mean."""
    names = await windows.node_names(conn) if any(not meant for _, _, meant in wrong) else []
    errors: list[FieldError] = []
    for number, (where, text, meant) in enumerate(wrong[:TOLD_MAX]):
        if meant:
            which = ", ".join(f"{ids.encode('node', row.id)} ({row.cluster})" for row in meant)
            hint = f"name it by id, one of {which}"
            errors.append(FieldError(where, f"several clusters have a node {text:.80}", hint))
            continue
        close = nearest(text, names) if number < HINTED_MAX else None
        errors.append(FieldError(where, f"there is no node {text!r:.80}", f"did you mean {close}?" if close else None))
    if more := wrong[TOLD_MAX:]:
        errors.append(FieldError("nodes", f"{len(more)} more name no one node", "`phalanx nodes` lists them"))
    return errors


async def _check_cover(
    conn: AsyncConnection, nodes: Sequence[object], labels: Mapping[str, str], errors: list[FieldError]
) -> None:
    """A window over nothing is a mistake."""
    if not nodes and not labels:
        errors.append(FieldError("nodes", "no node is named, and no label", "give nodes, labels or both"))
    elif labels and not await windows.some_node_has(conn, labels):
        errors.append(FieldError("labels", f"no node has {_written(labels)}", await _known_values(conn, labels)))


def _written(labels: Mapping[str, str]) -> str:
    return " and ".join(f"{key}={value}" for key, value in labels.items())[:200]


async def _known_values(conn: AsyncConnection, labels: Mapping[str, str]) -> str:
    """A hint: what there is instead of the first label that no node has, or has so."""
    for key, value in labels.items():
        values = await windows.values_of_label(conn, key)
        if not values:
            return f"no node has a label {key[:80]}: `phalanx nodes show` lists those that there are"
        if not await windows.some_node_has(conn, {key: value}):
            return f"nodes have {key[:80]}: {', '.join(values)[:200]}"
    return "each of them is there, but no node has all"
