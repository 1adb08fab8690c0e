"""What was sent to a device for steps that may be checked, and what came back: to be replayed elsewhere."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cola_runtime.base_model.retained_files import KeptStep, RetainedFiles, Sent
from cola_runtime.errors import NotFound
from cola_runtime.proto import control_pb2
from cola_runtime.transport.frames import TensorAddress
from cola_runtime.transport.tensors import Parcel
from cola_runtime.types import Lease, Replay

MOST_RETAINED_BYTES = 1 << 30
"""Of all leases together. A device's part of a lease whose steps would go beyond keeps none, and is not
checked."""


class _Kept:
    def __init__(self) -> None:
        self.steps: dict[int, KeptStep] = defaultdict(KeptStep)  # by the version trained
        self.nbytes = 0
        self.overflowed = False


class RetainedSteps:
    """By device of a lease. Tensors are kept as they are, and nobody changes them. Belongs to the event loop.

    With `files`, steps that are whole are there too, for this process's successor.
    """

    def __init__(self, *, most_bytes: int = MOST_RETAINED_BYTES, files: RetainedFiles | None = None) -> None:
        self._most_bytes = most_bytes
        self._files = files
        self._kept: dict[tuple[str, int, str], _Kept] = {}

    def sent_parcel(self, part: Lease, version: int, address: TensorAddress, parcel: Parcel) -> None:
        """For the step that leaves `version`; so the others."""
        self._sent(part, version, (address, parcel), parcel.wire_bytes)

    def sent_control(self, part: Lease, version: int, message: control_pb2.GradientControl) -> None:
        """A microbatch's end, or the norm of a sharded adapter."""
        if version in self._of(part).steps or message.HasField("microbatch_end"):
            self._sent(part, version, message, 0)

    def received_norms(self, part: Lease, version: int, norms: Sequence[float]) -> None:
        """Of a shard, for the step that leaves `version`. Kept only if what was sent for that step is."""
        steps = self._of(part).steps
        if version in steps:
            steps[version].norms = tuple(norms)

    async def received(self, part: Lease, version: int, weights_P: Tensor) -> None:
        """Kept only if what was sent for that step is. Returns when the step's file is there.

        So a checkpoint behind it is recorded only when the steps before it can be replayed.
        """
        kept = self._of(part)
        if version - 1 in kept.steps and self._fits(part, kept, weights_P.nbytes):
            step = kept.steps[version - 1]
            step.weights_P = weights_P
            if self._files is not None:
                await asyncio.wrap_future(self._files.write(part, version - 1, step))

    async def recall(self, replay: Replay) -> None:
        """Take up what a process before this one has kept of the replay's steps."""
        kept = self._kept.get(_key(replay.lease))
        versions = [v for v in range(replay.first, replay.last) if kept is None or v not in kept.steps]
        if self._files is None or not versions:
            return
        found = await asyncio.to_thread(self._files.read, replay.lease, versions)
        kept = self._kept.setdefault(_key(replay.lease), _Kept())
        for version, step in found.items():
            kept.steps[version] = step
            kept.nbytes += step.nbytes

    def steps(self, replay: Replay) -> Iterator[Sent] | None:
        """Everything that was sent for the steps from `first` to `last`, in order; None: not all is kept."""
        found = [self._step(replay.lease, version) for version in range(replay.first, replay.last)]
        if any(step is None or step.weights_P is None for step in found):
            return None
        return (each for step in found if step is not None for each in step.sent)

    def weights(self, part: Lease, version: int) -> Tensor | None:
        """[P]: what the device sent as `version`."""
        step = self._step(part, version - 1)
        return None if step is None else step.weights_P

    def norms_distance(self, replay: Replay, version: int, norms: Sequence[float]) -> float:
        """Relative, of a replayed step's norms from those that the device stated for it.

        Raises NotFound `STEPS_NOT_RETAINED`.
        """
        step = self._step(replay.lease, version)
        if step is None or len(step.norms) != len(norms):
            raise NotFound("STEPS_NOT_RETAINED", f"the norms of version {version} are not kept")
        made, stated = torch.tensor(norms, dtype=torch.float64), torch.tensor(step.norms, dtype=torch.float64)
        if torch.equal(made, stated):
            return 0.0
        distance = torch.linalg.vector_norm(made - stated) / torch.linalg.vector_norm(stated).clamp_min(
            1e-300
        )
        return float(distance.nan_to_num(nan=torch.inf))

    def forget(self, job_id: str, epoch: int, *, before: int) -> None:
        """Steps of the lease that lead to versions up to `before` are not asked for any more."""
        for key in [key for key in self._kept if key[:2] == (job_id, epoch)]:
            kept = self._kept[key]
            for version in [v for v in kept.steps if v < before]:
                kept.nbytes -= kept.steps.pop(version).nbytes
            if not kept.steps:
                del self._kept[key]
        if self._files is not None:
            self._files.forget(job_id, epoch, before=before)

    def _of(self, part: Lease) -> _Kept:
        """Of one device; a lease of which nothing is kept leaves nothing behind."""
        return self._kept.get(_key(part)) or _Kept()

    def _step(self, part: Lease, version: int) -> KeptStep | None:
        kept = self._kept.get(_key(part))
        return None if kept is None else kept.steps.get(version)

    def _sent(self, part: Lease, version: int, sent: Sent, nbytes: int) -> None:
        kept = self._kept.setdefault(_key(part), _Kept())
        if self._fits(part, kept, nbytes):
            kept.steps[version].sent.append(sent)

    def _fits(self, part: Lease, kept: _Kept, nbytes: int) -> bool:
        """Counts them; beyond the bound the device's part keeps nothing, until all of it is forgotten."""
        if sum(each.nbytes for each in self._kept.values()) + nbytes > self._most_bytes:
            kept.steps.clear()
            kept.nbytes, kept.overflowed = 0, True
            if self._files is not None:  # of no use any more
                self._files.forget(part.job_id, part.epoch)
        kept.nbytes += 0 if kept.overflowed else nbytes
        return not kept.overflowed


def _key(part: Lease) -> tuple[str, int, str]:
    return part.job_id, part.epoch, part.device_id
