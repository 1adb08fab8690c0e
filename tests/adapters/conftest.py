"""The registered module of adapter_samples, in this process for one test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cola_runtime.adapters import module_registry
from tests.adapters.adapter_samples import bent


@pytest.fixture
def bent_is_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module_registry, "_factories", {})
    module_registry.module_shapes.cache_clear()
    module_registry.register_adapter_module("bent", bent)
    yield
    module_registry.module_shapes.cache_clear()
