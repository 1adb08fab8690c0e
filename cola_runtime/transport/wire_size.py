"""What a step's tensors and messages take on the streams, told before they exist. Torch-free.

The same arithmetic as the sending ends': a test runs jobs and compares (tests/runtime/test_estimates.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from cola_runtime.proto import control_pb2
from cola_runtime.transport.frames import HEADER_BYTES, tensor_wire_bytes

_JOB_ID = "job-" + "0" * 32


def taps_wire_bytes(groups: Sequence[Sequence[int]]) -> int:
    """Of a microbatch's taps, given the bytes of each input group's tensors, in catalogue order."""
    return sum(tensor_wire_bytes(size) for group in groups for size in group)


def weights_wire_bytes(sizes: Sequence[int]) -> int:
    """Of a version's weights from one device, given the bytes of each."""
    return sum(map(tensor_wire_bytes, sizes))


def microbatch_end_bytes(device_id: str, *, version: int, microbatch: int, tensors: int, apply: bool) -> int:
    end = control_pb2.MicrobatchEnd(
        lease=_lease(device_id), version=version, microbatch=microbatch, tensors=tensors, apply=apply
    )
    return HEADER_BYTES + control_pb2.GradientControl(microbatch_end=end).ByteSize()


def update_end_bytes(device_id: str, *, version: int, tensors: int) -> int:
    """Of a step that has a rate, a norm and took its time."""
    end = control_pb2.UpdateEnd(
        lease=_lease(device_id),
        version=version,
        tensors=tensors,
        learning_rate=1.0,
        gradient_norm=1.0,
        device_seconds=1.0,
    )
    return HEADER_BYTES + control_pb2.GradientControl(update_end=end).ByteSize()


def _lease(device_id: str) -> control_pb2.LeaseRef:
    return control_pb2.LeaseRef(job_id=_JOB_ID, epoch=1, device_id=device_id)
