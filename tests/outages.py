"""A job store whose database cannot be reached, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cola_runtime.jobs.database import Database, unreachable


@contextmanager
def database_away(
    monkeypatch: pytest.MonkeyPatch, *, asked: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """`asked` is called for each question; real servers are stopped in tests/jobs/test_job_store_hold.py."""

    def fail(database: Database, *_: Any) -> None:
        database.outage = unreachable()
        asked()
        raise database.outage

    with monkeypatch.context() as patch:
        patch.setattr(Database, "_transact", fail)
        yield
