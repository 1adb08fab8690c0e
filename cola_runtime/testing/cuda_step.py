"""The base step's benchmark on a CUDA device: our mixed step, the frozen floor and peft, each side alone.

The model has SmolLM2-135M's shape and random weights; a side is timed from a device that has nothing to do to
one that has computed everything. Nothing is interleaved: nobody else is on the device, and memory is scarce.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cola_runtime.base_model.accelerator import Accelerator
from cola_runtime.testing.architectures import save_smollm2_shape
from cola_runtime.testing.base_step_sides import LORA, Ours, Peft, Stock, random_rows, tokens_of
from cola_runtime.testing.record import interleaved

SIZES = ((16, 32), (8, 128), (64, 512), (256, 128))  # tenants, tokens of each one's row
Step = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaCase:
    tenants: int
    tokens: int
    dtype: str
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.tenants}x{self.tokens}_{self.dtype}"


CUDA_CASES = tuple(
    CudaCase(tenants=tenants, tokens=tokens, dtype=dtype, rounds=10 if tenants < 64 else 5)
    for dtype in ("bfloat16", "float32")
    for tenants, tokens in SIZES
)
QUICK_CUDA_CASES = CUDA_CASES[:1]


class ComputedOnly:
    """Our step up to where all is computed, its taps still being handed out: as the service runs it."""

    def __init__(self, ours: Ours) -> None:
        self._ours = ours

    def __call__(self) -> None:
        self._ours.step("mixed", wait_for_taps=False)

    def drained(self) -> None:
        self._ours.drained()


def cuda_cases(folder: Path, cases: Sequence[CudaCase], seed: int) -> dict[str, Any]:
    """Case -> side -> median, least and most seconds, thread CPU seconds, and bytes at the peak.

    None for a side that did not fit in memory.
    """
    accelerator = Accelerator.of("cuda")
    path = save_smollm2_shape(folder)
    results = {case.name: _case(path, case, accelerator, seed) for case in cases}
    return {"accelerator": accelerator.description, "cases": results}


def _case(path: Path, case: CudaCase, accelerator: Accelerator, seed: int) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for name, build in _sides(path, case, accelerator, seed):
        sides[name] = _measured(name, build, case, accelerator)
        gc.collect()
        accelerator.give_back()
        print(case.name, name, sides[name], flush=True)
    floor = sides["floor"] and sides["floor"]["seconds"]
    ratios = {f"{name}_over_floor": side["seconds"] / floor for name, side in sides.items() if side and floor}
    return {**ratios, "rounds": case.rounds, "sides": sides}


def _sides(
    path: Path, case: CudaCase, accelerator: Accelerator, seed: int
) -> Iterator[tuple[str, Callable[[], Step]]]:
    rows_BT = random_rows(case.tenants, case.tokens, seed)
    tokens_BT = tokens_of(rows_BT).to(accelerator.device)

    def mixed() -> Ours:
        ours = Ours(path, case.dtype, accelerator="cuda")
        ours.add_team("mixed", rows_BT, tenants=case.tenants, kinds=(LORA,))
        return ours

    def peft(tenants: int) -> Peft:
        return Peft(path, case.dtype, "sdpa", tenants=tenants, accelerator=accelerator)

    yield "floor", lambda: partial(Stock(path, case.dtype, accelerator).step, tokens_BT)
    yield "mixed", lambda: partial(mixed().step, "mixed")
    yield "mixed_computed", lambda: ComputedOnly(mixed())
    yield "peft_joint", lambda: partial(peft(1).joint, tokens_BT)
    if case.tenants < 64 and case.dtype == "bfloat16":  # beyond, a round takes peft minutes
        yield "peft_sequential", lambda: partial(peft(case.tenants).sequential, tokens_BT)


def _measured(
    name: str, build: Callable[[], Step], case: CudaCase, accelerator: Accelerator
) -> dict[str, float] | None:
    torch.cuda.reset_peak_memory_stats(accelerator.device)
    few = name == "peft_sequential"
    rounds, warmup = (2, 1) if few else (case.rounds, 3)
    try:
        side = build()
        prepare = {name: side.drained} if isinstance(side, ComputedOnly) else None
        timing = interleaved(
            {name: side}, rounds=rounds, warmup=warmup, prepare=prepare, wait=accelerator.wait
        )[name]
    except torch.OutOfMemoryError:
        return None
    return {
        "seconds": statistics.median(timing.wall_seconds),
        "least_seconds": min(timing.wall_seconds),
        "most_seconds": max(timing.wall_seconds),
        "thread_cpu_seconds": statistics.median(timing.thread_cpu_seconds),
        "peak_bytes": torch.cuda.max_memory_allocated(accelerator.device),
    }
