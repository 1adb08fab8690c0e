"""Many tensors in one frame come back bit for bit; nothing that contradicts itself gets through."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest
import torch
import xxhash

from cola_runtime.errors import ProtocolError
from cola_runtime.gradients.compression import Int8Blocks, dequantized, quantized
from cola_runtime.transport.frames import (
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    DType,
    TensorAddress,
    control_frame,
)
from cola_runtime.transport.packs import ENTRY_BYTES, ReceivedPack
from cola_runtime.transport.reader import FrameLimits, FrameReader, ReceivedTensor
from cola_runtime.transport.tensors import (
    Compressed,
    from_wire,
    parcels,
    tensors_from_wire,
    vector_from_wire,
)
from cola_runtime.types import TensorKey, TensorKind

ADDRESS = TensorAddress(
    job_id="job-" + "0123456789abcdef" * 2, epoch=3, version=7, microbatch=2, kind=TensorKind.BLOB
)
A, B = TensorKind.GRAD_LORA_A, TensorKind.GRAD_LORA_B


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sent(tensors: Mapping[TensorKey, Compressed]) -> list[bytes]:
    frames = [frame for parcel in parcels(tensors) for frame in parcel.frames(ADDRESS)]
    assert sum(parcel.wire_bytes for parcel in parcels(tensors)) == sum(map(len, map(b"".join, frames)))
    return [b"".join(frame) for frame in frames]


def received(messages: list[bytes], *, packs: bool = True) -> list[ReceivedTensor | ReceivedPack]:
    reader = FrameReader(FrameLimits(packs=packs))
    return [item for message in messages for item in reader.feed(message)]  # type: ignore[misc]


def resigned(frame: bytes, offset: int, form: str, value: int) -> bytes:
    """The frame with one field changed and a right checksum."""
    changed = bytearray(frame)
    struct.pack_into(form, changed, offset, value)
    struct.pack_into("<Q", changed, 4, xxhash.xxh3_64_intdigest(bytes(changed[12:])))
    return bytes(changed)


def reason_of(frame: bytes, limits: FrameLimits | None = None) -> str:
    with pytest.raises(ProtocolError) as caught:
        FrameReader(limits or FrameLimits(packs=True)).feed(frame)
    return caught.value.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_a_pack_round_trips_bit_for_bit_in_catalogue_order(dtype: torch.dtype) -> None:
    shapes = {TensorKey(5, B): (3, 2), TensorKey(5, A): (2, 7), TensorKey(1, A): (), TensorKey(2, A): (0, 4)}
    tensors = {key: (random(*shape, seed=n) * 9).to(dtype) for n, (key, shape) in enumerate(shapes.items())}
    (message,) = sent(tensors)
    (pack,) = received([message])
    assert isinstance(pack, ReceivedPack)
    assert (pack.address.job_id, pack.address.epoch, pack.address.version) == (ADDRESS.job_id, 3, 7)
    assert pack.address.microbatch == 2
    assert pack.wire_bytes == len(message)
    assert pack.contents.packed.keys == (TensorKey(1, A), TensorKey(2, A), TensorKey(5, A), TensorKey(5, B))
    back = dict(tensors_from_wire(pack, torch.float32))
    for key, tensor in tensors.items():
        assert back[key].dtype == dtype
        assert back[key].shape == tensor.shape
        assert torch.equal(back[key], tensor)
    in_order = [tensors[key].reshape(-1) for key in pack.contents.packed.keys]
    assert torch.equal(vector_from_wire(pack), torch.cat(in_order))


def test_tensors_of_views_and_of_several_dtypes_are_packed_by_dtype() -> None:
    stacked = random(2, 3, 4)
    tensors = {
        TensorKey(0, A): stacked[1].T,
        TensorKey(1, TensorKind.INPUT): torch.arange(5, dtype=torch.int32).reshape(5, 1),
        TensorKey(2, A): stacked[0],
        TensorKey(3, A): stacked[0, :2],
    }
    items = received(sent(tensors))
    assert [type(item) for item in items] == [ReceivedTensor, ReceivedTensor, ReceivedPack]
    assert isinstance(items[0], ReceivedTensor)
    assert torch.equal(from_wire(items[0]), stacked[1].T)
    assert isinstance(items[2], ReceivedPack)
    assert torch.equal(dict(tensors_from_wire(items[2], torch.float32))[TensorKey(3, A)], stacked[0, :2])


def test_what_fills_more_than_a_frame_goes_in_several_and_a_large_tensor_alone() -> None:
    quarter = MAX_PAYLOAD_BYTES // 16
    tensors = {TensorKey(site, A): random(quarter, seed=site) for site in range(6)}
    tensors[TensorKey(6, A)] = random(5 * quarter)
    items = received(sent(tensors))
    assert [type(item) for item in items] == [ReceivedPack, ReceivedPack, ReceivedTensor]
    assert all(len(message) <= HEADER_BYTES + MAX_PAYLOAD_BYTES for message in sent(tensors))


def test_large_tensors_are_packed_without_a_copy_of_their_own() -> None:
    tensors = {TensorKey(site, A): random(200, 400, seed=site).T.bfloat16() for site in range(3)}
    (pack,) = received(sent(tensors))
    assert isinstance(pack, ReceivedPack)
    for key, tensor in tensors_from_wire(pack, torch.float32):
        assert torch.equal(tensor, tensors[key])


def test_int8_blocks_of_odd_sizes_are_packed_too() -> None:
    tensors = {TensorKey(site, A): random(site + 1, 33, seed=site) for site in range(4)}
    compressed: dict[TensorKey, Compressed] = {key: quantized(tensor) for key, tensor in tensors.items()}
    (pack,) = received(sent(compressed))
    assert isinstance(pack, ReceivedPack)
    assert pack.dtype is DType.INT8_BLOCKS
    for key, tensor in tensors_from_wire(pack, torch.float64):
        blocks = compressed[key]
        assert isinstance(blocks, Int8Blocks)
        assert torch.equal(tensor, dequantized(blocks, torch.float64))


def test_equal_indexes_are_checked_once() -> None:
    messages = [
        message
        for seed in range(2)
        for message in sent({TensorKey(site, A): random(3, seed=seed) for site in (0, 1)})
    ]
    first, second = received(messages)
    assert isinstance(first, ReceivedPack)
    assert isinstance(second, ReceivedPack)
    assert first.contents is second.contents
    assert torch.equal(vector_from_wire(second), random(3, seed=1).repeat(2))


@pytest.mark.parametrize(
    ("offset", "form", "value", "reason"),
    [
        (14, "<B", 0, "PACK_INVALID"),
        (14, "<B", DType.FLOAT64, "PACK_INVALID"),
        (15, "<B", 1, "PACK_INVALID"),
        (18, "<H", 9, "PACK_INVALID"),
        (20, "<H", int(B), "PACK_INVALID"),
        (22, "<H", 0, "PACK_INVALID"),
        (22, "<H", 1, "PACK_INVALID"),
        (22, "<H", 3, "PACK_INVALID"),
        (22, "<H", 65_535, "PACK_INVALID"),
        (56, "<I", 1, "FRAME_FIELDS"),
        (72, "<Q", 2**40, "PACK_INVALID"),
        (80, "<Q", 4, "PACK_INVALID"),
        (HEADER_BYTES + 2, "<H", 99, "PACK_INVALID"),
        (HEADER_BYTES + 6, "<H", 5, "PACK_INVALID"),
        (HEADER_BYTES + 6, "<H", 0, "PACK_INVALID"),
        (HEADER_BYTES + 8, "<I", 2**32 - 1, "PACK_INVALID"),
        (HEADER_BYTES + 12, "<I", 1, "PACK_INVALID"),
        (HEADER_BYTES + ENTRY_BYTES + 8, "<I", 4, "PACK_INVALID"),
    ],
)
def test_a_pack_that_contradicts_itself_is_refused(offset: int, form: str, value: int, reason: str) -> None:
    (message,) = sent({TensorKey(site, A): random(3) for site in (0, 1)})
    assert reason_of(resigned(message, offset, form, value)) == reason


def test_packs_are_refused_where_none_travel_and_before_a_peer_has_said_who_it_is() -> None:
    (message,) = sent({TensorKey(site, A): random(3) for site in (0, 1)})
    assert reason_of(message, FrameLimits()) == "PACK_UNEXPECTED"
    assert reason_of(message, FrameLimits(packs=True, max_tensor_bytes=10)) == "TENSOR_TOO_LARGE"


def test_a_pack_behind_a_control_message_of_any_length_is_read() -> None:
    tensors = {TensorKey(site, A): random(3, seed=site).double() for site in (0, 1)}
    for length in range(9):
        message = b"".join((*control_frame(bytes(length)), *sent(tensors)))
        _, pack = FrameReader(FrameLimits(packs=True)).feed(message)
        assert isinstance(pack, ReceivedPack)
        assert torch.equal(vector_from_wire(pack), torch.cat([*tensors.values()]))
