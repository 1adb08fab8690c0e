"""Which checkpoints there are, are kept for good, are to be checked: the store's door to checkpoints."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection

from cola_runtime.jobs import pins, progress, quarantine_rows, spot_check_rows
from cola_runtime.jobs.job_writes import JobWrites
from cola_runtime.jobs.records import CheckpointRecord
from cola_runtime.jobs.spot_check_rows import PendingCheck


class CheckpointBook:
    """Every method one transaction."""

    def __init__(self, writes: JobWrites) -> None:
        self._writes = writes

    async def record(self, checkpoint: CheckpointRecord, *, check: PendingCheck | None = None) -> None:
        """Make a checkpoint visible whose object is stored and whose last step is recorded.

        With it, that the steps up to it are to be checked, if so.
        """

        def insert(connection: Connection) -> None:
            progress.insert_checkpoint(connection, checkpoint, at=self._writes.at())
            if check is not None:
                spot_check_rows.keep_check(connection, check)

        await self._writes.run("checkpoint", checkpoint.job_id, insert)

    async def pending_checks(self) -> list[PendingCheck]:
        """Spot checks that are to be made."""
        return await self._writes.database.run(spot_check_rows.read_checks)

    async def forget_check(self, check: PendingCheck) -> None:
        """It has been made, or cannot be."""
        await self._writes.database.run(lambda c: spot_check_rows.forget_check(c, check))

    async def pin(self, job_id: str, version: int | None) -> CheckpointRecord:
        """It is kept for good; None is the newest. A second time changes nothing.

        Raises NotFound `CHECKPOINT_UNKNOWN`, Conflict `ADAPTER_NOT_READY`, QuotaExceeded `QUOTA_PINNED`.
        """
        return await self._writes.run(
            "event", job_id, lambda c: pins.pin_checkpoint(c, job_id, version, at=self._writes.at())
        )

    async def unpin(self, job_id: str, version: int) -> CheckpointRecord:
        """It goes as retention says. Raises NotFound `CHECKPOINT_UNKNOWN`, Conflict `ADAPTER_NOT_READY`."""
        return await self._writes.run(
            "event", job_id, lambda c: pins.unpin_checkpoint(c, job_id, version, at=self._writes.at())
        )

    async def mark_checked(self, job_id: str, version: int) -> None:
        """A spot check found that the checkpoint follows from the one before."""
        await self._writes.database.run(
            lambda c: quarantine_rows.mark_checked(c, job_id, version, at=self._writes.at())
        )

    async def retire(self, job_id: str, versions: Collection[int]) -> None:
        """They leave the record; their objects are to be deleted after that."""
        await self._writes.run(
            "retirement",
            job_id,
            lambda c: progress.delete_checkpoints(c, job_id, versions, at=self._writes.at()),
        )

    async def storage_keys(self) -> set[str]:
        """Every object that a job or a checkpoint names."""
        return await self._writes.database.run(progress.read_storage_keys)

    async def of(self, job_id: str) -> list[CheckpointRecord]:
        return await self._writes.database.run(lambda c: progress.read_checkpoints(c, job_id))

    async def latest(self, job_id: str) -> CheckpointRecord | None:
        return await self._writes.database.run(lambda c: progress.newest_checkpoint(c, job_id))
