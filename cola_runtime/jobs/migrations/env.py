"""Run by Alembic on every command: migrate over the connection that the caller passed."""

from __future__ import annotations

from alembic import context

from cola_runtime.jobs.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
