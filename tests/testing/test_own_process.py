"""Work in a process of its own, with the memory that a service's actors have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cola_runtime.process_environment import actor_environment, jemalloc
from cola_runtime.testing.own_process import as_an_actor


def where(marker: str) -> tuple[str, int, dict[str, str], bool]:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8") if Path("/proc/self/maps").exists() else ""
    return marker, os.getpid(), dict(os.environ), bool(jemalloc()) and jemalloc() in maps


def fail() -> None:
    raise LookupError("of the other process")


def test_work_gets_a_new_process_with_an_actors_environment_and_allocator() -> None:
    before = dict(os.environ)
    marker, pid, environment, loaded = as_an_actor(where, marker="given")
    assert marker == "given"
    assert pid != os.getpid()
    assert actor_environment().items() <= environment.items()
    assert loaded == bool(jemalloc())
    assert dict(os.environ) == before


def test_its_error_is_raised_here_and_leaves_this_environment_as_it_was() -> None:
    before = dict(os.environ)
    with pytest.raises(LookupError, match="of the other process"):
        as_an_actor(fail)
    assert dict(os.environ) == before
