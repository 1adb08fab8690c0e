"""What a step's tensors and messages take on the streams, told before they exist. Torch-free.

The same arithmetic as the sending ends': a test runs jobs and compares (tests/runtime/test_estimates.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from cola_runtime import update_chain
from cola_runtime.proto import control_pb2
from cola_runtime.transport.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES, tensor_wire_bytes
from cola_runtime.transport.packs import ENTRY_BYTES, MAX_PACKED_TENSORS

_JOB_ID = "job-" + "0" * 32


def taps_wire_bytes(groups: Sequence[Sequence[int]]) -> int:
    """Of a microbatch's taps, given the bytes of each input group's tensors, in catalogue order.

    They leave from the last group on, a frame's worth of neighbours at a time (base_model/gathered_taps.py).
    """
    total, waiting = 0, list[int]()
    for group in reversed(groups):
        if sum(waiting) + sum(group) > MAX_PAYLOAD_BYTES:
            total, waiting = total + _parcels_wire_bytes(waiting), []
        waiting = [*group, *waiting]
    return total + _parcels_wire_bytes(waiting)


def _parcels_wire_bytes(sizes: Sequence[int]) -> int:
    """Of tensors of one dtype that leave together: as many packs as it takes, a lone tensor as it is."""
    parcels: list[list[int]] = []
    for size in sizes:
        last = parcels[-1] if parcels else []
        room = MAX_PAYLOAD_BYTES - sum(last) - (len(last) + 1) * ENTRY_BYTES
        if last and size <= room and len(last) < MAX_PACKED_TENSORS:
            last.append(size)
        else:
            parcels.append([size])
    return sum(
        tensor_wire_bytes(parcel[0])
        if len(parcel) == 1
        else HEADER_BYTES + len(parcel) * ENTRY_BYTES + sum(parcel)
        for parcel in parcels
    )


def weights_wire_bytes(sizes: Sequence[int]) -> int:
    """Of a version's weights from one device, which are one tensor, given the bytes of each."""
    return tensor_wire_bytes(sum(sizes))


def microbatch_end_bytes(device_id: str, *, version: int, microbatch: int, tensors: int, apply: bool) -> int:
    end = control_pb2.MicrobatchEnd(
        lease=_lease(device_id), version=version, microbatch=microbatch, tensors=tensors, apply=apply
    )
    return HEADER_BYTES + control_pb2.GradientControl(microbatch_end=end).ByteSize()


def update_end_bytes(device_id: str, *, version: int) -> int:
    """Of a step that has a rate, a norm and took its time."""
    end = control_pb2.UpdateEnd(
        lease=_lease(device_id),
        version=version,
        learning_rate=1.0,
        gradient_norm=1.0,
        device_seconds=1.0,
        chain=update_chain.START,
    )
    return HEADER_BYTES + control_pb2.GradientControl(update_end=end).ByteSize()


def _lease(device_id: str) -> control_pb2.LeaseRef:
    return control_pb2.LeaseRef(job_id=_JOB_ID, epoch=1, device_id=device_id)
