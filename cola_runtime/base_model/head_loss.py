"""The losses of a mixed batch's labelled rows, tenant by tenant, and the taps of their heads.

Shapes: N = rows x tokens, n rows of one segment, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cola_runtime.base_model.accelerator import Accelerator
from cola_runtime.base_model.heads import BankedHead, HeadGradients, Pooling
from cola_runtime.base_model.segments import Member, MixedBatch
from cola_runtime.base_model.tap_carrier import TapOutlet
from cola_runtime.gradients.taps import Tap
from cola_runtime.types import TensorKey, TensorKind


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOutcome:
    """Of one segment. A training step predicts nothing."""

    loss_sum: Tensor  # float64 []
    predictions_n: Tensor | None = None


def head_losses(
    hidden_ND: Tensor,
    batch: MixedBatch,
    pooling: Pooling,
    *,
    grad_ND: Tensor | None,
    outlet: TapOutlet | None,
) -> dict[int, HeadOutcome]:
    """Position in BaseStep.segments -> outcome, of every segment that a head judges.

    With an outlet, each head's gradient leaves as a tap, always in its own encoding: it is tiny. Where
    `grad_ND` is given, d loss / d hidden is written to the pooled rows, in place.
    """
    rows, starts = len(batch.lengths), batch.starts
    if batch.images_BCHW is not None:  # they have no tokens: how many states each has, the body's answer says
        starts = np.arange(rows) * (len(hidden_ND) // rows)
    places = pooling.positions(starts, batch.lengths)
    outcomes: dict[int, HeadOutcome] = {}
    next_row = 0
    for member in batch.members:
        head, first_row = member.adapter.head, next_row
        next_row += len(member.segment.rows)
        if head is None:
            continue
        positions_n = Accelerator(hidden_ND.device).placed(torch.from_numpy(places[first_row:next_row]))
        hidden_nD = hidden_ND.index_select(0, positions_n)
        if outlet is None:
            losses_n, predictions_n = head.losses(hidden_nD, _labels(member), pooling)
        else:
            losses_n, gradients = head.gradients(hidden_nD, _labels(member), pooling, member.loss_denominator)
            _hand_out(member, _tensors(head, gradients, member.loss_scale), outlet)
            predictions_n = None
            if grad_ND is not None:
                grad_ND.index_copy_(0, positions_n, gradients.hidden_nD)
        outcomes[member.position] = HeadOutcome(loss_sum=losses_n.double().sum(), predictions_n=predictions_n)
    return outcomes


def _hand_out(member: Member, tensors: dict[TensorKey, Tensor], outlet: TapOutlet) -> None:
    def hand_out(copies: Sequence[Tensor]) -> None:
        outlet.sink(Tap(member.position, dict(zip(tensors, copies, strict=True))))

    outlet.carrier.carry(list(tensors.values()), hand_out)


def _labels(member: Member) -> list[float]:
    return [row.label for row in member.segment.rows if row.label is not None]


def _tensors(head: BankedHead, gradients: HeadGradients, loss_scale: float) -> dict[TensorKey, Tensor]:
    return {
        TensorKey(head.site, TensorKind.GRAD_WEIGHT): gradients.weight_CD / loss_scale,
        TensorKey(head.site, TensorKind.GRAD_BIAS): gradients.bias_C / loss_scale,
    }
