"""The first schema: tenants to audit, with the guards of the design in SQL.

Revision ID: 0001
Revises:
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TENANTS = """
CREATE TABLE tenants (
    id              uuid PRIMARY KEY,
    path            text NOT NULL UNIQUE
                    CHECK (path ~ '^[a-z0-9]([a-z0-9._-]*[a-z0-9])?(/[a-z0-9]([a-z0-9._-]*[a-z0-9])?)*$'),
    parent_id       uuid REFERENCES tenants,
    weight          double precision NOT NULL DEFAULT 1 CHECK (weight >= 0),
    preemption      jsonb NOT NULL DEFAULT '{}',
    uid             integer GENERATED ALWAYS AS IDENTITY (START WITH 71000) UNIQUE,
    version         bigint NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT now(),
    changed_xid     xid8 NOT NULL DEFAULT pg_current_xact_id()
);
CREATE TABLE quotas (
    tenant_id       uuid NOT NULL REFERENCES tenants ON DELETE CASCADE,
    resource        text NOT NULL,
    nominal         bigint NOT NULL CHECK (nominal >= 0),
    borrowing_limit bigint CHECK (borrowing_limit >= 0),
    lending_limit   bigint CHECK (lending_limit >= 0),
    PRIMARY KEY (tenant_id, resource)
);
CREATE TABLE users (
    id              uuid PRIMARY KEY,
    name            text NOT NULL UNIQUE,
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE clusters (
    id              uuid PRIMARY KEY,
    name            text NOT NULL UNIQUE,
    agent_instance  text,
    agent_seen_at   timestamptz,
    created_at      timestamptz NOT NULL DEFAULT now()
);
"""

NODES = """
CREATE TABLE nodes (
    id              uuid PRIMARY KEY,
    cluster_id      uuid NOT NULL REFERENCES clusters,
    name            text NOT NULL,
    ray_node_id     text NOT NULL,
    state           text NOT NULL DEFAULT 'ready' CHECK (state IN ('ready', 'cordoned', 'draining', 'lost')),
    wanted_state    text NOT NULL DEFAULT 'ready' CHECK (wanted_state IN ('ready', 'cordoned', 'draining')),
    alive           boolean NOT NULL DEFAULT true,
    gpu_type        text NOT NULL,
    gpus            integer NOT NULL CHECK (gpus >= 0),
    cpus            integer NOT NULL CHECK (cpus >= 0),
    memory_bytes    bigint NOT NULL CHECK (memory_bytes >= 0),
    address         text NOT NULL,
    labels          jsonb NOT NULL DEFAULT '{}',
    facts           jsonb NOT NULL DEFAULT '{}',
    stats           jsonb,
    stats_at        timestamptz,
    runner_boot     text,
    runner_seq      bigint NOT NULL DEFAULT 0,
    runner_seen_at  timestamptz,
    clock_skew_s    double precision,
    lost_at         timestamptz,
    version         bigint NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT now(),
    changed_xid     xid8 NOT NULL DEFAULT pg_current_xact_id(),
    UNIQUE (cluster_id, name)
);
CREATE TABLE tokens (
    id              uuid PRIMARY KEY,
    kind            text NOT NULL CHECK (kind IN ('user', 'cluster', 'node')),
    role            text NOT NULL
                    CHECK (role IN ('admin', 'operator', 'manager', 'member', 'viewer', 'cluster', 'node')),
    hash            bytea NOT NULL,
    name            text NOT NULL,
    user_id         uuid REFERENCES users,
    tenant_id       uuid REFERENCES tenants ON DELETE CASCADE,
    cluster_id      uuid REFERENCES clusters,
    node_id         uuid REFERENCES nodes ON DELETE CASCADE,
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz,
    revoked_at      timestamptz,
    CHECK ((role IN ('manager', 'member', 'viewer')) = (tenant_id IS NOT NULL)),
    CHECK ((kind = 'cluster') = (role = 'cluster') AND (kind = 'node') = (role = 'node')),
    CHECK ((role IN ('cluster', 'node')) = (cluster_id IS NOT NULL)),
    CHECK ((role = 'node') = (node_id IS NOT NULL))
);
CREATE INDEX tokens_node ON tokens (node_id) WHERE node_id IS NOT NULL;
"""

JOBS = """
CREATE TABLE bundles (
    tenant_id       uuid NOT NULL REFERENCES tenants ON DELETE CASCADE,
    hash            text NOT NULL CHECK (hash ~ '^[0-9a-f]{64}$'),
    bytes           bigint NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    used_at         timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, hash)
);
CREATE TABLE jobs (
    id              uuid PRIMARY KEY,
    tenant_id       uuid NOT NULL REFERENCES tenants,
    name            text NOT NULL,
    state           text NOT NULL DEFAULT 'queued'
                    CHECK (state IN ('queued', 'starting', 'running', 'stopping', 'succeeded', 'failed', 'cancelled')),
    version         bigint NOT NULL DEFAULT 1,
    epoch           bigint NOT NULL DEFAULT 0,
    priority        integer NOT NULL DEFAULT 0,
    spec            jsonb NOT NULL,
    labels          jsonb NOT NULL DEFAULT '{}',
    bundle          text,
    created_by      text NOT NULL,
    traceparent     text,
    received_at     timestamptz NOT NULL,
    submitted_at    timestamptz NOT NULL,
    queued_at       timestamptz NOT NULL,
    started_at      timestamptz,
    finished_at     timestamptz,
    cancel_requested_at timestamptz,
    held            boolean NOT NULL DEFAULT false,
    not_before      timestamptz,
    backoff_until   timestamptz,
    avoid_nodes     uuid[] NOT NULL DEFAULT '{}',
    attempts        integer NOT NULL DEFAULT 0,
    failures        integer NOT NULL DEFAULT 0,
    reason          text,
    message         text,
    changed_xid     xid8 NOT NULL DEFAULT pg_current_xact_id(),
    CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL))
);
CREATE INDEX jobs_queue ON jobs (priority DESC, submitted_at, id) WHERE state = 'queued';
CREATE INDEX jobs_live ON jobs (state) WHERE state IN ('starting', 'running', 'stopping');
CREATE INDEX jobs_tenant ON jobs (tenant_id, id DESC);
CREATE INDEX jobs_state ON jobs (state, id DESC);
CREATE INDEX jobs_changed ON jobs (changed_xid);
CREATE INDEX jobs_labels ON jobs USING gin (labels jsonb_path_ops);

CREATE TABLE holds (
    job_id          uuid PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    reason          text NOT NULL,
    message         text NOT NULL,
    unblocks        jsonb NOT NULL DEFAULT '[]',
    estimated_start timestamptz,
    since           timestamptz NOT NULL
);
CREATE TABLE attempts (
    id              uuid PRIMARY KEY,
    job_id          uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    cluster_id      uuid NOT NULL REFERENCES clusters,
    number          integer NOT NULL,
    epoch           bigint NOT NULL,
    state           text NOT NULL DEFAULT 'starting'
                    CHECK (state IN ('starting', 'running', 'stopping', 'ended', 'lost')),
    outcome         text,
    message         text,
    gpu_type        text NOT NULL,
    replicas        integer NOT NULL,
    resume_from     text,
    created_at      timestamptz NOT NULL,
    gang_ready_at   timestamptz,
    started_at      timestamptz,
    rendezvous_at   timestamptz,
    first_step_at   timestamptz,
    stop_cause      text,
    stop_requested_at timestamptz,
    grace_s         double precision NOT NULL DEFAULT 30,
    finished_called boolean NOT NULL DEFAULT false,
    ended_at        timestamptz,
    released_at     timestamptz,
    ranks           jsonb NOT NULL DEFAULT '[]',
    exits           jsonb NOT NULL DEFAULT '[]',
    UNIQUE (job_id, number),
    UNIQUE (job_id, epoch),
    CHECK ((state IN ('ended', 'lost')) = (ended_at IS NOT NULL)),
    CHECK ((state IN ('ended', 'lost')) = (outcome IS NOT NULL))
);
CREATE UNIQUE INDEX attempts_one_live ON attempts (job_id) WHERE state IN ('starting', 'running', 'stopping');
CREATE INDEX attempts_desired ON attempts (cluster_id) WHERE state IN ('starting', 'running', 'stopping');
CREATE INDEX attempts_charged ON attempts (cluster_id) WHERE released_at IS NULL;

CREATE TABLE placements (
    attempt_id      uuid NOT NULL REFERENCES attempts ON DELETE CASCADE,
    node_id         uuid NOT NULL REFERENCES nodes,
    group_rank      integer NOT NULL,
    replicas        integer NOT NULL CHECK (replicas > 0),
    gpu_indices     integer[] NOT NULL,
    first_rank      integer NOT NULL,
    ranks           integer NOT NULL CHECK (ranks > 0),
    cpus            double precision NOT NULL,
    memory_bytes    bigint NOT NULL,
    released_at     timestamptz,
    PRIMARY KEY (attempt_id, node_id)
);
CREATE INDEX placements_charged ON placements (node_id) WHERE released_at IS NULL;

CREATE TABLE checkpoints (
    job_id          uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    attempt_id      uuid NOT NULL REFERENCES attempts ON DELETE CASCADE,
    step            bigint NOT NULL,
    url             text NOT NULL,
    data            jsonb NOT NULL DEFAULT '{}',
    registered_at   timestamptz NOT NULL,
    PRIMARY KEY (job_id, step, url)
);
CREATE TABLE progress (
    job_id          uuid PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    attempt_id      uuid NOT NULL,
    step            bigint,
    total_steps     bigint,
    values          jsonb NOT NULL DEFAULT '{}',
    at              timestamptz NOT NULL
);
CREATE TABLE events (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id          uuid REFERENCES jobs ON DELETE CASCADE,
    attempt_id      uuid,
    node_id         uuid,
    at              timestamptz NOT NULL,
    kind            text NOT NULL,
    message         text NOT NULL,
    data            jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX events_job ON events (job_id, id);
CREATE INDEX events_at ON events USING brin (at);
"""

OBSERVATIONS = """
CREATE TABLE metrics (
    job_id          uuid NOT NULL,
    attempt_id      uuid NOT NULL,
    rank            integer NOT NULL,
    name            text NOT NULL,
    step            bigint,
    value           double precision NOT NULL,
    at              timestamptz NOT NULL
) PARTITION BY RANGE (at);
CREATE TABLE metrics_rest PARTITION OF metrics DEFAULT;
CREATE INDEX metrics_series ON metrics (job_id, name, at);

CREATE TABLE metric_rollups (
    job_id          uuid NOT NULL,
    name            text NOT NULL,
    resolution_s    integer NOT NULL CHECK (resolution_s IN (10, 60, 600)),
    bucket          timestamptz NOT NULL,
    min             double precision NOT NULL,
    max             double precision NOT NULL,
    sum             double precision NOT NULL,
    count           bigint NOT NULL,
    last_step       bigint,
    PRIMARY KEY (job_id, name, resolution_s, bucket)
) PARTITION BY RANGE (bucket);
CREATE TABLE metric_rollups_rest PARTITION OF metric_rollups DEFAULT;

CREATE TABLE logs (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id          uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    attempt_id      uuid NOT NULL REFERENCES attempts ON DELETE CASCADE,
    rank            integer NOT NULL,
    stream          text NOT NULL CHECK (stream IN ('stdout', 'stderr')),
    start_bytes     bigint NOT NULL,
    length_bytes    integer NOT NULL CHECK (length_bytes > 0),
    url             text NOT NULL,
    url_offset      bigint NOT NULL,
    at              timestamptz NOT NULL,
    UNIQUE (attempt_id, rank, stream, start_bytes)
);
CREATE INDEX logs_job ON logs (job_id, id);
"""

SERVICE = """
CREATE TABLE outbox (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic           text NOT NULL,
    payload         jsonb NOT NULL,
    created_at      timestamptz NOT NULL,
    due_at          timestamptz NOT NULL,
    tries           integer NOT NULL DEFAULT 0,
    delivered_at    timestamptz,
    last_error      text
);
CREATE INDEX outbox_due ON outbox (due_at) WHERE delivered_at IS NULL;
CREATE TABLE idempotency_keys (
    scope           text NOT NULL,
    key             text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    body_hash       bytea NOT NULL,
    status          integer NOT NULL,
    response        jsonb NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (scope, key)
);
CREATE INDEX idempotency_keys_created ON idempotency_keys (created_at);
CREATE TABLE leases (
    name            text PRIMARY KEY,
    holder          text NOT NULL,
    epoch           bigint NOT NULL,
    expires_at      timestamptz NOT NULL
);
CREATE TABLE audit (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at              timestamptz NOT NULL DEFAULT now(),
    token_id        uuid,
    actor           text NOT NULL,
    action          text NOT NULL,
    target          text NOT NULL,
    detail          jsonb NOT NULL DEFAULT '{}',
    request_id      text
);
CREATE INDEX audit_at ON audit (at);
"""

# `changed_xid` lets a reader ask for what changed since its last snapshot without missing a transaction that was in
# flight then: it reads rows with changed_xid >= pg_snapshot_xmin of that snapshot (and may see a few rows twice).
TRIGGERS = """
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.changed_xid := pg_current_xact_id();
    RETURN NEW;
END $$;
CREATE TRIGGER touch BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION touch();
CREATE TRIGGER touch BEFORE UPDATE ON tenants FOR EACH ROW EXECUTE FUNCTION touch();
CREATE TRIGGER touch BEFORE UPDATE OF state, alive, gpu_type, gpus, cpus, memory_bytes, labels ON nodes
    FOR EACH ROW EXECUTE FUNCTION touch();

CREATE FUNCTION touch_tenant() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE tenants SET version = version + 1 WHERE id = COALESCE(NEW.tenant_id, OLD.tenant_id);
    RETURN NULL;
END $$;
CREATE TRIGGER touch_tenant AFTER INSERT OR UPDATE OR DELETE ON quotas FOR EACH ROW EXECUTE FUNCTION touch_tenant();

CREATE FUNCTION guard_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.epoch < OLD.epoch THEN
        RAISE EXCEPTION 'job %: epoch % may not go back to %', OLD.id, OLD.epoch, NEW.epoch
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.state <> OLD.state AND NOT (OLD.state || '>' || NEW.state) = ANY (ARRAY[
        'queued>starting', 'queued>cancelled', 'queued>failed',
        'starting>running', 'starting>stopping', 'starting>queued',
        'starting>succeeded', 'starting>failed', 'starting>cancelled',
        'running>stopping', 'running>queued', 'running>succeeded', 'running>failed', 'running>cancelled',
        'stopping>queued', 'stopping>succeeded', 'stopping>failed', 'stopping>cancelled'
    ]) THEN
        RAISE EXCEPTION 'job %: no transition from % to %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard_job BEFORE UPDATE OF state, epoch ON jobs FOR EACH ROW EXECUTE FUNCTION guard_job();

CREATE FUNCTION guard_attempt() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state <> OLD.state AND NOT (OLD.state || '>' || NEW.state) = ANY (ARRAY[
        'starting>running', 'starting>stopping', 'starting>ended', 'starting>lost',
        'running>stopping', 'running>ended', 'running>lost', 'stopping>ended', 'stopping>lost'
    ]) THEN
        RAISE EXCEPTION 'attempt %: no transition from % to %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard_attempt BEFORE UPDATE OF state ON attempts FOR EACH ROW EXECUTE FUNCTION guard_attempt();
"""

# Where an attempt is charged is part of a job's scheduling state: a release must show as a change of the job.
RELEASE = """
CREATE FUNCTION touch_job_of_placement() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE jobs SET version = version WHERE id = (SELECT job_id FROM attempts WHERE id = NEW.attempt_id);
    RETURN NULL;
END $$;
CREATE TRIGGER touch_job_of_placement AFTER UPDATE OF released_at ON placements
    FOR EACH ROW EXECUTE FUNCTION touch_job_of_placement();
"""


def upgrade() -> None:
    for statements in (TENANTS, NODES, JOBS, OBSERVATIONS, SERVICE, TRIGGERS, RELEASE):
        run_script(op.get_bind(), statements)


def downgrade() -> None:
    run_script(
        op.get_bind(),
        "DROP TABLE audit, leases, idempotency_keys, outbox, logs, metric_rollups, metrics, events, progress,"
        " checkpoints, placements, attempts, holds, jobs, bundles, tokens, nodes, clusters, users, quotas,"
        " tenants CASCADE;"
        "DROP FUNCTION touch, touch_tenant, guard_job, guard_attempt, touch_job_of_placement",
    )
