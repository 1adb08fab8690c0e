"""The jobs of a soak, and what each of them gives when nothing goes wrong.

Two sorts. A `fixed` job's rows are longer than a base step's token budget, so that each of its base steps
holds one of its rows and nobody else's: its last checkpoint has the same bytes whatever happens (CPU,
float32). The others share base steps with whoever is there, which moves a float32 sum's last digit; they
train with an optimizer that does not enlarge such a difference, and end within MIXED_BOUND.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cola_runtime.adapters.checkpoint_format import decode_checkpoint
from cola_runtime.adapters.optimizer_state import STEP
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.peft_reference import relative_difference

MODEL = "tiny"
TOKEN_BUDGET = 96
FIXED_BYTES = (100, 120)  # of a row: a byte is a token of the tiny models
MIXED_BYTES = (12, 44)
MIXED_BOUND = 1e-5
ROWS = 24
WAIT_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakJob:
    """What a tenant may submit, again and again."""

    name: str
    spec: JobSpec
    training: bytes
    evaluation: bytes | None
    fixed: bool  # its base steps hold nothing else, so that its bits are always the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a job ends with."""

    losses: tuple[float, ...]
    tokens: int
    checkpoint: bytes

    @property
    def optimizer_steps(self) -> int:
        return optimizer_steps(self.checkpoint)


def soak_jobs(*, steps: int, seed: int) -> list[SoakJob]:
    """Different adapters, sizes, intervals, optimizers and checkpoint intervals, fixed and mixed in turn."""
    sgd = {"kind": "sgd", "learning_rate": 0.05, "momentum": 0.9}
    adamw = {"learning_rate": 1e-3, "eps": 1e-3}
    shapes: list[dict[str, Any]] = [
        {"adapter": {"rank": 2, "alpha": 4}, "rows_per_step": 1, "checkpoint_every": 7},
        {"adapter": {"rank": 4, "alpha": 8}, "rows_per_step": 2, "optimizer": adamw, "checkpoint_every": 9},
        {
            "adapter": {"rank": 4, "alpha": 8, "target_modules": "attention"},
            "rows_per_step": 2,
            "adaptation_interval": 2,
            "evaluation": {"every": max(1, steps // 3)},
            "checkpoint_every": 5,
        },
        {
            "adapter": {"rank": 8, "alpha": 8, "target_modules": "mlp"},
            "rows_per_step": 3,
            "optimizer": sgd,
            "schedule": {"kind": "cosine", "warmup_steps": 3},
            "checkpoint_every": 11,
        },
        {
            "adapter": {"kind": "linear", "target_modules": "attention"},
            "rows_per_step": 1,
            "optimizer": {"learning_rate": 1e-4},
            "encoding": "adapter_gradient",
            "checkpoint_every": 6,
        },
        {"adapter": {"rank": 2, "alpha": 2}, "rows_per_step": 4, "optimizer": sgd, "checkpoint_every": 4},
        # Blows a rounding up fifty times, so it is judged by its bytes: fixed.
        {"adapter": {"rank": 2, "alpha": 8}, "rows_per_step": 1, "optimizer": sgd, "checkpoint_every": 4},
    ]
    return [_job(number, shape, steps=steps, seed=seed) for number, shape in enumerate(shapes)]


def _job(number: int, shape: Mapping[str, Any], *, steps: int, seed: int) -> SoakJob:
    fixed = number % 2 == 0
    name = f"{'fixed' if fixed else 'mixed'}-{number}"
    lengths = FIXED_BYTES if fixed else MIXED_BYTES
    spec = JobSpec.model_validate(
        {"name": name, "base_model": MODEL, "seed": seed + number, "steps": steps, **shape}
    )
    evaluation = _rows(lengths, seed=[seed, number, 1], rows=4) if spec.evaluation.every else None
    training = _rows(lengths, seed=[seed, number, 0], rows=ROWS)
    return SoakJob(name=name, spec=spec, training=training, evaluation=evaluation, fixed=fixed)


def _rows(lengths: tuple[int, int], *, seed: Sequence[int], rows: int) -> bytes:
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        text = bytes(random.integers(97, 123, size=random.integers(*lengths), dtype=np.uint8)).decode()
        lines.append({"prompt": text[:8], "completion": text[8:]})
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def train_expected(model: Path, folder: Path, jobs: Sequence[SoakJob]) -> dict[str, Expected]:
    """Each job alone, one after the other, in a service that nothing happens to; by name."""
    settings = service_for(folder, model=model, name=MODEL, dtype="float32", token_budget=TOKEN_BUDGET)
    found = {}
    async with running_in_process(settings) as (service, _), await tenant_client(service, "alone") as client:
        for job in jobs:
            handle = await client.submit(job.spec, training=job.training, evaluation=job.evaluation)
            ended = await handle.wait(WAIT_SECONDS)
            last = (await handle.checkpoints())[-1]
            content = checkpoint_bytes(folder, handle.job_id, version=last.version, sha256=last.sha256)
            assert content is not None
            losses = tuple(step.loss for step in await handle.metrics())
            found[job.name] = Expected(losses=losses, tokens=ended.tokens, checkpoint=content)
    return found


def checkpoint_bytes(data_dir: Path, job_id: str, *, version: int, sha256: str) -> bytes | None:
    """The stored object of a checkpoint of one shard; None where there is none with this checksum."""
    folder = data_dir / "objects" / "checkpoints" / job_id
    for path in folder.glob(f"{version:08d}-*.safetensors"):
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # it was retired meanwhile
            continue
        if hashlib.sha256(content).hexdigest() == sha256:
            return content
    return None


def optimizer_steps(checkpoint: bytes) -> int:
    """How often the checkpoint's optimizer has stepped by its own state; 0 where it does not count."""
    states = decode_checkpoint(checkpoint).optimizer_state.values()
    return max((int(state[STEP]) for state in states if STEP in state), default=0)


def largest_difference(checkpoint: bytes, expected: bytes) -> float:
    """Over the adapter's tensors, relative; 0.0 where the bytes are the same."""
    if checkpoint == expected:
        return 0.0
    made, wanted = (
        {key: torch.from_numpy(array.copy()) for key, array in decode_checkpoint(content).weights.items()}
        for content in (checkpoint, expected)
    )
    return max(relative_difference(made, wanted).values())
