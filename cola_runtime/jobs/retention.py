"""Which checkpoints of a job need not be kept. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cola_runtime.config import RetentionSettings
from cola_runtime.jobs.records import CheckpointRecord


def superfluous(
    checkpoints: Sequence[CheckpointRecord], *, keep: Collection[int], settings: RetentionSettings
) -> list[CheckpointRecord]:
    """Those, oldest first, that neither the last ones nor `keep` (versions: the best one, pinned ones) hold.

    Beyond `max_bytes_per_job` of the last ones the older go, too; but never the newest, from which the job
    goes on, and never one of `keep`.
    """
    newest_first = sorted(checkpoints, key=lambda each: each.version, reverse=True)
    spared = sum(each.bytes for each in newest_first if each.version in keep)
    gone: list[CheckpointRecord] = []
    for place, each in enumerate(newest_first):
        if each.version in keep:
            continue
        spared += each.bytes
        too_many = settings.keep_last is not None and place >= settings.keep_last
        too_large = settings.max_bytes_per_job is not None and spared > settings.max_bytes_per_job
        if place > 0 and (too_many or too_large):
            gone.append(each)
            spared -= each.bytes
    return gone[::-1]
