"""What is said of the health of nodes, found by node: who failed checks there, and since when it takes work again.

Revision ID: 0013
Revises: 0012
"""

from alembic import op
from phalanx_server.store.migrate import build_indexes, run_script

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

INDEXES = {
    "events_node_health": "events (node_id, id) WHERE node_id IS NOT NULL AND kind = 'health'",
    "events_node_ready": "events (node_id, id) WHERE kind = 'node_ready'",
}
DOWN = """
DROP INDEX events_node_ready;
DROP INDEX events_node_health;
"""


def upgrade() -> None:
    build_indexes(op.get_context(), INDEXES)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
