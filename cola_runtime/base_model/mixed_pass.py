"""One forward and backward pass of a mixed batch: resident adapters in, losses and taps out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from cola_runtime import crash_points
from cola_runtime.base_model.bank import AdapterBank
from cola_runtime.base_model.body import Body, LastHidden, PatchedBody, causal_hidden, encoder_hidden
from cola_runtime.base_model.captured import CapturedPasses, common_ghosts, common_length
from cola_runtime.base_model.encoder_decoders import decoder_hidden
from cola_runtime.base_model.head_loss import HeadOutcome, head_losses
from cola_runtime.base_model.images import pooled_hidden
from cola_runtime.base_model.llama import LlamaBody
from cola_runtime.base_model.load import DTYPES, LoadedModel
from cola_runtime.base_model.loss import label_loss, segment_loss_sums
from cola_runtime.base_model.merge import MergedWeights
from cola_runtime.base_model.segments import Cohort, Member, MixedBatch, mixed_batch, no_ghosts
from cola_runtime.base_model.stacks.cohorts import GroupPlaces, Stacks, group_stacks
from cola_runtime.base_model.stacks.merged import bias_stacks, tap_stacks
from cola_runtime.base_model.tap_carrier import CopyingCarrier, DirectCarrier, TapCarrier, TapOutlet
from cola_runtime.base_model.tapped import TappedModules
from cola_runtime.base_model.whole_tiles import near_length
from cola_runtime.base_model.workspace import Workspace
from cola_runtime.gradients.taps import TapSink
from cola_runtime.types import UNQUANTIZED, Segment, SegmentLoss


class MixedPass:
    """Computes with the frozen model and whatever of the bank's adapters is asked for."""

    def __init__(self, loaded: LoadedModel, bank: AdapterBank) -> None:
        self._loaded, self._bank = loaded, bank
        self.merged = MergedWeights(loaded.groups if loaded.quantization == UNQUANTIZED else ())
        self.accelerator = loaded.accelerator
        self.space = Workspace(self.accelerator.device)
        # Apart where passes are captured: its sizes differ from step to step.
        self._loss_space = Workspace(self.accelerator.device) if self.accelerator.is_cuda else self.space
        self.carrier: TapCarrier = (
            CopyingCarrier(self.accelerator) if self.accelerator.is_cuda else DirectCarrier()
        )
        self._modules = TappedModules(loaded.groups)
        self.body = self._fastest_body()
        self._places = GroupPlaces(
            positions={
                site.index: place for group in loaded.groups for place, site in enumerate(group.sites)
            },
            source_groups=loaded.source_groups,
        )
        self._captures = self._captured_passes()
        near = near_length(DTYPES[loaded.dtype], self.accelerator.device)
        self._padded_length = near if self._captures is None else common_length
        self._ghosts = no_ghosts if self._captures is None else common_ghosts

    def compute(self, members: Sequence[Member], sink: TapSink | None) -> tuple[dict[int, SegmentLoss], int]:
        """Position in BaseStep.segments -> loss, and the computed tokens; taps if there is a sink.

        The last of them may still be on their way, but not those of a dynamic loss scale, which are judged.
        """
        batch = mixed_batch(
            members,
            self.accelerator,
            flat=self.lays_flat,
            padded_length=self._padded_length,
            ghosts=no_ghosts if sink is None else self._ghosts,
        )
        outlet = None if sink is None else TapOutlet(sink, self.carrier)
        body, stacks = self._body_and_stacks(batch, outlet)
        train = outlet is not None and bool(stacks)  # heads alone need no backward pass through the body
        try:
            crash_points.reach("base_model.forward")
            hidden_ND = body.forward(batch, stacks, train=train)
            with torch.no_grad():
                losses_K, grad_ND = label_loss(
                    hidden_ND, self._loaded.head, batch.labels, self._loss_space, train=train
                )
            heads = head_losses(hidden_ND, batch, self._loaded.pooling, grad_ND=grad_ND, outlet=outlet)
            crash_points.reach("base_model.backward")
            if grad_ND is not None:
                body.backward(grad_ND)
        finally:
            body.finish()
        if any(member.segment.loss_scaling.dynamic for member in members):
            self.carrier.drained()
        sums = segment_loss_sums(losses_K.cpu(), batch.labels)
        outcomes = {
            member.position: _segment_loss(member.segment, of_labels, heads.get(member.position))
            for member, of_labels in zip(batch.members, sums, strict=True)
        }
        return outcomes, batch.computed_tokens

    def let_go(self) -> None:
        """Of all memory that a smaller pass can do without, once the taps on their way have arrived."""
        self.carrier.drained()
        if self._captures is not None:
            self._captures.forget()
        self._loss_space.release()
        self.space.release()
        self.accelerator.give_back()

    @property
    def lays_flat(self) -> bool:
        """Rows end to end, nearly without padding: where the body tells them apart at no great cost."""
        return isinstance(self.body, LlamaBody) and not self.accelerator.is_cuda

    @property
    def cuts_by_length(self) -> bool:
        """Rows that would be padded to others go through a pass of their own where that is cheaper.

        On an accelerator a pass costs as much as thousands of tokens, and each shape must be captured.
        """
        return not self.lays_flat and not self.accelerator.is_cuda

    @contextmanager
    def adapted(self, cohorts: Sequence[Cohort], *, rows: int) -> Iterator[None]:
        """Within, the model itself computes `rows` rows with these adapters; with none it is the bare one."""
        with self._modules.active(self._stacks(cohorts, None), rows=rows, training=False):
            yield

    def _body_and_stacks(self, batch: MixedBatch, outlet: TapOutlet | None) -> tuple[Body, Stacks]:
        """What computes the batch: the body, or on a CUDA device its operations as they were captured."""
        stacks = partial(self._stacks, batch.cohorts)
        if self._captures is not None and not any(member.adapter.gang for member in batch.members):
            self._stacks([], None)  # the base weights are to be pristine
            captured = self._captures.find(batch, outlet, stacks)
            if captured is not None:
                return captured, captured.stacks
        return self.body, stacks(outlet)

    def _captured_passes(self) -> CapturedPasses | None:
        if not (isinstance(self.body, LlamaBody) and isinstance(self.carrier, CopyingCarrier)):
            return None
        return CapturedPasses(self.body, self.space, self.carrier)

    def _stacks(self, cohorts: Sequence[Cohort], outlet: TapOutlet | None) -> Stacks:
        """What is computed beside the base weights, which become those that these cohorts must see."""
        gang = cohorts[0].members[0].adapter.gang if cohorts else None
        asked = [member.adapter for cohort in cohorts for member in cohort.members]
        self.merged.put(self._bank.gang(gang, asked))
        if gang is None:
            return group_stacks(cohorts, self._places, self.space, outlet)
        stacks = bias_stacks(self.merged.biases, self._loaded.groups)
        return stacks if outlet is None else tap_stacks(stacks, cohorts, self._places.positions, outlet)

    def _fastest_body(self) -> Body:
        if self._loaded.by_hand:
            return LlamaBody(
                self._loaded.model,
                self._loaded.groups,
                self.space,
                checkpointing=self._loaded.activation_checkpointing,
                keep_tiles=self._loaded.tiled_weights,
            )
        return PatchedBody(self._last_hidden(), self._modules)

    def _last_hidden(self) -> LastHidden:
        loaded = self._loaded
        if loaded.images is not None:
            return partial(pooled_hidden, loaded.model, loaded.images)
        if loaded.encoder_decoder:
            return partial(decoder_hidden, loaded.model)
        return partial(encoder_hidden if loaded.bidirectional else causal_hidden, loaded.model)


def _segment_loss(
    segment: Segment, of_labels: tuple[float, float], of_head: HeadOutcome | None
) -> SegmentLoss:
    job_id = segment.lease.job_id
    if of_head is None:
        return SegmentLoss(job_id=job_id, loss_sum=of_labels[0], weight_sum=of_labels[1])
    return SegmentLoss(
        job_id=job_id,
        loss_sum=float(of_head.loss_sum),
        weight_sum=float(len(segment.rows)),
        predictions=()
        if of_head.predictions_n is None
        else tuple(map(float, of_head.predictions_n.tolist())),
    )
