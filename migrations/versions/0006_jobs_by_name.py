"""Let jobs be found by their name without reading all of them.

Revision ID: 0006
Revises: 0005
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

UP = "CREATE INDEX jobs_name ON jobs (name, id DESC);"
DOWN = "DROP INDEX jobs_name;"


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
