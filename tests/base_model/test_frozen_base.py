"""The base model's weights and buffers are the same bytes after a thousand steps of all sorts of tenants."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from cola_runtime.base_model.model import TappedModel
from tests.base_model.conftest import TinyFolder
from tests.base_model.kind_samples import KINDS, everywhere
from tests.base_model.merged_samples import SUM, collaborator
from tests.base_model.mixed_samples import install_all, poisoned, random_row, run_segments

STEPS = 1000
ROWS = (random_row(6, seed=1),)


def fingerprint(model: TappedModel) -> str:
    digest = hashlib.sha256()
    stock = model._loaded.model
    for name, tensor in sorted((*stock.named_parameters(), *stock.named_buffers()), key=lambda each: each[0]):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_a_thousand_mixed_steps_leave_the_base_models_bytes_alone(tiny_folder: TinyFolder) -> None:
    model = TappedModel.load(tiny_folder("gpt2", "float32"), dtype="float32", attention="eager", threads=1)
    before = fingerprint(model)
    assert not any(parameter.requires_grad for parameter in model._loaded.model.parameters())
    sites = model.sites[:4]
    apart = [everywhere(k, kind, sites, "float32") for k, kind in enumerate(list(KINDS.values())[:3])]
    apart.append(poisoned(replace(apart[0], job_id="job-bad")))
    gang = [collaborator(k, KINDS["lora"], sites, SUM, dtype="float32") for k in (10, 11)]
    install_all(model, apart)
    for member in gang:
        member.install(model)
    unmerged = [replace(member.segment(), rows=ROWS) for member in apart]
    merged = [replace(member.segment(), rows=ROWS) for member in gang]
    for step in range(STEPS):
        result, _ = run_segments(model, merged if step % 4 == 3 else unmerged)
        assert all(loss.reason is None for loss in result.losses)
    assert fingerprint(model) != before, "the gang is merged into them just now"
    for tenant in (*apart, *(member.tenant for member in gang)):
        model.evict(tenant.job_id)
    assert fingerprint(model) == before
