"""Adapters as ordinary `nn.Module`s in a stock model: what the runtime's gradients are compared with.

Written from the kinds' definitions with torch's own layers; shares only L-LoRA's draw and the registry of
users' modules with the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterSpec,
    HeadKind,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
    ModuleKind,
)
from cola_runtime.adapters.module_registry import build_module
from cola_runtime.testing.peft_reference import Recipe, TrainedAlone, stock_model, train_parameters
from cola_runtime.types import Patch, Site, SiteKind, TensorKey, TensorKind

_ACTIVATIONS: dict[str, type[nn.Module] | Any] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class OrdinaryAdapter(nn.Module):
    """s * a(x) of one site; `named` are its trainable parameters by the runtime's keys."""

    def __init__(self, kind: AdapterKind, site: Site, weights: Mapping[TensorKey, Tensor]) -> None:
        super().__init__()
        self.scaling = kind.scaling
        self.named: dict[TensorKey, Tensor] = {}
        self._own = {key: weight for key, weight in weights.items() if key.site == site.index}
        self._site = site
        self.body = self._body(kind)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.scaling * self.body(x)
        return output

    def _body(self, kind: AdapterKind) -> nn.Module:
        match kind:
            case LoraKind():
                return nn.Sequential(self._first(TensorKind.LORA_A), self._second(TensorKind.LORA_B))
            case LinearKind():
                bias = TensorKind.BIAS if kind.bias else None
                return self._first(TensorKind.WEIGHT, bias, groups=self._site.groups)
            case MlpKind():
                return nn.Sequential(
                    self._first(TensorKind.MLP_IN, TensorKind.MLP_IN_BIAS),
                    _ACTIVATIONS[kind.activation](),
                    self._second(TensorKind.MLP_OUT, TensorKind.MLP_OUT_BIAS),
                )
            case LinearizedLoraKind():
                return _Tangent(
                    kind, self._site, self._first(TensorKind.DELTA_A), self._second(TensorKind.DELTA_B)
                )
            case ModuleKind():
                return self._registered(kind)
            case HeadKind():
                raise ValueError("a head is at no module: `sequence_reference` has it")

    def _registered(self, kind: ModuleKind) -> nn.Module:
        """The user's own module, whose parameters are numbered in `parameters()` order."""
        module: nn.Module = build_module(kind, self._site.in_features, self._site.out_features)
        for slot, parameter in enumerate(module.parameters()):
            key = TensorKey(self._site.index, TensorKind.MODULE, slot)
            parameter.data = self._own[key].clone()
            self.named[key] = parameter
        return module if self._site.patch is None else _OnPatches(module, self._site.patch)

    def _first(self, weight: TensorKind, bias: TensorKind | None = None, *, groups: int = 1) -> _Layer:
        """What the module's own input goes through."""
        return _Layer(self._parameter(weight), self._parameter(bias), self._site, groups)

    def _second(self, weight: TensorKind, bias: TensorKind | None = None) -> _Layer:
        """What the first layer's output goes through: of the same positions, one at a time."""
        site = self._site
        patch = (
            None
            if site.patch is None
            else Patch(kernel=(1, 1), stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1))
        )
        kind = SiteKind.LINEAR if patch is None else site.kind
        over_hidden = replace(site, kind=kind, patch=patch, padding_index=None)
        return _Layer(self._parameter(weight), self._parameter(bias), over_hidden, site.groups)

    def _parameter(self, kind: TensorKind | None) -> nn.Parameter | None:
        if kind is None:
            return None
        key = TensorKey(self._site.index, kind)
        parameter = nn.Parameter(self._own[key].clone())
        self.named[key] = parameter
        return parameter


class _Layer(nn.Module):
    """torch's own linear, convolution or embedding with these parameters, over the input of `site`."""

    def __init__(self, weight: Any, bias: Any, site: Site, groups: int) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._site, self._groups = site, groups

    def forward(self, x: Tensor) -> Tensor:
        return self.computed(x, self.weight)

    def computed(self, x: Tensor, weight: Tensor) -> Tensor:
        patch = self._site.patch
        if patch is not None:
            kernel_OCHW = weight.reshape(len(weight), -1, *patch.kernel)
            padded = functional.pad(x, patch.padding)
            return functional.conv2d(
                padded, kernel_OCHW, self.bias, patch.stride, 0, patch.dilation, self._groups
            )
        if self._site.takes_ids:
            table_VO = weight.T
            found = functional.embedding(x, table_VO, padding_idx=self._site.padding_index)
            return found if self.bias is None else found + self.bias
        return functional.linear(x, weight, self.bias)


class _OnPatches(nn.Module):
    """A module of rows at every position of a convolution's output, by torch's own im2col."""

    def __init__(self, module: nn.Module, patch: Patch) -> None:
        super().__init__()
        self.module, self._patch = module, patch

    def forward(self, x_BCHW: Tensor) -> Tensor:
        patch = self._patch
        padded = functional.pad(x_BCHW, patch.padding)
        columns_BIL = functional.unfold(padded, patch.kernel, patch.dilation, 0, patch.stride)
        output_BLO: Tensor = self.module(columns_BIL.transpose(1, 2))
        height = (padded.shape[2] - patch.dilation[0] * (patch.kernel[0] - 1) - 1) // patch.stride[0] + 1
        images, positions, outputs = output_BLO.shape
        return output_BLO.transpose(1, 2).reshape(images, outputs, height, positions // height)


class _Tangent(nn.Module):
    """LoRA's forward-mode derivative at (A0, B0) in the direction of the deltas, by torch.func.jvp."""

    def __init__(self, kind: LinearizedLoraKind, site: Site, delta_a: _Layer, delta_b: _Layer) -> None:
        super().__init__()
        from cola_runtime.adapters.linearized_lora import SiteLinearizedLora

        base = SiteLinearizedLora(kind, site)  # the draw of (A0, B0) only
        self.register_buffer("a0", base.base_a_RI.to(delta_a.weight).reshape(delta_a.weight.shape))
        self.register_buffer("b0", base.base_b_OR.to(delta_b.weight).reshape(delta_b.weight.shape))
        self.delta_a, self.delta_b = delta_a, delta_b

    def forward(self, x: Tensor) -> Tensor:
        def lora(a: Tensor, b: Tensor) -> Tensor:
            return self.delta_b.computed(self.delta_a.computed(x, a), b)

        deltas = (self.delta_a.weight, self.delta_b.weight)
        tangent: Tensor = torch.func.jvp(lora, (self.a0, self.b0), deltas)[1]
        return tangent


def add_adapter(
    model: nn.Module, spec: AdapterSpec, weights: Mapping[TensorKey, Tensor]
) -> dict[TensorKey, Tensor]:
    """Forward hooks that add every site's adapter to its output; a head is at no module, and left out.

    Returns the trainable parameters.
    """
    parameters: dict[TensorKey, Tensor] = {}
    for site in spec.sites:
        if site.kind is SiteKind.HEAD:
            continue
        adapter = OrdinaryAdapter(spec.kinds[site.index], site, weights).to(next(model.parameters()).device)
        model.get_submodule(site.name).register_forward_hook(_adding(adapter))
        parameters.update(adapter.named)
    return parameters


def _adding(adapter: OrdinaryAdapter) -> Any:
    return lambda _module, args, output: output + adapter(args[0])


def train_ordinary(model_path: Path, recipe: Recipe, *, dtype: str, attention: str = "sdpa") -> TrainedAlone:
    """As `peft_reference.train_alone`, for every kind, on the model in `dtype` throughout."""
    model = stock_model(model_path, dtype=dtype, attention=attention)
    wide_norms(model.requires_grad_(False).eval())
    return train_parameters(model, add_adapter(model, recipe.spec, recipe.initial_weights), recipe)


def wide_norms(model: nn.Module) -> None:
    """Let every RMSNorm compute in the model's own dtype: transformers' are in float32 even in float64."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    inverse = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon)
    normed: Tensor = module.weight * (hidden * inverse)
    return normed
