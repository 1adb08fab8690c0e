"""Links of the update chain; quarantined devices; checkpoints that were checked or pinned; keys that end."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_MOMENTS = (("checkpoints", "checked_at"), ("checkpoints", "pinned_at"), ("api_keys", "expires_at"))


def upgrade() -> None:
    op.add_column("steps", sa.Column("chain", sa.Text(), nullable=False, server_default=""))
    for table, name in _MOMENTS:
        op.add_column(table, sa.Column(name, sa.String(length=32), nullable=True))
    op.add_column("tenant_terms", sa.Column("pinned_bytes", sa.BigInteger(), nullable=True))
    op.create_table(
        "quarantines",
        sa.Column("device_id", sa.String(length=63), nullable=False),
        sa.Column("reason", sa.String(length=100), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("quarantined_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("device_id", name=op.f("pk_quarantines")),
    )


def downgrade() -> None:
    op.drop_table("quarantines")
    op.drop_column("tenant_terms", "pinned_bytes")
    for table, name in _MOMENTS:
        op.drop_column(table, name)
    op.drop_column("steps", "chain")
