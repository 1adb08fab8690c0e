"""Frames round trip for every dtype and size, and nothing that is wrong in them gets through."""

from __future__ import annotations

import struct
import time

import pytest
import torch
import xxhash

from cola_runtime.errors import ProtocolError
from cola_runtime.machine import ALIGNMENT_BYTES
from cola_runtime.transport import frames
from cola_runtime.transport.frames import (
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    DType,
    TensorAddress,
    WireTensor,
    control_frame,
    tensor_frames,
    tensor_wire_bytes,
)
from cola_runtime.transport.reader import ControlPayload, FrameLimits, FrameReader, ReceivedTensor
from cola_runtime.transport.tensors import from_wire, to_wire
from cola_runtime.types import TensorKind

JOB = "job-" + "0123456789abcdef" * 2
ADDRESS = TensorAddress(
    job_id=JOB, epoch=3, version=2**32 - 1, microbatch=7, site=65_535, kind=TensorKind.GRAD_LORA_B
)
FIELDS = slice(12, HEADER_BYTES)


def encode(tensor: torch.Tensor, address: TensorAddress = ADDRESS) -> list[bytes]:
    return [header + bytes(payload) for header, payload in tensor_frames(address, to_wire(tensor))]


def resign(frame: bytearray) -> bytes:
    """Give a tampered frame a right checksum, so that the check behind the checksum is what answers."""
    struct.pack_into("<Q", frame, 4, xxhash.xxh3_64_intdigest(bytes(frame[12:])))
    return bytes(frame)


def reason_of(*messages: bytes, limits: FrameLimits | None = None) -> str:
    reader = FrameReader(limits or FrameLimits())
    for message in messages[:-1]:
        reader.feed(message)
    with pytest.raises(ProtocolError) as caught:
        reader.feed(messages[-1])
    return caught.value.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (0, 8), (3, 5), (2, 3, 4, 5), (333, 1001), (1280, 1024)])
def test_a_tensor_round_trips_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    frames_sent = encode(tensor)
    reader = FrameReader(FrameLimits())
    received = [item for frame in frames_sent for item in reader.feed(frame)]

    assert len(received) == 1
    assert isinstance(received[0], ReceivedTensor)
    assert received[0].address == ADDRESS
    back = from_wire(received[0])
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)
    assert received[0].wire_bytes == sum(map(len, frames_sent)) == tensor_wire_bytes(tensor.nbytes)


def test_special_bfloat16_values_keep_their_bits() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40], dtype=torch.bfloat16)
    (received,) = FrameReader(FrameLimits()).feed(encode(tensor)[0])
    assert isinstance(received, ReceivedTensor)
    assert torch.equal(from_wire(received).view(torch.int16), tensor.view(torch.int16))


def test_a_non_contiguous_tensor_is_sent_in_row_major_order() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    (received,) = FrameReader(FrameLimits()).feed(encode(tensor)[0])
    assert isinstance(received, ReceivedTensor)
    assert torch.equal(from_wire(received), tensor)


def test_the_receiver_owns_its_buffer() -> None:
    tensor = torch.ones(4)
    message = encode(tensor)[0]
    (received,) = FrameReader(FrameLimits()).feed(message)
    assert isinstance(received, ReceivedTensor)
    from_wire(received).zero_()
    (again,) = FrameReader(FrameLimits()).feed(message)
    assert isinstance(again, ReceivedTensor)
    assert torch.equal(from_wire(again), tensor)


@pytest.mark.parametrize("numbers", [1, 5, 300_001])  # the last one in chunks
def test_a_received_tensor_begins_where_matrix_products_want_it(numbers: int) -> None:
    for _ in range(8):
        reader = FrameReader(FrameLimits())
        (received,) = [item for frame in encode(torch.ones(numbers)) for item in reader.feed(frame)]
        assert isinstance(received, ReceivedTensor)
        assert from_wire(received).data_ptr() % ALIGNMENT_BYTES == 0
        assert from_wire(received).sum() == numbers


def test_one_message_may_hold_many_frames_and_control_between_them() -> None:
    message = encode(torch.ones(3))[0] + b"".join(control_frame(b"hello")) + encode(torch.zeros(2))[0]
    items = FrameReader(FrameLimits()).feed(message)
    assert [type(item) for item in items] == [ReceivedTensor, ControlPayload, ReceivedTensor]
    assert isinstance(items[1], ControlPayload)
    assert items[1].payload == b"hello"
    assert items[1].wire_bytes == HEADER_BYTES + 5


def test_chunks_of_two_tensors_may_alternate() -> None:
    first, second = torch.randn(600, 1000), torch.randn(500, 1000)
    other = TensorAddress(job_id=JOB, epoch=3, version=1, kind=TensorKind.INPUT)
    pairs = zip(encode(first), encode(second, other), strict=False)
    reader = FrameReader(FrameLimits())
    items = [item for pair in pairs for frame in pair for item in reader.feed(frame)]
    items += reader.feed(encode(first)[2])
    assert [torch.equal(from_wire(item), tensor) for item, tensor in zip(items, (second, first), strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("position", [0, 4, 13, 18, 30, 45, 60, 79, HEADER_BYTES, HEADER_BYTES + 11])
def test_any_damaged_byte_is_noticed(position: int) -> None:
    frame = bytearray(encode(torch.ones(3))[0])
    frame[position] ^= 0x10
    assert reason_of(bytes(frame)) in {"FRAME_CHECKSUM", "FRAME_MAGIC"}


@pytest.mark.parametrize("cut", [1, HEADER_BYTES - 1, HEADER_BYTES + 1])
def test_a_cut_frame_is_refused(cut: int) -> None:
    assert reason_of(encode(torch.ones(3))[0][:cut]) == "FRAME_TRUNCATED"


@pytest.mark.parametrize(
    ("offset", "form", "value", "reason"),
    [
        (12, "<B", 1, "FRAME_VERSION"),
        (13, "<B", 9, "FRAME_KIND"),
        (14, "<B", 0, "TENSOR_INVALID"),
        (14, "<B", 200, "TENSOR_INVALID"),
        (14, "<B", DType.FLOAT64, "TENSOR_INVALID"),
        (15, "<B", 5, "FRAME_FIELDS"),
        (16, "<H", 1, "FRAME_FIELDS"),
        (20, "<H", 99, "TENSOR_INVALID"),
        (56, "<I", 4, "TENSOR_INVALID"),
        (60, "<I", 2, "FRAME_FIELDS"),
        (72, "<Q", 2**63, "TENSOR_INVALID"),
        (80, "<Q", 4, "TENSOR_INVALID"),
        (80, "<Q", 2**64 - 1, "TENSOR_INVALID"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(offset: int, form: str, value: int, reason: str) -> None:
    frame = bytearray(encode(torch.ones(3))[0])
    struct.pack_into(form, frame, offset, value)
    assert reason_of(resign(frame)) == reason


def test_a_shape_whose_product_overflows_64_bits_is_refused_before_allocation() -> None:
    frame = bytearray(encode(torch.ones(1, 1, 1, 1))[0])
    struct.pack_into("<4I", frame, 56, *(2**32 - 1,) * 4)
    assert reason_of(resign(frame)) == "TENSOR_INVALID"


def test_a_tensor_above_the_limit_is_refused_at_its_first_chunk() -> None:
    limits = FrameLimits(max_tensor_bytes=2_000_000)
    assert reason_of(encode(torch.ones(500_001))[0], limits=limits) == "TENSOR_TOO_LARGE"


def test_incomplete_tensors_are_bounded_in_number_and_bytes() -> None:
    addresses = [TensorAddress(job_id=JOB, epoch=1, version=v, kind=TensorKind.INPUT) for v in range(3)]
    firsts = [encode(torch.ones(300_000), address)[0] for address in addresses]
    assert reason_of(*firsts, limits=FrameLimits(max_open_tensors=2)) == "TOO_MANY_OPEN_TENSORS"
    assert reason_of(*firsts, limits=FrameLimits(max_open_bytes=2_500_000)) == "TOO_MANY_OPEN_TENSORS"


def test_chunks_twice_out_of_order_or_of_another_shape_are_refused() -> None:
    chunks = encode(torch.ones(600_000))
    assert reason_of(chunks[0], chunks[0]) == "TENSOR_OUT_OF_ORDER"
    assert reason_of(chunks[0], chunks[2]) == "TENSOR_OUT_OF_ORDER"
    assert reason_of(chunks[1]) == "TENSOR_OUT_OF_ORDER"
    other = encode(torch.ones(2, 300_000))
    assert reason_of(chunks[0], other[1]) == "TENSOR_INVALID"


def test_a_payload_above_1_mib_is_refused() -> None:
    frame = bytearray(encode(torch.ones(3))[0])
    struct.pack_into("<I", frame, 52, MAX_PAYLOAD_BYTES + 1)
    assert reason_of(resign(frame)) == "FRAME_TOO_LARGE"
    with pytest.raises(ProtocolError, match="must fit one frame"):
        control_frame(bytes(MAX_PAYLOAD_BYTES + 1))


def test_a_dtype_or_rank_without_a_code_is_not_sent() -> None:
    for tensor in (torch.ones(2, dtype=torch.complex64), torch.ones(1, 1, 1, 1, 1)):
        with pytest.raises(ProtocolError, match="cannot send"):
            to_wire(tensor)


def test_every_dtype_code_has_an_item_size_and_a_tensor_kind_an_id() -> None:
    assert {int(dtype) for dtype in DType} == set(frames.ITEM_BYTES)
    assert {int(kind) for kind in TensorKind} == set(frames.TENSOR_KINDS)


def test_a_job_id_of_another_form_is_not_sent() -> None:
    wire = WireTensor(dtype=DType.UINT8, shape=(1,), data=memoryview(b"x"))
    address = TensorAddress(job_id="job-1", epoch=1, version=0, kind=TensorKind.BLOB)
    with pytest.raises(ValueError, match="32 hexadecimal"):
        list(tensor_frames(address, wire))


def test_a_tensor_whose_chunks_stop_coming_does_not_keep_its_memory() -> None:
    first, *_ = tensor_frames(
        TensorAddress(job_id="job-" + "0" * 32, epoch=1, version=0, kind=TensorKind.BLOB),
        WireTensor(dtype=DType.UINT8, shape=(2 << 20,), data=memoryview(bytes(2 << 20))),
    )
    reader = FrameReader(FrameLimits(tensor_seconds=0.0))
    assert reader.feed(b"".join(first)) == []
    assert reader.incomplete
    time.sleep(0.01)
    with pytest.raises(ProtocolError) as caught:
        reader.feed(b"")
    assert caught.value.reason == "TENSOR_STALLED"
