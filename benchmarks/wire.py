"""What each encoding and compression costs, in bytes and CPU on both sides; and the planner's choice.

    python benchmarks/wire.py [--quick] [--json] [--seed N]

1. One job (SmolLM2, all seven projections, r = 8, 8 rows of 128 tokens = 1,024 tokens a step, every token a
   label) under `activations` and `adapter_gradient`, through SDK and gRPC in one process, bytes by the
   runtime's own counters. The base model computes in bfloat16, so that `activations` travels as bfloat16
   with x shared among q, k, v and gate, up; `adapter_gradient` is float32.
2. The taps of one layer's sites, times the layers, from random x and g through the real stacks, compression,
   frames and accumulators on one thread (cola_runtime/testing/wire_cells.py).
3. The planner's plan against the measured best at three link speeds: bytes / link speed + CPU of both sides.
4. What compression costs a gradient and 50 steps of training on a tiny model (not with --quick).
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cola_runtime.adapter_spec import AdapterKind, AdapterPart, AdapterSpec, LinearKind, LoraKind
from cola_runtime.base_model.pretrained import prepare_smollm2
from cola_runtime.base_model.product_rate import matrix_product_flops
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.demo.datasets import demo_tenants
from cola_runtime.encodings import Compression, TapPlan
from cola_runtime.gradients.planner import Costs, Workload, plan_taps
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.lossy import compression_cost
from cola_runtime.testing.record import argument_parser, emit, record
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.testing.wire_cells import Cell, measure_cells, possible_plans
from cola_runtime.types import Site

ROWS, TOKENS = 8, 128
ENCODINGS = ("activations", "adapter_gradient")
JOB_TIMEOUT_SECONDS = 1800.0

TARGETS = {"q,v": ("q_proj", "v_proj"), "all": None}
KINDS: dict[str, AdapterKind] = {"r4": LoraKind(rank=4), "r16": LoraKind(rank=16), "full": LinearKind()}
LINKS = {"100 Mbit/s": 12.5e6, "1 Gbit/s": 125e6, "10 Gbit/s": 1.25e9}

Groups = list[dict[TapPlan, Cell]]
"""Per input group of one layer: plan -> what it costs."""


def main() -> None:
    arguments = argument_parser(__doc__ or "").parse_args()
    started = datetime.now(UTC)
    steps = 1 if arguments.quick else 3
    with tempfile.TemporaryDirectory() as folder:
        by_encoding, sites = asyncio.run(measure(Path(folder), steps=steps, seed=arguments.seed))
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    up = {encoding: counted["bytes_up"] for encoding, counted in by_encoding.items()}
    results: dict[str, Any] = {
        "activations_bf16_over_adapter_gradient": up["activations"] / up["adapter_gradient"],
        "rows": ROWS,
        "tokens_per_step": ROWS * TOKENS,
        "steps": steps,
        "per_step": by_encoding,
        **measure_tables(sites, quick=arguments.quick),
    }
    if not arguments.quick:
        results["compression"] = compression_costs()
    emit(record("wire", results, seed=arguments.seed, started=started), arguments.json)


def measure_tables(sites: Sequence[Site], *, quick: bool) -> dict[str, Any]:
    """A step's cost in every cell of the table, and what the planner would have taken."""
    base_flops = matrix_product_flops(torch.bfloat16)
    cells: dict[str, Any] = {}
    planner: dict[str, Any] = {}
    for target, names in TARGETS.items():
        chosen = [site for site in sites if names is None or site.name.endswith(names)]
        for rows in (32, 256) if quick else (32, 256, 2048):
            for name in ("r4", "r16") if quick else KINDS:
                groups = measure_layer(KINDS[name], chosen, rows, rounds=1 if quick else 5)
                layers = len({site.input_group for site in chosen}) // len(groups)
                key = f"{target} N={rows} {name}"
                cells[key] = {str(plan): _step(groups, plan, layers) for plan in possible_plans(KINDS[name])}
                for link, speed in LINKS.items():
                    costs = Costs(link_bytes_per_second=speed, base_flops=base_flops)
                    planner[f"{key} {link}"] = against_best(KINDS[name], chosen, rows, groups, costs)
    worst = max(entry["over_best"] for entry in planner.values())
    return {"planner_over_best": worst, "base_flops": base_flops, "cells": cells, "planner": planner}


def measure_layer(kind: AdapterKind, sites: Sequence[Site], rows: int, *, rounds: int) -> Groups:
    """Every input group of the first layer that has sites."""
    return [
        measure_cells(kind, group, rows, dtype=torch.bfloat16, rounds=rounds) for group in _first_layer(sites)
    ]


def _first_layer(sites: Sequence[Site]) -> list[list[Site]]:
    layer = sites[0].name.split(".")[:3]
    groups: dict[int, list[Site]] = {}
    for site in sites:
        if site.name.split(".")[:3] == layer:
            groups.setdefault(site.input_group, []).append(site)
    return list(groups.values())


def _step(groups: Groups, plan: TapPlan, layers: int) -> dict[str, float]:
    cells = [group[plan] for group in groups]
    return {
        "bytes_up": layers * sum(cell.bytes_up for cell in cells),
        "base_cpu_ms": layers * 1e3 * sum(cell.base_seconds for cell in cells),
        "device_cpu_ms": layers * 1e3 * sum(cell.device_seconds for cell in cells),
    }


def against_best(
    kind: AdapterKind, sites: Sequence[Site], rows: int, groups: Groups, costs: Costs
) -> dict[str, Any]:
    """Measured seconds of the planner's exact plan over those of the best encoding of every group."""
    spec = AdapterSpec(parts=(AdapterPart(kind=kind, sites=tuple(sites)),), seed=0)
    plan, _ = plan_taps(spec, Workload(tokens=rows, microbatches=1, base_dtype="bfloat16"), costs)
    numbers = [group[0].input_group for group in _first_layer(sites)]
    taken, best = 0.0, 0.0
    for number, group in zip(numbers, groups, strict=True):
        seconds = {
            option.encoding: cell.seconds(costs.link_bytes_per_second)
            for option, cell in group.items()
            if option.compression is Compression.NONE
        }
        taken += seconds[plan.encoding_of(number)]
        best += min(seconds.values())
    return {"plan": str(plan), "over_best": taken / best}


def compression_costs() -> Mapping[str, Mapping[str, float]]:
    """By kind and plan, on a tiny Llama."""
    kinds = {"lora r8": LoraKind(), "full": LinearKind()}
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_model("llama", Path(folder))
        return {
            f"{name} {plan}": asdict(compression_cost(path, kind, plan))
            for name, kind in kinds.items()
            for plan in possible_plans(kind)
            if plan.compression is not Compression.NONE
        }


async def measure(
    folder: Path, *, steps: int, seed: int
) -> tuple[dict[str, dict[str, float]], tuple[Site, ...]]:
    """Counted bytes of one step under each encoding, the CPU that the device spent on it; and the sites."""
    model = prepare_smollm2(Path(".cache/models"))
    settings = service_for(
        folder,
        model=model,
        name="smollm2",
        dtype="bfloat16",
        attention="auto",
        token_budget=ROWS * TOKENS,
        threads=2,
    )
    async with running_in_process(settings) as (service, _), await tenant_client(service, "wire") as client:
        counted = {
            encoding: await _one_job(client, encoding, steps=steps, seed=seed) for encoding in ENCODINGS
        }
        return counted, service.base_model.sites


async def _one_job(client: AsyncClient, encoding: str, *, steps: int, seed: int) -> dict[str, float]:
    spec = JobSpec.model_validate(
        {
            "name": encoding,
            "base_model": "smollm2",
            "adapter": {"rank": 8},
            "rows_per_step": ROWS,
            "steps": steps,
            "max_length": TOKENS,
            "truncate": True,
            "loss": "full",
            "encoding": encoding,
            "seed": seed,
            "checkpoint_every": steps,
        }
    )
    handle = await client.submit(spec, training=long_rows())
    job = await handle.wait(JOB_TIMEOUT_SECONDS)
    tokens = {step.tokens for step in await handle.metrics()}
    assert tokens == {ROWS * TOKENS}, f"every step computes {ROWS} x {TOKENS} tokens, got {tokens}"
    return {
        "bytes_up": job.bytes_up / steps,
        "bytes_down": job.bytes_down / steps,
        "device_seconds": job.device_seconds / steps,
    }


def long_rows() -> bytes:
    """Real chat text, joined to rows that are longer than TOKENS tokens and cut there."""
    chat = demo_tenants(training_rows=400)[3]
    texts = [json.loads(line)["text"] for line in chat.training.splitlines()]
    joined = [" ".join(texts[start : start + 10]) for start in range(0, len(texts) - 9, 10)]
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in joined)


if __name__ == "__main__":
    main()
