"""What the processes of base models and devices begin with."""

from __future__ import annotations

import gc

import pytest

from cola_runtime.config import LARGE_PAGES, TLS_ENVIRONMENT, actor_environment
from cola_runtime.machine import keep_started_objects


def test_an_actor_asks_for_large_pages_unless_the_service_was_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert actor_environment() == {**TLS_ENVIRONMENT, "GLIBC_TUNABLES": LARGE_PAGES}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert actor_environment()["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=1"


def test_what_a_process_started_with_is_not_collected_again() -> None:
    kept = [[] for _ in range(1000)]
    try:
        keep_started_objects()
        assert gc.get_freeze_count() > len(kept)
        assert not any(each is kept[0] for each in gc.get_objects())
    finally:
        gc.unfreeze()
