"""A base model actor that Ray finds no place for is told, with what it needs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cola_runtime.config import ServiceSettings
from cola_runtime.errors import Unavailable
from cola_runtime.runtime import cluster


class NeverPlaced:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def describe(self) -> None:
        await asyncio.Event().wait()


async def test_a_base_model_that_is_not_placed_in_time_names_the_resource_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "BASE_MODEL_START_SECONDS", 0.01)
    monkeypatch.setattr(cluster.ray, "cluster_resources", dict)
    monkeypatch.setattr(cluster, "base_model_handle", lambda *_, **__: object())
    monkeypatch.setattr(cluster, "RemoteBaseModel", NeverPlaced)
    with pytest.raises(Unavailable) as caught:
        await cluster.Cluster(ServiceSettings()).start_base_models("token")
    assert (caught.value.reason, "cola_base_model" in caught.value.remedy) == ("BASE_MODEL_NOT_PLACED", True)
