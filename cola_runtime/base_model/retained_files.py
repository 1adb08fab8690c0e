"""Steps that were kept for a spot check, on disk: a base model that starts again can replay them still.

A file a step in a folder of its lease, in safetensors; its metadata say in which order what was sent.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from google.protobuf.message import DecodeError
from torch import Tensor

from cola_runtime.proto import control_pb2
from cola_runtime.transport.frames import DType, TensorAddress
from cola_runtime.transport.tensors import Parcel
from cola_runtime.types import Lease, TensorKey, TensorKind

KEPT_SECONDS = 86_400.0  # of a lease that nobody has asked to forget, since its last step
SWEEP_SECONDS = 3600.0

Sent = tuple[TensorAddress, Parcel] | control_pb2.GradientControl

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class KeptStep:
    """What one device was sent for one step, in order, and what it answered."""

    sent: list[Sent] = field(default_factory=list)
    norms: tuple[float, ...] = ()  # of a shard's tensors
    weights_P: Tensor | None = None

    @property
    def nbytes(self) -> int:
        of_weights = 0 if self.weights_P is None else self.weights_P.nbytes
        return of_weights + sum(each[1].wire_bytes for each in self.sent if isinstance(each, tuple))


class RetainedFiles:
    """A folder. Files are written and deleted one after the other by a thread of their own.

    A disk that does not take one costs that step's check after a restart, and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retained-files")
        self._swept = -math.inf
        self._sweep()

    def write(self, part: Lease, version: int, step: KeptStep) -> Future[None]:
        """Of the step that leaves `version`, which is whole. Done when it is there, or cannot be."""
        sent, norms, weights_P = tuple(step.sent), step.norms, step.weights_P
        assert weights_P is not None, "written when they have come"
        self._sweep()
        return self._later(lambda: _write(self._path(part, version), sent, norms, weights_P))

    def read(self, part: Lease, versions: Sequence[int]) -> dict[int, KeptStep]:
        """Of these versions what there is and can be read. Blocks."""
        paths = {version: self._path(part, version) for version in versions}
        reading = self._thread.submit(lambda: {version: _found(path) for version, path in paths.items()})
        return {version: step for version, step in reading.result().items() if step is not None}

    def forget(self, job_id: str, epoch: int, *, before: float = math.inf) -> None:
        """Steps of the lease that lead to versions up to `before`, or all. Returns at once."""

        def delete() -> None:
            folder = self._of_lease(job_id, epoch)
            for path in folder.glob("*.safetensors"):
                if int(path.stem.rpartition(".")[2]) < before:
                    path.unlink()
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()

        self._later(delete)

    def close(self) -> None:
        """What was begun is written."""
        self._thread.shutdown(wait=True)

    def _later(self, work: Callable[[], None]) -> Future[None]:
        def attempt() -> None:
            try:
                work()
            except OSError as error:
                logger.warning("retained steps: %s", error, extra={"event": "spot_check.files_failed"})

        return self._thread.submit(attempt)

    def _sweep(self) -> None:
        """Also of a process that runs on: nobody may have told it of a lease that ended while it was away."""
        if time.monotonic() - self._swept >= SWEEP_SECONDS:
            self._swept = time.monotonic()
            self._later(self._forget_old)

    def _forget_old(self) -> None:
        oldest = time.time() - KEPT_SECONDS
        for folder in self._folder.glob("job-*"):
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)

    def _of_lease(self, job_id: str, epoch: int) -> Path:
        return self._folder / f"{job_id}-{epoch}"

    def _path(self, part: Lease, version: int) -> Path:
        return self._of_lease(part.job_id, part.epoch) / f"{part.device_id}.{version}.safetensors"


def _write(path: Path, sent: Sequence[Sent], norms: Sequence[float], weights_P: Tensor) -> None:
    tensors, items = {"weights": weights_P.contiguous()}, []
    for number, each in enumerate(sent):
        if isinstance(each, tuple):
            address, parcel = each
            entries = list(parcel)
            # A copy of each: a file takes no tensors that share memory, as a pass's taps may.
            tensors |= {f"{number}.{i}": elements.clone() for i, (_, _, elements) in enumerate(entries)}
            shapes = [((key.site, key.kind, key.slot), shape) for key, shape, _ in entries]
            items.append({"address": tuple(address), "dtype": int(parcel.dtype), "entries": shapes})
        else:
            items.append({"control": base64.b64encode(each.SerializeToString()).decode()})
    described = json.dumps({"items": items, "norms": list(norms)})
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(safetensors.torch.save(tensors, metadata={"cola": described}))
    fresh.replace(path)


def _found(path: Path) -> KeptStep | None:
    """None for no file, and for one that a crash of the machine has left damaged."""
    if not path.exists():
        return None
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError, DecodeError) as error:
        logger.warning("retained steps: %s: %s", path, error, extra={"event": "spot_check.files_failed"})
        return None


def _read(path: Path) -> KeptStep:
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        described = json.loads(file.metadata()["cola"])
    sent = [_sent(number, item, tensors) for number, item in enumerate(described["items"])]
    return KeptStep(sent=sent, norms=tuple(described["norms"]), weights_P=tensors["weights"])


def _sent(number: int, item: dict[str, Any], tensors: dict[str, Tensor]) -> Sent:
    if "control" in item:
        return control_pb2.GradientControl.FromString(base64.b64decode(item["control"]))
    job_id, epoch, version, kind, *rest = item["address"]
    parcel = Parcel(DType(item["dtype"]))
    for i, ((site, of_tensor, slot), shape) in enumerate(item["entries"]):
        key = TensorKey(site, TensorKind(of_tensor), slot)
        parcel.add(key, tuple(shape), tensors[f"{number}.{i}"])
    return TensorAddress(job_id, epoch, version, TensorKind(kind), *rest), parcel
