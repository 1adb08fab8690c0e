"""Tenants with adapters of every kind, and what autograd gives for each of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterPart,
    AdapterSpec,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
)
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.site_kinds import unfit
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.testing.ordinary_modules import add_adapter, wide_norms
from cola_runtime.testing.peft_reference import batch_loss, relative_difference
from cola_runtime.types import Site
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    gradients_of,
    install_all,
    random_row,
    run_segments,
)

KINDS: dict[str, AdapterKind] = {
    "lora": LoraKind(rank=3, alpha=6.0),
    "rslora": LoraKind(rank=4, alpha=3.0, use_rslora=True),
    "linear": LinearKind(scaling=0.5),
    "linear-bias": LinearKind(bias=True, scaling=0.7),
    "mlp-relu": MlpKind(hidden=7, activation="relu", scaling=1.5),
    "mlp-gelu": MlpKind(hidden=5, activation="gelu"),
    "linearized-zero": LinearizedLoraKind(rank=3, alpha=6.0, initial_b="zero"),
    "linearized-random": LinearizedLoraKind(
        rank=2, alpha=1.0
    ),  # B0 is not small: s keeps the sum near the base
}
NONLINEAR = {"mlp-relu", "mlp-gelu"}
BOUNDS = {"float64": 1e-10, "float32": 1e-5}
ZERO = 1e-7  # of the largest gradient


def random_weights(spec: AdapterSpec) -> Weights:
    draw = torch.Generator().manual_seed(spec.seed)
    return {
        key: weight + 0.1 * torch.randn(weight.shape, generator=draw, dtype=torch.float64).to(weight.dtype)
        for key, weight in initial_weights(spec).items()
    }


def tenant(number: int, parts: tuple[AdapterPart, ...], dtype: str) -> Tenant:
    spec = AdapterSpec(parts=parts, seed=number, dtype=dtype)
    lengths = [(17, 9), (29,), (5, 21), (12,)][number % 4]
    rows = tuple(random_row(length, seed=100 * number + k) for k, length in enumerate(lengths))
    return Tenant(job_id=f"job-{number}", spec=spec, weights=random_weights(spec), rows=rows)


def everywhere(number: int, kind: AdapterKind, sites: tuple[Site, ...], dtype: str) -> Tenant:
    """The kind at each of `sites` that it can be at."""
    return tenant(number, (AdapterPart(kind=kind, sites=fitting(kind, sites)),), dtype)


def fitting(kind: AdapterKind, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    return tuple(site for site in sites if unfit(kind, site) is None)


def autograd_gradients(path: Path, member: Tenant, tapped: TappedModel) -> Weights:
    """The stock model with the member's adapter as ordinary modules.

    The hand-written Llama computes everything in the model's dtype, so the stock one must, too: transformers'
    RMSNorm and eager attention go through float32. Other bodies are the stock model's own code.
    """
    description = tapped.describe("", "")
    details = description.details
    by_hand = details["body"] == "LlamaBody"
    attention = "sdpa" if by_hand else details["attention"]
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, description.dtype), attn_implementation=attention
    )
    if by_hand:
        wide_norms(model)
    model.to(details["accelerator"].split(",")[0])  # angles, which are float32, differ by a digit elsewhere
    parameters = add_adapter(model.requires_grad_(False).eval(), member.spec, member.weights)
    batch_loss(model, member.rows).backward()
    return {
        key.gradient: torch.zeros_like(parameter).cpu() if parameter.grad is None else parameter.grad.cpu()
        for key, parameter in parameters.items()
    }


def mixed_kinds(
    sites: tuple[Site, ...], encoding: Encoding, dtype: str
) -> tuple[list[Tenant], list[Encoding]]:
    """One tenant per kind, and `encoding` for each, or activations where the kind does not have it."""
    tenants = [everywhere(number, kind, sites, dtype) for number, kind in enumerate(KINDS.values())]
    linear_only = encoding is Encoding.WEIGHT_GRADIENT
    return tenants, [
        Encoding.ACTIVATIONS if linear_only and name in NONLINEAR else encoding for name in KINDS
    ]


def assert_exact(
    path: Path, tapped: TappedModel, tenants: Sequence[Tenant], encodings: Sequence[Encoding], bound: float
) -> None:
    """Every tenant's gradient out of one mixed batch against autograd through its adapter alone."""
    install_all(tapped, tenants)
    segments = [member.segment(encoding) for member, encoding in zip(tenants, encodings, strict=True)]
    result, taps = run_segments(tapped, segments)
    assert [loss.reason for loss in result.losses] == [None] * len(tenants)
    for position, member in enumerate(tenants):
        expected = autograd_gradients(path, member, tapped)
        differences = relative_difference(gradients_of(taps, position, member), expected)
        floor = ZERO * max(float(gradient.norm()) for gradient in expected.values())
        # A bias at k of an attention without rotations shifts all scores alike: its gradient is zero but for
        # rounding, and nothing can be relative to it.
        differences = {key: d for key, d in differences.items() if float(expected[key].norm()) > floor}
        worst = max(differences, key=lambda key: differences[key])
        assert differences[worst] < bound, (member.spec.parts[0].kind, worst, differences[worst])
