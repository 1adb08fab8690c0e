"""What every carrier of taps guarantees: all of it, in order, in host memory; nothing behind a failure."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cola_runtime.base_model.accelerator import Accelerator
from cola_runtime.base_model.tap_carrier import CopyingCarrier, DirectCarrier, TapCarrier


@pytest.fixture
def carrier(accelerator: str) -> TapCarrier:
    return CopyingCarrier(Accelerator.of("cuda")) if accelerator == "cuda" else DirectCarrier()


def test_everything_arrives_in_order_with_its_shapes(carrier: TapCarrier, accelerator: str) -> None:
    arrived: list[object] = []
    for number in range(100):
        tensors = [
            torch.full((3, number % 4), float(number), device=accelerator),
            torch.arange(5, device=accelerator),
        ]
        carrier.carry(tensors, arrived.append)
    carrier.behind(lambda: arrived.append("end"))
    carrier.drained()
    assert arrived.pop() == "end"
    for number, copies in enumerate(arrived):
        full, counted = copies
        assert torch.equal(full, torch.full((3, number % 4), float(number)))
        assert torch.equal(counted, torch.arange(5))


def test_nothing_follows_a_failure_until_it_was_raised(carrier: TapCarrier, accelerator: str) -> None:
    arrived: list[object] = []

    def failing(_copies: Sequence[Tensor]) -> None:
        raise ValueError("the sink fails")

    def whole_step() -> None:
        carrier.carry([torch.ones(1, device=accelerator)], failing)
        carrier.behind(lambda: arrived.append("an end without its taps"))
        carrier.drained()

    with pytest.raises(ValueError, match="the sink fails"):
        whole_step()
    assert arrived == []
    carrier.behind(lambda: arrived.append("the next step"))
    carrier.drained()
    assert arrived == ["the next step"]
