"""What one base step takes in memory and time, by how the frozen base is computed; one thread.

    python benchmarks/base_memory.py [--quick] [--json] [--seed N]

SmolLM2-135M, one LoRA r = 8 on all seven projections, 8 rows of 128 tokens, every token a label,
adapter_gradient taps dropped as they come. Per setting: bytes of the weights, the most bytes of tensors that
live at once during a first training step beside the weights (counted, not measured: `testing/live_bytes.py`),
and the median thread CPU seconds of the steps after it. `by_hand` is LlamaBody, `stock` transformers' own
modules, as every other architecture has them.
--quick: 4 x 32 tokens, fewer settings and steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cola_runtime.adapter_spec import lora_spec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.base_model import load
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.pretrained import prepare_smollm2
from cola_runtime.rows import Row
from cola_runtime.testing.live_bytes import LiveBytes
from cola_runtime.testing.record import argument_parser, emit, record
from cola_runtime.types import BaseStep, Lease, Segment

CACHE = Path(".cache/models")
LEASE = Lease(job_id="job-0", epoch=1, device_id="device")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    dtype: str = "float32"
    by_hand: bool = True
    checkpointing: bool = False
    quantization: str = "none"

    @property
    def name(self) -> str:
        body = "by_hand" if self.by_hand else "stock"
        parts = [self.dtype, self.quantization if self.quantization != "none" else body]
        return "_".join([*parts, *(["checkpointed"] if self.checkpointing else [])])


CASES = (
    Case(),
    Case(checkpointing=True),
    Case(by_hand=False),
    Case(by_hand=False, checkpointing=True),
    Case(dtype="bfloat16"),
    Case(dtype="bfloat16", checkpointing=True),
    Case(dtype="float16"),
    Case(quantization="int8", by_hand=False),
    Case(quantization="nf4", by_hand=False),
    Case(dtype="bfloat16", quantization="nf4", by_hand=False, checkpointing=True),
)
QUICK = CASES[:4]


def main() -> None:
    arguments = argument_parser(__doc__).parse_args()
    started = datetime.now(UTC)
    path = prepare_smollm2(CACHE)
    rows, tokens, steps = (4, 32, 2) if arguments.quick else (8, 128, 3)
    results: dict[str, Any] = {"rows": rows, "tokens": tokens}
    for case in QUICK if arguments.quick else CASES:
        results[case.name] = _measure(path, case, _rows(rows, tokens, arguments.seed), steps)
    emit(record("base_memory", results, seed=arguments.seed, started=started), arguments.json)


def _measure(path: Path, case: Case, rows: tuple[Row, ...], steps: int) -> dict[str, float]:
    model = _model(path, case)
    spec = lora_spec(model.sites, rank=8, alpha=16.0)
    model.install(LEASE, spec, 0, initial_weights(spec))
    denominator = float(sum(row.label_tokens for row in rows))
    step = BaseStep(
        number=1,
        segments=(Segment(lease=LEASE, version=0, rows=rows, loss_denominator=denominator),),
    )
    with LiveBytes() as counted:
        (loss,) = model.run(step, lambda tap: None).losses
    seconds = []
    for _ in range(steps):
        began = time.thread_time()
        model.run(step, lambda tap: None)
        seconds.append(time.thread_time() - began)
    return {
        "weight_bytes": int(model.describe("", "").details["weight_bytes"]),
        "peak_bytes": counted.peak,
        "seconds": median(seconds),
        "loss": float(loss.loss_sum / loss.weight_sum),
    }


def _model(path: Path, case: Case) -> TappedModel:
    plain_llama = load.is_plain_llama
    if not case.by_hand:
        load.is_plain_llama = lambda _model, _groups: False
    try:
        return TappedModel.load(
            path,
            dtype=case.dtype,
            attention="auto" if case.by_hand else "sdpa",
            threads=1,
            activation_checkpointing=case.checkpointing,
            quantization=case.quantization,
        )
    finally:
        load.is_plain_llama = plain_llama


def _rows(rows: int, tokens: int, seed: int) -> tuple[Row, ...]:
    draw = np.random.default_rng(seed)
    weights = np.ones(tokens, np.float32)
    weights[0] = 0.0
    return tuple(
        Row(tokens=draw.integers(5, 49_000, tokens, dtype=np.int32), weights=weights) for _ in range(rows)
    )


if __name__ == "__main__":
    main()
