"""Mixed training through Ray and gRPC against peft alone: the largest relative difference after 20 steps.

    python benchmarks/exactness.py [--quick] [--json] [--seed N]

Four tenants per encoding with different ranks, sites, rates, batch sizes and intervals; both encodings run in
the same mixed batches. Tiny Llama and tiny GPT-2 in float32 and float64; SmolLM2 in float32 with the demo's
real text (left out with --quick, which trains 6 steps in float32 only).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from cola_runtime.base_model.pretrained import prepare_smollm2
from cola_runtime.config import ServiceSettings
from cola_runtime.demo.datasets import demo_tenants
from cola_runtime.testing.exactness import (
    MixedJob,
    four_tenants,
    largest_difference,
    service_for,
    train_mixed,
    train_reference,
)
from cola_runtime.testing.record import argument_parser, emit, record
from cola_runtime.testing.tiny_models import save_tiny_model

ENCODINGS = ("activations", "adapter_gradient")
BOUNDS = {
    ("llama", "float32"): 2e-5,
    ("gpt2", "float32"): 2e-5,
    ("llama", "float64"): 1e-6,  # transformers computes RMSNorm in float32 whatever the model's type
    ("gpt2", "float64"): 1e-9,
    ("smollm2", "float32"): 1e-4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    kind: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.dtype}"

    @property
    def bound(self) -> float:
        return BOUNDS[self.kind, self.dtype]


def main() -> None:
    arguments = argument_parser(__doc__ or "").parse_args()
    started = datetime.now(UTC)
    torch.set_num_threads(2)
    steps = 6 if arguments.quick else 20
    cases = [Case(kind=kind, dtype=dtype) for kind, dtype in BOUNDS]
    if arguments.quick:
        cases = [case for case in cases if case.kind != "smollm2" and case.dtype == "float32"]
    results = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            results[case.name] = run_case(case, Path(folder), steps=steps, seed=arguments.seed)
    worst = max(results.values(), key=lambda result: result["max_relative_difference"] / result["bound"])
    summary = {
        "max_relative_difference": worst["max_relative_difference"],
        "bound": worst["bound"],
        "within_bounds": all(result["within_bound"] for result in results.values()),
        "steps": steps,
        "cases": results,
    }
    emit(record("exactness", summary, seed=arguments.seed, started=started), arguments.json)
    if not summary["within_bounds"]:
        raise SystemExit("a difference is above its bound")


def run_case(case: Case, folder: Path, *, steps: int, seed: int) -> dict[str, object]:
    """Train eight jobs mixed and four of each encoding's references alone; compare every tensor."""
    model = _model(case, folder)
    jobs = [job for encoding in ENCODINGS for job in _jobs(case, steps=steps, encoding=encoding, seed=seed)]
    settings: ServiceSettings = service_for(
        folder / "service",
        model=model,
        name=case.kind,
        dtype=case.dtype,
        token_budget=1024 if case.kind == "smollm2" else 2048,
    )
    mixed = asyncio.run(train_mixed(settings, jobs))
    alone = {
        job.spec.name.removeprefix("adapter-gradient-"): train_reference(
            job, mixed.base, model, attention="sdpa"
        )
        for job in jobs
        if job.spec.encoding == "adapter_gradient"
    }
    by_encoding = {
        encoding: max(
            largest_difference(mixed.weights[f"{encoding.replace('_', '-')}-{number}"], reference)
            for number, reference in alone.items()
        )
        for encoding in ENCODINGS
    }
    worst = max(by_encoding.values())
    return {
        "max_relative_difference": worst,
        "bound": case.bound,
        "within_bound": worst <= case.bound,
        "base_steps": mixed.base_steps,
        "job_steps": steps * len(jobs),
        **by_encoding,
    }


def _model(case: Case, folder: Path) -> Path:
    if case.kind == "smollm2":
        return prepare_smollm2(Path(".cache/models"))
    return save_tiny_model(case.kind, folder / "model", dtype=case.dtype)


def _jobs(case: Case, *, steps: int, encoding: str, seed: int) -> Sequence[MixedJob]:
    jobs = four_tenants(case.kind, steps=steps, encoding=encoding, seed=seed)
    if case.kind != "smollm2":
        return jobs
    texts = [tenant.training for tenant in demo_tenants(training_rows=40)]
    return [MixedJob(spec=job.spec, training=text) for job, text in zip(jobs, texts, strict=True)]


if __name__ == "__main__":
    main()
