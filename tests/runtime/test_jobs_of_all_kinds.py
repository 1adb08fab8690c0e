"""Jobs of several kinds, and of an operator's own module, from submission to an adapter used elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cola_runtime.adapters import module_registry
from cola_runtime.adapters.attach import attach_adapter
from cola_runtime.cli.job_file import read_job_file
from cola_runtime.config import ServiceSettings
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import (
    MixedJob,
    MixedRun,
    exported_weights,
    four_tenants,
    largest_difference,
    service_for,
    tenant_client,
    train_mixed,
    train_modules,
)
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from tests.runtime.documented_modules import documented, write_module

STEPS = 3
WAIT_SECONDS = 60.0
ENCODINGS = ("activations", "adapter_gradient")
GATED = {"kind": "module", "name": "gated", "options": {"width": 5}, "scaling": 0.5}
MIXTURE = [
    {"kind": "lora", "rank": 4, "alpha": 8, "target_modules": "attention"},
    {"kind": "mlp", "hidden": 6, "activation": "gelu", "target_modules": ["mlp.c_proj"]},
]


@pytest.fixture
def adapter_module(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The documented module, importable but not imported; this process forgets it afterwards."""
    torch.set_num_threads(1)
    name = write_module(repository, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )  # Ray's actors
    monkeypatch.setattr(module_registry, "_factories", {})
    module_registry.module_shapes.cache_clear()
    yield name
    sys.modules.pop(name, None)
    module_registry.module_shapes.cache_clear()


def job(name: str, adapter: Any, encoding: str) -> MixedJob:
    fields = {
        "base_model": "tiny",
        "adapter": adapter,
        "encoding": encoding,
        "steps": STEPS,
        "rows_per_step": 4,
        "adaptation_interval": 2,
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01},
    }
    spec = JobSpec.model_validate({"name": f"{name}-{encoding.replace('_', '-')}", "seed": 3, **fields})
    return MixedJob(spec=spec, training=four_tenants("tiny", steps=1, encoding="auto")[0].training)


async def train_in_process(settings: ServiceSettings, jobs: list[MixedJob]) -> MixedRun:
    """All jobs of one tenant at once."""
    async with (
        running_in_process(settings) as (service, _devices),
        await tenant_client(service, "alice") as client,
    ):
        handles = [await client.submit(each.spec, training=each.training) for each in jobs]
        weights = {}
        for handle in handles:
            await handle.wait(WAIT_SECONDS)
            folder = await handle.download_adapter(settings.data_dir / handle.name)
            weights[handle.name] = exported_weights(folder, service.base_model)
        steps = (await client.describe()).base_steps
        return MixedRun(base=service.base_model, weights=weights, base_steps=steps)


async def test_mixed_kinds_and_a_registered_module_train_as_ordinary_modules_do_alone(
    adapter_module: str, tmp_path: Path
) -> None:
    path = save_tiny_model("gpt2", tmp_path / "model", dtype="float64")
    settings = service_for(tmp_path / "service", model=path, name="tiny", dtype="float64")
    settings = settings.model_copy(update={"adapter_modules": (adapter_module,)})
    jobs = [
        job(name, adapter, encoding)
        for name, adapter in (("mixture", MIXTURE), ("module", GATED))
        for encoding in ENCODINGS
    ]
    mixed = await train_in_process(settings, jobs)
    for each in jobs:
        alone = train_modules(each, mixed.base, path, attention="sdpa")
        assert all(weight.dtype == torch.float64 for weight in alone.values())
        difference = largest_difference(mixed.weights[each.spec.name], alone)
        assert difference <= 1e-9, f"{each.spec.name}: {difference:.2e}"


async def test_the_documented_job_runs_and_its_adapter_works_on_the_stock_model(
    repository: Path, adapter_module: str, tmp_path: Path
) -> None:
    wanted = documented_job(repository, tmp_path)
    path = save_tiny_model("llama", tmp_path / "model")
    settings = service_for(
        tmp_path / "service", model=path, name=wanted.spec.base_model, dtype="float32"
    ).model_copy(update={"adapter_modules": (adapter_module,)})
    await train_in_process(settings, [wanted])
    folder = settings.data_dir / wanted.spec.name
    assert json.loads((folder / "adapter_config.json").read_bytes())["format"] == "cola_adapter"
    model = AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.arange(5, 25)[None]
    bare = model(tokens).logits
    assert len(attach_adapter(model, folder).spec.parts) == 3
    assert not torch.equal(model(tokens).logits, bare)


def documented_job(repository: Path, folder: Path) -> MixedJob:
    file = folder / "job.yaml"
    file.write_text(documented(repository, "yaml", "name: mixed"), encoding="utf-8")
    parsed = read_job_file(file)
    assert parsed.training == folder / "rows.jsonl"
    return replace(job("any", MIXTURE, "auto"), spec=parsed.spec)


@pytest.mark.ray
@pytest.mark.timeout(300)
async def test_ray_actors_import_the_settings_modules(adapter_module: str, tmp_path: Path) -> None:
    path = save_tiny_model("gpt2", tmp_path / "model", dtype="float64")
    settings = service_for(tmp_path / "service", model=path, name="tiny", dtype="float64")
    settings = settings.model_copy(update={"adapter_modules": (adapter_module,)})
    wanted = job("module", GATED, "activations")
    mixed = await train_mixed(settings, [wanted])
    alone = train_modules(wanted, mixed.base, path, attention="sdpa")
    assert largest_difference(mixed.weights[wanted.spec.name], alone) <= 1e-9
