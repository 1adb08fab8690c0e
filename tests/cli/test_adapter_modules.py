"""A process that cannot import the operator's modules does not start, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("command", ["serve", "device"])
def test_a_module_that_cannot_be_imported_ends_the_command_before_anything_starts(
    cola: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("cola_runtime.process_environment.set_thread_environment", lambda threads: None)
    monkeypatch.setenv("COLA_JOIN_TOKEN", "secret")
    monkeypatch.setenv("COLA_DATA_DIR", str(tmp_path / "data"))
    ran = cola(command, "--adapter-module", "json", "--adapter-module", "no_such.adapters")
    assert ran.code == 3
    assert "'no_such.adapters' cannot be imported: ModuleNotFoundError" in ran.err
    assert not (tmp_path / "data").exists()


def test_a_job_store_that_is_damaged_ends_serve_before_ray_starts(
    cola: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cola_runtime.runtime.coordinator.Cluster", None)
    folder = tmp_path / "data"
    folder.mkdir()
    store = folder / "jobs.sqlite"
    store.write_bytes(b"no database " * 1000)
    ran = cola("serve", "--data-dir", str(folder))
    assert ran.code == 9
    assert all(part in ran.err for part in ("STORE_CORRUPT", str(store), "put back a copy")), ran.err
    assert list(folder.iterdir()) == [store]
