"""One mixed base step against the frozen floor and against peft, on one thread.

    python benchmarks/base_step.py [--quick] [--json] [--seed N]

SmolLM2-135M, LoRA r = 8 on all seven projections, one row per tenant, every token a label. The sides take
turns, round by round, in one process:
  floor            forward and backward of the bare transformers model down to its input embeddings
  mixed            our step of all tenants, adapter_gradient taps handed to a sink; no adapter was in the step
                   before, so every round stacks them anew
  merged           our step of the same tenants as one gang whose merged weights are in place, `activations`
                   taps handed to a sink; what a merge costs is told apart: it comes with new versions
  merged_...       the same with weight_gradient and adapter_gradient taps; not with --quick
  peft_joint       peft with one adapter on all rows
  peft_sequential  peft tenant after tenant (set_adapter)
The stock model and peft run with whichever attention implementation a trial finds faster for the bare model.
Ratios are medians over rounds of the same round's thread CPU time, which other processes disturb least.
Bytes per added tenant are the bank's on the model's device. bfloat16 has no merged side: it is refused.
--quick: 8 x 32 instead of 8 x 128 tokens in float32, fewer rounds, no peft in bfloat16.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from cola_runtime.adapter_spec import lora_spec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.site_kinds import WHOLE_ROWS
from cola_runtime.base_model.bank import AdapterBank
from cola_runtime.base_model.load import load_frozen_model
from cola_runtime.base_model.merge import MergedWeights
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.pretrained import prepare_smollm2
from cola_runtime.gradients.taps import Tap
from cola_runtime.testing.record import argument_parser, compare, emit, interleaved, record
from cola_runtime.types import BaseStep, Encoding, Gang, Lease, Membership, Row, Segment, Site, TapPlan

CACHE = Path(".cache/models")
RANK, ALPHA = 8, 16.0
UNSENT_TAPS = 64
SIDES = ("mixed", "merged", "peft_joint", "peft_sequential")
HALF_SIDES = ("mixed", "peft_joint", "peft_sequential")
MERGED_SIDES = {
    "merged": Encoding.ACTIVATIONS,
    "merged_weight_gradient": Encoding.WEIGHT_GRADIENT,
    "merged_adapter_gradient": Encoding.ADAPTER_GRADIENT,
}
GANG = Gang(name="group/benchmark", combine="mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    tenants: int
    tokens: int
    dtype: str
    rounds: int
    warmup: int
    sides: tuple[str, ...] = SIDES

    @property
    def name(self) -> str:
        return f"{self.tenants}x{self.tokens}_{self.dtype}"


CASES = (
    Case(
        tenants=8,
        tokens=128,
        dtype="float32",
        rounds=5,
        warmup=1,
        sides=(*SIDES, "merged_weight_gradient", "merged_adapter_gradient"),
    ),
    Case(tenants=16, tokens=32, dtype="bfloat16", rounds=9, warmup=1, sides=HALF_SIDES),
)
QUICK_CASES = (
    Case(tenants=8, tokens=32, dtype="float32", rounds=1, warmup=0),
    Case(tenants=16, tokens=32, dtype="bfloat16", rounds=2, warmup=1, sides=SIDES[:1]),
)


def main() -> None:
    arguments = argument_parser(__doc__ or "").parse_args()
    started = datetime.now(UTC)
    torch.set_num_threads(1)
    path = prepare_smollm2(CACHE)
    cases = QUICK_CASES if arguments.quick else CASES
    results = {case.name: run_case(path, case, seed=arguments.seed) for case in cases}
    top = {f"{side}_over_floor": results[cases[0].name][f"{side}_over_floor"] for side in SIDES}
    summary = {**top, "merged_encoding": MERGED_SIDES["merged"], "rank": RANK, "threads": 1, "cases": results}
    emit(record("base_step", summary, seed=arguments.seed, started=started), arguments.json)


def run_case(path: Path, case: Case, *, seed: int) -> dict[str, Any]:
    rows_BT = np.random.default_rng(seed).integers(0, 49_152, (case.tenants, case.tokens), dtype=np.int32)
    tokens_BT = torch.from_numpy(rows_BT).long()
    stock = Stock(path, case.dtype)
    attention = stock.choose_attention(tokens_BT[: case.tenants // 2])
    ours = Ours(path, case.dtype, rows_BT)
    sides: dict[str, Callable[[], object]] = {"floor": partial(stock.step, tokens_BT), "mixed": ours.step}
    merged = Merged(path, case.dtype, rows_BT) if "merged" in case.sides else None
    for side, encoding in MERGED_SIDES.items():
        if merged is not None and side in case.sides:
            sides[side] = partial(merged.step, encoding)
    if "peft_joint" in case.sides:
        peft = Peft(path, case.dtype, attention, ours.sites, tenants=case.tenants)
        sides["peft_joint"] = partial(peft.joint, tokens_BT)
        sides["peft_sequential"] = partial(peft.sequential, tokens_BT)
    if case.warmup == 0:
        for side in sides.keys() & {"mixed", "merged"}:
            sides[side]()  # its buffers are allocated once in its life; the others' cost them in every step
    compared = compare(interleaved(sides, rounds=case.rounds, warmup=case.warmup), "floor")
    return {
        **{f"{side}_over_floor": compared[side]["thread_cpu_paired_over_baseline"] for side in case.sides},
        "rounds": case.rounds,
        "attention": {"floor": attention, "peft": attention, "mixed": ours.attention},
        "install_seconds_per_adapter": ours.install_seconds_per_adapter,
        "mixed_bank_bytes_per_added_tenant": ours.bank_bytes_per_tenant,
        **({} if merged is None else {**merged.bank_bytes(), **merge_costs(path, case)}),
        "sides": compared,
    }


class Stock:
    """The bare transformers model: the frozen floor."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._model = _stock_model(path, dtype, "sdpa").requires_grad_(False)

    def choose_attention(self, tokens_BT: Tensor) -> str:
        """Set the implementation that is faster for half the rows; also warms everything up."""
        names = ("sdpa", "eager")
        timings: dict[str, float] = {}
        for name in names:
            self._model.set_attn_implementation(name)
            timing = interleaved({name: lambda: self.step(tokens_BT)}, rounds=1, warmup=0)
            timings[name] = timing[name].thread_cpu_seconds[0]
        best = min(names, key=lambda name: timings[name])
        self._model.set_attn_implementation(best)
        return best

    def step(self, tokens_BT: Tensor) -> None:
        embedded_BTD = self._model.get_input_embeddings()(tokens_BT).requires_grad_(True)
        logits_BTV = self._model(inputs_embeds=embedded_BTD, use_cache=False).logits
        _loss(logits_BTV, tokens_BT).backward()


class Ours:
    """One mixed step of as many tenants as there are rows; two sets of tenants take turns."""

    def __init__(self, path: Path, dtype: str, rows_BT: NDArray[np.int32]) -> None:
        self._model = TappedModel.load(path, dtype=dtype, attention="eager", threads=1)
        self.sites = self._model.sites
        self.attention = self._model.describe("", "").details["attention"]
        self.install_seconds_per_adapter = 0.0
        self.bank_bytes_per_tenant = 0
        self._number = 0
        self._steps = [
            tuple(self._segment(f"job-{team}-{k}", row_T) for k, row_T in enumerate(rows_BT))
            for team in range(2)
        ]

    def step(self) -> None:
        self._number += 1
        _run(self._model, BaseStep(number=self._number, segments=self._steps[self._number % 2]))

    def _segment(self, job_id: str, row_T: NDArray[np.int32]) -> Segment:
        spec = lora_spec(self.sites, rank=RANK, alpha=ALPHA)
        weights, before = initial_weights(spec), self._model.bank_bytes.model_device
        segment = _segment(job_id, row_T)
        started = time.thread_time()
        self._model.install(segment.lease, spec, 0, weights)
        self.install_seconds_per_adapter = time.thread_time() - started
        self.bank_bytes_per_tenant = self._model.bank_bytes.model_device - before
        return segment


class Merged:
    """One step of as many tenants as there are rows, all of one gang, whose weights stay in place."""

    def __init__(self, path: Path, dtype: str, rows_BT: NDArray[np.int32]) -> None:
        self._model = TappedModel.load(path, dtype=dtype, attention="eager", threads=1)
        self._segments = tuple(self._member(f"job-{k}", row_T) for k, row_T in enumerate(rows_BT))

    def step(self, encoding: Encoding) -> None:
        segments = tuple(replace(segment, taps=TapPlan(encoding)) for segment in self._segments)
        _run(self._model, BaseStep(number=1, segments=segments))

    def bank_bytes(self) -> dict[str, float]:
        found, tenants = self._model.bank_bytes, len(self._segments)
        return {
            "merged_bank_bytes_per_added_tenant": found.model_device / tenants,
            "merged_host_bytes_per_added_tenant": found.host / tenants,
        }

    def _member(self, job_id: str, row_T: NDArray[np.int32]) -> Segment:
        spec = lora_spec(self._model.sites, rank=RANK, alpha=ALPHA)
        segment = replace(_segment(job_id, row_T), gang=GANG)
        self._model.install(segment.lease, spec, 0, initial_weights(spec), membership=Membership(gang=GANG))
        return segment


def merge_costs(path: Path, case: Case) -> dict[str, float]:
    """Thread CPU seconds of merging all tenants, as a new version makes it necessary, and of undoing it."""
    loaded = load_frozen_model(path, dtype=case.dtype, attention="eager")
    bank, weights = AdapterBank(loaded.sites, getattr(torch, case.dtype)), MergedWeights(loaded.groups)
    sites = tuple(site for site in loaded.sites if site.kind in WHOLE_ROWS)
    spec = lora_spec(sites, rank=RANK, alpha=ALPHA)
    for k in range(case.tenants):
        lease = Lease(job_id=f"job-{k}", epoch=1, device_id="device")
        bank.install(lease, spec, 0, initial_weights(spec), membership=Membership(gang=GANG))
    everybody = bank.gang(GANG)
    weights.put(everybody[1:])  # makes the pristine copies
    seconds = [
        (_seconds(lambda: weights.put(everybody)), _seconds(lambda: weights.put(()))) for _ in range(3)
    ]
    merge, restore = (median(times) for times in zip(*seconds, strict=True))
    return {"merge_seconds": merge, "restore_seconds": restore, "pristine_bytes": weights.nbytes}


def _seconds(work: Callable[[], None]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


class Peft:
    """peft on the stock model, all tenants' adapters loaded."""

    def __init__(
        self, path: Path, dtype: str, attention: str, sites: tuple[Site, ...], *, tenants: int
    ) -> None:
        from peft import LoraConfig, get_peft_model

        names = sorted({site.name.rpartition(".")[2] for site in sites})
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM")
        self._names = [f"tenant{k}" for k in range(tenants)]
        base = _stock_model(path, dtype, attention)
        # Factors in the model's dtype, as in our forward; peft's own default (float32) is slower in bfloat16.
        self._model = get_peft_model(
            base, config, adapter_name=self._names[0], autocast_adapter_dtype=False
        ).eval()
        for name in self._names[1:]:
            self._model.add_adapter(name, config, autocast_adapter_dtype=False)

    def joint(self, tokens_BT: Tensor) -> None:
        self._model.set_adapter(self._names[0])
        self._step(tokens_BT)

    def sequential(self, tokens_BT: Tensor) -> None:
        for name, tokens_T in zip(self._names, tokens_BT, strict=True):
            self._model.set_adapter(name)
            self._step(tokens_T[None])

    def _step(self, tokens_BT: Tensor) -> None:
        _loss(self._model(input_ids=tokens_BT, use_cache=False).logits, tokens_BT).backward()
        self._model.zero_grad(set_to_none=True)


def _stock_model(path: Path, dtype: str, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()


def _loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Any:
    flat_KV = logits_BTV[:, :-1].float().flatten(0, 1)
    return cross_entropy(flat_KV, tokens_BT[:, 1:].flatten())


def _run(model: TappedModel, step: BaseStep) -> None:
    # A sender that keeps up: what it has sent is freed.
    taps: deque[Tap] = deque(maxlen=UNSENT_TAPS)
    result = model.run(step, taps.append)
    assert all(loss.reason is None for loss in result.losses)


def _segment(job_id: str, row_T: NDArray[np.int32]) -> Segment:
    row = _row(row_T)
    lease = Lease(job_id=job_id, epoch=1, device_id="device")
    return Segment(lease=lease, version=0, rows=(row,), loss_denominator=float(row.label_tokens))


def _row(tokens_T: NDArray[np.int32]) -> Row:
    weights_T = np.ones(len(tokens_T), np.float32)
    weights_T[0] = 0.0
    return Row(tokens=tokens_T, weights=weights_T)


if __name__ == "__main__":
    main()
