"""What evaluations cost and steps that a job repeated are counted; a job may have a deadline."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_COUNTED = (
    ("jobs", "evaluation_tokens", sa.BigInteger()),
    ("jobs", "repeated_steps", sa.Integer()),
    ("evaluations", "tokens", sa.BigInteger()),
    ("evaluations", "base_seconds", sa.Float()),
)


def upgrade() -> None:
    for name in ("deadline_at", "deadline_missed_at"):
        op.add_column("jobs", sa.Column(name, sa.String(length=32), nullable=True))
    for table, name, kind in _COUNTED:
        op.add_column(table, sa.Column(name, kind, nullable=False, server_default="0"))


def downgrade() -> None:
    for table, name, _ in _COUNTED:
        op.drop_column(table, name)
    for name in ("deadline_at", "deadline_missed_at"):
        op.drop_column("jobs", name)
