"""Long answers come in bounded pieces, and prompts stay within the model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import grpc
import pytest
from serving import ROWS, Served, serving

from cola_runtime.client.sdk import Client
from cola_runtime.errors import InvalidInput, Unavailable
from cola_runtime.proto import jobs_pb2, jobs_pb2_grpc
from cola_runtime.server.limits import Limits
from cola_runtime.spec import JobSpec, LoraSpec


def test_an_adapter_is_sent_in_bounded_chunks(tmp_path: Path, tokenizer_path: Path, spec: JobSpec) -> None:
    assert Limits().export_chunk_bytes == 256 * 1024
    sizes: dict[str, list[int]] = {}
    with serving(tmp_path, tokenizer_path, Limits(export_chunk_bytes=10_000)) as served:
        with Client(base_url=served.url, api_key=served.keys["alice"]) as client:
            handle = client.submit(spec.model_copy(update={"adapter": LoraSpec(rank=256)}), training=ROWS)
        served.train(handle.job_id, steps=1)
        served.checkpoint(handle.job_id)
        metadata = [("authorization", f"Bearer {served.keys['alice']}")]
        with grpc.insecure_channel(served.target) as channel:
            request = jobs_pb2.ExportAdapterRequest(job_id=handle.job_id)
            for chunk in jobs_pb2_grpc.JobsStub(channel).ExportAdapter(
                request, metadata=metadata, timeout=10
            ):
                sizes.setdefault(chunk.file_name, []).append(len(chunk.content))
    assert list(sizes) == ["adapter_config.json", "adapter_model.safetensors"]
    weights = sizes["adapter_model.safetensors"]
    assert set(weights[:-1]) == {10_000}
    assert sum(weights) > 4 * 256 * (16 + 24) * 4  # sites, rank, A and B, float32


def test_a_damaged_checkpoint_is_not_exported(client: Client, served: Served, spec: JobSpec) -> None:
    handle = client.submit(spec, training=ROWS)
    served.train(handle.job_id, steps=1)
    served.checkpoint(handle.job_id)
    (stored,) = (served.objects / "checkpoints").rglob("1")
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    with pytest.raises(Unavailable) as caught:
        served.run(served.service.export(served.tenants["alice"], handle.job_id))
    assert caught.value.reason == "CHECKPOINT_DAMAGED"
    assert handle.checkpoints()[0].sha256 != hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ("", {}, "PROMPT_EMPTY"),
        ("a" * 256, {}, "PROMPT_TOO_LONG"),
        ("a" * 2_000_000, {}, "PROMPT_TOO_LONG"),
        ("a", {"max_new_tokens": 10**6}, "GENERATION_INVALID"),
        ("a", {"temperature": -1.0}, "GENERATION_INVALID"),
        ("a", {"temperature": float("nan")}, "GENERATION_INVALID"),
        ("a", {"base_model": "gpt-9"}, "BASE_MODEL_UNKNOWN"),
        ([{"role": "user"}], {}, "MESSAGES_INVALID"),
        ([{"role": "wizard", "content": "x"}], {}, "MESSAGES_INVALID"),
        ([], {}, "MESSAGES_INVALID"),
    ],
)
def test_a_prompt_out_of_bounds_is_refused(
    client: Client, served: Served, prompt: object, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.generate(prompt, **options)  # type: ignore[arg-type]
    assert caught.value.reason == reason
    assert served.runner.generation.generated == []


def test_new_tokens_fit_into_the_rest_of_the_context(client: Client, served: Served) -> None:
    client.generate("a" * 250, max_new_tokens=64)
    assert served.runner.generation.generated[0]["max_new_tokens"] == 6
    assert served.runner.generation.generated[0]["stop_ids"]
