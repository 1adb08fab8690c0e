"""How taps get from the accelerator to whoever sends them, without the compute thread waiting for a copy.

On a CUDA device every tap is copied to page-locked memory on a stream of its own, while the backward pass
goes on. One thread waits for the copies, in their order, and hands them out.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from cola_runtime.base_model.accelerator import Accelerator
from cola_runtime.gradients.taps import TapSink

MOST_PENDING_BYTES = 4 << 30  # copied and not yet handed out; beyond, the compute thread waits
_ALIGNMENT = 256  # bytes

logger = logging.getLogger(__name__)

HandOut = Callable[[Sequence[Tensor]], None]
"""Gets the carried tensors in host memory, in their order."""


@dataclass(frozen=True, slots=True)
class Recipients:
    """Whose taps a cohort's are, and who takes them."""

    segments: Sequence[int]  # positions in BaseStep.segments
    loss_scales: Sequence[float]  # of each segment's loss, and so of its gradients
    sink: TapSink


@dataclass(frozen=True, slots=True)
class Delivery:
    """`HandOut` that knows its recipients apart: the same products may be made for others later."""

    recipients: Recipients
    hand_out: Callable[[Recipients, Sequence[Tensor]], None]

    def __call__(self, copies: Sequence[Tensor]) -> None:
        self.hand_out(self.recipients, copies)


class TapCarrier(Protocol):
    """Called by the compute thread, or the one that computes its backward pass for it."""

    @property
    def crosses(self) -> bool:
        """The taps are in another memory than those who take them."""

    def carry(self, tensors: Sequence[Tensor], hand_out: HandOut) -> None:
        """`hand_out` gets the tensors, behind those of earlier calls. They may not be changed afterwards.

        Raises what failed there since the last call; what came behind a failure was not handed out.
        """

    def behind(self, work: Callable[[], None]) -> None:
        """Do this behind everything that was carried so far."""

    def drained(self) -> None:
        """Return when everything was handed out. Raises what failed there since the last call."""


@dataclass(frozen=True, slots=True)
class TapOutlet:
    """Where the taps of one pass go, and how they get there."""

    sink: TapSink
    carrier: TapCarrier


class DirectCarrier:
    """`TapCarrier` of a base model in host memory: everything happens at once."""

    crosses = False

    def carry(self, tensors: Sequence[Tensor], hand_out: HandOut) -> None:
        hand_out(tensors)

    def behind(self, work: Callable[[], None]) -> None:
        work()

    def drained(self) -> None:
        """There is never anything left."""


@dataclass(frozen=True, slots=True)
class _Parcel:
    """One call's tensors under way; the device's own stay alive until they are copied."""

    copied: torch.cuda.Event
    originals: Sequence[Tensor]
    copies: Sequence[Tensor]
    hand_out: HandOut
    nbytes: int


@dataclass(slots=True)
class _Pending:
    """What the thread has to do, in order; guarded by the carrier's condition."""

    items: deque[_Parcel | Callable[[], None]] = field(default_factory=deque)
    nbytes: int = 0
    busy: bool = False
    error: BaseException | None = None


class CopyingCarrier:
    """`TapCarrier` from a CUDA device."""

    crosses = True

    def __init__(self, accelerator: Accelerator) -> None:
        self._device = accelerator.device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pending = _Pending()
        self._changed = threading.Condition()
        threading.Thread(target=self._hand_out_forever, name="taps", daemon=True).start()

    def carry(self, tensors: Sequence[Tensor], hand_out: HandOut) -> None:
        copies = _page_locked(tensors)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            copied.record()
        nbytes = sum(tensor.nbytes for tensor in tensors)
        with self._changed:
            self._raise_failure()
            self._changed.wait_for(
                lambda: not self._pending.nbytes or self._pending.nbytes + nbytes <= MOST_PENDING_BYTES
            )
            self._pending.nbytes += nbytes
            self._put(_Parcel(copied, tensors, copies, hand_out, nbytes))

    def before_overwriting(self) -> None:
        """What the compute stream is asked for next begins when everything carried so far is copied."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def behind(self, work: Callable[[], None]) -> None:
        with self._changed:
            self._put(work)

    def drained(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._pending.items and not self._pending.busy)
            self._raise_failure()

    def _raise_failure(self) -> None:
        error, self._pending.error = self._pending.error, None
        if error is not None:
            raise error

    def _put(self, item: _Parcel | Callable[[], None]) -> None:
        self._pending.items.append(item)
        self._changed.notify_all()

    def _hand_out_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._pending.items))
                item, self._pending.busy = self._pending.items.popleft(), True
                failed = self._pending.error is not None
            # Behind a failure nothing is handed out: a microbatch's end must not follow half of its taps.
            error = None if failed else _error_of(item)
            with self._changed:
                self._pending.error = self._pending.error or error
                self._pending.nbytes -= item.nbytes if isinstance(item, _Parcel) else 0
                self._pending.busy = False
                del item  # with the device's memory: the next one may be long in coming
                self._changed.notify_all()


def _error_of(item: _Parcel | Callable[[], None]) -> BaseException | None:
    """Do it; what it raised is for the compute thread to raise again."""
    try:
        if isinstance(item, _Parcel):
            item.copied.synchronize()
            item.hand_out(item.copies)
        else:
            item()
    except BaseException as error:
        logger.exception("taps could not be handed out", extra={"event": "base.taps_failed"})
        return error
    return None


def _page_locked(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors of the same shapes beside each other in one allocation, content undefined."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    return [
        memory[end - size : end - size + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, size, end in zip(tensors, sizes, accumulate(sizes), strict=True)
    ]
