"""One mixed base step against the frozen floor and against peft, on one thread; and a tenant's memory.

    python benchmarks/base_step.py [--quick] [--json] [--seed N] [--accelerator cuda]

SmolLM2-135M, every token a label (of completions the second half), B rows of T tokens. Every case has a
process of its own, with the allocator of a service's base models for all sides. These take turns there, round
by round:
  floor            forward and backward of the bare transformers model down to its input embeddings
  mixed            our step of B tenants, LoRA r = 8 on all seven projections, adapter_gradient taps
  linear           the same with full-rank adapters on q and v (everywhere they would be the model again)
  mlp              the same with MLPs of 8 hidden features on all seven
  mixed_kinds      the same with LoRA, linear, MLP and linearized LoRA tenants in one batch
  merged           the step of B tenants as one gang whose merged weights are in place, `activations` taps;
                   what a merge costs is told apart: it comes with new versions
  merged_1x8       as `merged` with one tenant of r = 8 for all rows; merged_1x64 and merged_Bx64 with r = 64
  merged_...       as `merged` with weight_gradient and adapter_gradient taps; not with --quick
  peft_joint       peft with one adapter on all rows
  peft_sequential  peft tenant after tenant (set_adapter)
The stock model and peft run with whichever attention implementation a trial finds faster for the bare model.
Ratios are medians over rounds of the same round's thread CPU time, which other processes disturb least.
bfloat16 has no merged side: it is refused. Memory (testing/counted_memory.py) is counted over living tensors.
--accelerator cuda: on an accelerator, at sizes that fill one, in wall time up to where it has computed all
that it was asked for; the model has SmolLM2-135M's shape and random weights, and no memory is counted.
--quick: 8 x 32 instead of 8 x 128 tokens in float32, fewer rounds and sides, no peft in bfloat16.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cola_runtime.adapter_spec import AdapterKind
from cola_runtime.base_model.pretrained import prepare_smollm2
from cola_runtime.encodings import Encoding
from cola_runtime.testing.base_step_sides import (
    FEW_MODULES,
    LINEAR,
    LORA,
    MIXED_KINDS,
    MLP,
    RANK,
    WIDE_LORA,
    Ours,
    Peft,
    Stock,
    merge_seconds,
    random_rows,
    tokens_of,
)
from cola_runtime.testing.counted_memory import added_tenant, peft_tenant
from cola_runtime.testing.cuda_step import CUDA_CASES, QUICK_CUDA_CASES, cuda_cases
from cola_runtime.testing.own_process import as_an_actor
from cola_runtime.testing.record import argument_parser, compare, emit, interleaved, record

CACHE = Path(".cache/models")
MEMORY_ROWS = (8, 16)  # rows, tokens: only what lives afterwards counts
TOP_SIDES = ("mixed", "merged", "peft_joint", "peft_sequential")
KIND_SIDES: dict[str, tuple[AdapterKind, ...]] = {
    "mixed": (LORA,),
    "linear": (LINEAR,),
    "mlp": (MLP,),
    "mixed_kinds": MIXED_KINDS,
}
PEFT_SIDES = ("peft_joint", "peft_sequential")
MEMORY_KINDS = {"lora": LORA, "lora_r64": WIDE_LORA, "linear": LINEAR, "mlp": MLP}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedSide:
    team: str
    encoding: Encoding = Encoding.ACTIVATIONS


MERGED_SIDES = {
    "merged": MergedSide(team="merged_8x8"),
    "merged_1x8": MergedSide(team="merged_1x8"),
    "merged_8x64": MergedSide(team="merged_8x64"),
    "merged_1x64": MergedSide(team="merged_1x64"),
    "merged_weight_gradient": MergedSide(team="merged_8x8", encoding=Encoding.WEIGHT_GRADIENT),
    "merged_adapter_gradient": MergedSide(team="merged_8x8", encoding=Encoding.ADAPTER_GRADIENT),
}
MERGED_TEAMS = {"merged_8x8": (8, LORA), "merged_1x8": (1, LORA), "merged_8x64": (8, WIDE_LORA)} | {
    "merged_1x64": (1, WIDE_LORA)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    tenants: int
    tokens: int
    dtype: str
    rounds: int
    warmup: int
    sides: tuple[str, ...]
    prompt: int = 1  # tokens at a row's start that are no labels

    @property
    def name(self) -> str:
        completions = "" if self.prompt == 1 else "_completions"
        return f"{self.tenants}x{self.tokens}_{self.dtype}{completions}"


CASES = (
    Case(
        tenants=8,
        tokens=128,
        dtype="float32",
        rounds=5,
        warmup=1,
        sides=(*KIND_SIDES, *MERGED_SIDES, *PEFT_SIDES),
    ),
    Case(
        tenants=16,
        tokens=32,
        dtype="bfloat16",
        rounds=9,
        warmup=1,
        sides=("mixed", "mixed_kinds", *PEFT_SIDES),
    ),
    Case(tenants=16, tokens=32, dtype="bfloat16", rounds=9, warmup=1, sides=("mixed",), prompt=16),
)
QUICK_CASES = (
    Case(tenants=8, tokens=32, dtype="float32", rounds=1, warmup=0, sides=(*TOP_SIDES, "mixed_kinds")),
    Case(tenants=16, tokens=32, dtype="bfloat16", rounds=2, warmup=1, sides=("mixed",)),
)


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (on_cpu if arguments.accelerator == "cpu" else on_cuda)(arguments)


def on_cpu(arguments: Namespace) -> None:
    started = datetime.now(UTC)
    path = prepare_smollm2(CACHE)
    cases = QUICK_CASES if arguments.quick else CASES
    kinds = ("lora",) if arguments.quick else tuple(MEMORY_KINDS)
    bytes_of_tenants = memory(path, kinds, seed=arguments.seed)
    results = {case.name: as_an_actor(run_case, path, case, seed=arguments.seed) for case in cases}
    top = {f"{side}_over_floor": results[cases[0].name][f"{side}_over_floor"] for side in TOP_SIDES}
    summary = {
        **top,
        "merged_encoding": MERGED_SIDES["merged"].encoding,
        "rank": RANK,
        "linear_sites": FEW_MODULES,
        "threads": 1,
        "memory": bytes_of_tenants,
        "cases": results,
    }
    emit(record("base_step", summary, seed=arguments.seed, started=started), arguments.json)


def on_cuda(arguments: Namespace) -> None:
    started = datetime.now(UTC)
    with TemporaryDirectory() as folder:
        results = cuda_cases(
            Path(folder), QUICK_CUDA_CASES if arguments.quick else CUDA_CASES, arguments.seed
        )
    emit(record("base_step_cuda", results, seed=arguments.seed, started=started), arguments.json)


def run_case(path: Path, case: Case, *, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)  # in a new process
    rows_BT = random_rows(case.tenants, case.tokens, seed)
    tokens_BT = tokens_of(rows_BT)
    stock, ours = Stock(path, case.dtype), Ours(path, case.dtype)
    attention = stock.choose_attention(tokens_BT[: case.tenants // 2])
    sides: dict[str, Callable[[], object]] = {"floor": partial(stock.step, tokens_BT, case.prompt)}
    prepare: dict[str, Callable[[], object]] = {}
    for side in case.sides:
        team = _add_team(ours, side, rows_BT, case.prompt)
        if team is not None:
            encoding = MERGED_SIDES[side].encoding if side in MERGED_SIDES else Encoding.ADAPTER_GRADIENT
            sides[side], prepare[side] = partial(ours.step, team, encoding), partial(ours.put_in_place, team)
    if "peft_joint" in case.sides:
        peft = Peft(path, case.dtype, attention, tenants=case.tenants)
        sides["peft_joint"] = partial(peft.joint, tokens_BT)
        sides["peft_sequential"] = partial(peft.sequential, tokens_BT)
    if case.warmup == 0:
        sides["mixed"]()  # our buffers are allocated once in their life; the others' cost them in every step
    timings = interleaved(sides, rounds=case.rounds, warmup=case.warmup, prepare=prepare)
    compared = compare(timings, "floor")
    merges = "merged" in case.sides
    merged = merge_seconds(ours, "merged_8x8", "mixed", repeats=case.rounds) if merges else {}
    return {
        **{f"{side}_over_floor": compared[side]["thread_cpu_paired_over_baseline"] for side in case.sides},
        "rounds": case.rounds,
        "attention": {"floor": attention, "peft": attention, "ours": ours.attention},
        "install_seconds_per_adapter": ours.install_seconds,
        **merged,
        "sides": compared,
    }


def memory(path: Path, kinds: tuple[str, ...], *, seed: int) -> dict[str, Any]:
    """Bytes per added tenant in float32: ours by kind, merged, and peft's."""
    rows_BT = random_rows(*MEMORY_ROWS, seed)

    def counted(kind: AdapterKind, *, merged: bool = False) -> dict[str, float]:
        ours = Ours(path, "float32")
        found = added_tenant(ours, rows_BT, kind=kind, tenants=len(rows_BT), merged=merged)
        return {**asdict(found), "counted_over_weights": found.counted / found.weights}

    return {
        **{name: counted(MEMORY_KINDS[name]) for name in kinds},
        "merged_lora": counted(LORA, merged=True),
        "peft_lora": peft_tenant(Peft(path, "float32", "eager", tenants=1), rows_BT),
    }


def _add_team(ours: Ours, side: str, rows_BT: NDArray[np.int32], prompt: int) -> str | None:
    """Install the side's team, unless another side has the same; its name. None: the side is not ours."""
    if side in KIND_SIDES:
        ours.add_team(side, rows_BT, tenants=len(rows_BT), kinds=KIND_SIDES[side], prompt=prompt)
        return side
    if side not in MERGED_SIDES:
        return None
    team = MERGED_SIDES[side].team
    tenants, kind = MERGED_TEAMS[team]
    if team not in ours.install_seconds:
        ours.add_team(team, rows_BT, tenants=tenants, kinds=(kind,), merged=True)
    return team


if __name__ == "__main__":
    main()
