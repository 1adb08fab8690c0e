"""Where the base model computes: this machine's processors, or one CUDA device; and how tensors get there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cola_runtime.errors import InvalidInput

ACCELERATORS = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Owned by the compute thread: what is placed is there before whatever that thread asks for next."""

    device: torch.device

    @staticmethod
    def of(setting: str) -> Accelerator:
        """`auto` is cuda where torch sees a device. Raises InvalidInput `ACCELERATOR_MISSING`."""
        available = torch.cuda.is_available()
        if setting == "cuda" and not available:
            raise InvalidInput(
                "ACCELERATOR_MISSING",
                "torch sees no CUDA device here",
                where="base_models.accelerator",
                remedy="Set the base model's accelerator to cpu, or install a torch for CUDA and its driver.",
            )
        return Accelerator(torch.device("cuda", 0) if available and setting != "cpu" else torch.device("cpu"))

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def description(self) -> str:
        """`cpu`, or `cuda` and the device's name."""
        return f"cuda, {torch.cuda.get_device_name(self.device)}" if self.is_cuda else "cpu"

    def compute_exactly(self) -> None:
        """Products in their operands' own precision, for the whole process.

        torch's defaults are TF32 in convolutions, and sums that are split and added in bfloat16 or float16.
        """
        if self.is_cuda:
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def placed(self, tensor: Tensor) -> Tensor:
        """A tensor in host memory as one there. Nobody waits: the copy goes through page-locked memory."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.is_cuda else tensor

    def placed_aside(self, tensor: Tensor) -> PlacedAside:
        """As `placed`, but beside whatever is being computed. From any thread."""
        if not self.is_cuda:
            return PlacedAside(tensor)
        aside = _copy_stream(self.device)
        with torch.cuda.stream(aside):
            there, copied = self.placed(tensor), torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return PlacedAside(there, copied)

    def page_locked(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, from where products that need it now and then fetch it without waiting."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.is_cuda)
        return copy.copy_(tensor)

    def wait(self) -> None:
        """Until everything asked for is computed."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def give_back(self) -> None:
        """Memory that torch keeps for later goes back to the device."""
        if self.is_cuda:
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class PlacedAside:
    """A tensor whose copy may still be on its way."""

    tensor: Tensor
    copied: torch.cuda.Event | None = None

    def arrived(self) -> Tensor:
        """The tensor, for what the calling thread asks for from now on; nobody waits."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.copied)
            self.tensor.record_stream(stream)  # its memory belongs to the other stream
        return self.tensor


@lru_cache(maxsize=8)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


HOST = Accelerator(torch.device("cpu"))


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor that all callers share. Made anew for each use they would cost a copy each."""
    return _constants(tuple(values), dtype, device)


@lru_cache(maxsize=4096)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return Accelerator(device).placed(torch.tensor(values, dtype=dtype))
