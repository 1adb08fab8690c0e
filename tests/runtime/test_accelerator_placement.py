"""Where a cluster's base model goes: on a GPU that a node offers, or refused before Ray waits for one."""

from __future__ import annotations

import pytest

from cola_runtime.config import BaseModelSettings
from cola_runtime.errors import InvalidInput
from cola_runtime.runtime.cluster import chosen_accelerator

WITH_GPU = {"CPU": 4.0, "GPU": 1.0}
WITHOUT = {"CPU": 4.0}


def settings(accelerator: str) -> BaseModelSettings:
    return BaseModelSettings.model_validate({"accelerator": accelerator})


@pytest.mark.parametrize(
    ("asked", "resources", "chosen"),
    [
        ("auto", WITH_GPU, "cuda"),
        ("auto", WITHOUT, "cpu"),
        ("cpu", WITH_GPU, "cpu"),
        ("cuda", WITH_GPU, "cuda"),
    ],
)
def test_auto_takes_a_gpu_where_a_node_offers_one(
    asked: str, resources: dict[str, float], chosen: str
) -> None:
    assert chosen_accelerator(settings(asked), resources) == chosen


def test_cuda_is_refused_where_no_node_offers_a_gpu() -> None:
    with pytest.raises(InvalidInput) as caught:
        chosen_accelerator(settings("cuda"), WITHOUT)
    assert caught.value.reason == "ACCELERATOR_MISSING"
    assert caught.value.where == "base_models.accelerator"
