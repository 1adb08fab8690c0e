"""`cola doctor` finds what is wrong and says what to do."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cola_runtime.cli import checks
from cola_runtime.config import BaseModelSettings, ClientSettings, DeviceSettings, ServiceSettings


def test_all_good_beside_a_running_service(
    cola: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLA_DATA_DIR", str(tmp_path / "not" / "yet"))
    ran = cola("doctor", "--json")
    found = {check["name"]: check for check in ran.json["checks"]}
    assert (ran.code, ran.json["ok"]) == (0, True)
    assert found["key"]["finding"] == "tenant alice; base models: tiny-llama; devices: 1"
    assert {
        "python",
        "packages",
        "sqlite",
        "ray",
        "threads",
        "data folder",
        "job store",
        "base model",
        "disk",
    } <= set(found)
    assert {"object storage", "service"} <= set(found)
    text = cola("doctor")
    assert (text.code, "All good." in text.out) == (0, True)
    assert not (tmp_path / "not").exists()


def test_a_wrong_key_ends_with_1_and_the_remedy(
    cola: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLA_API_KEY", "tml-wrong")
    ran = cola("doctor")
    assert (ran.code, "KEY_UNKNOWN" in ran.out, "cola keys create" in ran.out) == (1, True, True)


def test_without_a_service_its_port_must_be_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = ServiceSettings(listen=f"127.0.0.1:{port}")
        down, busy = checks.check_service(service, ClientSettings(base_url="grpc://127.0.0.1:1"))
        assert (down.status, busy.status, str(port) in busy.finding) == ("note", "fail", True)
    assert checks.check_port(f"127.0.0.1:{port}").status == "ok"
    assert checks.check_port("nonsense").status == "fail"


def test_sqlite_below_the_fix_is_noted() -> None:
    assert checks.check_sqlite((3, 40, 1)).status == "note"
    assert checks.check_sqlite((3, 51, 3)).status == "ok"


def test_a_package_below_its_floor_fails() -> None:
    below = checks._below_floor("typer", "999.0")
    assert below is not None
    assert (below.status, below.remedy) == ("fail", "pip install 'typer>=999.0'")
    assert checks._below_floor("typer", "0.1") is None
    missing = checks._below_floor("no-such-package-here", "1.0")
    assert missing is not None
    assert missing.finding == "not installed"


def test_a_data_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert checks.check_data_dir(tmp_path / "file").status == "fail"
    assert checks.check_data_dir(tmp_path / "new" / "deep").status == "ok"


def test_a_damaged_job_store_is_told_from_one_that_is_open(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    assert checks.check_store(path).finding == "there is none yet"
    with contextlib.closing(sqlite3.connect(path)) as store:
        store.execute("CREATE TABLE jobs (job_id TEXT)")
        store.commit()
        assert checks.check_store(path).finding == "jobs.sqlite is whole"
        store.execute("PRAGMA locking_mode = EXCLUSIVE")
        store.execute("INSERT INTO jobs VALUES ('a')")
        store.commit()
        assert checks.check_store(path).finding == "a coordinator has it open"
    path.write_bytes(path.read_bytes()[:100] + b"x" * 5000)
    assert checks.check_store(path).status == "fail"
    path.write_bytes(b"not a database at all" * 100)
    assert (checks.check_store(path).status, "put back" in checks.check_store(path).remedy) == ("fail", True)


def test_storage_and_base_model_are_looked_at(tmp_path: Path) -> None:
    assert checks.check_storage(tmp_path / "objects").status == "ok"
    (tmp_path / "objects" / ".partial").mkdir(parents=True)
    (tmp_path / "objects" / ".partial" / "left").touch()
    assert "1 half-written" in checks.check_storage(tmp_path / "objects").finding
    missing = checks.check_base_model(BaseModelSettings(name="tiny", path=tmp_path))
    assert (missing.status, "--model-path" in missing.remedy) == ("fail", True)
    (tmp_path / "config.json").touch()
    assert checks.check_base_model(BaseModelSettings(name="tiny", path=tmp_path)).status == "ok"


def test_more_threads_than_cores_are_noted() -> None:
    assert checks.check_threads(ServiceSettings(devices=DeviceSettings(count=1000))).status == "note"
    assert checks.check_threads(ServiceSettings(devices=DeviceSettings(count=0))).status == "ok"
