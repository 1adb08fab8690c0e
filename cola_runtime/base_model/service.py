"""The base model as the coordinator sees it: leases, base steps, events. The Ray actor forwards to this."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cola_runtime import crash_points
from cola_runtime.adapter_spec import LeaseTerms
from cola_runtime.adapters.checkpoint_format import checkpoint_weights
from cola_runtime.base_model.bank import PreparedAdapter
from cola_runtime.base_model.compute_lane import ComputeLane
from cola_runtime.base_model.event_log import EventLog
from cola_runtime.base_model.gathered_taps import GatheredTaps
from cola_runtime.base_model.gradient_server import GradientServer
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.retained import RetainedSteps
from cola_runtime.base_model.retained_files import RetainedFiles
from cola_runtime.base_model.updates import Update
from cola_runtime.config import HostSettings
from cola_runtime.errors import ColaError, NotFound
from cola_runtime.gradients.compression import TapCompressor
from cola_runtime.gradients.taps import Tap
from cola_runtime.trace.report import BASE_STEP
from cola_runtime.trace.spans import ProcessSpans, SpanRecorder
from cola_runtime.types import (
    BaseEvent,
    BaseModelDescription,
    BaseStep,
    BaseStepResult,
    Lease,
    StepApplied,
    StepRefused,
)

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger(__name__)

COMPUTE = "compute thread"  # its lane in a trace


class BaseModelService:
    """Owns a TappedModel, its compute thread and the gradient stream server. Belongs to one event loop.

    Steps that may be checked are kept in `retained_dir` too, for the process after this one.
    """

    def __init__(
        self, model: TappedModel, *, name: str, join_token: str, retained_dir: Path | None = None
    ) -> None:
        self._files = None if retained_dir is None else RetainedFiles(retained_dir)
        self._model = model
        self._name = name
        self._lane = ComputeLane()
        self._preparing = asyncio.Lock()  # updates are installed in the order they came
        self._decoding = asyncio.Lock()  # steps are decoded, and so computed, in the order they came
        self._compressor = TapCompressor()  # belongs to whoever hands out the taps
        self._events = EventLog()
        self._spans = SpanRecorder()
        self._server = GradientServer(
            join_token=join_token,
            on_update=self._install_soon,
            on_event=self._events.append,
            spans=self._spans,
            retained=RetainedSteps(files=self._files),
        )
        self._endpoint = ""
        self._deviations: dict[str, float] = {}  # of replays under way, by their lease's job
        self._installing: set[asyncio.Task[None]] = set()

    async def start(
        self,
        bind: str,
        *,
        credentials: grpc.ServerCredentials | None = None,
        hosts: HostSettings | None = None,
    ) -> str:
        """Listen for devices; returns the gradient endpoint, host:port."""
        self._endpoint = await self._server.start(bind, credentials=credentials, hosts=hosts)
        return self._endpoint

    async def stop(self) -> None:
        """End the streams first, so that nothing new is queued, then the compute thread."""
        await self._server.stop()
        for task in self._installing:
            task.cancel()
        self._lane.stop()
        if self._files is not None:
            self._files.close()

    async def describe(self) -> BaseModelDescription:
        return self._model.describe(self._name, self._endpoint)

    async def lease(self, lease: Lease, terms: LeaseTerms) -> None:
        """Accept the lease's device and epoch from now on. Raises Fenced for an older epoch."""
        self._server.lease(lease, terms)
        crash_points.reach("base_model.leased")

    async def end_lease(self, job_id: str, epoch: int) -> None:
        """Forget the lease and its adapter, unless a newer lease holds the job."""
        if self._server.end_lease(job_id, epoch):
            self._deviations.pop(job_id, None)
            self._server.norm_deviations.pop(job_id, None)
            await self._lane.run(lambda: self._forget(job_id), urgent=True)

    async def forget_steps(self, job_id: str, epoch: int, *, before: int) -> None:
        """What was retained for steps of the lease that lead to versions up to `before` may go."""
        self._server.retained.forget(job_id, epoch, before=before)

    async def dismiss_device(self, device_id: str) -> None:
        """End the device's gradient stream; tickets that it was given before open none."""
        self._server.dismiss(device_id)

    async def run(self, step: BaseStep) -> BaseStepResult:
        """Compute one mixed batch; taps leave while it runs, each microbatch's end behind them.

        The ends are queued by whoever hands out the taps, behind them: else the next step's taps, which may
        be handed out before this coroutine goes on, would be ahead and count as this microbatch's.
        """
        async with self._decoding:
            if self._model.images is not None:
                step = await asyncio.to_thread(self._model.images.decoded, step)
            expected = await asyncio.to_thread(self._model.expect, step) if self._model.limits_bank else {}
        gathered = [GatheredTaps(segment, self._server.send_tap) for segment in step.segments]

        def sink(tap: Tap) -> None:
            segment = step.segments[tap.segment]
            compressed = self._compressor.compress(segment.lease, segment.taps.compression, tap.tensors)
            gathered[tap.segment].add(compressed)
            crash_points.reach("base_model.tap")

        def end(result: BaseStepResult) -> None:
            for taps, segment, loss in zip(gathered, step.segments, result.losses, strict=True):
                if step.train and loss.reason is None:
                    taps.flush()
                    self._server.end_microbatch(segment, taps.sent)

        try:
            result = await self._lane.run(lambda: self._model.run(step, sink, then=end))
        finally:
            self._model.unexpect(expected)
        crash_points.reach("base_model.step_done")
        self._record(step, result)
        return result

    async def generate(
        self,
        job_id: str | None,
        prompts: Sequence[Sequence[int]],
        *,
        checkpoint: bytes | None = None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Sequence[int],
    ) -> list[list[int]]:
        """New tokens for every prompt, in one turn of the compute thread: from the adapter in the bank, else
        from the checkpoint; None is the bare base model.
        """

        def ask() -> list[list[int]]:
            with self._resident(job_id, checkpoint), self._timed("generate", job_id or ""):
                return self._model.generate(
                    job_id,
                    prompts,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                    stop_ids=stop_ids,
                )

        return await self._lane.run(ask)

    async def next_events(self, after: int) -> tuple[int, list[BaseEvent]]:
        """Events numbered above `after` as soon as there is one, or none after 5 s. Conflict EVENTS_LOST."""
        return await self._events.after(after)

    async def record_spans(self, on: bool) -> ProcessSpans:
        """Record what the compute thread and the streams do from now on, or no more; what was, until now."""
        return self._spans.switch(on, now=time.monotonic())

    @contextmanager
    def _resident(self, job_id: str | None, checkpoint: bytes | None) -> Iterator[None]:
        """On the compute thread: the checkpoint's adapter is in the bank while the context lasts."""
        if job_id is None or checkpoint is None or self._model.version(job_id) is not None:
            yield
            return
        spec, version, weights = checkpoint_weights(checkpoint)
        lease = Lease(job_id=job_id, epoch=0, device_id="")
        tensors = {key: torch.from_numpy(weight.copy()) for key, weight in weights.items()}
        self._model.install(lease, spec, version, tensors)
        try:
            yield
        finally:
            self._model.evict(job_id)

    def _forget(self, job_id: str) -> None:
        self._model.evict(job_id)
        self._model.behind_taps(lambda: self._compressor.forget(job_id))

    def _record(self, step: BaseStep, result: BaseStepResult) -> None:
        if self._spans.on:
            self._spans.add(
                COMPUTE,
                BASE_STEP,
                begin=result.started,
                end=result.started + result.seconds,
                number=result.number,
                jobs=len({segment.lease.job_id for segment in step.segments}),
                microbatches=len(step.segments),
                tokens=result.real_tokens,
                computed_tokens=result.computed_tokens,
                does="train" if step.train else "losses",
                bank_hits=result.bank.hits,  # since the process started, as what follows
                bank_misses=result.bank.misses,
                bank_prefetched=result.bank.prefetched,
                bank_evicted_bytes=result.bank.evicted_bytes,
            )

    @contextmanager
    def _timed(self, name: str, job_id: str) -> Iterator[None]:
        """On the compute thread: its time goes into the trace."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._spans.add(COMPUTE, name, begin=begin, end=time.monotonic(), job=job_id)

    def _install_soon(self, update: Update) -> None:
        """Queue the install between two base steps; the bank never changes under a running one."""
        take = self._install if update.terms.replay is None else self._compare
        task = asyncio.create_task(take(update))
        self._installing.add(task)
        task.add_done_callback(self._installing.discard)

    async def _install(self, update: Update) -> None:
        def install(prepared: PreparedAdapter | None) -> None:
            with self._timed("install", update.lease.job_id):
                self._model.install(
                    update.lease,
                    update.terms.spec,
                    update.version,
                    update.weights,
                    max_staleness=update.terms.max_staleness,
                    membership=update.terms.membership,
                    prepared=prepared,
                )

        crash_points.reach("base_model.update_complete")
        try:
            async with self._preparing:
                prepared, links = await asyncio.gather(
                    self._prepared(update), asyncio.to_thread(update.follow_chains)
                )
            if not self._server.honours(update.lease):
                return  # ended since: behind the eviction, an install would stay in the bank for good
            installing = self._lane.submit(lambda: install(prepared), urgent=True)
            if prepared is not None:  # a base step that asks for it comes behind the install
                await self._tell_applied(update, links)
            await asyncio.wrap_future(installing)
        except ColaError as error:
            self._events.append(StepRefused(lease=update.lease, reason=error.reason, message=str(error)))
        except Exception:
            logger.exception("installing failed", extra={"event": "base.install_failed"})
            message = f"version {update.version} could not be installed"
            self._events.append(StepRefused(lease=update.lease, reason="INSTALL_FAILED", message=message))
        else:
            crash_points.reach("base_model.installed")
            if prepared is None:
                await self._tell_applied(update, links)

    async def _tell_applied(self, update: Update, links: tuple[str, ...]) -> None:
        for part, shard in zip(update.lease.parts, update.shards, strict=True):
            await self._server.retained.received(part, update.version, shard.weights_P)
        self._events.append(_applied(update, links))

    async def _compare(self, update: Update) -> None:
        """A replayed step beside the one that it repeats. The replay begins when its start has arrived."""
        replay, lease = update.terms.replay, update.lease
        assert replay is not None  # `_install_soon` has looked
        try:
            async with self._preparing:
                if update.version == replay.first:
                    self._deviations[lease.job_id] = 0.0
                    await self._server.retained.recall(replay)
                    self._server.replay(lease, replay)
                else:
                    [shard] = update.shards
                    sent_P = self._server.retained.weights(replay.lease, update.version)
                    if sent_P is None:
                        raise NotFound("STEPS_NOT_RETAINED", f"version {update.version} is not kept")
                    found = await asyncio.to_thread(relative_distance, shard.weights_P, sent_P)
                    of_norms = self._server.norm_deviations.get(lease.job_id, 0.0)
                    self._deviations[lease.job_id] = max(self._deviations[lease.job_id], found, of_norms)
        except ColaError as error:
            self._events.append(StepRefused(lease=lease, reason=error.reason, message=str(error)))
        else:
            deviation = self._deviations[lease.job_id]
            self._events.append(StepApplied(lease=lease, version=update.version, deviation=deviation))

    async def _prepared(self, update: Update) -> PreparedAdapter | None:
        """Beside the step under way. A gang's member is merged on the compute thread, from what it sent."""
        if update.terms.membership is not None:
            return None
        return await asyncio.to_thread(self._model.prepare, update.terms.spec, update.weights)


def relative_distance(made_P: Tensor, sent_P: Tensor) -> float:
    """|made - sent| / |sent|, in the Euclidean norm; 0 only for equal bits."""
    if torch.equal(made_P, sent_P):
        return 0.0
    difference, norm = torch.linalg.vector_norm(made_P - sent_P), torch.linalg.vector_norm(sent_P)
    return max(float(difference / norm.clamp_min(torch.finfo(norm.dtype).tiny)), sys.float_info.min)


def _applied(update: Update, links: tuple[str, ...]) -> StepApplied:
    return StepApplied(
        lease=update.lease,
        version=update.version,
        learning_rate=update.learning_rate,
        gradient_norm=update.gradient_norm,
        device_seconds=update.device_seconds,
        bytes_up=update.bytes_up,
        bytes_down=update.bytes_down,
        links=links,
    )
