"""A shard's norms count for the step that they are of, one for each of its tensors."""

from __future__ import annotations

import pytest

from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.base_model.shard_inbox import ShardInbox
from cola_runtime.errors import ProtocolError
from cola_runtime.proto import control_pb2
from tests.device.adapter_samples import kinds_spec


@pytest.mark.parametrize(("version", "missing"), [(1, 0), (0, 1)], ids=["another version", "one too few"])
def test_norms_of_another_step_or_number_are_refused(version: int, missing: int) -> None:
    spec = kinds_spec()
    inbox = ShardInbox(spec)
    inbox.version = 0
    norms = [1.0] * len(weight_shapes(spec))
    inbox.take_norms(control_pb2.ShardNorms(version=0, norms=norms))
    with pytest.raises(ProtocolError) as caught:
        inbox.take_norms(control_pb2.ShardNorms(version=version, norms=norms[missing:]))
    assert caught.value.reason == "NORMS_INVALID"
    assert len(inbox.norms) == len(norms)
