"""Stacked LoRA with dropout:  y += (d(x) A^T)(s B)^T  with  d(x) = m * x / (1 - p),  in training only.

Each site has a mask of its own, as in PEFT, so sites of one input group share no product and no tap.
Shapes as in `lora`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.base_model.accelerator import Accelerator, constants
from cola_runtime.base_model.stacks.lora import LoraFactors, LoraLayout, LoraStack
from cola_runtime.base_model.stacks.protocol import CohortRows, Kept
from cola_runtime.base_model.stacks.taps import GroupTaps


class DropoutLoraLayout(LoraLayout):
    """A `LoraLayout` whose training steps drop inputs; a forward-only step is plain LoRA."""

    def stack(
        self, views: LoraFactors, rows: CohortRows, positions: tuple[int, ...], taps: GroupTaps | None
    ) -> LoraStack:
        plain = LoraLayout.stack(self, views, rows, positions, taps)
        if not rows.dropouts:
            return plain
        return DropoutLoraStack(plain.rows, plain.rank, plain.positions, plain.factors, plain.taps)


@dataclass(frozen=True, slots=True)
class DropoutLoraStack(LoraStack):
    """`SiteStack` of one cohort's LoRA with dropout at one input group."""

    def add_to(self, outputs_BTO: Sequence[Tensor], x_BTI: Tensor) -> Kept:
        """Keeps of every site the mask, bool [S, M, I], and d(x) A^T, [S, M, R]."""
        x_SMI = self.rows.of(x_BTI)
        kept: list[Tensor] = []
        for alone in self._sites():
            keep_SMI = self._mask(alone, x_SMI)
            h_SMR = torch.bmm(self._dropped(x_SMI, keep_SMI), alone.factors.a_SQI.transpose(1, 2))
            out_SMO = self.rows.of(outputs_BTO[alone.positions[0]])
            out_SMO.baddbmm_(h_SMR, alone.factors.b_SOR[0].transpose(1, 2))
            kept += [keep_SMI, h_SMR]
        return tuple(kept)

    def backward(self, x_BTI: Tensor, kept: Kept, grads_BTO: Sequence[Tensor], dx_BTI: Tensor | None) -> None:
        x_SMI = self.rows.of(x_BTI)
        for alone, keep_SMI, h_SMR in zip(self._sites(), kept[::2], kept[1::2], strict=True):
            grads_SMO = [self.rows.of(grads_BTO[alone.positions[0]])]
            gb_SMR = alone._grad_times_b(grads_SMO)
            if dx_BTI is not None:
                dropped_SMI = self._dropped(torch.bmm(gb_SMR, alone.factors.a_SQI), keep_SMI)
                self.rows.of(dx_BTI).add_(dropped_SMI)
            if self.taps is not None:
                alone._emit(self._dropped(x_SMI, keep_SMI), h_SMR, gb_SMR, grads_SMO)

    def _sites(self) -> Iterator[LoraStack]:
        """Each site as a plain stack of its own."""
        a_parts = torch.split(self.factors.a_SQI, self.rank, dim=1)
        for number, (site, position) in enumerate(zip(self.factors.sites, self.positions, strict=True)):
            factors = LoraFactors((site,), a_parts[number], (self.factors.b_SOR[number],))
            yield LoraStack(self.rows, self.rank, (position,), factors, self.taps)

    def _mask(self, alone: LoraStack, x_SMI: Tensor) -> Tensor:
        (site,) = alone.factors.sites
        tokens = x_SMI.shape[1]
        if self.rows.span.of_tokens:
            masks = [draw.line_mask(site, tokens) for draw in self.rows.dropouts]
        else:
            masks = [draw.mask(site, tokens // len(draw.lengths)) for draw in self.rows.dropouts]
        return Accelerator(x_SMI.device).placed(torch.stack(masks))

    def _dropped(self, tensor_SMI: Tensor, keep_SMI: Tensor) -> Tensor:
        factors = [draw.factor for draw in self.rows.dropouts]
        factors_S11 = constants(factors, tensor_SMI.dtype, tensor_SMI.device)[:, None, None]
        return (tensor_SMI * keep_SMI).mul_(factors_S11)
