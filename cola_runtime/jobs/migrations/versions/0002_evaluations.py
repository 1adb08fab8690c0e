"""Evaluations get a table of their own; the two held-out losses of a job move there."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_LOSSES = ("evaluation_loss_before", "evaluation_loss_after")

_jobs = sa.table(
    "jobs",
    *(sa.column(name, sa.String()) for name in ("job_id", "created_at", "finished_at")),
    *(sa.column(name, sa.Integer()) for name in ("version", "epoch")),
    *(sa.column(name, sa.Float()) for name in _LOSSES),
)
_evaluations = sa.table(
    "evaluations",
    *(sa.column(name, sa.String()) for name in ("job_id", "primary", "created_at")),
    *(sa.column(name, sa.Integer()) for name in ("step", "epoch")),
    *(sa.column(name, sa.Boolean()) for name in ("greater_is_better", "improved")),
    sa.column("metrics", sa.JSON()),
)


def upgrade() -> None:
    op.create_table(
        "evaluations",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("primary", sa.String(length=32), nullable=False),
        sa.Column("greater_is_better", sa.Boolean(), nullable=False),
        sa.Column("improved", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.String(length=32), nullable=False),
        sa.CheckConstraint("step >= 0", name=op.f("ck_evaluations_step_not_negative")),
        sa.ForeignKeyConstraint(
            ["job_id", "epoch"], ["leases.job_id", "leases.epoch"], name=op.f("fk_evaluations_job_id_epoch")
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_evaluations_job_id")),
        sa.PrimaryKeyConstraint("job_id", "step", name=op.f("pk_evaluations")),
    )
    _move_losses()
    for name in _LOSSES:
        op.drop_column("jobs", name)


def downgrade() -> None:
    for name, which in zip(_LOSSES, (_evaluations.c.step == 0, _evaluations.c.step > 0), strict=True):
        op.add_column("jobs", sa.Column(name, sa.Float(), nullable=True))
        losses = sa.select(_evaluations.c.metrics["loss"].as_float())
        newest = losses.where(_evaluations.c.job_id == _jobs.c.job_id, which)
        newest = newest.order_by(_evaluations.c.step.desc()).limit(1)
        op.get_bind().execute(_jobs.update().values({name: newest.scalar_subquery()}))
    op.drop_table("evaluations")


def _move_losses() -> None:
    """Before the first step and, of jobs that have gone on, at the version that the job has now."""
    connection = op.get_bind()
    for job in connection.execute(sa.select(_jobs).where(_jobs.c.epoch > 0)).mappings():
        before, after = (job[name] for name in _LOSSES)
        shared = {
            "job_id": job["job_id"],
            "epoch": job["epoch"],
            "primary": "loss",
            "greater_is_better": False,
            "created_at": job["finished_at"] or job["created_at"],
        }
        if before is not None:
            first = {"step": 0, "metrics": {"loss": before}, "improved": True}
            connection.execute(_evaluations.insert().values(**shared, **first))
        if after is not None and job["version"] > 0:
            improved = before is None or after < before
            last = {"step": job["version"], "metrics": {"loss": after}, "improved": improved}
            connection.execute(_evaluations.insert().values(**shared, **last))
