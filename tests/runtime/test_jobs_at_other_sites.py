"""Jobs at embeddings and convolutions through a whole service, against ordinary modules and torch.optim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cola_runtime.errors import InvalidInput
from cola_runtime.spec import JobSpec
from cola_runtime.testing.architectures import save_image_classifier
from cola_runtime.testing.exactness import (
    MixedJob,
    exported_weights,
    four_tenants,
    largest_difference,
    service_for,
    tenant_client,
    train_modules,
    train_reference,
)
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from tests.runtime.test_image_jobs import job as image_job
from tests.runtime.test_image_jobs import train_all
from tests.runtime.test_jobs_of_all_kinds import train_in_process

BOUND = 1e-9
STEPS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def text_job(name: str, adapter: Any, **fields: Any) -> MixedJob:
    common = {
        "base_model": "tiny",
        "adapter": adapter,
        "steps": STEPS,
        "rows_per_step": 4,
        "adaptation_interval": 2,
        "seed": 3,
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 0.5},
    }
    spec = JobSpec.model_validate({"name": name, **common, **fields})
    return MixedJob(spec=spec, training=four_tenants("tiny", steps=1, encoding="auto")[0].training)


def lora(*modules: str, rank: int = 4) -> dict[str, Any]:
    return {"kind": "lora", "rank": rank, "alpha": 8, "target_modules": list(modules)}


def linear(*modules: str) -> dict[str, Any]:
    return {"kind": "linear", "bias": True, "scaling": 0.5, "target_modules": list(modules)}


async def test_jobs_at_an_embedding_train_as_ordinary_modules_do_alone(tmp_path: Path) -> None:
    """All mixed with a job that leaves the embedding alone; one of them merged into it."""
    path = save_tiny_model("llama", tmp_path / "model", dtype="float64")
    settings = service_for(tmp_path / "service", model=path, name="tiny", dtype="float64")
    adafactor = {"optimizer": {"kind": "adafactor", "learning_rate": 1e-3}}
    jobs = [
        text_job("lora", lora("q_proj", "embed_tokens"), encoding="activations"),
        text_job("factors", lora("embed_tokens"), encoding="adapter_gradient"),
        text_job("table", linear("embed_tokens"), encoding="weight_gradient"),
        text_job("planned", [linear("model.embed_tokens"), lora("v_proj")], **adafactor),
        text_job("merged", lora("embed_tokens", "o_proj"), mode="merged"),
        text_job("without", {"rank": 2}),
    ]
    mixed = await train_in_process(settings, jobs)
    for each in jobs:
        alone = train_modules(each, mixed.base, path, attention="sdpa")
        assert largest_difference(mixed.weights[each.spec.name], alone) <= BOUND, each.spec.name


@pytest.mark.parametrize("model_type", ["vit", "convnext", "resnet"])
async def test_jobs_at_convolutions_train_as_ordinary_modules_do_alone(
    model_type: str, tmp_path: Path
) -> None:
    """ViT's patches; ConvNeXt's depthwise kernels of 7 x 7 in 16 and 24 groups; ResNet's strided ones."""
    model = save_image_classifier(model_type, tmp_path / model_type, dtype="float64")
    modules = {"vit": "projection", "convnext": "dwconv", "resnet": "convolution"}[model_type]
    rank = 48 if model_type == "convnext" else 4
    adafactor = {"kind": "adafactor", "learning_rate": 2e-3}
    jobs = [
        image_job(0, 2, steps=STEPS, adapter=lora(modules, rank=rank), encoding="activations"),
        image_job(1, 3, steps=STEPS, adapter=linear(modules), adaptation_interval=2, optimizer=adafactor),
        image_job(2, 2, steps=STEPS, adapter=linear(modules), mode="merged"),
        image_job(3, 4, steps=STEPS, adapter=[]),
    ]
    base, done = await train_all(tmp_path, model, jobs)
    for wanted in jobs:
        alone = train_reference(wanted, base, model, attention=base.details["attention"])
        exported = exported_weights(done[wanted.spec.name]["folder"], base)
        assert largest_difference(exported, alone) <= BOUND, wanted.spec.name


async def test_what_cannot_be_at_a_site_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = save_tiny_model("gpt2", tmp_path / "model", dtype="float32")
    settings = service_for(tmp_path / "service", model=path, name="tiny", dtype="float32")
    mlp = {"kind": "mlp", "hidden": 4, "target_modules": ["wte"]}
    async with (
        running_in_process(settings) as (service, _),
        await tenant_client(service, "alice") as client,
    ):
        for adapter, mode, reason, message in (
            (mlp, "unmerged", "SITE_UNSUPPORTED", "only kinds linear in x"),
            ({**lora("wte"), "dropout": 0.1}, "unmerged", "SITE_UNSUPPORTED", "dropout is for rows"),
            (lora("wte"), "merged", "MERGED_TIED_WEIGHT", "shared with another module"),
            (lora("wpe"), "unmerged", "NO_MODULE_MATCHED", "no module is named 'wpe'"),
        ):
            wanted = text_job("refused", adapter, mode=mode)
            with pytest.raises(InvalidInput, match=message) as caught:
                await client.submit(wanted.spec, training=wanted.training)
            assert caught.value.reason == reason
        assert not await client.jobs()
        assert {site.kind for site in service.base_model.sites} == {"conv1d", "embedding"}
