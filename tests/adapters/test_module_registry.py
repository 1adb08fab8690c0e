"""Operators' modules: imported by name, refused with the place and the reason."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from cola_runtime.adapter_spec import ModuleKind
from cola_runtime.adapters import module_registry
from cola_runtime.adapters.adapter import site_adapter
from cola_runtime.adapters.module_registry import import_adapter_modules, module_shapes
from cola_runtime.errors import InvalidInput
from cola_runtime.testing.tiny_models import tiny_sites
from tests.adapters.adapter_samples import MODULE

SITE = tiny_sites("llama")[0]


def test_importing_registers_once_and_again_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from cola_runtime.adapters.module_registry import register_adapter_module\n"
    (tmp_path / "operators_own.py").write_text(
        code + "register_adapter_module('own', lambda i, o, options: 1)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module_registry, "_factories", {})
    import_adapter_modules(["operators_own"])
    import_adapter_modules(["operators_own"])
    assert list(module_registry._factories) == ["own"]
    sys.modules.pop("operators_own")


@pytest.mark.parametrize(
    ("code", "problem"),
    [(None, "ModuleNotFoundError"), ("1 / 0", "ZeroDivisionError: division by zero"), ("(", "SyntaxError")],
)
def test_what_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str | None, problem: str
) -> None:
    if code is not None:
        (tmp_path / "operators_bad.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInput, match=r"'operators_bad' cannot be imported") as caught:
        import_adapter_modules(["operators_bad"])
    assert caught.value.reason == "ADAPTER_MODULE_IMPORT"
    assert problem in str(caught.value)


def test_sites_of_one_shape_share_the_trial(
    bent_is_registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = module_shapes(MODULE, SITE.in_features, SITE.out_features)
    monkeypatch.setattr(module_registry, "_factories", {})
    assert module_shapes(MODULE, SITE.in_features, SITE.out_features) is before


def test_a_module_computes_in_evaluation_mode(bent_is_registered: None) -> None:
    def dropping(inputs: int, outputs: int, options: object) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.Dropout(0.9))

    module_registry.register_adapter_module("dropping", dropping)
    adapter = site_adapter(ModuleKind(name="dropping"), SITE)
    weights, x = adapter.initial_weights(0), torch.ones(4, SITE.in_features, dtype=torch.float64)
    assert torch.equal(adapter.forward(x, weights), adapter.forward(x, weights))
    assert adapter.forward(x, weights).count_nonzero() == 4 * SITE.out_features


@pytest.mark.parametrize("factory", [lambda i, o, options: None, lambda i, o, options: nn.Flatten()])
def test_what_is_no_module_with_parameters_is_refused(bent_is_registered: None, factory: object) -> None:
    module_registry.register_adapter_module("odd", factory)
    with pytest.raises(InvalidInput) as caught:
        module_shapes(ModuleKind(name="odd"), 4, 4)
    assert caught.value.reason == "ADAPTER_MODULE_INVALID"


def test_initial_weights_follow_from_the_seed_whatever_other_threads_build(bent_is_registered: None) -> None:
    adapter = site_adapter(MODULE, SITE)
    expected = adapter.initial_weights(7)
    with ThreadPoolExecutor(8) as threads:
        seeds = [7, *range(100, 107)] * 100
        drawn = list(threads.map(adapter.initial_weights, seeds))[::8]
    assert all(torch.equal(weights[key], expected[key]) for weights in drawn for key in expected)
