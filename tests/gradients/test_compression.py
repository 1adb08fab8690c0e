"""Compressed taps: bounded errors, sizes that frames check, error feedback that makes good what was left."""

from __future__ import annotations

import struct

import pytest
import torch
import xxhash

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, LinearKind
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.encodings import Compression
from cola_runtime.errors import ProtocolError
from cola_runtime.gradients import int8_layout
from cola_runtime.gradients.accumulate import GradientAccumulator
from cola_runtime.gradients.compression import (
    Int8Blocks,
    TapCompressor,
    dequantized,
    product_of_factors,
    quantized,
)
from cola_runtime.testing.tiny_models import tiny_sites
from cola_runtime.transport.frames import DType, TensorAddress, tensor_frames
from cola_runtime.transport.reader import FrameLimits, FrameReader, ReceivedTensor
from cola_runtime.transport.tensors import from_wire, tap_from_wire, to_wire
from cola_runtime.types import Lease, TensorKey, TensorKind

JOB = "job-" + "0123456789abcdef" * 2
LEASE = Lease(job_id=JOB, epoch=1, device_id="d")
ADDRESS = TensorAddress(job_id=JOB, epoch=1, version=0, kind=TensorKind.GRAD_LORA_A, site=3)
SITE = tiny_sites("llama")[1]  # 64 to 32
PRODUCT = TensorKey(SITE.index, TensorKind.WEIGHT_GRADIENT)
FACTORS = TensorKey(SITE.index, TensorKind.WEIGHT_GRADIENT_FACTORS)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Magnitudes over many orders, as gradients have them."""
    draw = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (8 * torch.rand(shape, generator=draw, dtype=torch.float64) - 8)
    return (torch.randn(shape, generator=draw, dtype=torch.float64) * scale).to(dtype)


def received(message: bytes) -> ReceivedTensor:
    (item,) = FrameReader(FrameLimits()).feed(message)
    assert isinstance(item, ReceivedTensor)
    return item


def sent(tensor: torch.Tensor | Int8Blocks) -> bytes:
    ((header, payload),) = tensor_frames(ADDRESS, to_wire(tensor))
    return header + bytes(payload)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (8, 576), (577, 3), (0, 5), ()])
def test_int8_is_off_by_a_253rd_of_its_blocks_largest_at_most(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = random(*shape, dtype=dtype)
    back = tap_from_wire(received(sent(quantized(tensor))), torch.float64)
    assert back.shape == tensor.shape
    flat, decoded = tensor.double().reshape(-1), back.reshape(-1)
    for first in range(0, flat.numel(), 64):
        block = slice(first, first + 64)
        assert (decoded[block] - flat[block]).abs().max() <= flat[block].abs().max() / 253


def test_int8_takes_one_byte_a_value_and_two_a_block() -> None:
    blocks = quantized(random(8, 576))
    assert blocks.payload.numel() == 8 * 576 + 2 * 72 == int8_layout.payload_bytes(8 * 576)
    assert received(sent(blocks)).dtype is DType.INT8_BLOCKS


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_within_its_block(value: float) -> None:
    tensor = random(200)
    tensor[70] = value
    back = dequantized(quantized(tensor), torch.float32)
    assert not torch.isfinite(back[64:128]).any()
    assert torch.isfinite(back[:64]).all() and torch.isfinite(back[128:]).all()


@pytest.mark.parametrize("value", [0.0, 1e-44])
def test_zeros_and_the_smallest_numbers_are_finite(value: float) -> None:
    assert torch.equal(dequantized(quantized(torch.full((70,), value)), torch.float32), torch.zeros(70))


@pytest.mark.parametrize(("offset", "form", "value"), [(56, "<I", 65), (72, "<Q", 192), (14, "<B", 5)])
def test_a_frame_whose_shape_and_blocks_disagree_is_refused(offset: int, form: str, value: int) -> None:
    frame = bytearray(sent(quantized(random(64, 3))))
    struct.pack_into(form, frame, offset, value)
    struct.pack_into("<Q", frame, 4, xxhash.xxh3_64_intdigest(bytes(frame[12:])))
    with pytest.raises(ProtocolError) as caught:
        received(bytes(frame))
    assert caught.value.reason == "TENSOR_INVALID"


def test_weights_on_their_way_back_may_not_be_int8() -> None:
    with pytest.raises(ProtocolError, match="may not be INT8_BLOCKS"):
        from_wire(received(sent(quantized(random(4, 4)))))


def test_without_compression_the_tensors_are_the_same_objects() -> None:
    tensors = {PRODUCT: random(32, 65)}
    assert TapCompressor().compress(LEASE, Compression.NONE, tensors) is tensors


def test_a_bfloat16_gradient_is_added_in_the_adapters_own_width() -> None:
    spec = AdapterSpec(parts=(AdapterPart(kind=LinearKind(), sites=(SITE,)),), seed=0)
    accumulator, key = GradientAccumulator(spec), TensorKey(SITE.index, TensorKind.GRAD_WEIGHT)
    first, second = random(32, 64, seed=1), random(32, 64, seed=2)
    for gradient in (first, second):
        (rounded,) = TapCompressor().compress(LEASE, Compression.BFLOAT16, {key: gradient}).values()
        assert isinstance(rounded, torch.Tensor) and rounded.dtype is torch.bfloat16
        accumulator.add(key, rounded, {})
    expected = first.bfloat16().float() + second.bfloat16().float()
    assert torch.equal(accumulator.gradients()[key], expected)


def factors(compressor: TapCompressor, product: torch.Tensor, lease: Lease = LEASE) -> torch.Tensor:
    sent = compressor.compress(lease, Compression.LOW_RANK, {PRODUCT: product})
    (found,) = sent.values()
    assert sent.keys() == {FACTORS} and isinstance(found, torch.Tensor)
    return found


def test_low_rank_is_exact_for_a_product_of_that_rank_and_much_smaller() -> None:
    draw = torch.Generator().manual_seed(3)
    product = torch.randn(32, 8, generator=draw, dtype=torch.float64) @ torch.randn(
        8, 65, generator=draw, dtype=torch.float64
    )
    found = factors(TapCompressor(), product)
    assert tuple(found.shape) == (32 + 65, 8)
    torch.testing.assert_close(product_of_factors(found, 32), product, rtol=1e-10, atol=1e-10)


def test_what_low_rank_leaves_out_is_made_good_later() -> None:
    """Everything sent and the error of the last round are together everything that was to be sent."""
    compressor, draw = TapCompressor(), torch.Generator().manual_seed(4)
    product = torch.randn(32, 65, generator=draw, dtype=torch.float64)
    total = torch.zeros_like(product)
    errors = []
    for round_ in range(1, 41):
        total += product_of_factors(factors(compressor, product), 32)
        errors.append(float((total - round_ * product).norm() / (round_ * product).norm()))
    assert errors[0] > 0.5  # a random product has no low rank
    assert errors[-1] < 0.1
    assert all(later < earlier for earlier, later in zip(errors[::8], errors[8::8], strict=False))


def test_a_new_lease_and_another_job_begin_without_an_error() -> None:
    product = random(32, 65)
    fresh = factors(TapCompressor(), product)
    compressor = TapCompressor()
    assert torch.equal(factors(compressor, product), fresh)
    assert not torch.equal(factors(compressor, product), fresh)
    again = Lease(job_id=JOB, epoch=2, device_id="d")
    assert torch.equal(factors(compressor, product, again), fresh)
    other = Lease(job_id="job-" + "1" * 32, epoch=1, device_id="d")
    assert torch.equal(factors(compressor, product, other), fresh)
    compressor.forget(JOB)
    assert torch.equal(factors(compressor, product, again), fresh)


def test_a_device_adds_the_product_of_two_factors_and_refuses_other_shapes() -> None:
    spec = AdapterSpec(parts=(AdapterPart(kind=LinearKind(bias=True), sites=(SITE,)),), seed=0)
    accumulator, weights = GradientAccumulator(spec), initial_weights(spec)
    pair = random(32 + 65, 4)
    accumulator.add(FACTORS, pair, weights)
    product = pair[:32] @ pair[32:].T
    found = accumulator.gradients()
    torch.testing.assert_close(found[TensorKey(SITE.index, TensorKind.GRAD_WEIGHT)], product[:, :-1])
    torch.testing.assert_close(found[TensorKey(SITE.index, TensorKind.GRAD_BIAS)], product[:, -1])
    for wrong in (random(96, 4), random(97), random(97, 0), random(97, 4).long()):
        with pytest.raises(ProtocolError) as caught:
            accumulator.add(FACTORS, wrong, weights)
        assert caught.value.reason == "TENSOR_INVALID"
