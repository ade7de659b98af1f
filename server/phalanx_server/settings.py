"""Settings of every server-side process, read from the environment (`PHALANX_…`) and nowhere else.

Owns names, defaults and bounds. Refuses to know what they are used for: each process takes what it needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Seconds = Annotated[float, Field(gt=0)]
Days = Annotated[float, Field(gt=0)]

MIB = 1 << 20


class Settings(BaseSettings):
    """One field per variable: `PHALANX_DATABASE_URL` is `database_url`. Durations in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix="PHALANX_", extra="ignore", frozen=True)

    database_url: SecretStr | None = None
    """`postgresql+asyncpg://…`; no default, so that no process ever writes to a database by accident."""
    database_pool: Annotated[int, Field(ge=1, le=500)] = 12
    """Connections this process may hold, the listener not counted. In the server a quarter of them is for nodes and
    agents alone, and each part has at least one."""
    statement_timeout_s: Seconds = 30
    """Of the server: a statement that waits longer, for a lock say, is given up, and its caller told to come back."""
    data_dir: Path = Path("~/.local/share/phalanx")
    storage_url: str | None = None
    """fsspec root of logs, code bundles and outputs; absent = `<data_dir>/storage`."""
    bootstrap_admin_token_file: Path | None = None
    """With the next one: files with the first admin's and the first cluster's token (as `phalanx new-token` prints
    them). A migration of an empty database takes these instead of making and printing its own."""
    bootstrap_cluster_token_file: Path | None = None
    policy_file: Path | None = None
    """JSON object of the policy fields of plan-format.md; absent = defaults."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8321
    log_format: Literal["json", "console"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_public: bool = False
    """Serve `/metrics` without a token."""
    metrics_host: str = "127.0.0.1"
    """Of the scheduler, which listens on nothing else."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Where the scheduler answers Prometheus, without a token. Absent = nowhere; 0 = any free port."""
    shutdown_grace_s: Seconds = 5
    token_cache_s: Annotated[float, Field(ge=0, le=60)] = 3
    """How long a verified token is trusted without a look into the database: the longest a revoked one still works."""

    max_waiting_requests: Annotated[int, Field(ge=0)] = 500
    """Of users, while others are worked on; one more is told to come back."""
    max_streams: Annotated[int, Field(ge=1)] = 1000
    """Open event streams: followers of jobs, logs and metrics."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1 * MIB
    max_batch_bytes: Annotated[int, Field(ge=1024)] = 32 * MIB
    """For `POST /v1/jobs/batch` and `POST /v1/plan`, which carry many jobs."""
    max_report_bytes: Annotated[int, Field(ge=1024)] = 4 * MIB
    max_bundle_bytes: Annotated[int, Field(ge=1024)] = 256 * MIB
    max_output_bytes: Annotated[int, Field(ge=1024)] = 10 << 30
    """For one output file of a job; a node sends no more than as much for a whole group."""

    node_timeout_s: Seconds = 20
    startup_grace_s: Seconds = 15
    fence_s: Seconds = 60
    loss_grace_s: Seconds = 5
    outage_tolerance_s: Seconds = 3_600
    """A cluster that is cut off from the server for so long ends its ranks; only then are its nodes given up."""
    heartbeat_s: Seconds = 2
    lease_ttl_s: Seconds = 4
    lease_renew_s: Seconds = 1

    retain_metrics_days: Days = 7
    """Raw metric points; roll-ups are kept as long as events."""
    retain_events_days: Days = 90
    retain_logs_days: Annotated[float, Field(ge=2)] = 30
    """After the end of their job: a node may bring them for a day, and each job is looked at once."""
    retain_bundles_days: Annotated[float, Field(ge=1)] = 30
    """Code bundles, after their last upload or submit and after the end of every job that ran them."""
    retain_outputs_days: Annotated[float, Field(ge=1)] = 30
    """Files that jobs left, after the end of their job."""
    webhook_url: str | None = None

    @property
    def storage_root(self) -> str:
        """The fsspec URL under which logs, bundles and outputs live, without a trailing slash."""
        if self.storage_url:
            return self.storage_url.rstrip("/")
        return f"file://{self.data_dir.expanduser().resolve() / 'storage'}"

    @property
    def required_database_url(self) -> str:
        """Raises ValueError with what to do where no database was named."""
        if self.database_url is None:
            raise ValueError(
                "PHALANX_DATABASE_URL is not set. Give a PostgreSQL database, for example"
                " postgresql+asyncpg://phalanx:secret@db.example/phalanx, or use `phalanx up`, which brings its own."
            )
        return self.database_url.get_secret_value()
