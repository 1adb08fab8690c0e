"""Every test runs on the processor, and once more on a CUDA device where there is one."""

from __future__ import annotations

import pytest
import torch

from tests.base_model.conftest import one_thread, tiny_folder

__all__ = ["one_thread", "tiny_folder"]


def _present(where: str) -> str:
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    return where


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.accelerator)])
def cuda(request: pytest.FixtureRequest) -> str:
    """For tests whose siblings on the processor are in another folder."""
    return _present(request.param)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.accelerator)])
def accelerator(request: pytest.FixtureRequest) -> str:
    return _present(request.param)
