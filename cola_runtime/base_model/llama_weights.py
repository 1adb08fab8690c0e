"""A Llama's frozen weights by input group, and which models count as Llama."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cola_runtime.base_model.frozen_products import FrozenProduct, ProductKind
from cola_runtime.base_model.site_groups import SiteGroup


@dataclass(frozen=True, slots=True)
class Projection:
    """One input group of a layer."""

    number: int  # the input group
    products: tuple[FrozenProduct, ...]

    def sites(self, tensors_NO: Sequence[Tensor], shape: tuple[int, int]) -> list[Tensor]:
        """[B, T, O] of every site: column slices of one tensor per product."""
        sites: list[Tensor] = []
        for product, tensor_NO in zip(self.products, tensors_NO, strict=True):
            tensor_BTO = tensor_NO.view(*shape, -1)
            sites += [tensor_BTO] if len(product.widths) == 1 else torch.split(tensor_BTO, product.widths, -1)
        return sites


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaLayer:
    qkv: Projection
    output: Projection
    gate_up: Projection
    down: Projection
    attention_norm_D: Tensor
    mlp_norm_D: Tensor

    @property
    def projections(self) -> tuple[Projection, ...]:
        """In the order in which the forward pass meets them."""
        return self.qkv, self.output, self.gate_up, self.down


def llama_layers(model: Any, groups: Sequence[SiteGroup], make: ProductKind) -> list[LlamaLayer]:
    of = {group.sites[0].name: group for group in groups}
    return [
        LlamaLayer(
            qkv=_fused(of[f"model.layers.{depth}.self_attn.q_proj"], make),
            output=_apart(of[f"model.layers.{depth}.self_attn.o_proj"], make),
            # Apart: two contiguous outputs cost no more and spare the adapters' products a copy of each.
            gate_up=_apart(of[f"model.layers.{depth}.mlp.gate_proj"], make),
            down=_apart(of[f"model.layers.{depth}.mlp.down_proj"], make),
            attention_norm_D=layer.input_layernorm.weight.detach(),
            mlp_norm_D=layer.post_attention_layernorm.weight.detach(),
        )
        for depth, layer in enumerate(model.model.layers)
    ]


def _fused(group: SiteGroup, make: ProductKind) -> Projection:
    assert group.fused_weight is not None  # `is_plain_llama` has looked
    product = make(group.fused_weight, group.fused_bias, group.widths)
    return Projection(group.sites[0].input_group, (product,))


def _apart(group: SiteGroup, make: ProductKind) -> Projection:
    modules: Sequence[Any] = group.modules
    products = [
        make(module.weight.detach(), None if module.bias is None else module.bias.detach(), [width])
        for module, width in zip(modules, group.widths, strict=True)
    ]
    return Projection(group.sites[0].input_group, tuple(products))


def is_plain_llama(model: Any, groups: Sequence[SiteGroup]) -> bool:
    """Exactly transformers' own LlamaForCausalLM with SiLU, plain Linear sites and, as last group, the
    embedding; nothing missing.
    """
    from transformers.models.llama import modeling_llama as llama

    if type(model) is not llama.LlamaForCausalLM:
        return False
    layers = model.model.layers
    of_layers = groups[:-1]
    return (
        all(type(layer) is llama.LlamaDecoderLayer for layer in layers)
        and groups[-1].modules == (model.model.embed_tokens,)
        and all(type(module) is nn.Linear for group in of_layers for module in group.modules)
        and [len(group.modules) for group in of_layers] == [3, 1, 2, 1] * len(layers)
        and all(group.fused_weight is not None for group in of_layers if len(group.modules) == 3)
        and _is_silu(layers[0].mlp.act_fn)
    )


def _is_silu(activation: Any) -> bool:
    probe = torch.linspace(-3, 3, 7)
    return torch.equal(activation(probe), functional.silu(probe))
