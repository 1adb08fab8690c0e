"""Each job's loss scale, and the taps of a pass that may have to be repeated at a lower one.

A float16 base loses gradients below 6e-8. So the backward pass of a job's rows starts from S times its loss,
and its taps are divided by S again before they leave: exactly, S being a power of two. Rows share nothing
with their neighbours' rows, and no scale either.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cola_runtime.base_model.parts import OnePass, Outcomes
from cola_runtime.base_model.segments import Member
from cola_runtime.gradients.taps import Tap, TapSink
from cola_runtime.types import Segment, SegmentLoss

GROWTH_INTERVAL = 2000  # steps in a row without overflow; this and the factors are torch.amp.GradScaler's
LOWEST, HIGHEST = 1.0, 2.0**32

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Scale:
    epoch: int
    value: float
    good_steps: int = 0


class LossScales:
    """Dynamic scales by job, from the first step of a lease to its end. Owned by the compute thread."""

    def __init__(self) -> None:
        self._scales: dict[str, _Scale] = {}

    def of(self, segment: Segment) -> float:
        """S of a training segment."""
        return self._scale(segment).value if segment.loss_scaling.dynamic else segment.loss_scaling.scale

    def lower(self, segment: Segment) -> bool:
        """Halve the scale after an overflow; False where it is not dynamic, or as low as it may be."""
        if not segment.loss_scaling.dynamic:
            return False
        scale = self._scale(segment)
        scale.good_steps = 0
        if scale.value <= LOWEST:
            return False
        scale.value /= 2
        job_id = segment.lease.job_id
        logger.info(
            "the loss scale of %s fell to %g", job_id, scale.value,
            extra={"event": "loss_scale.lowered", "job_id": job_id},
        )  # fmt: skip
        return True

    def stepped(self, segment: Segment) -> None:
        """The segment's taps are finite. Enough whole steps in a row double the scale."""
        if not (segment.loss_scaling.dynamic and segment.last_microbatch):
            return
        scale = self._scale(segment)
        scale.good_steps += 1
        if scale.good_steps == GROWTH_INTERVAL:
            scale.value, scale.good_steps = min(2 * scale.value, HIGHEST), 0

    def forget(self, job_id: str) -> None:
        self._scales.pop(job_id, None)

    def train(self, members: Sequence[Member], sink: TapSink, one_pass: OnePass) -> tuple[Outcomes, int]:
        """`one_pass` under the members' scales, and once more for those alone whose gradients overflowed."""
        held = HeldTaps(sink, [m.position for m in members if m.segment.loss_scaling.dynamic])
        scaled = self._scaled(members)
        outcomes, tokens = one_pass(scaled, held)
        while scaled := self._scaled([m for m in scaled if self._lowered(m, held, outcomes[m.position])]):
            _, more = one_pass(scaled, held)
            tokens += more
        for member in members:
            if not held.overflowed(member.position):
                self.stepped(member.segment)
        held.release()
        return outcomes, tokens

    def _scaled(self, members: Sequence[Member]) -> list[Member]:
        return [replace(member, loss_scale=self.of(member.segment)) for member in members]

    def _lowered(self, member: Member, held: HeldTaps, outcome: SegmentLoss) -> bool:
        """The member's gradient overflowed, and not its loss: its taps are forgotten, its scale is halved."""
        if not held.overflowed(member.position) or not math.isfinite(outcome.loss_sum):
            return False
        if not self.lower(member.segment):
            return False
        held.drop(member.position)
        return True

    def _scale(self, segment: Segment) -> _Scale:
        lease = segment.lease
        scale = self._scales.get(lease.job_id)
        if scale is None or scale.epoch != lease.epoch:
            scale = self._scales[lease.job_id] = _Scale(lease.epoch, segment.loss_scaling.scale)
        return scale


class HeldTaps:
    """A sink that keeps the taps of some segments until the pass has shown that they are finite.

    Those of the other segments go on at once.
    """

    def __init__(self, sink: TapSink, positions: Collection[int]) -> None:
        self._sink = sink
        self._held: dict[int, list[Tap]] = {position: [] for position in positions}
        self._overflowed: set[int] = set()

    def __call__(self, tap: Tap) -> None:
        held = self._held.get(tap.segment)
        if held is None:
            self._sink(tap)
            return
        held.append(tap)
        if not all(bool(tensor.isfinite().all()) for tensor in tap.tensors.values()):
            self._overflowed.add(tap.segment)

    def overflowed(self, position: int) -> bool:
        return position in self._overflowed

    def drop(self, position: int) -> None:
        """Forget the segment's taps: they are about to be computed again."""
        self._held[position].clear()
        self._overflowed.discard(position)

    def release(self) -> None:
        for taps in self._held.values():
            for tap in taps:
                self._sink(tap)
