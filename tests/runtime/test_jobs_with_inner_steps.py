"""Inner steps through the whole service, against the surrogate written down in torch on the stock model."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.schedule import learning_rate
from cola_runtime.data.cursor import step_rows
from cola_runtime.data.formats import parse_dataset
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.errors import JobFailed
from cola_runtime.gradients import surrogate
from cola_runtime.jobs.plan import TrainingPlan, training_plan
from cola_runtime.rows import Row
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import exported_weights, largest_difference, service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.ordinary_modules import OrdinaryAdapter
from cola_runtime.testing.peft_reference import batch_loss
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import Site, TensorKey

WAIT_SECONDS = 60.0
STEPS = 4
ROWS = b"".join(
    json.dumps({"prompt": "ab" * n, "completion": "cde"[: 1 + n % 3]}).encode() + b"\n" for n in range(1, 9)
)


def spec(**fields: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "inner",
            "base_model": "tiny",
            "adapter": {"rank": 3, "alpha": 6},
            "steps": STEPS,
            "rows_per_step": 4,
            "adaptation_interval": 2,
            "inner_steps": 3,
            "optimizer": {"learning_rate": 2e-3, "max_grad_norm": 1.0},
            "schedule": {"kind": "linear", "warmup_steps": 1},
            **fields,
        }
    )


class SurrogateTraining:
    """One job by its definition: taps from the stock model with ordinary modules, then torch.optim."""

    def __init__(self, model_path: Path, plan: TrainingPlan) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
        self._model.requires_grad_(False).eval()
        self._plan = plan
        weights = initial_weights(plan.adapter)
        self._modules = {
            site: OrdinaryAdapter(plan.adapter.kinds[site.index], site, weights)
            for site in plan.adapter.sites
        }
        self._taps: dict[Site, tuple[Tensor, Tensor]] = {}
        for site, module in self._modules.items():
            self._model.get_submodule(site.name).register_forward_hook(self._hook(site, module))
        self.parameters = {key: p for module in self._modules.values() for key, p in module.named.items()}
        self._optimizer = torch.optim.AdamW(list(self.parameters.values()), weight_decay=0.0)

    def _hook(self, site: Site, module: OrdinaryAdapter) -> Any:
        def hook(_module: Any, args: Any, output: Tensor) -> Tensor:
            adapted = output + module(args[0])
            adapted.register_hook(lambda g: self._taps.__setitem__(site, (args[0].detach(), g)))
            return adapted

        return hook

    def step(self, rows: list[Row], number: int) -> None:
        rate = learning_rate(self._plan.schedule, self._plan.optimizer.learning_rate, number)
        self._optimizer.param_groups[0]["lr"] = rate
        batch_loss(self._model, rows).backward()
        targets = []
        for site, (x, g) in self._taps.items():
            rows_with_gradient = (g.flatten(0, 1) != 0).any(dim=1)  # gpt2: no two sites share an x
            x, g = x.flatten(0, 1)[rows_with_gradient], g.flatten(0, 1)[rows_with_gradient]
            targets.append((self._modules[site], x, (self._modules[site](x) - g).detach()))
        for _ in range(self._plan.optimizer.inner_steps):
            self._optimizer.zero_grad()
            for module, x, target in targets:
                (0.5 * (module(x) - target).square().sum()).backward()
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            self._optimizer.step()


async def test_a_job_with_inner_steps_is_the_written_down_surrogate(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model", dtype="float64")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float64")
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        handle = await client.submit(spec(), training=ROWS)
        await handle.wait(WAIT_SECONDS)
        steps = await handle.metrics()
        assert [step.step for step in steps] == [1, 2, 3, 4]
        assert (await handle.refresh()).encoding == "activations"
        folder = await handle.download_adapter(tmp_path / "adapter")
        found = exported_weights(folder, service.base_model)
        plan = training_plan(spec(), service.base_model, total_steps=STEPS)
    rows = (
        Tokenizer(model)
        .tokenize(parse_dataset(ROWS, file_name="t"), max_length=256, loss="completion", truncate=False)
        .rows
    )
    expected = SurrogateTraining(model, plan)
    for number in range(STEPS):
        expected.step([row for part in step_rows(rows, spec(), number) for row in part], number)
    alone: dict[TensorKey, Tensor] = {key: p.detach() for key, p in expected.parameters.items()}
    assert largest_difference(found, alone) < 1e-9


async def test_a_step_whose_taps_are_too_large_fails_the_job_at_once_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(surrogate, "MAX_KEPT_BYTES", 10_000)
    model = save_tiny_model("gpt2", tmp_path / "model", dtype="float64")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float64")
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        handle = await client.submit(spec(), training=ROWS)
        with pytest.raises(JobFailed) as caught:
            await handle.wait(WAIT_SECONDS)
        assert caught.value.reason == "TAPS_TOO_LARGE"
        assert "fewer rows_per_step" in str(caught.value)
        events = [event async for event in handle.events()]
        assert [event.kind for event in events].count("lease.lost") == 1
