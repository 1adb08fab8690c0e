"""The hand-written Llama, long rows, bfloat16, and a module that one forward pass calls twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cola_runtime.base_model import attention, load
from cola_runtime.base_model.model import TappedModel
from cola_runtime.testing.peft_reference import batch_loss, relative_difference
from cola_runtime.types import TensorKey, TensorKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    four_tenants,
    gradients_of,
    install_all,
    peft_gradients,
    run_segments,
)


def all_gradients(model: TappedModel, tenants: list[Tenant]) -> list[Weights]:
    _, taps = run_segments(model, [member.segment() for member in tenants])
    return [gradients_of(taps, position, member) for position, member in enumerate(tenants)]


def worst(found: list[Weights], expected: list[Weights]) -> float:
    return max(
        max(relative_difference(mine, theirs).values()) for mine, theirs in zip(found, expected, strict=True)
    )


def loaded(path: Path, dtype: str) -> tuple[TappedModel, list[Tenant]]:
    model = TappedModel.load(path, dtype=dtype, attention="eager", threads=1)
    tenants = four_tenants(model.sites, "float32" if dtype == "bfloat16" else dtype)
    install_all(model, tenants)
    return model, tenants


def test_llama_by_hand_and_llama_patched_agree(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_folder("llama", "float64")
    model, tenants = loaded(path, "float64")
    assert model.describe("", "").details["body"] == "LlamaBody"
    by_hand = all_gradients(model, tenants)
    monkeypatch.setattr(load, "is_plain_llama", lambda _model, _groups: False)
    patched, tenants = loaded(path, "float64")
    assert patched.describe("", "").details["body"] == "PatchedBody"
    assert worst(by_hand, all_gradients(patched, tenants)) < 1e-6


def test_long_rows_take_flash_attention_and_keep_their_gradient(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tenants = loaded(tiny_folder("llama", "float64"), "float64")
    kept = all_gradients(model, tenants)
    monkeypatch.setattr(attention, "LONGEST_KEPT", 8)
    assert worst(all_gradients(model, tenants), kept) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16_gradients_are_as_near_to_float32s_as_pefts_are(tiny_folder: TinyFolder, kind: str) -> None:
    model, tenants = loaded(tiny_folder(kind, "bfloat16"), "bfloat16")
    found = all_gradients(model, tenants)
    for member, mine in zip(tenants, found, strict=True):
        exact, _ = peft_gradients(tiny_folder(kind, "bfloat16"), member, "float32")
        theirs, _ = peft_gradients(tiny_folder(kind, "bfloat16"), member, "bfloat16")
        assert _distance(mine, exact) < 1.5 * _distance(theirs, exact)


def _distance(found: Weights, exact: Weights) -> float:
    return float(
        torch.stack([(found[key].double() - exact[key].double()).norm() for key in exact]).norm()
        / torch.stack([grad.double().norm() for grad in exact.values()]).norm()
    )


def tied_layers(path: Path, dtype: torch.dtype, attention: str) -> Any:
    """A model whose second layer is its first once more, so that its modules are called twice."""
    model = _read(path, dtype, attention)
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    layers[1] = layers[0]
    return model


_read = load._read


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_module_called_twice_gets_the_sum_of_both_gradients(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tiny_folder(kind, "float64")
    monkeypatch.setattr(load, "_read", tied_layers)
    model, tenants = loaded(path, "float64")
    assert len(model.sites) == (14 if kind == "llama" else 8)
    found = all_gradients(model, tenants[:1])[0]
    expected = hooked_gradients(tied_layers(path, torch.float64, "eager"), tenants[0])
    assert max(relative_difference(found, expected).values()) < 1e-10


def hooked_gradients(model: Any, member: Tenant) -> Weights:
    """Autograd through forward hooks that add s B A x."""
    factors = {key: weight.clone().requires_grad_(True) for key, weight in member.weights.items()}
    for site in member.spec.sites:
        a = factors[TensorKey(site.index, TensorKind.LORA_A)]
        b = factors[TensorKey(site.index, TensorKind.LORA_B)]
        model.get_submodule(site.name).register_forward_hook(_adding(a, b, member.spec.parts[0].kind.scaling))
    batch_loss(model, member.rows).backward()
    kinds = {TensorKind.LORA_A: TensorKind.GRAD_LORA_A, TensorKind.LORA_B: TensorKind.GRAD_LORA_B}
    return {TensorKey(k.site, kinds[k.kind]): f.grad for k, f in factors.items() if f.grad is not None}


def _adding(a: Tensor, b: Tensor, scaling: float) -> Any:
    return lambda _module, args, output: output + scaling * (args[0] @ a.T @ b.T)
