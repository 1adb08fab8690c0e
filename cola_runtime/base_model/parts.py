"""What becomes of segments whose rows are computed in several passes, for whatever reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from cola_runtime.base_model.segments import Member
from cola_runtime.gradients.taps import TapSink
from cola_runtime.types import SegmentLoss

Outcomes = dict[int, SegmentLoss]
"""Position in BaseStep.segments -> loss."""
OnePass = Callable[[Sequence[Member], TapSink | None], tuple[Outcomes, int]]
"""The outcomes of rows computed together, and how many tokens that was; with a sink taps are handed out."""


def in_parts(
    parts: Iterable[Sequence[Member]], compute: Callable[[Sequence[Member]], tuple[Outcomes, int]]
) -> tuple[Outcomes, int]:
    """One part after the other; a segment may have rows in several. As of one pass over all of them."""
    found: dict[int, list[tuple[Member, SegmentLoss]]] = {}
    tokens = 0
    for part in parts:
        outcomes, more = compute(part)
        tokens += more
        for member in part:
            found.setdefault(member.position, []).append((member, outcomes[member.position]))
    return {position: _joined(losses) for position, losses in found.items()}, tokens


def _joined(losses: Sequence[tuple[Member, SegmentLoss]]) -> SegmentLoss:
    """Of a segment's parts; predictions in the order of its rows."""
    first = losses[0][1]
    reason = next((loss.reason for _, loss in losses if loss.reason), None)
    if reason is not None:
        return SegmentLoss(job_id=first.job_id, reason=reason)
    by_row = [
        pair
        for member, loss in losses
        for pair in zip(member.row_numbers, loss.predictions, strict=bool(loss.predictions))
    ]
    return replace(
        first,
        loss_sum=sum(loss.loss_sum for _, loss in losses),
        weight_sum=sum(loss.weight_sum for _, loss in losses),
        predictions=tuple(prediction for _, prediction in sorted(by_row)),
    )
