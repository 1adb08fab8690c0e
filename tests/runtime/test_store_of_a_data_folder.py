"""A data folder's datasets and checkpoints belong to one job store: another one does not clear them away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_runtime.config import ServiceSettings
from cola_runtime.errors import Conflict
from cola_runtime.runtime.coordinator import running_coordinator
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.testing.in_process import no_devices
from tests.postgres import TEMPLATE, PostgresServer


class NoBaseModel:
    """As far as a service gets that has its store: it asks for the base model next."""

    async def describe(self) -> None:
        raise ConnectionError("there is none")


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    made = postgres.new_database(template=TEMPLATE)
    yield made
    postgres.drop(made)


async def start(**settings: object) -> None:
    chosen = ServiceSettings.model_validate(settings)
    async with running_coordinator(chosen, [NoBaseModel()], "token", devices_at=no_devices):  # type: ignore[arg-type]
        pytest.fail("it has no base model")


async def test_a_service_with_another_job_store_refuses_the_folder_and_deletes_nothing(
    tmp_path: Path, url: str
) -> None:
    with pytest.raises(ConnectionError):
        await start(data_dir=tmp_path)
    storage = ObjectStorage(f"file://{tmp_path / 'objects'}")
    storage.put("checkpoints/job-1/1.safetensors", b"kept")
    with pytest.raises(Conflict) as caught:
        await start(data_dir=tmp_path, database=url)
    assert caught.value.reason == "STORE_MISMATCH"
    assert storage.get("checkpoints/job-1/1.safetensors") == b"kept"
    with pytest.raises(ConnectionError):
        await start(data_dir=tmp_path / "other", database=url)
    with pytest.raises(Conflict):
        await start(data_dir=tmp_path / "other")
