"""What `cola doctor` looks at. Each check gives a finding; none raises."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cola_runtime.config import BaseModelSettings, ClientSettings, ServiceSettings
from cola_runtime.errors import ColaError

PACKAGE = "cola_runtime"
PYTHON_FLOOR = (3, 11)
SQLITE_FIXED = (3, 51, 3)
DISK_NOTE_BYTES = 5 << 30
DISK_FAIL_BYTES = 512 << 20
CONNECT_TIMEOUT_SECONDS = 2.0

_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*>=\s*([0-9.]+)\s*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    status: Literal["ok", "note", "fail"]
    finding: str
    remedy: str = ""


def run_checks(service: ServiceSettings, client: ClientSettings) -> list[Check]:
    return [
        check_python(),
        *check_packages(),
        check_sqlite(sqlite3.sqlite_version_info),
        check_ray(),
        check_threads(service),
        check_data_dir(service.data_dir),
        check_store(service.store_file) if service.database is None else check_database(service.store_url),
        check_storage(service.data_dir / "objects"),
        check_disk(service.data_dir),
        *map(check_base_model, service.base_models),
        *check_service(service, client),
    ]


def check_python() -> Check:
    found = platform.python_version()
    if _numbers(found) >= PYTHON_FLOOR:
        return Check(name="python", status="ok", finding=found)
    floor = ".".join(map(str, PYTHON_FLOOR))
    return Check(name="python", status="fail", finding=found, remedy=f"Use Python {floor} or newer.")


def check_packages() -> Iterator[Check]:
    """Every requirement of this package against its floor; one line if all are met."""
    met = 0
    for requirement in importlib.metadata.requires(PACKAGE) or []:
        match = _REQUIREMENT.match(requirement)
        if match is None:  # of an extra
            continue
        problem = _below_floor(*match.groups())
        met += problem is None
        if problem is not None:
            yield problem
    yield Check(name="packages", status="ok", finding=f"{met} at or above their floors")


def check_sqlite(version: tuple[int, ...]) -> Check:
    """Below 3.51.3 two writing connections can corrupt a WAL database; the job store keeps to one."""
    found = ".".join(map(str, version))
    if version >= SQLITE_FIXED:
        return Check(name="sqlite", status="ok", finding=found)
    return Check(
        name="sqlite",
        status="note",
        finding=f"{found} has the WAL bug fixed in 3.51.3; the job store's single connection avoids it",
        remedy="Do not open jobs.sqlite with other programs while the service runs.",
    )


def check_ray() -> Check:
    try:
        module = importlib.import_module("ray")
    except ImportError as error:
        return Check(
            name="ray", status="fail", finding=f"cannot be imported: {error}", remedy="Install ray[default]."
        )
    return Check(name="ray", status="ok", finding=f"{module.__version__} can be imported")


def check_threads(service: ServiceSettings) -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_bases = sum(base_model.replicas * base_model.threads for base_model in service.base_models)
    wanted = of_bases + service.devices.count * service.devices.threads
    finding = f"{cores} cores; base models and devices want {wanted} threads"
    if wanted <= cores + 1:  # a device mostly waits for the base model
        return Check(name="threads", status="ok", finding=finding)
    return Check(
        name="threads", status="note", finding=finding, remedy="Fewer devices or threads may be faster here."
    )


def check_data_dir(folder: Path) -> Check:
    existing = _nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check(
            name="data folder",
            status="fail",
            finding=f"{folder} cannot be written: {error.strerror}",
            remedy="Give another with COLA_DATA_DIR or `cola serve --data-dir`.",
        )
    return Check(name="data folder", status="ok", finding=f"{folder} can be written")


def check_store(path: Path) -> Check:
    """The job store is whole, unless a coordinator has it open, which then keeps everybody else out."""
    if not path.exists():
        return Check(name="job store", status="ok", finding="there is none yet")
    from cola_runtime.jobs.damage import damage_of

    try:
        found = damage_of(path)
    except sqlite3.Error as error:
        if "locked" in str(error):
            return Check(name="job store", status="ok", finding="a coordinator has it open")
        found = str(error)
    if not found:
        return Check(name="job store", status="ok", finding=f"{path.name} is whole")
    return Check(
        name="job store",
        status="fail",
        finding=f"{path} is damaged: {found}",
        remedy="Stop the service, move it and its -wal away and put back a copy: docs/deploy.md, Copies.",
    )


def check_database(url: str) -> Check:
    """Reachable, its tables of this release or older, and who writes; the URL may hold a password."""
    from cola_runtime.jobs.inspection import inspect_store

    try:
        found = inspect_store(url)
    except ColaError as error:
        remedy = "See that the server runs and that COLA_DATABASE names it, its user and its database."
        return Check(
            name="job store", status="fail", finding=f"{error.reason}: {error.message}", remedy=remedy
        )
    held = f"held by {found.holder}" if found.holder else "no coordinator holds it"
    if not found.known:
        return Check(
            name="job store",
            status="fail",
            finding=f"its tables ({found.revision}) are of a newer release than this one; {held}",
            remedy="Install the release that the coordinator had.",
        )
    tables = f"tables {found.revision}" if found.revision else "no tables yet"
    if found.revision != found.newest_revision:
        tables += f", which `cola serve` brings to {found.newest_revision}"
    return Check(name="job store", status="ok", finding=f"PostgreSQL, {tables}; {held}")


def check_storage(folder: Path) -> Check:
    """Objects can be written, and nothing half-written lies about."""
    if not folder.exists():
        return Check(name="object storage", status="ok", finding="there is none yet")
    writable = check_data_dir(folder)
    if writable.status == "fail":
        return replace(writable, name="object storage")
    partial = len(list((folder / ".partial").glob("*")))
    finding = "can be written" + (f"; {partial} half-written objects" if partial else "")
    return Check(name="object storage", status="ok", finding=finding)


def check_base_model(settings: BaseModelSettings) -> Check:
    """Its folder is there, if it is given by its folder."""
    if settings.path is None:
        return Check(name="base model", status="ok", finding=f"{settings.name}, found by its alias")
    if (settings.path / "config.json").is_file():
        return Check(name="base model", status="ok", finding=f"{settings.name} in {settings.path}")
    return Check(
        name="base model",
        status="fail",
        finding=f"{settings.path} holds no config.json",
        remedy="Give a folder in transformers' format with `cola serve --model-path`.",
    )


def check_disk(folder: Path) -> Check:
    free = shutil.disk_usage(_nearest_existing(folder)).free
    finding = f"{free / (1 << 30):.1f} GiB free"
    if free >= DISK_NOTE_BYTES:
        return Check(name="disk", status="ok", finding=finding)
    status: Literal["note", "fail"] = "note" if free >= DISK_FAIL_BYTES else "fail"
    return Check(
        name="disk", status=status, finding=finding, remedy="Free space: checkpoints are written here."
    )


def check_service(service: ServiceSettings, client: ClientSettings) -> list[Check]:
    """The service answers and takes the key; or none runs and its port is free."""
    from cola_runtime.client.channel import parse_base_url

    try:
        target = parse_base_url(client.base_url).target
    except ColaError as error:
        return [Check(name="service", status="fail", finding=error.message, remedy=error.remedy)]
    if _listens(target):
        return [
            Check(name="service", status="ok", finding=f"something listens at {target}"),
            check_key(client),
        ]
    down = Check(
        name="service",
        status="note",
        finding=f"nothing listens at {target}",
        remedy="`cola serve` starts one.",
    )
    return [down, check_port(service.listen)]


def check_key(client: ClientSettings) -> Check:
    from cola_runtime.client.sdk import Client

    if not client.api_key.get_secret_value():
        return Check(
            name="key", status="fail", finding="COLA_API_KEY is not set", remedy="Set it to your API key."
        )
    try:
        with Client(base_url=client.base_url) as connection:
            answer = connection.describe()
    except ColaError as error:
        return Check(
            name="key", status="fail", finding=f"{error.reason}: {error.message}", remedy=error.remedy
        )
    models = ", ".join(model.name for model in answer.base_models)
    finding = f"tenant {answer.tenant}; base models: {models}; devices: {len(answer.devices)}"
    if answer.degraded:
        remedy = "Reads may be stale and writes are refused: see that the job store's database runs."
        return Check(
            name="key", status="note", finding=f"{finding}; degraded: {answer.degraded}", remedy=remedy
        )
    lost = [each.replica for model in answer.base_models for each in model.replicas if each.state == "lost"]
    if lost:
        finding += f"; replicas that do not answer: {', '.join(lost)}"
        return Check(
            name="key", status="note", finding=finding, remedy="Ray starts them again: `ray status`."
        )
    if answer.quarantined_devices:
        names = ", ".join(answer.quarantined_devices)
        remedy = "`cola devices list` says why; `cola devices reinstate` lets one in again."
        return Check(name="key", status="note", finding=f"{finding}; in quarantine: {names}", remedy=remedy)
    if not answer.devices:
        return Check(name="key", status="note", finding=finding, remedy="`cola device` adds a device.")
    return Check(name="key", status="ok", finding=finding)


def check_port(listen: str) -> Check:
    host, _, port = listen.rpartition(":")
    try:
        with socket.create_server((host.strip("[]"), int(port))):
            pass
    except (OSError, ValueError, OverflowError) as error:
        return Check(
            name="port",
            status="fail",
            finding=f"cannot listen on {listen}: {error}",
            remedy="Give another with COLA_LISTEN or `cola serve --listen`.",
        )
    return Check(name="port", status="ok", finding=f"{listen} is free")


def _below_floor(name: str, floor: str) -> Check | None:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    if found != "not installed" and _numbers(found) >= _numbers(floor):
        return None
    return Check(name=name, status="fail", finding=found, remedy=f"pip install '{name}>={floor}'")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _nearest_existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _listens(target: str) -> bool:
    host, _, port = target.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False
