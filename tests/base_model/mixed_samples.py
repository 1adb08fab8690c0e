"""Mixed batches of four different tenants on a tiny model, and what peft gives each of them alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec, lora_spec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding, TapPlan
from cola_runtime.gradients.accumulate import GradientAccumulator
from cola_runtime.gradients.taps import Tap
from cola_runtime.rows import Row
from cola_runtime.testing.peft_reference import adapter_parameters, batch_loss, peft_model
from cola_runtime.types import BaseStep, BaseStepResult, Lease, Segment, Site, TensorKey, TensorKind

Weights = dict[TensorKey, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One adapter with trained-looking (non-zero B) weights and its rows."""

    job_id: str
    spec: AdapterSpec
    weights: Weights
    rows: tuple[Row, ...]

    @property
    def lease(self) -> Lease:
        return Lease(job_id=self.job_id, epoch=1, device_id="device")

    def segment(self, encoding: Encoding = Encoding.ADAPTER_GRADIENT) -> Segment:
        return Segment(
            lease=self.lease,
            version=0,
            rows=self.rows,
            loss_denominator=float(sum(row.loss_weight for row in self.rows)),
            taps=TapPlan(encoding),
        )


def four_tenants(sites: tuple[Site, ...], dtype: str) -> list[Tenant]:
    """Ranks 4, 8, 4, 2; 1 to 3 rows of 5 to 29 tokens; all sites, the attention's, the upper layers', all.

    Tenants 0 and 3 differ in rank; 0 and 4 stack: five in all, the last one a twin of the first in shape.
    """
    half = len(sites) // 2
    chosen = [sites, sites[1::3], sites[half:], sites, sites]
    ranks, lengths = [4, 8, 4, 2, 4], [(17, 9), (29,), (5, 21, 12), (8, 8), (13, 25)]
    return [
        tenant(k, chosen[k], rank=ranks[k], lengths=lengths[k], dtype=dtype, use_rslora=k == 1)
        for k in range(5)
    ]


def tenant(
    number: int,
    sites: tuple[Site, ...],
    *,
    rank: int,
    lengths: tuple[int, ...],
    dtype: str,
    use_rslora: bool = False,
) -> Tenant:
    spec = lora_spec(
        rank=rank, alpha=6.0 + number, use_rslora=use_rslora, seed=number, sites=sites, dtype=dtype
    )
    return Tenant(
        job_id=f"job-{number}",
        spec=spec,
        weights=trained_weights(spec),
        rows=tuple(random_row(length, seed=100 * number + k) for k, length in enumerate(lengths)),
    )


def trained_weights(spec: AdapterSpec) -> Weights:
    generator = torch.Generator().manual_seed(spec.seed)
    weights = initial_weights(spec)
    for key, weight in weights.items():
        if key.kind is TensorKind.LORA_B:
            draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(0.1 * draw)
    return weights


def random_row(length: int, *, seed: int) -> Row:
    """Bytes, with weights 0 on a prompt of a third, 1 and 0.5 on the rest."""
    generator = np.random.default_rng(seed)
    weights = np.where(generator.random(length) < 0.3, 0.5, 1.0).astype(np.float32)
    weights[: max(1, length // 3)] = 0.0
    return Row(tokens=generator.integers(5, 250, length, dtype=np.int32), weights=weights)


def install_all(model: TappedModel, tenants: list[Tenant]) -> None:
    for member in tenants:
        model.install(member.lease, member.spec, 0, member.weights)


def run_segments(
    model: TappedModel, segments: list[Segment], *, train: bool = True
) -> tuple[BaseStepResult, list[Tap]]:
    taps: list[Tap] = []
    result = model.run(BaseStep(number=1, segments=tuple(segments), train=train), taps.append)
    return result, taps


def gradients_of(taps: list[Tap], position: int, member: Tenant) -> Weights:
    """What the member's device would sum up: GRAD_LORA_A and GRAD_LORA_B of every site."""
    accumulator = GradientAccumulator(member.spec)
    for tap in taps:
        if tap.segment == position:
            for key, tensor in tap.tensors.items():
                accumulator.add(key, tensor, member.weights)
    return accumulator.gradients()


def peft_gradients(path: Path, member: Tenant, dtype: str) -> tuple[Weights, float]:
    """Autograd through stock transformers with the member's adapter alone, and its mean loss."""
    model = peft_model(path, member.spec, dtype=dtype)
    factors = adapter_parameters(model, member.spec)
    with torch.no_grad():
        for key, parameter in factors.items():
            parameter.copy_(member.weights[key])
    loss = batch_loss(model, member.rows)
    loss.backward()
    grads = {key.gradient: p.grad for key, p in factors.items()}
    return {key: grad for key, grad in grads.items() if grad is not None}, float(loss)


def poisoned(member: Tenant) -> Tenant:
    """The same tenant with NaN all over its adapter."""
    return replace(member, weights={key: torch.full_like(w, torch.nan) for key, w in member.weights.items()})
