"""Alembic's environment: runs the revisions on the connection that `phalanx_server.store.migrate` hands over."""

from alembic import context
from phalanx_server.store.schema import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit(
        "run migrations through phalanx_server.store.migrate (upgrade, downgrade), which brings a connection"
    )

context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=True)
with context.begin_transaction():
    context.run_migrations()
