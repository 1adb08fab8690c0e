"""Which of a job's checkpoints is exported, and as what files."""

from __future__ import annotations

from collections.abc import Sequence

from cola_runtime.adapters.adapter_files import adapter_folder
from cola_runtime.adapters.checkpoint_format import checkpoint_weights
from cola_runtime.errors import Conflict, NotFound
from cola_runtime.jobs.records import CheckpointRecord, JobRecord
from cola_runtime.scheduler.checkpoints import read_checkpoint
from cola_runtime.spec import JobSpec
from cola_runtime.storage.objects import ObjectStorage


def pick_checkpoint(
    checkpoints: Sequence[CheckpointRecord], job: JobRecord, version: int | None
) -> CheckpointRecord:
    """That of `version`; None is the newest.

    Raises Conflict `ADAPTER_NOT_READY`, NotFound `CHECKPOINT_UNKNOWN`.
    """
    if not checkpoints:
        raise Conflict(
            "ADAPTER_NOT_READY",
            f"job {job.name} has no checkpoint yet (it is {job.state})",
            remedy="Wait for its first checkpoint: `cola jobs logs --follow`.",
        )
    if version is None:
        return checkpoints[-1]
    for checkpoint in checkpoints:
        if checkpoint.version == version:
            return checkpoint
    raise NotFound(
        "CHECKPOINT_UNKNOWN",
        f"job {job.name} has no checkpoint of version {version}",
        remedy=f"It has: {', '.join(str(each.version) for each in checkpoints)}.",
    )


def adapter_files(storage: ObjectStorage, checkpoint: CheckpointRecord, job: JobRecord) -> dict[str, bytes]:
    """File name -> content of the folder with the checkpoint's adapter. Blocks."""
    spec, _version, weights = checkpoint_weights(read_checkpoint(storage, checkpoint))
    task = JobSpec.model_validate_json(job.spec_json).task.kind
    return adapter_folder(spec, weights, job.base_model, task=task)


def no_best(job: JobRecord) -> NotFound:
    """`BEST_UNKNOWN`: what to raise where the best version of a job without evaluations is asked for."""
    return NotFound(
        "BEST_UNKNOWN",
        f"job {job.name} has no evaluation, so none of its versions is the best",
        remedy="Submit with held-out rows, or export by version: `cola jobs checkpoints`.",
    )
