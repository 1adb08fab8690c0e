"""Bytes on the wire by encoding, counted by the runtime's own counters on one SmolLM2 job.

    python benchmarks/wire.py [--quick] [--json] [--seed N]

The same job (all seven projections, r = 8, 8 rows of 128 tokens = 1,024 tokens a step, every token a label)
runs once under each encoding, through SDK, Ray and gRPC. The base model computes in bfloat16, so that
`activations` travels as bfloat16 with x shared among q, k, v and gate, up; `adapter_gradient` is float32.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from cola_runtime.base_model.pretrained import prepare_smollm2
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.demo.datasets import demo_tenants
from cola_runtime.runtime.coordinator import running_service
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import service_for
from cola_runtime.testing.record import argument_parser, emit, record

ROWS, TOKENS = 8, 128
ENCODINGS = ("activations", "adapter_gradient")
JOB_TIMEOUT_SECONDS = 1800.0


def main() -> None:
    arguments = argument_parser(__doc__ or "").parse_args()
    started = datetime.now(UTC)
    steps = 1 if arguments.quick else 3
    with tempfile.TemporaryDirectory() as folder:
        by_encoding = asyncio.run(measure(Path(folder), steps=steps, seed=arguments.seed))
    up = {encoding: counted["bytes_up"] for encoding, counted in by_encoding.items()}
    results = {
        "activations_bf16_over_adapter_gradient": up["activations"] / up["adapter_gradient"],
        "rows": ROWS,
        "tokens_per_step": ROWS * TOKENS,
        "steps": steps,
        "per_step": by_encoding,
    }
    emit(record("wire", results, seed=arguments.seed, started=started), arguments.json)


async def measure(folder: Path, *, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Counted bytes of one step under each encoding, and the CPU that the device spent on it."""
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
    async with running_service(settings) as service:
        await service.store.create_tenant("wire")
        key = await service.store.create_key("wire")
        async with AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key) as client:
            return {
                encoding: await _one_job(client, encoding, steps=steps, seed=seed) for encoding in ENCODINGS
            }


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
