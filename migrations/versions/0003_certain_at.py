"""When the ranks of a lost attempt have certainly ended by themselves, wherever they were.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("certain_at", sa.TIMESTAMP(timezone=True)))


def downgrade() -> None:
    op.drop_column("attempts", "certain_at")
