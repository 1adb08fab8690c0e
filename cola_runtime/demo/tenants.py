"""Who the demo's four tenants are: different data, ranks, learning rates, batch sizes and encodings."""

from __future__ import annotations

from dataclasses import dataclass

from cola_runtime.demo.datasets import TenantData, demo_tenants
from cola_runtime.spec import JobSpec, LoraSpec, OptimizerSpec, ScheduleSpec

RANKS = {"film": 4, "spam": 8, "deutsch": 16, "chat": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoTenant:
    data: TenantData
    spec: JobSpec
    rank: int

    @property
    def name(self) -> str:
        return self.data.tenant


def four_tenants(base_model: str, *, steps: int) -> tuple[DemoTenant, ...]:
    """`film` streams hidden gradients (`activations`), the other three `adapter_gradient`."""
    specs = {
        "film": _spec("film", base_model, steps, learning_rate=1e-3, rows=4, sites=("q_proj", "v_proj")),
        "spam": _spec("spam", base_model, steps, learning_rate=5e-4, rows=8),
        "deutsch": _spec("deutsch", base_model, steps, learning_rate=1e-3, rows=6),
        "chat": _spec("chat", base_model, steps, learning_rate=5e-4, rows=6),
    }
    specs["film"] = specs["film"].model_copy(update={"encoding": "activations"})
    return tuple(
        DemoTenant(data=data, spec=specs[data.tenant], rank=RANKS[data.tenant]) for data in demo_tenants()
    )


def _spec(
    name: str,
    base_model: str,
    steps: int,
    *,
    learning_rate: float,
    rows: int,
    sites: tuple[str, ...] | None = None,
) -> JobSpec:
    return JobSpec(
        name=name,
        base_model=base_model,
        adapter=LoraSpec(rank=RANKS[name], alpha=2.0 * RANKS[name], target_modules=sites or "all-linear"),
        optimizer=OptimizerSpec(learning_rate=learning_rate, max_grad_norm=1.0),
        schedule=ScheduleSpec(kind="linear", warmup_steps=2),
        steps=steps,
        rows_per_step=rows,
        checkpoint_every=5,
    )
