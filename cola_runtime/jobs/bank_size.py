"""What a job's adapter takes beside the base model. Pure; torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from cola_runtime.adapter_spec import AdapterKind, AdapterPart, HeadKind, LinearizedLoraKind
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.gradients.planner import ITEM_BYTES
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.types import BaseModelDescription


def bank_bytes(plan: TrainingPlan, base: BaseModelDescription) -> int:
    """In the base model's dtype, a head in the adapter's; twice while one version before is kept."""
    return _bytes(plan, base, plan.adapter.parts)


def limited_bytes(plan: TrainingPlan, base: BaseModelDescription) -> int:
    """Of these what counts against a bank's limit: not heads, and nothing of what is merged."""
    bodies = [part for part in plan.adapter.parts if not isinstance(part.kind, HeadKind)]
    return 0 if plan.merged else _bytes(plan, base, bodies)


def _bytes(plan: TrainingPlan, base: BaseModelDescription, parts: Iterable[AdapterPart]) -> int:
    return (1 + plan.max_staleness) * sum(
        ITEM_BYTES[plan.adapter.dtype if isinstance(part.kind, HeadKind) else base.dtype]
        * _banked_factors(part.kind)
        * sum(prod(shape) for site in part.sites for shape in site_weight_shapes(part.kind, site).values())
        for part in parts
    )


def _banked_factors(kind: AdapterKind) -> int:
    """Times the trained weights: beside linearized LoRA's deltas the bank holds the point around which."""
    return 2 if isinstance(kind, LinearizedLoraKind) and kind.initial_b != "zero" else 1
