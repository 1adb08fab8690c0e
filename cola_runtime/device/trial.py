"""How fast this device steps: a short trial at its start, by which the coordinator places adapters."""

from __future__ import annotations

import time

import torch

from cola_runtime.adapter_spec import lora_spec
from cola_runtime.adapters.flat_layout import FlatLayout
from cola_runtime.device.optimizer import FlatAdamW
from cola_runtime.types import OptimizerHyperparameters, Site, SiteKind

ROUNDS = 6
_SITE = Site(index=0, name="trial", kind=SiteKind.LINEAR, in_features=8192, out_features=8192, input_group=0)


def optimizer_speed() -> float:
    """Numbers a second of an AdamW step, on the calling thread: the best of a few, some 5 ms each.

    Gradients and weights on the wire cost about the same per number, whatever the device.
    """
    layout = FlatLayout(lora_spec(rank=16, alpha=16.0, use_rslora=False, seed=0, sites=(_SITE,)))
    optimizer = FlatAdamW(OptimizerHyperparameters(kind="adamw", learning_rate=1e-3), layout, torch.float32)
    weights_P, gradient_P = torch.ones(layout.numel), torch.ones(layout.numel)
    fastest = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        optimizer.step(weights_P, gradient_P, rate=1e-3, clip=None)
        fastest = min(fastest, time.perf_counter() - started)
    return layout.numel / fastest
