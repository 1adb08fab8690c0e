"""What a tenant is entitled to: its weight and its caps. A tenant without a row has the defaults."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenant_terms",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("tokens_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("concurrent_jobs", sa.Integer(), nullable=True),
        sa.Column("total_steps", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("weight > 0", name=op.f("ck_tenant_terms_weight_positive")),
        sa.CheckConstraint(
            "tokens_per_minute > 0 AND concurrent_jobs > 0 AND total_steps > 0",
            name=op.f("ck_tenant_terms_caps_positive"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_tenant_terms_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_tenant_terms")),
    )


def downgrade() -> None:
    op.drop_table("tenant_terms")
