"""Tiny pretrained folders, one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cola_runtime.testing.tiny_models import ModelKind, save_tiny_model

TinyFolder = Callable[[ModelKind, str], Path]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    made: dict[tuple[str, str], Path] = {}

    def folder(kind: ModelKind, dtype: str) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = save_tiny_model(kind, tmp_path_factory.mktemp(f"{kind}-{dtype}"), dtype=dtype)
        return made[kind, dtype]

    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
