"""Tokens a second of the whole runtime against peft, with K tenants on this machine.

    python benchmarks/throughput.py [--quick] [--json] [--seed N] [--accelerator cuda]

SmolLM2-135M, LoRA r = 8 on all seven projections, AdamW; every tenant is one sender of a real chat set, with
one row a step. All sides train the same rows and end with saved adapters; loading the base model is in none.
  runtime          `cola serve`'s composition: Ray, gRPC, two devices, SDK; from the first submit to the last
                   adapter downloaded
  peft_sequential  the best that peft does for one tenant after another: each to its end (nothing is
                   switched), or in turns with `set_adapter`
  peft_processes   a peft process per tenant, all at once
  peft_jemalloc    peft_sequential in a process that has the jemalloc which the runtime gives its base models
                   and devices (Ray's package brings it along; peft as it is installed has glibc's malloc)
Every side has both cores and takes its best: peft's threads and attention are tried on one tenant, the
runtime's base model runs with one thread, with two, and as two replicas of one thread each. Memory (PSS of
all processes of a side) is looked at when the last adapter is saved: a look costs CPU that both sides need.
Peft's sequential rate does not depend on the number of tenants: it is measured before and after each shape of
the runtime (--quick: before), and a ratio is that of the runtime's fastest shape over the better one of the
two beside it: a shared machine's speed drifts. That with jemalloc is measured before the first and after the
last shape. Row lengths vary by a quarter around their mean.
Jobs are short, twelve steps, so that beginning and ending one counts; one and 16 tenants also train 48 steps.
--accelerator cuda: the base model, one replica of one thread, is on a CUDA device, and so is peft; eight rows
of 512 tokens a step, which peft pads to the longest, or one of 128. Devices are still CPU processes, four
fewer than cores. Where a sender's messages are used up, the next senders' follow.
--quick: 16 tenants in bfloat16, a few steps.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cola_runtime.base_model.accelerator import Accelerator
from cola_runtime.base_model.pretrained import prepare_smollm2
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.config import BaseModelSettings, DeviceSettings, SchedulerSettings, ServiceSettings
from cola_runtime.demo.memory import memory_bytes
from cola_runtime.machine import keep_started_objects
from cola_runtime.process_environment import jemalloc
from cola_runtime.rows import Row
from cola_runtime.runtime.coordinator import running_service
from cola_runtime.spec import JobSpec
from cola_runtime.testing.chat_rows import chat_datasets, tokenized
from cola_runtime.testing.exactness import tenant_client
from cola_runtime.testing.own_process import as_an_actor
from cola_runtime.testing.peft_rivals import (
    PeftSetting,
    Trained,
    fastest,
    one_after_another,
    process_each,
    taking_turns,
)
from cola_runtime.testing.record import argument_parser, emit, record

SMOLLM2 = "smollm2-135m-instruct"
CACHE = Path(".cache/models")
RANK, ALPHA, LEARNING_RATE = 8, 16.0, 1e-3
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
JOB_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    dtype: str
    tokens: int  # mean length of a row
    tenants: tuple[int, ...]
    steps: int
    peft_tenants: int  # whose training gives peft's rate
    processes: tuple[int, ...]
    twice: bool = True  # peft's rate, before and behind each shape's
    rows_per_step: int = 1
    accelerator: str = "cpu"  # of the base model, and of peft
    devices: int = 2
    token_budget: int = 2048
    shapes: tuple[tuple[int, int], ...] = (
        (1, 1),
        (1, 2),
        (2, 1),
    )  # the base model's replicas, threads of each

    @property
    def name(self) -> str:
        rows = "" if self.rows_per_step == 1 else f"_{self.rows_per_step}_rows"
        return f"{self.tokens}_{self.dtype}{rows}_{self.steps}_steps"


CASES = (
    Case(
        dtype="bfloat16",
        tokens=32,
        tenants=(1, 2, 4, 8, 16, 32),
        steps=12,
        peft_tenants=4,
        processes=(2, 4, 8),
    ),
    Case(
        dtype="bfloat16",
        tokens=32,
        tenants=(1, 16),
        steps=48,
        peft_tenants=2,
        processes=(),
        shapes=((2, 1),),
    ),
    Case(dtype="float32", tokens=128, tenants=(1, 8), steps=8, peft_tenants=2, processes=(2,)),
)
QUICK_CASES = (
    Case(
        dtype="bfloat16",
        tokens=32,
        tenants=(16,),
        steps=4,
        peft_tenants=2,
        processes=(),
        twice=False,
        shapes=((2, 1),),
    ),
)

FULL_CUDA_CASE = Case(
    dtype="bfloat16",
    tokens=512,
    tenants=(1, 4, 16, 64),
    steps=12,
    peft_tenants=4,
    processes=(2, 4),
    rows_per_step=8,
    accelerator="cuda",
    devices=max(2, (os.cpu_count() or 1) - 4),
    token_budget=32_768,
    shapes=((1, 1),),
)
CUDA_CASES = (FULL_CUDA_CASE, replace(FULL_CUDA_CASE, tokens=128, tenants=(16, 64), rows_per_step=1))
QUICK_CUDA_CASES = (
    replace(FULL_CUDA_CASE, tenants=(16,), steps=4, peft_tenants=2, processes=(), twice=False),
)
CASES_OF = {"cpu": (CASES, QUICK_CASES), "cuda": (CUDA_CASES, QUICK_CUDA_CASES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the runtime took for one number of tenants."""

    trained: Trained
    base_busy: float  # seconds of base steps, of all replicas, over seconds
    base_steps: int


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--accelerator", choices=tuple(CASES_OF), default="cpu")
    arguments = parser.parse_args()
    accelerator = Accelerator.of(arguments.accelerator)
    started = datetime.now(UTC)
    path = prepare_smollm2(CACHE)
    cases = CASES_OF[arguments.accelerator][arguments.quick]
    results = {case.name: run_case(path, case, seed=arguments.seed) for case in cases}
    first = results[cases[0].name]
    summary = {
        "speedup_over_peft_sequential": first["speedup_over_peft_sequential"],
        "speedup_over_peft_jemalloc": first["speedup_over_peft_jemalloc"],
        "base_busy": first["base_busy"],
        "accelerator": accelerator.description,
        "rank": RANK,
        "cases": results,
    }
    name = "throughput_cuda" if accelerator.is_cuda else "throughput"
    emit(record(name, summary, seed=arguments.seed, started=started), arguments.json)


def run_case(path: Path, case: Case, *, seed: int) -> dict[str, Any]:
    datasets = chat_datasets(
        path,
        tenants=max(case.tenants),
        rows=case.steps * case.rows_per_step,
        tokens=case.tokens,
        estimate=case.accelerator == "cuda",
        seed=seed,
    )
    rows = tokenized(path, datasets)
    setting = PeftSetting(
        model=path,
        dtype=case.dtype,
        target_modules=PROJECTIONS,
        rank=RANK,
        alpha=ALPHA,
        learning_rate=LEARNING_RATE,
        rows_per_step=case.rows_per_step,
        accelerator=case.accelerator,
    )
    tried = (8 if case.twice else 2) * case.rows_per_step  # of three, luck chose the threads
    setting = fastest(setting, rows[0][:tried], trials=2 if case.twice else 1)
    few = rows[: case.peft_tenants]
    peft = [sequential(setting, few)]
    preloaded = [sequential_with_jemalloc(setting, rows[0][:tried], few)]
    runtime: dict[tuple[int, int], dict[int, Served]] = {}
    for shape in case.shapes:
        print(case.name, "peft", peft[-1], flush=True)
        runtime[shape] = asyncio.run(serve_all(path, case, datasets, shape=shape))
        peft.append(sequential(setting, few) if case.twice else peft[-1])
    if case.twice:
        preloaded.append(sequential_with_jemalloc(setting, rows[0][:tried], few))
    fastest_preloaded = max((rate for rates in preloaded for rate in rates.values()), default=None)
    beside = {
        shape: max(*before.values(), *after.values())
        for shape, before, after in zip(case.shapes, peft, peft[1:], strict=False)
    }
    processes = {count: process_each(setting, rows[:count]) for count in case.processes}
    fastest_shape = {
        count: max(case.shapes, key=lambda shape: _rate(runtime[shape][count])) for count in case.tenants
    }
    best = {count: runtime[shape][count] for count, shape in fastest_shape.items()}
    return {
        "mean_row_tokens": float(np.mean([row.length for of_tenant in rows for row in of_tenant])),
        "steps": case.steps,
        "speedup_over_peft_sequential": {
            str(count): _rate(best[count]) / beside[shape] for count, shape in fastest_shape.items()
        },
        "speedup_over_peft_jemalloc": None
        if fastest_preloaded is None
        else {str(count): _rate(served) / fastest_preloaded for count, served in best.items()},
        "speedup_over_peft_processes": {
            str(count): _rate(best[count]) / trained.tokens_per_second
            for count, trained in processes.items()
            if count in best
        },
        "base_busy": {str(count): served.base_busy for count, served in best.items()},
        "runtime": {
            f"{count}_tenants_{replicas}_replicas_{threads}_threads": _shown(served)
            for (replicas, threads), of_shape in runtime.items()
            for count, served in of_shape.items()
        },
        "peft_sequential_tokens_per_second": {name: [each[name] for each in peft] for name in peft[0]},
        "peft_jemalloc_tokens_per_second": {
            name: [each[name] for each in preloaded] for name in preloaded[0]
        },
        "peft_threads": setting.threads,
        "peft_attention": setting.attention,
        "peft_processes": {
            str(count): {"tokens_per_second": t.tokens_per_second, "gib": t.memory_bytes / 2**30}
            for count, t in processes.items()
        },
    }


def sequential(setting: PeftSetting, tenants: Sequence[Sequence[Row]]) -> dict[str, float]:
    """Tokens a second of each way to train one tenant after another."""
    rates = {
        "to_its_end": one_after_another(setting, tenants).tokens_per_second,
        "in_turns": taking_turns(setting, tenants).tokens_per_second,
    }
    Accelerator.of(setting.accelerator).give_back()
    return rates


def sequential_with_jemalloc(
    setting: PeftSetting, tried: Sequence[Row], tenants: Sequence[Sequence[Row]]
) -> dict[str, float]:
    """`sequential` in a process of its own that has the runtime's allocator, with what is fastest there.

    Empty on CUDA, where host memory is not what limits, and where Ray's package brings no jemalloc.
    """
    if not jemalloc() or setting.accelerator != "cpu":
        return {}
    return as_an_actor(_fastest_sequential, setting, tried, tenants)


def _fastest_sequential(
    setting: PeftSetting, tried: Sequence[Row], tenants: Sequence[Sequence[Row]]
) -> dict[str, float]:
    return sequential(fastest(setting, tried), tenants)


async def serve_all(
    path: Path, case: Case, datasets: Sequence[bytes], *, shape: tuple[int, int]
) -> dict[int, Served]:
    """Every number of tenants on one service, after short jobs that warm it up."""
    replicas, threads = shape
    with tempfile.TemporaryDirectory() as folder:
        settings = ServiceSettings(
            data_dir=Path(folder) / "service",
            listen="127.0.0.1:0",
            base_models=(
                BaseModelSettings.model_validate(
                    {
                        "name": SMOLLM2,
                        "path": path,
                        "dtype": case.dtype,
                        "accelerator": case.accelerator,
                        "threads": threads,
                        "replicas": replicas,
                    }
                ),
            ),
            devices=DeviceSettings(count=case.devices),
            scheduler=SchedulerSettings(token_budget=case.token_budget),
        )
        async with running_service(settings) as service, AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(await tenant_client(service, f"tenant-{number}"))
                for number in range(max(case.tenants))
            ]
            await train(case, clients[:replicas], datasets, steps=2, folder=Path(folder) / "warm")
            keep_started_objects()  # as `cola serve` does, which has no torch and no peft in its process
            found: dict[int, Served] = {}
            for count in case.tenants:
                adapters = Path(folder) / f"adapters-{count}"
                found[count] = await train(case, clients[:count], datasets, steps=case.steps, folder=adapters)
                print(case.name, f"{count} tenants, {replicas} x {threads}", _shown(found[count]), flush=True)
            return found


async def train(
    case: Case,
    clients: Sequence[AsyncClient],
    datasets: Sequence[bytes],
    *,
    steps: int,
    folder: Path,
) -> Served:
    """One job of each client, all at once, from the first submit to the last adapter on disk."""
    before = await clients[0].describe()
    started = time.perf_counter()
    jobs = await asyncio.gather(
        *(
            train_one(case, client, dataset, steps=steps, folder=folder / str(number))
            for number, (client, dataset) in enumerate(zip(clients, datasets, strict=False))
        )
    )
    seconds = time.perf_counter() - started
    after = await clients[0].describe()
    return Served(
        trained=Trained(tokens=sum(jobs), seconds=seconds, memory_bytes=memory_bytes()),
        base_busy=(after.base_busy_seconds - before.base_busy_seconds) / seconds,
        base_steps=after.base_steps - before.base_steps,
    )


async def train_one(case: Case, client: AsyncClient, dataset: bytes, *, steps: int, folder: Path) -> int:
    """Tokens trained on."""
    spec = JobSpec.model_validate(
        {
            "name": f"chat-{steps}",
            "base_model": SMOLLM2,
            "steps": steps,
            "rows_per_step": case.rows_per_step,
            "shuffle": False,
            "adapter": {"rank": RANK, "alpha": ALPHA, "target_modules": "all-linear"},
            "optimizer": {"learning_rate": LEARNING_RATE},
            "checkpoint_every": steps,
        }
    )
    handle = await client.submit(spec, training=dataset)
    job = await handle.wait(JOB_TIMEOUT_SECONDS)
    await handle.download_adapter(folder)
    return job.tokens


def _rate(served: Served) -> float:
    return served.trained.tokens_per_second


def _shown(served: Served) -> dict[str, float]:
    return {
        "tokens_per_second": served.trained.tokens_per_second,
        "seconds": served.trained.seconds,
        "base_busy": served.base_busy,
        "base_steps": served.base_steps,
        "gib": served.trained.memory_bytes / 2**30,
    }


if __name__ == "__main__":
    main()
