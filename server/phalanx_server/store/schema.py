"""The tables, as SQLAlchemy Core sees them: exactly what `migrations/` builds (a test compares the two).

Owns column names and types. CHECK constraints, triggers and partitions live in the migrations' SQL alone.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.dialects.postgresql import UUID as PG_UUID

from phalanx_server.store.xid8 import Xid8

metadata = MetaData()

Uuid = PG_UUID(as_uuid=True)
Time = TIMESTAMP(timezone=True)


def _id() -> Column[Any]:
    return Column("id", Uuid, primary_key=True)


def _identity() -> Column[int]:
    return Column("id", BigInteger, Identity(always=True), primary_key=True)


def _created_at() -> Column[Any]:
    return Column("created_at", Time, nullable=False, server_default=func.now())


def _version() -> Column[int]:
    return Column("version", BigInteger, nullable=False, server_default=text("1"))


def _changed_xid() -> Column[int]:
    return Column("changed_xid", Xid8(), nullable=False, server_default=text("pg_current_xact_id()"))


def _object(name: str, *, nullable: bool = False) -> Column[Any]:
    return Column(name, JSONB, nullable=nullable, server_default=None if nullable else text("'{}'"))


def _seat(name: str) -> Column[Any]:
    """The place of a gang, as `store.seats` writes it."""
    return Column(name, JSONB(none_as_null=True))


def _array(name: str) -> Column[Any]:
    return Column(name, JSONB, nullable=False, server_default=text("'[]'"))


def _count(name: str) -> Column[int]:
    return Column(name, Integer, nullable=False, server_default=text("0"))


tenants = Table(
    "tenants",
    metadata,
    _id(),
    Column("path", Text, nullable=False, unique=True),
    Column("parent_id", Uuid, ForeignKey("tenants.id")),
    Column("weight", Double, nullable=False, server_default=text("1")),
    _object("preemption"),
    Column("uid", Integer, Identity(always=True, start=71000), nullable=False, unique=True),
    _version(),
    _created_at(),
    _changed_xid(),
)

quotas = Table(
    "quotas",
    metadata,
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("resource", Text, primary_key=True),
    Column("nominal", BigInteger, nullable=False),
    Column("borrowing_limit", BigInteger),
    Column("lending_limit", BigInteger),
)

users = Table("users", metadata, _id(), Column("name", Text, nullable=False, unique=True), _created_at())

clusters = Table(
    "clusters",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    Column("agent_instance", Text),
    Column("agent_seen_at", Time),
    _object("agent_backlog", nullable=True),
    _created_at(),
)

nodes = Table(
    "nodes",
    metadata,
    _id(),
    Column("cluster_id", Uuid, ForeignKey("clusters.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("ray_node_id", Text, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'ready'")),
    Column("wanted_state", Text, nullable=False, server_default=text("'ready'")),
    Column("alive", Boolean, nullable=False, server_default=text("true")),
    Column("gpu_type", Text, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("cpus", Integer, nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("address", Text, nullable=False),
    _object("labels"),
    _object("facts"),
    _object("stats", nullable=True),
    Column("stats_at", Time),
    Column("runner_boot", Text),
    Column("runner_seq", BigInteger, nullable=False, server_default=text("0")),
    Column("runner_seen_at", Time),
    Column("clock_skew_s", Double),
    Column("lost_at", Time),
    _version(),
    _created_at(),
    _changed_xid(),
    UniqueConstraint("cluster_id", "name"),
)

tokens = Table(
    "tokens",
    metadata,
    _id(),
    Column("kind", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("name", Text, nullable=False),
    Column("user_id", Uuid, ForeignKey("users.id")),
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE")),
    Column("cluster_id", Uuid, ForeignKey("clusters.id")),
    Column("node_id", Uuid, ForeignKey("nodes.id", ondelete="CASCADE")),
    _created_at(),
    Column("expires_at", Time),
    Column("revoked_at", Time),
)
Index("tokens_expired", tokens.c.expires_at, postgresql_where=text("kind = 'node'"))
Index("tokens_node", tokens.c.node_id, postgresql_where=tokens.c.node_id.isnot(None))

# ------------------------------------------------------------------ work

bundles = Table(
    "bundles",
    metadata,
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("hash", Text, primary_key=True),
    Column("bytes", BigInteger, nullable=False),
    _created_at(),
    Column("used_at", Time, nullable=False, server_default=func.now()),
)

environments = Table(
    "environments",
    metadata,
    _id(),
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Column("requirements", JSONB, nullable=False),
    Column("created_by", Text, nullable=False),
    _created_at(),
    UniqueConstraint("tenant_id", "name"),
)

jobs = Table(
    "jobs",
    metadata,
    _id(),
    Column("tenant_id", Uuid, ForeignKey("tenants.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'queued'")),
    _version(),
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),
    _count("priority"),
    Column("spec", JSONB, nullable=False),
    _object("labels"),
    Column("bundle", Text),
    Column("created_by", Text, nullable=False),
    Column("traceparent", Text),
    Column("received_at", Time, nullable=False),
    Column("submitted_at", Time, nullable=False),
    Column("queued_at", Time, nullable=False),
    Column("started_at", Time),
    Column("finished_at", Time),
    Column("cancel_requested_at", Time),
    Column("held", Boolean, nullable=False, server_default=text("false")),
    Column("not_before", Time),
    Column("backoff_until", Time),
    Column("avoid_nodes", ARRAY(Uuid), nullable=False, server_default=text("'{}'")),
    _count("attempts"),
    _count("failures"),
    Column("reason", Text),
    Column("message", Text),
    _changed_xid(),
    Column("deadline", Time),
    Column("array_id", Uuid),
    Column("array_index", Integer),
    Column("array_max_running", Integer),
    _count("unmet"),
)
Index("jobs_queue", jobs.c.priority.desc(), jobs.c.submitted_at, jobs.c.id, postgresql_where=text("state = 'queued'"))
Index("jobs_tried", jobs.c.id, postgresql_where=text("state = 'queued' AND attempts > 0"))
Index(
    "jobs_elastic",
    jobs.c.id,
    postgresql_where=text("state = 'running' AND spec->'resources'->'elastic' <> 'null'"),
)
Index("jobs_live", jobs.c.state, postgresql_where=text("state IN ('starting', 'running', 'stopping')"))
Index("jobs_tenant", jobs.c.tenant_id, jobs.c.id.desc())
Index("jobs_state", jobs.c.state, jobs.c.id.desc())
Index("jobs_name", jobs.c.name, jobs.c.id.desc())
Index("jobs_finished", jobs.c.finished_at, jobs.c.id, postgresql_where=jobs.c.finished_at.isnot(None))
_RAN = text("attempts > 0 AND finished_at IS NOT NULL")
Index("jobs_ran", jobs.c.state, jobs.c.id.desc(), postgresql_where=_RAN)
Index("jobs_changed", jobs.c.changed_xid)
Index("jobs_bundle", jobs.c.tenant_id, jobs.c.bundle, postgresql_where=jobs.c.bundle.isnot(None))
Index("jobs_labels", jobs.c.labels, postgresql_using="gin", postgresql_ops={"labels": "jsonb_path_ops"})

_IN_ARRAY = jobs.c.array_id.isnot(None)
Index("jobs_array", jobs.c.array_id, jobs.c.array_index, postgresql_where=_IN_ARRAY)
Index("jobs_array_open", jobs.c.array_id, postgresql_where=_IN_ARRAY & jobs.c.finished_at.is_(None))

dependencies = Table(
    "dependencies",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("on_id", Uuid, primary_key=True),
    Column("kind", Text, primary_key=True),
)
Index("dependencies_on", dependencies.c.on_id)

policy = Table(
    "policy",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    _object("settings"),
    _version(),
    _changed_xid(),
)

maintenance = Table(
    "maintenance",
    metadata,
    _id(),
    Column("nodes", ARRAY(Uuid), nullable=False, server_default=text("'{}'")),
    _object("labels"),
    Column("starts_at", Time, nullable=False),
    Column("ends_at", Time, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    _created_at(),
    _version(),
)
Index("maintenance_ends", maintenance.c.ends_at)

holds = Table(
    "holds",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("reason", Text, nullable=False),
    Column("message", Text, nullable=False),
    _array("unblocks"),
    Column("estimated_start", Time),
    Column("since", Time, nullable=False),
    _seat("kept"),
    Column("estimated_start_low", Time),
    Column("estimated_start_high", Time),
    Column("first_start", Time),
    Column("first_start_low", Time),
    Column("first_start_high", Time),
)
Index("holds_kept", holds.c.job_id, postgresql_where=holds.c.kept.isnot(None))

forecasts = Table(
    "forecasts",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("said_at", Time),
    Column("start", Time),
    Column("start_low", Time),
    Column("start_high", Time),
    Column("run_s", Double),
    Column("run_low_s", Double),
    Column("run_high_s", Double),
)

attempts = Table(
    "attempts",
    metadata,
    _id(),
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("cluster_id", Uuid, ForeignKey("clusters.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'starting'")),
    Column("outcome", Text),
    Column("message", Text),
    Column("gpu_type", Text, nullable=False),
    Column("replicas", Integer, nullable=False),
    Column("resume_from", Text),
    Column("created_at", Time, nullable=False),
    Column("gang_ready_at", Time),
    Column("started_at", Time),
    Column("rendezvous_at", Time),
    Column("first_step_at", Time),
    Column("stop_cause", Text),
    Column("stop_requested_at", Time),
    Column("grace_s", Double, nullable=False, server_default=text("30")),
    Column("finished_called", Boolean, nullable=False, server_default=text("false")),
    Column("ended_at", Time),
    Column("released_at", Time),
    _array("ranks"),
    _array("exits"),
    Column("certain_at", Time),
    Column("stop_reason", Text),
    Column("stop_for", Uuid),
    _seat("next"),
    UniqueConstraint("job_id", "number"),
    UniqueConstraint("job_id", "epoch"),
)
_LIVE = text("state IN ('starting', 'running', 'stopping')")
Index("attempts_one_live", attempts.c.job_id, unique=True, postgresql_where=_LIVE)
Index("attempts_desired", attempts.c.cluster_id, postgresql_where=_LIVE)
Index("attempts_charged", attempts.c.cluster_id, postgresql_where=attempts.c.released_at.is_(None))
Index("attempts_next", attempts.c.id, postgresql_where=text("state = 'stopping' AND next IS NOT NULL"))

placements = Table(
    "placements",
    metadata,
    Column("attempt_id", Uuid, ForeignKey("attempts.id", ondelete="CASCADE"), primary_key=True),
    Column("node_id", Uuid, ForeignKey("nodes.id"), primary_key=True),
    Column("group_rank", Integer, nullable=False),
    Column("replicas", Integer, nullable=False),
    Column("gpu_indices", ARRAY(Integer), nullable=False),
    Column("first_rank", Integer, nullable=False),
    Column("ranks", Integer, nullable=False),
    Column("cpus", Double, nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("released_at", Time),
)
Index("placements_charged", placements.c.node_id, postgresql_where=placements.c.released_at.is_(None))
Index("placements_released", placements.c.released_at, postgresql_where=placements.c.released_at.is_not(None))

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("attempt_id", Uuid, ForeignKey("attempts.id", ondelete="CASCADE"), nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("url", Text, nullable=False),
    _object("data"),
    Column("registered_at", Time, nullable=False),
    _changed_xid(),
    PrimaryKeyConstraint("job_id", "step", "url"),
)
Index("checkpoints_changed", checkpoints.c.changed_xid)

progress = Table(
    "progress",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt_id", Uuid, nullable=False),
    Column("step", BigInteger),
    Column("total_steps", BigInteger),
    _object("values"),
    Column("at", Time, nullable=False),
)

attempt_steps = Table(
    "attempt_steps",
    metadata,
    Column("attempt_id", Uuid, ForeignKey("attempts.id", ondelete="CASCADE"), primary_key=True),
    Column("of_training", Boolean, nullable=False),
    Column("first_step", BigInteger, nullable=False),
    Column("first_step_at", Time, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    Column("last_step_at", Time, nullable=False),
    _object("totals"),
)

speeds = Table(
    "speeds",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("gpu_type", Text, primary_key=True),
    Column("replicas", Integer, primary_key=True, autoincrement=False),
    Column("unit", Text),
    Column("attempt_id", Uuid),
    Column("at", Time),
    Column("step", BigInteger),
    Column("work", Double, nullable=False, server_default=text("0")),
    Column("seconds", Double, nullable=False, server_default=text("0")),
    Column("counted", BigInteger, nullable=False, server_default=text("0")),
    Column("speed", Double),
    Column("history", Double),
)

events = Table(
    "events",
    metadata,
    _identity(),
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE")),
    Column("attempt_id", Uuid),
    Column("node_id", Uuid),
    Column("at", Time, nullable=False),
    Column("kind", Text, nullable=False),
    Column("message", Text, nullable=False),
    _object("data"),
)
Index("events_job", events.c.job_id, events.c.id)
Index(
    "events_node_health",
    events.c.node_id,
    events.c.id,
    postgresql_where=text("node_id IS NOT NULL AND kind = 'health'"),
)
Index("events_node_ready", events.c.node_id, events.c.id, postgresql_where=text("kind = 'node_ready'"))
Index("events_at", events.c.at, postgresql_using="brin")

# ------------------------------------------------------------------ what was observed

metrics = Table(
    "metrics",
    metadata,
    Column("job_id", Uuid, nullable=False),
    Column("attempt_id", Uuid, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("step", BigInteger),
    Column("value", Double, nullable=False),
    Column("at", Time, nullable=False),
    postgresql_partition_by="RANGE (at)",
)
Index("metrics_series", metrics.c.job_id, metrics.c.name, metrics.c.at)

metric_rollups = Table(
    "metric_rollups",
    metadata,
    Column("job_id", Uuid, nullable=False),
    Column("name", Text, nullable=False),
    Column("resolution_s", Integer, nullable=False),
    Column("bucket", Time, nullable=False),
    Column("min", Double, nullable=False),
    Column("max", Double, nullable=False),
    Column("sum", Double, nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("last_step", BigInteger),
    PrimaryKeyConstraint("job_id", "name", "resolution_s", "bucket"),
    postgresql_partition_by="RANGE (bucket)",
)

logs = Table(
    "logs",
    metadata,
    _identity(),
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("attempt_id", Uuid, ForeignKey("attempts.id", ondelete="CASCADE"), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("stream", Text, nullable=False),
    Column("start_bytes", BigInteger, nullable=False),
    Column("length_bytes", Integer, nullable=False),
    Column("url", Text, nullable=False),
    Column("url_offset", BigInteger, nullable=False),
    Column("at", Time, nullable=False),
    UniqueConstraint("attempt_id", "rank", "stream", "start_bytes"),
)
Index("logs_job", logs.c.job_id, logs.c.id)

outputs = Table(
    "outputs",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("attempt_id", Uuid, ForeignKey("attempts.id", ondelete="CASCADE"), nullable=False),
    Column("group_rank", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("hash", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("created_at", Time, nullable=False),
    PrimaryKeyConstraint("attempt_id", "group_rank", "path"),
)
Index("outputs_job", outputs.c.job_id, outputs.c.path)

profiles = Table(
    "profiles",
    metadata,
    _id(),
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("attempt_id", Uuid, ForeignKey("attempts.id", ondelete="CASCADE"), nullable=False),
    Column("steps", Integer, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("created_at", Time, nullable=False),
    Column("closed_at", Time),
)
Index("profiles_job", profiles.c.job_id, profiles.c.id)
Index("profiles_open", profiles.c.attempt_id, unique=True, postgresql_where=profiles.c.closed_at.is_(None))

profile_ranks = Table(
    "profile_ranks",
    metadata,
    Column("profile_id", Uuid, ForeignKey("profiles.id", ondelete="CASCADE"), primary_key=True),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False, server_default="requested"),
    Column("reason", Text, nullable=False, server_default=""),
    Column("bytes", BigInteger),
    Column("hash", Text),
    Column("url", Text),
)

outbox = Table(
    "outbox",
    metadata,
    _identity(),
    Column("topic", Text, nullable=False),
    Column("payload", JSONB, nullable=False),
    Column("created_at", Time, nullable=False),
    Column("due_at", Time, nullable=False),
    _count("tries"),
    Column("delivered_at", Time),
    Column("last_error", Text),
)
Index("outbox_delivered", outbox.c.delivered_at, postgresql_where=outbox.c.delivered_at.isnot(None))
Index("outbox_due", outbox.c.due_at, postgresql_where=outbox.c.delivered_at.is_(None))

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("body_hash", LargeBinary, nullable=False),
    Column("status", Integer, nullable=False),
    Column("response", JSONB, nullable=False),
    _created_at(),
)
Index("idempotency_keys_created", idempotency_keys.c.created_at)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("expires_at", Time, nullable=False),
)

retention = Table(
    "retention",
    metadata,
    Column("what", Text, primary_key=True),
    Column("finished_at", Time, nullable=False),
    Column("job_id", Uuid, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    _identity(),
    Column("at", Time, nullable=False, server_default=func.now()),
    Column("token_id", Uuid),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    _object("detail"),
    Column("request_id", Text),
)
Index("audit_at", audit.c.at)
