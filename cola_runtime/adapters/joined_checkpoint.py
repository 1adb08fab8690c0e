"""The checkpoints of all shards of an adapter as the one that a single device would have made. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.checkpoint_format import CheckpointContent, decode_checkpoint, encode_checkpoint
from cola_runtime.adapters.shards import shard_specs
from cola_runtime.errors import InvalidInput


def join_checkpoints(spec: AdapterSpec, shards: Sequence[bytes]) -> bytes:
    """The checkpoint of the whole adapter `spec`, from those of its shards in order.

    Raises InvalidInput `CHECKPOINT_INVALID` for what is no checkpoint, or not of this adapter's shards, or of
    several versions.
    """
    contents = [decode_checkpoint(data) for data in shards]
    first = contents[0]
    expected = [replace(first.definition, spec=of_shard) for of_shard in shard_specs(spec, len(contents))]
    found = [content.definition for content in contents]
    if found != expected or len({content.version for content in contents}) > 1:
        raise InvalidInput(
            "CHECKPOINT_INVALID",
            f"the checkpoints of {len(contents)} shards do not belong together",
            remedy="Use an older checkpoint.",
        )
    whole = CheckpointContent.of(
        replace(first.definition, spec=spec),
        first.version,
        {key: weight for content in contents for key, weight in content.weights.items()},
        {key: state for content in contents for key, state in content.optimizer_state.items()},
    )
    return encode_checkpoint(whole)
