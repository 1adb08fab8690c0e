"""What the throughput benchmark compares with: peft's steps of one row and of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cola_runtime.adapter_spec import lora_spec
from cola_runtime.rows import Row
from cola_runtime.testing import peft_rivals
from cola_runtime.testing.peft_reference import adapter_parameters, peft_model, relative_difference
from cola_runtime.testing.peft_rivals import PeftSetting, one_after_another, step_loss, taking_turns
from cola_runtime.testing.tiny_models import save_tiny_model, tiny_sites

torch.set_num_threads(1)
SPEC = lora_spec(sites=tiny_sites("llama"), rank=2, alpha=4.0, use_rslora=False, seed=3, dtype="float64")


def make_row(length: int, prompt: int) -> Row:
    weights = np.ones(length, np.float32)
    weights[:prompt] = 0.0
    tokens = np.random.default_rng(length).integers(5, 261, length).astype(np.int32)
    return Row(tokens=tokens, weights=weights)


ROWS = (make_row(7, 1), make_row(19, 6), make_row(12, 1), make_row(19, 18))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models"), dtype="float64")


def make_model(path: Path, attention: str) -> Any:
    """With a B that is not zero: with one that is, A has no gradient."""
    model = peft_model(path, SPEC, dtype="float64", attention=attention)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model, SPEC).values():
            parameter.normal_(generator=draw).div_(8)
    return model


def gradients(model: Any, loss: torch.Tensor) -> dict[Any, torch.Tensor]:
    factors = adapter_parameters(model, SPEC)
    return dict(zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_step_is_its_rows_by_themselves_over_all_their_labels(path: Path, attention: str) -> None:
    model = make_model(path, attention)
    labels = sum(row.label_tokens for row in ROWS)
    alone = sum(row.label_tokens / labels * step_loss(model, [row]) for row in ROWS)
    together = step_loss(model, ROWS)
    assert together.item() == pytest.approx(alone.item(), rel=1e-6)
    difference = relative_difference(gradients(model, together), gradients(model, alone))
    assert max(difference.values()) < 1e-5


def test_one_row_is_neither_padded_nor_masked(path: Path) -> None:
    model = make_model(path, "sdpa")
    given: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.update(kwargs)

    model.get_base_model().register_forward_pre_hook(keep, with_kwargs=True)
    step_loss(model, ROWS[:1])
    assert given["input_ids"].shape == (1, 7)
    assert given.get("attention_mask") is None
    step_loss(model, ROWS)
    assert given["attention_mask"].sum(1).tolist() == [row.length for row in ROWS]


@pytest.mark.parametrize("train", [one_after_another, taking_turns])
@pytest.mark.parametrize(("rows_per_step", "steps"), [(1, [1, 1, 1, 1]), (2, [2, 2]), (4, [4])])
def test_a_tenants_rows_come_so_many_a_step(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: Callable[..., Any],
    rows_per_step: int,
    steps: list[int],
) -> None:
    seen: list[list[Row]] = []

    def counted(model: Any, rows: tuple[Row, ...]) -> torch.Tensor:
        seen.append(list(rows))
        return step_loss(model, rows)

    monkeypatch.setattr(peft_rivals, "step_loss", counted)
    setting = PeftSetting(
        model=path,
        dtype="float32",
        target_modules=("q_proj", "down_proj"),
        rank=2,
        alpha=4.0,
        learning_rate=1e-3,
    )
    trained = train(replace(setting, rows_per_step=rows_per_step), [ROWS, ROWS[::-1]])
    assert trained.tokens == 2 * sum(row.length for row in ROWS)
    assert sorted(map(len, seen)) == sorted(2 * steps)
    first = [
        row for rows in (seen[: len(steps)] if train is one_after_another else seen[::2]) for row in rows
    ]
    assert first == list(ROWS)
