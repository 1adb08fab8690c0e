"""Lossy forms of a tap's tensors: made where the base model hands out its taps, undone by the device.

Opt-in, and named in the job's encoding; docs/encodings.md has the errors. Weights on their way back are never
compressed. Shapes: O out_features, I in_features, K rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from cola_runtime.encodings import Compression
from cola_runtime.errors import ProtocolError
from cola_runtime.gradients import int8_layout
from cola_runtime.gradients.planner import LOW_RANK
from cola_runtime.types import Lease, TensorKey, TensorKind

_LEVELS = 127.0


@dataclass(frozen=True, slots=True)
class Int8Blocks:
    """A tensor of `shape` as the payload of `int8_layout`."""

    shape: tuple[int, ...]
    payload: Tensor  # uint8 [payload_bytes(elements)]


Compressed = Tensor | Int8Blocks


def quantized(tensor: Tensor) -> Int8Blocks:
    """Round to the nearest of 255 levels per block, symmetric around zero.

    Off by at most 1/253 of the block's largest magnitude: half a level, and the scale's rounding. A block
    that holds a NaN or an infinity becomes non-finite as a whole.
    """
    elements = tensor.numel()
    missing = int8_layout.blocks(elements) * int8_layout.BLOCK_VALUES - elements
    values = functional.pad(_wide(tensor).reshape(-1), (0, missing)).view(-1, int8_layout.BLOCK_VALUES)
    scales = (values.abs().amax(dim=1, keepdim=True) / _LEVELS).to(torch.bfloat16)
    levels = (values / scales).nan_to_num_(0.0).round_().clamp_(-_LEVELS, _LEVELS)
    payload = torch.empty(int8_layout.payload_bytes(elements), dtype=torch.uint8)
    border = int8_layout.scales_bytes(elements)
    payload[:border] = scales.view(-1).view(torch.uint8)
    payload[border:].view(torch.int8).copy_(levels.view(-1)[:elements])
    return Int8Blocks(tuple(tensor.shape), payload)


def dequantized(blocks: Int8Blocks, dtype: torch.dtype) -> Tensor:
    """scale * int8 in `dtype`. Raises ProtocolError `TENSOR_INVALID` for a payload of another size."""
    elements = torch.Size(blocks.shape).numel()
    expected = int8_layout.payload_bytes(elements)
    if blocks.payload.numel() != expected:
        raise ProtocolError(
            "TENSOR_INVALID",
            f"{blocks.shape} in int8 blocks has another size",
            limit=expected,
            actual=blocks.payload.numel(),
        )
    border = int8_layout.scales_bytes(elements)
    scales = blocks.payload[:border].clone().view(torch.bfloat16).to(dtype)  # where it lay may be odd
    values = torch.zeros(len(scales), int8_layout.BLOCK_VALUES, dtype=dtype)
    values.view(-1)[:elements] = blocks.payload[border:].view(torch.int8)
    return values.mul_(scales.unsqueeze(1)).view(-1)[:elements].view(blocks.shape)


def product_of_factors(factors_FK: Tensor, outputs: int) -> Tensor:
    """P Q^T, [O, I + 1], of P [O, K] above Q [I + 1, K]."""
    return factors_FK[:outputs] @ factors_FK[outputs:].T


@dataclass(slots=True)
class _Feedback:
    """What low rank left out at one site so far, and the directions that it begins its next search with."""

    error_OI: Tensor  # [O, I + 1]
    q_IK: Tensor  # [I + 1, K]


@dataclass(slots=True)
class _OfLease:
    epoch: int
    sites: dict[int, _Feedback] = field(default_factory=dict)


class TapCompressor:
    """Compresses taps lease by lease. Only the thread that hands out taps may call it.

    Low rank holds an error of [O, I + 1] for every site of a lease, beside the base model, until it ends.
    """

    def __init__(self) -> None:
        self._leases: dict[str, _OfLease] = {}

    def compress(
        self, lease: Lease, compression: Compression, tensors: Mapping[TensorKey, Tensor]
    ) -> Mapping[TensorKey, Compressed]:
        """The tensors as they travel; without compression themselves. Ids are never touched."""
        if compression is Compression.NONE:
            return tensors
        if compression is Compression.LOW_RANK:
            return {_factors_key(key): self._factors(lease, key, _wide(t)) for key, t in tensors.items()}
        narrowed = _narrowed if compression is Compression.BFLOAT16 else quantized
        return {key: narrowed(t) if t.is_floating_point() else t for key, t in tensors.items()}

    def forget(self, job_id: str) -> None:
        """The job's lease has ended; its next one begins without an error to make good."""
        self._leases.pop(job_id, None)

    def _factors(self, lease: Lease, key: TensorKey, product_OI: Tensor) -> Tensor:
        """One power iteration of PowerSGD (arXiv:1905.13727) on the product and what was left out before."""
        of_lease = self._leases.get(lease.job_id)
        if of_lease is None or of_lease.epoch != lease.epoch:
            of_lease = self._leases[lease.job_id] = _OfLease(lease.epoch)
        feedback = of_lease.sites.get(key.site)
        if feedback is None:
            feedback = of_lease.sites[key.site] = _fresh_feedback(key.site, product_OI)
        wanted_OI = feedback.error_OI.add_(product_OI)
        p_OK, _ = torch.linalg.qr(wanted_OI @ feedback.q_IK)
        feedback.q_IK = wanted_OI.T @ p_OK
        feedback.error_OI = wanted_OI.addmm_(p_OK, feedback.q_IK.T, alpha=-1.0)
        return torch.cat([p_OK, feedback.q_IK])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _narrowed(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16)


def _factors_key(key: TensorKey) -> TensorKey:
    assert key.kind is TensorKind.WEIGHT_GRADIENT, "the planner gives low rank weight gradients only"
    return TensorKey(key.site, TensorKind.WEIGHT_GRADIENT_FACTORS)


def _fresh_feedback(site: int, product_OI: Tensor) -> _Feedback:
    """Nothing left out, and random directions of the site alone."""
    rank = min(LOW_RANK, *product_OI.shape)
    draw = torch.Generator().manual_seed(site)
    q_IK = torch.randn(product_OI.shape[1], rank, generator=draw, dtype=torch.float64)
    return _Feedback(torch.zeros_like(product_OI), q_IK.to(product_OI.dtype))
