"""Alembic's scripts; `Database.open` runs them."""
