"""A hand-written mixed forward and backward for Llama, faster than the bare transformers model.

What a frozen base allows: no weight gradients, residuals added by the products themselves, cheap norms, every
large tensor in a buffer that lives from step to step. Whatever is not exactly transformers' LlamaForCausalLM
goes through `PatchedBody` instead.
Shapes: B rows, T tokens, N = B T, D hidden, F intermediate, W width of q, k and v together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cola_runtime.base_model.attention import AttentionRecord, CausalAttention, Rotary
from cola_runtime.base_model.frozen_ops import (
    ResidualGradient,
    rms_norm,
    silu,
    swiglu_backward,
)
from cola_runtime.base_model.frozen_products import fastest_product
from cola_runtime.base_model.llama_weights import LlamaLayer, Projection, llama_layers
from cola_runtime.base_model.row_groups import RowGroups, row_groups
from cola_runtime.base_model.segments import MixedBatch
from cola_runtime.base_model.site_groups import SiteGroup
from cola_runtime.base_model.stacks.cohorts import Stacks
from cola_runtime.base_model.stacks.protocol import Kept
from cola_runtime.base_model.workspace import Workspace


@dataclass(slots=True, kw_only=True)
class _LayerRecord:
    """One layer's activations that the backward pass reads; x of down is recomputed."""

    h_ND: Tensor
    inverse_N1: Tensor  # of h's norm
    x_ND: Tensor  # of q, k, v
    attention: list[AttentionRecord]  # of each group of rows
    mixed_ND: Tensor  # attention's output, x of o
    middle_ND: Tensor  # the residual stream between attention and MLP
    middle_inverse_N1: Tensor
    middle_x_ND: Tensor  # of gate, up
    gate_NF: Tensor
    up_NF: Tensor
    silu_NF: Tensor  # of gate
    kept: dict[int, list[Kept]]  # input group -> what every stack's forward left


@dataclass(slots=True, kw_only=True)
class _Step:
    """The step under way."""

    shape: tuple[int, int]
    stacks: Stacks
    rows: RowGroups
    rotaries: list[Rotary]  # of each group of rows
    lowest: int  # the lowest adapted input group, by its place in the forward pass; -1: the embedding
    tokens_BT1: Tensor
    embedding_kept: list[Kept]
    inputs_ND: dict[int, Tensor] = field(default_factory=dict)  # of the layers that the backward pass reaches
    records: dict[int, _LayerRecord] = field(default_factory=dict)  # of the same, unless checkpointed
    last_ND: Tensor | None = None  # the residual stream before the final norm
    last_inverse_N1: Tensor | None = None


class LlamaBody:
    """`Body` of one LlamaForCausalLM. The tensors that it hands out lie in `space`.

    With `checkpointing` a layer keeps its input alone and is computed again in the backward pass.
    """

    def __init__(
        self,
        model: Any,
        groups: Sequence[SiteGroup],
        space: Workspace,
        *,
        checkpointing: bool,
        keep_tiles: bool,
    ) -> None:
        attention = model.model.layers[0].self_attn
        self._model = model.model
        self._space = space
        self._checkpointing = checkpointing
        gate_OI = self._model.layers[0].mlp.gate_proj.weight.detach()
        self._layers = llama_layers(model, groups, fastest_product(gate_OI, keep_tiles=keep_tiles))
        self._eps = float(model.config.rms_norm_eps)
        self._attention = CausalAttention(
            heads=model.config.num_attention_heads,
            key_heads=model.config.num_key_value_heads,
            head_size=attention.head_dim,
            scaling=attention.scaling,
        )
        self._places = {
            projection.number: 4 * depth + place
            for depth, layer in enumerate(self._layers)
            for place, projection in enumerate(layer.projections)
        }
        self._embedding = groups[-1].sites[0].input_group
        self._places[self._embedding] = -1
        self._step: _Step | None = None

    @torch.no_grad()
    def forward(self, batch: MixedBatch, stacks: Stacks, *, train: bool) -> Tensor:
        tokens_BT = batch.tokens_BT
        embedded_BTD = self._model.embed_tokens(tokens_BT)
        embedding = stacks.get(self._embedding, [])
        rows = row_groups(batch)
        step = _Step(
            shape=(tokens_BT.shape[0], tokens_BT.shape[1]),
            stacks=stacks,
            rows=rows,
            rotaries=self._rotaries(embedded_BTD, rows),
            lowest=min((self._places[group] for group in stacks), default=4 * len(self._layers)),
            tokens_BT1=tokens_BT[..., None],
            embedding_kept=[stack.add_to([embedded_BTD], tokens_BT[..., None]) for stack in embedding],
        )
        h_ND = embedded_BTD.flatten(0, 1)
        for depth, layer in enumerate(self._layers):
            kept = f"layer{depth}" if train and depth >= step.lowest // 4 else ""
            passing = f"passing{depth % 2}"
            slot = "again" if self._checkpointing else kept or passing
            record = self._layer_forward(layer, h_ND, step, slot)
            next_ND = self._add_down(layer, record, step, f"{kept or passing}.next")
            if kept:
                step.inputs_ND[depth] = h_ND
            if kept and not self._checkpointing:
                step.records[depth] = record
            h_ND = next_ND
        out_ND = self._buffer("hidden", h_ND.shape[1], h_ND)
        step.last_ND = h_ND
        step.last_inverse_N1 = rms_norm(h_ND, self._model.norm.weight, self._eps, out_ND, self._space)
        self._step = step if train else None
        return out_ND

    @torch.no_grad()
    def backward(self, grad_ND: Tensor) -> None:
        step = self._step
        assert step is not None and step.last_ND is not None and step.last_inverse_N1 is not None
        dh = ResidualGradient(grad_ND, self._space)
        dh.add_rms_norm_backward(grad_ND, step.last_ND, step.last_inverse_N1, self._model.norm.weight)
        while step.inputs_ND:
            depth, h_ND = step.inputs_ND.popitem()  # the deepest left
            record = step.records.pop(depth, None) or self._recomputed(self._layers[depth], h_ND, step)
            if self._mlp_backward(self._layers[depth], record, step, dh):
                self._attention_backward(self._layers[depth], record, step, dh)
        grads_BTD = [dh.rounded_ND.view(*step.shape, -1)]
        for stack, kept in zip(step.stacks.get(self._embedding, []), step.embedding_kept, strict=True):
            stack.backward(step.tokens_BT1, kept, grads_BTD, None)

    def finish(self) -> None:
        self._step = None

    def _buffer(self, name: str, columns: int, like: Tensor) -> Tensor:
        return self._space.tensor(name, (len(like), columns), like.dtype)

    def _rotaries(self, embedded_BTD: Tensor, rows: RowGroups) -> list[Rotary]:
        """By the tokens' positions in their rows."""
        longest = max(group.tokens for group in rows.groups)
        positions = torch.arange(longest, device=embedded_BTD.device)[None]
        cos_1TE, sin_1TE = self._model.rotary_emb(embedded_BTD, position_ids=positions)
        return [
            self._attention.rotary(cos_1TE[0, : group.tokens], sin_1TE[0, : group.tokens])
            for group in rows.groups
        ]

    def _recomputed(self, layer: LlamaLayer, h_ND: Tensor, step: _Step) -> _LayerRecord:
        """The layer's record once more. The residual stream above it is known: down's product is left out."""
        record = self._layer_forward(layer, h_ND, step, "again")
        unread_ND = self._buffer("again.next", h_ND.shape[1], h_ND)
        record.kept[layer.down.number] = _adapt(layer.down, self._activated(record), [unread_ND], step)
        return record

    def _layer_forward(self, layer: LlamaLayer, h_ND: Tensor, step: _Step, slot: str) -> _LayerRecord:
        """The layer up to the input of down; `slot` names the buffers that must survive."""
        hidden = h_ND.shape[1]
        kept: dict[int, list[Kept]] = {}
        x_ND = self._buffer(f"{slot}.x", hidden, h_ND)
        inverse_N1 = rms_norm(h_ND, layer.attention_norm_D, self._eps, x_ND, self._space)
        (qkv_NW,), kept[layer.qkv.number] = self._project(layer.qkv, x_ND, ["qkv"], step)
        width = self._attention.heads * self._attention.head_size
        mixed_ND = self._buffer(f"{slot}.mixed", width, h_ND)
        attention = self._attend(qkv_NW, mixed_ND, step, slot)
        middle_ND, kept[layer.output.number] = self._add_projected(
            layer.output, h_ND, mixed_ND, f"{slot}.middle", step
        )

        middle_x_ND = self._buffer(f"{slot}.middle_x", hidden, h_ND)
        middle_inverse_N1 = rms_norm(middle_ND, layer.mlp_norm_D, self._eps, middle_x_ND, self._space)
        (gate_NF, up_NF), kept[layer.gate_up.number] = self._project(
            layer.gate_up, middle_x_ND, [f"{slot}.gate", f"{slot}.up"], step
        )
        silu_NF = self._buffer(f"{slot}.silu", gate_NF.shape[1], h_ND)
        silu(gate_NF, silu_NF)
        return _LayerRecord(
            h_ND=h_ND,
            inverse_N1=inverse_N1,
            x_ND=x_ND,
            attention=attention,
            mixed_ND=mixed_ND,
            middle_ND=middle_ND,
            middle_inverse_N1=middle_inverse_N1,
            middle_x_ND=middle_x_ND,
            gate_NF=gate_NF,
            up_NF=up_NF,
            silu_NF=silu_NF,
            kept=kept,
        )

    def _add_down(self, layer: LlamaLayer, record: _LayerRecord, step: _Step, name: str) -> Tensor:
        """The layer's output."""
        out_ND, record.kept[layer.down.number] = self._add_projected(
            layer.down, record.middle_ND, self._activated(record), name, step
        )
        return out_ND

    def _activated(self, record: _LayerRecord) -> Tensor:
        """x of down: silu(gate) * up."""
        act_NF = self._buffer("act", record.up_NF.shape[1], record.up_NF)
        return torch.mul(record.silu_NF, record.up_NF, out=act_NF)

    def _mlp_backward(
        self, layer: LlamaLayer, record: _LayerRecord, step: _Step, dh: ResidualGradient
    ) -> bool:
        """In place: dh becomes the gradient between attention and MLP. False if nothing below is adapted."""
        grad_NF = self._input_gradient(layer.down, self._activated(record), [dh.rounded_ND], record, step)
        if grad_NF is None:
            return False
        grad_gate_NF, grad_up_NF = (
            self._buffer(name, grad_NF.shape[1], grad_NF) for name in ("grad_gate", "grad_up")
        )
        swiglu_backward(grad_NF, record.gate_NF, record.up_NF, record.silu_NF, grad_gate_NF, grad_up_NF)
        grads = [grad_gate_NF, grad_up_NF]
        dx_ND = self._input_gradient(layer.gate_up, record.middle_x_ND, grads, record, step)
        if dx_ND is None:
            return False
        dh.add_rms_norm_backward(dx_ND, record.middle_ND, record.middle_inverse_N1, layer.mlp_norm_D)
        return True

    def _attention_backward(
        self, layer: LlamaLayer, record: _LayerRecord, step: _Step, dh: ResidualGradient
    ) -> None:
        """In place: dh becomes the gradient of the layer's input, unless nothing below is adapted."""
        grad_ND = self._input_gradient(layer.output, record.mixed_ND, [dh.rounded_ND], record, step)
        if grad_ND is None:
            return
        grad_NW = self._buffer("grad_qkv", sum(layer.qkv.products[0].widths), grad_ND)
        self._attend_backward(grad_ND, record.attention, step, grad_NW)
        dx_ND = self._input_gradient(layer.qkv, record.x_ND, [grad_NW], record, step)
        if dx_ND is not None:
            dh.add_rms_norm_backward(dx_ND, record.h_ND, record.inverse_N1, layer.attention_norm_D)

    def _input_gradient(
        self,
        projection: Projection,
        x_NI: Tensor,
        grads_NO: list[Tensor],
        record: _LayerRecord,
        step: _Step,
    ) -> Tensor | None:
        """g W + the adapters' share, valid until the next one of its width; hands out the taps.

        None at the lowest group, below which nobody needs it.
        """
        dx_NI = None
        if self._places[projection.number] > step.lowest:
            first, *others = projection.products
            dx_NI = first.gradient(grads_NO[0], self._space, f"dx{x_NI.shape[1]}")
            for product, grad_NO in zip(others, grads_NO[1:], strict=True):
                dx_NI = product.add_gradient(dx_NI, grad_NO)
        x_BTI = x_NI.view(*step.shape, -1)
        grads_BTO = projection.sites(grads_NO, step.shape)
        dx_BTI = None if dx_NI is None else dx_NI.view(*step.shape, -1)
        stacks = step.stacks.get(projection.number, [])
        for stack, kept in zip(stacks, record.kept[projection.number], strict=True):
            stack.backward(x_BTI, kept, grads_BTO, dx_BTI)
        return dx_NI

    def _project(
        self, projection: Projection, x_NI: Tensor, names: list[str], step: _Step
    ) -> tuple[list[Tensor], list[Kept]]:
        """x W^T + b + s a(x) of every product, and what every stack keeps."""
        outputs_NO = [
            product.project(x_NI, self._space, name)
            for product, name in zip(projection.products, names, strict=True)
        ]
        return outputs_NO, _adapt(projection, x_NI, outputs_NO, step)

    def _add_projected(
        self, projection: Projection, base_NO: Tensor, x_NI: Tensor, name: str, step: _Step
    ) -> tuple[Tensor, list[Kept]]:
        """base + x W^T + b + s a(x), for a group of one site, and what every stack keeps."""
        out_NO = projection.products[0].add_projected(base_NO, x_NI, self._space, name)
        return out_NO, _adapt(projection, x_NI, [out_NO], step)

    def _attend(self, qkv_NW: Tensor, mixed_ND: Tensor, step: _Step, slot: str) -> list[AttentionRecord]:
        """Writes attention's output to `mixed`, group by group."""
        records = []
        for number, (group, rotary) in enumerate(zip(step.rows.groups, step.rotaries, strict=True)):
            out_RTD = group.room(mixed_ND, self._space, "rows.mixed")
            qkv_RTW = group.read(qkv_NW, self._space, "rows.qkv")
            records.append(
                self._attention.forward(
                    qkv_RTW, rotary, self._by_head(out_RTD), f"{slot}.{number}", self._space
                )
            )
            group.write(out_RTD, mixed_ND)
        step.rows.silence(mixed_ND)
        return records

    def _attend_backward(
        self, grad_ND: Tensor, records: list[AttentionRecord], step: _Step, grad_NW: Tensor
    ) -> None:
        """Writes the gradient of q, k and v, group by group."""
        for group, rotary, record in zip(step.rows.groups, step.rotaries, records, strict=True):
            out_RTW = group.room(grad_NW, self._space, "rows.grad_qkv")
            grad_RTD = group.read_gradient(grad_ND, self._space, "rows.grad")
            self._attention.backward(self._by_head(grad_RTD), record, rotary, out_RTW, self._space)
            group.write(out_RTW, grad_NW)
        step.rows.silence(grad_NW)

    def _by_head(self, tensor_RTD: Tensor) -> Tensor:
        return tensor_RTD.view(*tensor_RTD.shape[:2], self._attention.heads, self._attention.head_size)


def _adapt(projection: Projection, x_NI: Tensor, outputs_NO: list[Tensor], step: _Step) -> list[Kept]:
    stacks = step.stacks.get(projection.number, [])
    if not stacks:
        return []
    outputs_BTO = projection.sites(outputs_NO, step.shape)
    return [stack.add_to(outputs_BTO, x_NI.view(*step.shape, -1)) for stack in stacks]
