"""How one adapter's weights lie in one flat vector, so that equal adapters stack with a single copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten_dense_tensors

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterPart,
    AdapterSpec,
    HeadKind,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
    ModuleKind,
)
from cola_runtime.base_model.stacks.head import HeadLayout
from cola_runtime.base_model.stacks.linear import LinearLayout
from cola_runtime.base_model.stacks.linearized_lora import LinearizedLoraLayout
from cola_runtime.base_model.stacks.lora import LoraLayout
from cola_runtime.base_model.stacks.lora_dropout import DropoutLoraLayout
from cola_runtime.base_model.stacks.mlp import MlpLayout
from cola_runtime.base_model.stacks.module import ModuleLayout
from cola_runtime.base_model.stacks.protocol import PartLayout, by_input_group
from cola_runtime.types import TensorKey


@dataclass(frozen=True, slots=True)
class Piece:
    """The sites of one part at one input group: consecutive blocks of the flat vector."""

    part: int  # in spec.parts
    layout: PartLayout
    blocks: slice  # of all the vector's


@dataclass(frozen=True, slots=True, eq=False)
class AdapterLayout:
    """Part by part, input group by input group. The bank keeps one per `layout_key`: identity is equality."""

    pieces: tuple[Piece, ...]
    block_sizes: list[int]  # piece by piece

    @staticmethod
    def of(spec: AdapterSpec) -> AdapterLayout:
        pieces: list[Piece] = []
        sizes: list[int] = []
        for number, part in enumerate(spec.parts):
            for sites in by_input_group(part.sites).values():
                layout = _part_layout(AdapterPart(kind=part.kind, sites=sites))
                first = len(sizes)
                sizes.extend(layout.block_sizes)
                pieces.append(Piece(number, layout, slice(first, len(sizes))))
        return AdapterLayout(tuple(pieces), sizes)

    def blocks(self, flat: Tensor) -> Sequence[Tensor]:
        """Views of one adapter's vector [P], or of several ones' beside each other [S, P]: all at once, since
        each look at a vector takes longer than a view.
        """
        return flat.split_with_sizes(self.block_sizes, dim=-1)

    def flatten(self, weights: Mapping[TensorKey, Tensor], spec: AdapterSpec, dtype: torch.dtype) -> Tensor:
        """A copy of all weights, each part's scaling folded in, in the bank's `dtype`.

        Scaled in the wider of both dtypes, then rounded. A few operations on everything: a base model does it
        at every step of every tenant, beside what it computes.
        """
        blocks = [
            block
            for piece in self.pieces
            for block in piece.layout.scaled(weights, spec.parts[piece.part].kind)
        ]
        if not blocks:
            return torch.empty(0, dtype=dtype)
        flat: Tensor = flatten_dense_tensors([block.tensor for block in blocks])  # type: ignore[no-untyped-call]
        wide = flat.to(torch.promote_types(flat.dtype, dtype), copy=len(blocks) == 1)  # of one it is a view
        parts = wide.split_with_sizes([block.tensor.numel() for block in blocks])
        for factor in {block.by for block in blocks} - {1.0}:
            torch._foreach_mul_(
                [part for part, block in zip(parts, blocks, strict=True) if block.by == factor], factor
            )
        return wide.to(dtype)


def layout_key(spec: AdapterSpec) -> object:
    """Adapters with equal keys stack: what the blocks hold may differ, their shapes may not."""
    return tuple((_shape_key(part.kind), tuple(site.index for site in part.sites)) for part in spec.parts)


def _shape_key(kind: AdapterKind) -> object:
    match kind:
        case LoraKind():
            return "lora", kind.rank, kind.dropout > 0
        case LinearizedLoraKind():
            return "linearized_lora", kind.rank, kind.initial_b
        case LinearKind():
            return "linear", kind.bias
        case MlpKind():
            return "mlp", kind.hidden, kind.activation
        case ModuleKind():
            return "module", kind.name, kind.options
        case HeadKind():
            return "head"  # of any number of labels: nothing of it is stacked
        case _:
            assert_never(kind)


def _part_layout(part: AdapterPart) -> PartLayout:
    kind = part.kind
    match kind:
        case LoraKind():
            layout = DropoutLoraLayout if kind.dropout else LoraLayout
            return layout(kind.rank, part.sites)
        case LinearizedLoraKind():
            return LinearizedLoraLayout(kind, part.sites)
        case LinearKind():
            return LinearLayout(kind, part.sites)
        case MlpKind():
            return MlpLayout(kind, part.sites)
        case ModuleKind():
            return ModuleLayout(kind, part.sites)
        case HeadKind():
            return HeadLayout()
        case _:
            assert_never(kind)
