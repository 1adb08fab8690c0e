"""The first schema."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A table before those that refer to it.
    _create_tenants()
    _create_api_keys()
    _create_jobs()
    _create_events()
    _create_leases()
    _create_checkpoints()
    _create_steps()


def downgrade() -> None:
    for table in ("checkpoints", "events", "steps", "leases", "jobs", "api_keys", "tenants"):
        op.drop_table(table)


def _create_tenants() -> None:
    op.create_table(
        "tenants",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("created_at", sa.String(length=32), nullable=False),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 63", name=op.f("ck_tenants_name_length")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_tenants")),
        sa.UniqueConstraint("name", name=op.f("uq_tenants_name")),
    )


def _create_api_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(length=32), nullable=False),
        sa.Column("last_used_at", sa.String(length=32), nullable=True),
        sa.Column("revoked_at", sa.String(length=32), nullable=True),
        sa.CheckConstraint("length(key_sha256) = 64", name=op.f("ck_api_keys_key_is_digest")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_api_keys_tenant_id")),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("key_sha256", name=op.f("uq_api_keys_key_sha256")),
    )


def _create_jobs() -> None:
    op.create_table("jobs", *_job_columns(), *_job_constraints())
    op.create_index(op.f("ix_jobs_state"), "jobs", ["state"], unique=False)
    op.create_index(
        op.f("ix_jobs_tenant_id_created_at_job_id"),
        "jobs",
        ["tenant_id", "created_at", "job_id"],
        unique=False,
    )


def _job_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("base_model", sa.String(length=200), nullable=False),
        sa.Column("spec_json", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("version", sa.Integer(), server_default="0", nullable=False),
        sa.Column("total_steps", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), server_default="0", nullable=False),
        sa.Column("device_id", sa.String(length=200), nullable=True),
        sa.Column("encoding", sa.String(length=32), nullable=False),
        sa.Column("training_key", sa.Text(), nullable=False),
        sa.Column("training_name", sa.Text(), server_default="", nullable=False),
        sa.Column("evaluation_key", sa.Text(), nullable=True),
        sa.Column("evaluation_name", sa.Text(), server_default="", nullable=False),
        sa.Column("idempotency_key", sa.String(length=200), nullable=True),
        sa.Column("request_digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.String(length=32), nullable=False),
        sa.Column("started_at", sa.String(length=32), nullable=True),
        sa.Column("finished_at", sa.String(length=32), nullable=True),
        sa.Column("failure_reason", sa.String(length=100), nullable=True),
        sa.Column("failure_message", sa.Text(), nullable=True),
        sa.Column("evaluation_loss_before", sa.Float(), nullable=True),
        sa.Column("evaluation_loss_after", sa.Float(), nullable=True),
        sa.Column("last_loss", sa.Float(), nullable=True),
        sa.Column("tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("label_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("bytes_down", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("base_seconds", sa.Float(), server_default="0", nullable=False),
        sa.Column("device_seconds", sa.Float(), server_default="0", nullable=False),
    )


def _job_constraints() -> tuple[sa.Constraint, ...]:
    return (
        sa.CheckConstraint(
            "(state = 'failed') = (failure_reason IS NOT NULL)", name=op.f("ck_jobs_failure_has_reason")
        ),
        sa.CheckConstraint(
            "(state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)",
            name=op.f("ck_jobs_end_is_dated"),
        ),
        sa.CheckConstraint(
            "device_id IS NULL OR state IN ('queued', 'running')", name=op.f("ck_jobs_lease_only_when_active")
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_jobs_state_known"),
        ),
        sa.CheckConstraint("epoch >= 0", name=op.f("ck_jobs_epoch_not_negative")),
        sa.CheckConstraint("total_steps > 0", name=op.f("ck_jobs_has_steps")),
        sa.CheckConstraint("version BETWEEN 0 AND total_steps", name=op.f("ck_jobs_version_in_range")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_jobs_tenant_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("tenant_id", "idempotency_key", name=op.f("uq_jobs_tenant_id_idempotency_key")),
    )


def _create_events() -> None:
    op.create_table(
        "events",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=100), nullable=False),
        sa.Column("level", sa.String(length=16), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data_json", sa.Text(), nullable=False),
        sa.CheckConstraint("level IN ('info', 'warning', 'error')", name=op.f("ck_events_level_known")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_events_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_events_job_id_id"), "events", ["job_id", "id"], unique=False)


def _create_leases() -> None:
    op.create_table(
        "leases",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("epoch", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device_id", sa.String(length=200), nullable=False),
        sa.Column("granted_at", sa.String(length=32), nullable=False),
        sa.Column("ended_at", sa.String(length=32), nullable=True),
        sa.CheckConstraint("epoch > 0", name=op.f("ck_leases_epoch_positive")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_leases_job_id")),
        sa.PrimaryKeyConstraint("job_id", "epoch", name=op.f("pk_leases")),
    )
    op.create_index(
        "uq_leases_open",
        "leases",
        ["job_id"],
        unique=True,
        sqlite_where=sa.text("ended_at IS NULL"),
        postgresql_where=sa.text("ended_at IS NULL"),
    )


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("storage_key", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.String(length=32), nullable=False),
        sa.CheckConstraint("bytes > 0", name=op.f("ck_checkpoints_not_empty")),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_checkpoints_sha256_length")),
        sa.CheckConstraint("version >= 0", name=op.f("ck_checkpoints_version_not_negative")),
        sa.ForeignKeyConstraint(
            ["job_id", "epoch"], ["leases.job_id", "leases.epoch"], name=op.f("fk_checkpoints_job_id_epoch")
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_checkpoints_job_id")),
        sa.PrimaryKeyConstraint("job_id", "version", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("storage_key", name=op.f("uq_checkpoints_storage_key")),
    )


def _create_steps() -> None:
    op.create_table(
        "steps",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("loss", sa.Float(), nullable=False),
        sa.Column("learning_rate", sa.Float(), nullable=False),
        sa.Column("gradient_norm", sa.Float(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("label_tokens", sa.Integer(), nullable=False),
        sa.Column("device_id", sa.String(length=200), nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), nullable=False),
        sa.Column("bytes_down", sa.BigInteger(), nullable=False),
        sa.Column("base_seconds", sa.Float(), nullable=False),
        sa.Column("device_seconds", sa.Float(), nullable=False),
        sa.Column("applied_at", sa.String(length=32), nullable=False),
        sa.CheckConstraint("step > 0", name=op.f("ck_steps_step_positive")),
        sa.CheckConstraint(
            "tokens >= 0 AND label_tokens BETWEEN 0 AND tokens AND bytes_up >= 0 AND bytes_down >= 0"
            " AND base_seconds >= 0 AND device_seconds >= 0",
            name=op.f("ck_steps_spent_not_negative"),
        ),
        sa.ForeignKeyConstraint(
            ["job_id", "epoch"], ["leases.job_id", "leases.epoch"], name=op.f("fk_steps_job_id_epoch")
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_steps_job_id")),
        sa.PrimaryKeyConstraint("job_id", "step", name=op.f("pk_steps")),
    )
