"""What is said of the health of nodes, found by node: who failed checks there, and since when it takes work again.

Revision ID: 0013
Revises: 0012
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

UP = """
CREATE INDEX events_node_health ON events (node_id, id) WHERE node_id IS NOT NULL AND kind IN ('health', 'node_ready');
"""
DOWN = """
DROP INDEX events_node_health;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
