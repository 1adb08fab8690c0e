"""The tapped base model: one frozen transformer that computes mixed batches of many tenants' adapters."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.site_kinds import WHOLE_ROWS
from cola_runtime.base_model.bank import AdapterBank, BankBytes
from cola_runtime.base_model.body import Body, LastHidden, PatchedBody, causal_hidden, encoder_hidden
from cola_runtime.base_model.encoder_decoders import decoder_hidden
from cola_runtime.base_model.generate import Sampling, generate_tokens, keep_own_settings_only
from cola_runtime.base_model.head_loss import HeadOutcome, head_losses
from cola_runtime.base_model.images import ImageInput, pooled_hidden
from cola_runtime.base_model.llama import LlamaBody
from cola_runtime.base_model.load import DTYPES, LoadedModel, load_frozen_model
from cola_runtime.base_model.loss import label_loss, segment_loss_sums
from cola_runtime.base_model.loss_scales import HeldTaps, LossScales
from cola_runtime.base_model.merge import MergedWeights
from cola_runtime.base_model.segments import (
    Cohort,
    Member,
    MixedBatch,
    RowLimits,
    mixed_batch,
    one_gang,
    row_refusal,
)
from cola_runtime.base_model.stacks.cohorts import GroupPlaces, Stacks, group_stacks
from cola_runtime.base_model.stacks.merged import bias_stacks, tap_stacks
from cola_runtime.base_model.tapped import TappedModules
from cola_runtime.base_model.workspace import Workspace
from cola_runtime.errors import InvalidInput, NotFound
from cola_runtime.gradients.taps import TapSink
from cola_runtime.types import (
    PRODUCT_FLOPS,
    QUANTIZATION,
    UNQUANTIZED,
    BaseModelDescription,
    BaseStep,
    BaseStepResult,
    Lease,
    Membership,
    Row,
    Segment,
    SegmentLoss,
    Site,
    TensorKey,
)


class TappedModel:
    """Synchronous and not thread-safe: every call comes from one compute thread."""

    def __init__(self, loaded: LoadedModel, *, path: Path, dtype: str, threads: int) -> None:
        self._loaded = loaded
        self._path = path
        self._dtype = dtype
        self._threads = threads
        self._bank = AdapterBank(
            loaded.sites,
            DTYPES[dtype],
            hidden_size=loaded.hidden_size,
            tied_sites=loaded.tied_sites,
            quantization=loaded.quantization,
        )
        self._merged = MergedWeights(loaded.groups if loaded.quantization == UNQUANTIZED else ())
        self._modules = TappedModules(loaded.groups)
        self._space = Workspace()
        self._body = self._fastest_body()
        self._limits = RowLimits(
            vocabulary_size=loaded.vocabulary_size,
            context_length=loaded.context_length,
            token_types=loaded.token_types,
            causal=not loaded.bidirectional,
            encoder_decoder=loaded.encoder_decoder,
            image_shape=None if loaded.images is None else loaded.images.shape,
        )
        self._scales = LossScales()
        self._places = GroupPlaces(
            positions={
                site.index: place for group in loaded.groups for place, site in enumerate(group.sites)
            },
            source_groups=loaded.source_groups,
        )
        if not loaded.bidirectional:
            keep_own_settings_only(loaded.model)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str,
        attention: str = "auto",
        threads: int = 1,
        activation_checkpointing: bool = False,
        quantization: str = UNQUANTIZED,
    ) -> TappedModel:
        """Load a pretrained folder. Sets the number of torch's threads, for the whole process.

        `attention` is `eager`, `sdpa`, or `auto`: whichever is faster here, by a short trial. A plain Llama
        trains through our own attention and needs none. With `activation_checkpointing` a layer keeps its
        input alone and is computed again in the backward pass. `quantization` is `none`, `int8` or `nf4`.
        """
        torch.set_num_threads(threads)
        loaded = load_frozen_model(
            path,
            dtype=dtype,
            attention=attention,
            activation_checkpointing=activation_checkpointing,
            quantization=quantization,
        )
        return cls(loaded, path=path, dtype=dtype, threads=threads)

    @property
    def catalogue(self) -> tuple[Site, ...]:
        """Every module that can carry an adapter: `sites`, then convolutions and embeddings."""
        return self._loaded.sites

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every Linear and Conv1D: what `all-linear` names."""
        return tuple(site for site in self.catalogue if site.kind in WHOLE_ROWS)

    def describe(self, name: str, gradient_endpoint: str) -> BaseModelDescription:
        model = self._loaded.model
        return BaseModelDescription(
            name=name,
            architecture=type(model).__name__,
            context_length=self._limits.context_length,
            vocabulary_size=self._limits.vocabulary_size,
            dtype=self._dtype,
            sites=self.catalogue,
            gradient_endpoint=gradient_endpoint,
            tokenizer_path=str(self._path),
            parameters=self._loaded.parameters,
            hidden_size=self._loaded.hidden_size,
            tasks=self._loaded.tasks,
            details={
                "tasks": ", ".join(self._loaded.tasks),
                "attention": self._attention,
                "body": type(self._body).__name__,
                "activation_checkpointing": "on" if self._loaded.activation_checkpointing else "off",
                "threads": str(self._threads),
                "device": "cpu",
                QUANTIZATION: self._loaded.quantization,
                "weight_bytes": str(_weight_bytes(model)),
                PRODUCT_FLOPS: repr(self._loaded.product_flops),
            },
            tied_sites=self._loaded.tied_sites,
            source_groups=tuple(sorted(self._loaded.source_groups)),
        )

    def install(
        self,
        lease: Lease,
        spec: AdapterSpec,
        version: int,
        weights: Mapping[TensorKey, Tensor],
        *,
        membership: Membership | None = None,
        max_staleness: int = 0,
    ) -> None:
        """Make this version the job's current one. Raises Fenced, InvalidInput: see AdapterBank.install."""
        self._bank.install(lease, spec, version, weights, membership=membership, max_staleness=max_staleness)

    def evict(self, job_id: str) -> None:
        """Forget the job's adapter; sites that no merged adapter is left at become pristine at once."""
        self._bank.evict(job_id)
        self._scales.forget(job_id)
        self._merged.release(self._bank.merged_sites)

    @property
    def bank_bytes(self) -> BankBytes:
        return self._bank.nbytes

    def version(self, job_id: str) -> tuple[int, int] | None:
        """(lease epoch, version) of the job's adapter in the bank."""
        return self._bank.version(job_id)

    def run(self, step: BaseStep, sink: TapSink) -> BaseStepResult:
        """Compute one mixed batch; its taps go to `sink` while the backward pass runs.

        A segment that the bank or the base model cannot serve gets a reason (`ADAPTER_UNKNOWN`, `FENCED`,
        `GANG_MISMATCH`, `VERSION_STALE`, `ROW_INVALID`) and is left out; the others are computed as if it
        were not there. The first one that can be served decides whose merged weights are put in place: those
        of another gang, or of another version of a member, get `GANG_MIXED`. Taps under a dynamic loss scale
        leave at the end: a segment whose gradient overflows is computed again at a lower one.
        """
        started = time.monotonic()
        refusals = one_gang(step.segments, [self._refusal(segment) for segment in step.segments])
        members = [
            self._member(position, segment)
            for position, segment in enumerate(step.segments)
            if refusals[position] is None
        ]
        outcomes: dict[int, SegmentLoss] = {}
        computed_tokens = 0
        if members:
            outcomes, computed_tokens = (
                self._train(members, sink) if step.train else self._pass(members, None)
            )
        return BaseStepResult(
            number=step.number,
            losses=tuple(
                outcomes.get(position) or _refused(segment, refusals[position])
                for position, segment in enumerate(step.segments)
            ),
            started=started,
            seconds=time.monotonic() - started,
            computed_tokens=computed_tokens,
            real_tokens=sum(member.segment.tokens for member in members),
        )

    @property
    def images(self) -> ImageInput | None:
        """What decodes its rows' images; None where it takes no images."""
        return self._loaded.images

    def generate(
        self,
        job_id: str | None,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop_ids: Collection[int] = (),
    ) -> list[list[int]]:
        """Continue each prompt with the job's current adapter, or with the bare base model for None.

        A merged adapter answers with its whole gang as it is now. An encoder-decoder reads the prompts as its
        sources. Stops before the first of `stop_ids`, which is not returned. Temperature 0 is greedy. Raises
        NotFound `ADAPTER_UNKNOWN`, InvalidInput `PROMPT_EMPTY`, `SEQUENCE_TOO_LONG`, `TASK_UNSUPPORTED`.
        """
        for prompt in prompts:
            self._check_generation(len(prompt), max_new_tokens)
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop_ids=frozenset(stop_ids)
        )
        cohorts = [] if job_id is None else [self._lone_cohort(job_id, rows=len(prompts))]
        with self._modules.active(self._stacks(cohorts, None), rows=len(prompts), training=False):
            return generate_tokens(self._loaded.model, prompts, sampling)

    def _train(self, members: Sequence[Member], sink: TapSink) -> tuple[dict[int, SegmentLoss], int]:
        """As `_pass`, with taps, and once more for those members alone whose gradients overflowed."""
        held = HeldTaps(sink, [m.position for m in members if m.segment.loss_scaling.dynamic])
        scaled = self._scaled(members)
        outcomes, tokens = self._pass(scaled, held)
        while scaled := self._scaled([m for m in scaled if self._lowered(m, held, outcomes[m.position])]):
            _, more = self._pass(scaled, held)
            tokens += more
        for member in members:
            if not held.overflowed(member.position):
                self._scales.stepped(member.segment)
        held.release()
        return outcomes, tokens

    def _scaled(self, members: Sequence[Member]) -> list[Member]:
        return [replace(member, loss_scale=self._scales.of(member.segment)) for member in members]

    def _lowered(self, member: Member, held: HeldTaps, outcome: SegmentLoss) -> bool:
        """The member's gradient overflowed, and not its loss: its taps are forgotten, its scale is halved."""
        if not held.overflowed(member.position) or not math.isfinite(outcome.loss_sum):
            return False
        if not self._scales.lower(member.segment):
            return False
        held.drop(member.position)
        return True

    def _pass(self, members: Sequence[Member], sink: TapSink | None) -> tuple[dict[int, SegmentLoss], int]:
        """Position in BaseStep.segments -> loss, and how many tokens were computed."""
        batch = mixed_batch(members)
        return self._compute(batch, sink), batch.computed_tokens

    def _compute(self, batch: MixedBatch, sink: TapSink | None) -> dict[int, SegmentLoss]:
        """Position in BaseStep.segments -> loss."""
        stacks = self._stacks(batch.cohorts, sink)
        train = sink is not None and bool(stacks)  # heads alone need no backward pass through the body
        try:
            hidden_ND = self._body.forward(batch, stacks, train=train)
            with torch.no_grad():
                losses_K, grad_ND = label_loss(
                    hidden_ND, self._loaded.head, batch.labels, self._space, train=train
                )
            heads = head_losses(hidden_ND, batch, self._loaded.pooling, grad_ND=grad_ND, sink=sink)
            if grad_ND is not None:
                self._body.backward(grad_ND)
        finally:
            self._body.finish()
        sums = segment_loss_sums(losses_K, batch.labels)
        return {
            member.position: _segment_loss(member.segment, of_labels, heads.get(member.position))
            for member, of_labels in zip(batch.members, sums, strict=True)
        }

    def _stacks(self, cohorts: Sequence[Cohort], sink: TapSink | None) -> Stacks:
        """What is computed beside the base weights, which become those that these cohorts must see."""
        gang = cohorts[0].members[0].adapter.gang if cohorts else None
        asked = [member.adapter for cohort in cohorts for member in cohort.members]
        self._merged.put(self._bank.gang(gang, asked))
        if gang is None:
            return group_stacks(cohorts, self._places, self._space, sink)
        stacks = bias_stacks(self._merged.biases, self._loaded.groups)
        return stacks if sink is None else tap_stacks(stacks, cohorts, self._places.positions, sink)

    def _fastest_body(self) -> Body:
        if self._loaded.by_hand:
            return LlamaBody(
                self._loaded.model,
                self._loaded.groups,
                self._space,
                checkpointing=self._loaded.activation_checkpointing,
            )
        return PatchedBody(self._last_hidden(), self._modules)

    def _last_hidden(self) -> LastHidden:
        loaded = self._loaded
        if loaded.images is not None:
            return partial(pooled_hidden, loaded.model, loaded.images)
        if loaded.encoder_decoder:
            return partial(decoder_hidden, loaded.model)
        return partial(encoder_hidden if loaded.bidirectional else causal_hidden, loaded.model)

    def _refusal(self, segment: Segment) -> str | None:
        adapter = self._bank.adapter(segment.lease.job_id)
        head = None if adapter is None or adapter.head is None else adapter.head.kind
        return self._bank.refusal(segment) or row_refusal(segment.rows, self._limits, head)

    def _member(self, position: int, segment: Segment) -> Member:
        adapter = self._bank.adapter_of(segment)
        assert adapter is not None  # `_refusal` has looked
        return Member(position=position, segment=segment, adapter=adapter)

    def _lone_cohort(self, job_id: str, *, rows: int) -> Cohort:
        adapter = self._bank.adapter(job_id)
        if adapter is None:
            raise NotFound("ADAPTER_UNKNOWN", f"no adapter of {job_id} is resident", where=job_id)
        row = Row(tokens=np.zeros(1, np.int32), weights=np.zeros(1, np.float32))
        segment = Segment(
            lease=adapter.lease,
            version=adapter.version,
            rows=(row,) * rows,
            loss_denominator=1.0,
            gang=adapter.gang,
        )
        return Cohort(members=(Member(position=0, segment=segment, adapter=adapter),), first_row=0)

    def _check_generation(self, prompt_tokens: int, max_new_tokens: int) -> None:
        if self._loaded.bidirectional:
            raise InvalidInput(
                "TASK_UNSUPPORTED",
                f"{type(self._loaded.model).__name__} predicts no tokens and generates nothing",
                where="base_model",
                remedy="Ask a causal language model.",
            )
        if prompt_tokens == 0:
            raise InvalidInput("PROMPT_EMPTY", "the prompt has no tokens", where="prompt")
        total = prompt_tokens + max_new_tokens
        if self._loaded.encoder_decoder:
            total = max(prompt_tokens, 1 + max_new_tokens)  # each beside its own positions
        if total > self._limits.context_length:
            raise InvalidInput(
                "SEQUENCE_TOO_LONG",
                f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones do not fit the context",
                where="prompt",
                limit=self._limits.context_length,
                actual=total,
                remedy="Shorten the prompt or ask for fewer tokens.",
            )

    @property
    def _attention(self) -> str:
        loaded = self._loaded
        return f"fused, {loaded.attention} when generating" if loaded.by_hand else loaded.attention


def _weight_bytes(model: Any) -> int:
    """Of the frozen weights, those that several modules share once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _refused(segment: Segment, reason: str | None) -> SegmentLoss:
    return SegmentLoss(job_id=segment.lease.job_id, reason=reason)


def _segment_loss(
    segment: Segment, of_labels: tuple[float, float], of_head: HeadOutcome | None
) -> SegmentLoss:
    job_id = segment.lease.job_id
    if of_head is None:
        return SegmentLoss(job_id=job_id, loss_sum=of_labels[0], weight_sum=of_labels[1])
    return SegmentLoss(
        job_id=job_id,
        loss_sum=of_head.loss_sum,
        weight_sum=float(len(segment.rows)),
        predictions=of_head.predictions,
    )
