"""Steps hold their link in the adapter's update chain."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("chain", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("steps", "chain")
