"""The tapped base model: one frozen transformer that computes mixed batches of many tenants' adapters."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.site_kinds import WHOLE_ROWS
from cola_runtime.base_model.accelerator import Accelerator
from cola_runtime.base_model.bank import AdapterBank, BankBytes, PreparedAdapter
from cola_runtime.base_model.description import described
from cola_runtime.base_model.fitting import FittingPasses
from cola_runtime.base_model.generate import Sampling, check_prompt, generate_tokens, keep_own_settings_only
from cola_runtime.base_model.images import ImageInput
from cola_runtime.base_model.load import DTYPES, LoadedModel, load_frozen_model
from cola_runtime.base_model.loss_scales import LossScales
from cola_runtime.base_model.mixed_pass import MixedPass
from cola_runtime.base_model.near_passes import NearPasses
from cola_runtime.base_model.refusals import RowLimits, one_gang, row_refusal
from cola_runtime.base_model.residency import Version
from cola_runtime.base_model.segments import Cohort, Member
from cola_runtime.base_model.stacks.protocol import Span
from cola_runtime.errors import NotFound
from cola_runtime.gradients.taps import TapSink
from cola_runtime.rows import Row
from cola_runtime.types import (
    UNQUANTIZED,
    BaseModelDescription,
    BaseStep,
    BaseStepResult,
    Lease,
    Membership,
    Segment,
    SegmentLoss,
    Site,
    TensorKey,
)

logger = logging.getLogger(__name__)


class TappedModel:
    """Synchronous and not thread-safe: every call comes from one compute thread."""

    def __init__(self, loaded: LoadedModel, *, threads: int, bank_bytes: int | None = None) -> None:
        """`bank_bytes`: of adapters' weights on the model's device at a time; None: no limit."""
        self._loaded = loaded
        self._bank_limit = bank_bytes
        self._threads = threads
        self._bank = AdapterBank(
            loaded.sites,
            DTYPES[loaded.dtype],
            hidden_size=loaded.hidden_size,
            tied_sites=loaded.tied_sites,
            quantization=loaded.quantization,
            accelerator=loaded.accelerator,
            limit_bytes=bank_bytes,
        )
        self._pass = MixedPass(loaded, self._bank)
        self._limits = RowLimits(
            vocabulary_size=loaded.vocabulary_size,
            context_length=loaded.context_length,
            token_types=loaded.token_types,
            causal=not loaded.bidirectional,
            encoder_decoder=loaded.encoder_decoder,
            image_shape=None if loaded.images is None else loaded.images.shape,
        )
        self._scales = LossScales()
        passes = FittingPasses(self._pass.compute, self._pass.let_go).compute
        self._passes = NearPasses(passes).compute if self._pass.cuts_by_length else passes
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
        tiled_weights: bool = True,
        quantization: str = UNQUANTIZED,
        accelerator: str = "cpu",
        bank_bytes: int | None = None,
    ) -> TappedModel:
        """Load a pretrained folder. Sets the number of torch's threads, for the whole process.

        `attention` is `eager`, `sdpa`, or `auto`: whichever is faster here, by a short trial. A plain Llama
        trains through our own attention and needs none. With `activation_checkpointing` a layer keeps its
        input alone and is computed again in the backward pass. `tiled_weights` keeps frozen weights in
        bfloat16 in the processor's layout too, where a trial finds that faster. `quantization` is `none`,
        `int8` or `nf4`. `accelerator` is `cpu`, `cuda` or `auto`; InvalidInput `ACCELERATOR_MISSING` before
        anything is read.
        """
        chosen = Accelerator.of(accelerator)
        chosen.compute_exactly()
        torch.set_num_threads(threads)
        loaded = load_frozen_model(
            path,
            dtype=dtype,
            attention=attention,
            activation_checkpointing=activation_checkpointing,
            tiled_weights=tiled_weights,
            quantization=quantization,
            accelerator=chosen,
        )
        return cls(loaded, threads=threads, bank_bytes=bank_bytes)

    @property
    def catalogue(self) -> tuple[Site, ...]:
        """Every module that can carry an adapter: `sites`, then convolutions and embeddings."""
        return self._loaded.sites

    @property
    def tried_attention(self) -> str | None:
        """The implementation that `auto` chose by its trial, or would have; None where there is no trial."""
        loaded = self._loaded
        untried = loaded.by_hand or loaded.model.config.is_encoder_decoder
        return None if untried else loaded.attention

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every Linear and Conv1D: what `all-linear` names."""
        return tuple(site for site in self.catalogue if site.kind in WHOLE_ROWS)

    def describe(self, name: str, gradient_endpoint: str) -> BaseModelDescription:
        description = described(
            self._loaded,
            name=name,
            gradient_endpoint=gradient_endpoint,
            body=type(self._pass.body).__name__,
            unpadded=self._pass.lays_flat or self._pass.cuts_by_length,
            threads=self._threads,
        )
        return replace(description, bank_bytes=self._bank_limit)

    def install(
        self,
        lease: Lease,
        spec: AdapterSpec,
        version: int,
        weights: Mapping[TensorKey, Tensor],
        *,
        membership: Membership | None = None,
        max_staleness: int = 0,
        prepared: PreparedAdapter | None = None,
    ) -> None:
        """Make this version the job's current one. Raises Fenced, InvalidInput: see AdapterBank.install."""
        install = partial(
            self._bank.install,
            lease,
            spec,
            version,
            weights,
            membership=membership,
            max_staleness=max_staleness,
            prepared=prepared,
        )
        try:
            return install()
        except torch.OutOfMemoryError:
            logger.warning(
                "no memory to install %s: buffers are given back", lease.job_id,
                extra={"event": "base.out_of_memory", "job_id": lease.job_id},
            )  # fmt: skip
        self._pass.let_go()
        install()

    def prepare(self, spec: AdapterSpec, weights: Mapping[TensorKey, Tensor]) -> PreparedAdapter:
        """What takes time of an install without a gang. From any thread; raises as `install` does."""
        return self._bank.prepare(spec, weights)

    def evict(self, job_id: str) -> None:
        """Forget the job's adapter; sites that no merged adapter is left at become pristine at once."""
        self._bank.evict(job_id)
        self._scales.forget(job_id)
        self._pass.merged.release(self._bank.merged_sites)

    @property
    def bank_bytes(self) -> BankBytes:
        return self._bank.nbytes

    @property
    def limits_bank(self) -> bool:
        return self._bank.is_limited

    def expect(self, step: BaseStep) -> Mapping[Version, Tensor]:
        """See AdapterBank.expect. From any thread."""
        return self._bank.expect(step.segments)

    def unexpect(self, expected: Mapping[Version, Tensor]) -> None:
        self._bank.unexpect(expected)

    def version(self, job_id: str) -> tuple[int, int] | None:
        """(lease epoch, version) of the job's adapter in the bank."""
        return self._bank.version(job_id)

    def run(
        self, step: BaseStep, sink: TapSink, *, then: Callable[[BaseStepResult], None] | None = None
    ) -> BaseStepResult:
        """Compute one mixed batch; its taps go to `sink` while the backward pass runs.

        A segment that the bank or the base model cannot serve gets a reason (`ADAPTER_UNKNOWN`, `FENCED`,
        `GANG_MISMATCH`, `VERSION_STALE`, `ROW_INVALID`) and is left out; the others are computed as if it
        were not there. The first one that can be served decides whose merged weights are put in place: those
        of another gang, or of another version of a member, get `GANG_MIXED`. Taps under a dynamic loss scale
        leave at the end: a segment whose gradient overflows is computed again at a lower one.

        It returns when all taps have left, unless told what to do `then`: that is done behind the last tap,
        by whoever hands them out, and with an accelerator the next step may be computed meanwhile. A step
        that does not fit in memory is computed in halves; a row that does not fit alone: `OUT_OF_MEMORY`.
        """
        started = time.monotonic()
        refusals = one_gang(step.segments, [self._refusal(segment) for segment in step.segments])
        members = [
            self._member(position, segment)
            for position, segment in enumerate(step.segments)
            if refusals[position] is None
        ]
        placed = self._bank.on_device([member.adapter for member in members])
        members = [replace(member, adapter=adapter) for member, adapter in zip(members, placed, strict=True)]
        outcomes: dict[int, SegmentLoss] = {}
        computed_tokens = 0
        if members:
            outcomes, computed_tokens = (
                self._scales.train(members, sink, self._passes) if step.train else self._passes(members, None)
            )
        result = BaseStepResult(
            number=step.number,
            losses=tuple(
                outcomes.get(position) or _refused(segment, refusals[position])
                for position, segment in enumerate(step.segments)
            ),
            started=started,
            seconds=time.monotonic() - started,
            computed_tokens=computed_tokens,
            real_tokens=sum(member.segment.tokens for member in members),
            bank=self._bank.use,
        )
        if then is None:
            self._pass.carrier.drained()
        else:
            self._pass.carrier.behind(lambda: then(result))
        return result

    def behind_taps(self, work: Callable[[], None]) -> None:
        """Do this behind all taps that were computed so far, where they are handed out."""
        self._pass.carrier.behind(work)

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
            check_prompt(self._loaded, len(prompt), max_new_tokens)
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop_ids=frozenset(stop_ids)
        )
        cohorts = [] if job_id is None else [self._lone_cohort(job_id, rows=len(prompts))]
        with self._pass.adapted(cohorts, rows=len(prompts)):
            return generate_tokens(self._loaded.model, prompts, sampling)

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
        [adapter] = self._bank.on_device([adapter])
        row = Row(tokens=np.zeros(1, np.int32), weights=np.zeros(1, np.float32))
        segment = Segment(
            lease=adapter.lease,
            version=adapter.version,
            rows=(row,) * rows,
            loss_denominator=1.0,
            gang=adapter.gang,
        )
        return Cohort(members=(Member(position=0, segment=segment, adapter=adapter),), span=Span(0, rows))


def _refused(segment: Segment, reason: str | None) -> SegmentLoss:
    return SegmentLoss(job_id=segment.lease.job_id, reason=reason)
