"""Spot checks that are to be made: a coordinator that starts again makes them still."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "spot_checks",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("epoch", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("first", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("last", sa.Integer(), nullable=False),
        sa.Column("device_ids", sa.JSON(), nullable=False),
        sa.Column("shards", sa.JSON(), nullable=False),
        sa.Column("replica", sa.Text(), nullable=False),
        sa.CheckConstraint('"first" >= 0 AND "last" > "first"', name=op.f("ck_spot_checks_has_steps")),
        sa.ForeignKeyConstraint(
            ["job_id", "epoch"], ["leases.job_id", "leases.epoch"], name=op.f("fk_spot_checks_job_id_epoch")
        ),
        sa.PrimaryKeyConstraint("job_id", "epoch", "first", name=op.f("pk_spot_checks")),
    )


def downgrade() -> None:
    op.drop_table("spot_checks")
