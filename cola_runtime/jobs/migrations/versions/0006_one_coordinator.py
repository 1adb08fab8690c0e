"""Which coordinator may write; columns as wide on PostgreSQL as what SQLite has let in all along."""

from __future__ import annotations

from uuid import uuid4

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_OF_DEVICES = ("jobs", "leases", "steps")


def upgrade() -> None:
    table = op.create_table(
        "coordinator",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("store_id", sa.String(length=32), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("last_write", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_coordinator_only_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_coordinator")),
    )
    op.bulk_insert(table, [{"id": 1, "store_id": uuid4().hex, "term": 0, "last_write": 0}])
    if op.get_bind().dialect.name == "postgresql":  # SQLite enforces neither lengths nor widths
        for name in _OF_DEVICES:
            op.alter_column(name, "device_id", type_=sa.Text())
        op.alter_column("tenant_terms", "concurrent_jobs", type_=sa.BigInteger())


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("tenant_terms", "concurrent_jobs", type_=sa.Integer())
        for name in _OF_DEVICES:
            op.alter_column(name, "device_id", type_=sa.String(length=200))
    op.drop_table("coordinator")
