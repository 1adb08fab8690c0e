"""What describes the bytes wrongly is refused before a tensor is looked at."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from cola_runtime.adapters.tensor_views import read_tensors, write_tensors

WEIGHTS, STEPS = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((), np.float64)


def written(**changes: dict[str, Any]) -> bytes:
    """Two tensors, `a` and `b`, with other entries in the header."""
    data = write_tensors({"a": WEIGHTS, "b": STEPS}, {"told": "yes"})
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    for name, fields in changes.items():
        header[name] |= fields
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + size :]


def test_tensors_and_metadata_are_read_back() -> None:
    metadata, tensors = read_tensors(written())
    assert metadata == {"told": "yes"}
    assert list(tensors) == ["a", "b"]
    assert np.array_equal(tensors["a"], WEIGHTS)
    assert tensors["b"].shape == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"b": {"data_offsets": [16, 24]}},  # where `a` is, too
        {"b": {"data_offsets": [32, 40]}},
        {"b": {"data_offsets": [24, 40]}},
        {"a": {"data_offsets": [-24, 0]}},
        {"a": {"data_offsets": [0]}},
        {"a": {"shape": [6, 3]}},
        {"a": {"shape": [-2, -3]}},
        {"a": {"shape": ["2", 3]}},
        {"a": {"shape": None}},
        {"a": {"dtype": "F64"}},
        {"a": {"dtype": "I32"}},
    ],
)
def test_a_header_that_does_not_fit_the_bytes_is_refused(changes: dict[str, dict[str, Any]]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_tensors(written(**changes))


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: data[:20]])
def test_bytes_that_are_too_few_or_too_many_are_refused(spoil: Any) -> None:
    with pytest.raises((ValueError, struct.error)):
        read_tensors(spoil(written()))


def test_a_header_larger_than_its_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="a header of"):
        read_tensors(struct.pack("<Q", 1 << 40) + b"{}")
