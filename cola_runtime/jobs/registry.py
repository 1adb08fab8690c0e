"""Which devices may join and which have: the store's door to join tokens and registered devices."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import Connection

from cola_runtime import clock, ids
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs import device_rows, quarantine_rows
from cola_runtime.jobs.database import Database
from cola_runtime.jobs.device_recall import DeviceMemory
from cola_runtime.jobs.device_rows import DeviceRecord, TokenRecord
from cola_runtime.jobs.quarantine_rows import Quarantine


class DeviceRegistry:
    """Every method one transaction. `memory` hears what it says of devices."""

    def __init__(self, database: Database, now: clock.Clock) -> None:
        self._database, self._now = database, now
        self.memory = DeviceMemory(now)

    async def create_token(
        self, trust_class: TrustClass, *, reusable: bool, valid: timedelta, created_by: str
    ) -> tuple[str, TokenRecord]:
        """A new join token, in the clear for the only time."""
        now = self._now()
        record = TokenRecord(
            token_id=ids.new_token_id(),
            trust_class=trust_class,
            reusable=reusable,
            created_by=created_by,
            created_at=clock.rfc3339(now),
            expires_at=clock.rfc3339(now + valid),
        )
        return await self._database.run(lambda c: device_rows.insert_token(c, record)), record

    async def trust_by_token(self, token: str, device_id: str) -> TokenRecord:
        """Of a device without certificate, which shows its token each time. Raises Unauthenticated."""
        at = clock.rfc3339(self._now())
        found = await self._database.run(
            lambda c: device_rows.use_token(c, token, device_id, at=at, again=True)
        )
        self.memory.note_token(token, device_id, found)
        return found

    async def join(self, token: str, device_id: str, key_sha256: str, *, until: datetime) -> DeviceRecord:
        """Register the device, using up the token. Raises Unauthenticated, Conflict `DEVICE_ID_TAKEN`."""
        at, expires_at = clock.rfc3339(self._now()), clock.rfc3339(until)

        def register(connection: Connection) -> DeviceRecord:
            used = device_rows.use_token(connection, token, device_id, at=at)
            device = DeviceRecord(
                device_id=device_id,
                trust_class=used.trust_class,
                key_sha256=key_sha256,
                joined_by=used.created_by,
                joined_at=at,
                expires_at=expires_at,
                revoked_at=None,
            )
            return device_rows.insert_device(connection, device)

        return self.memory.note_device(await self._database.run(register))

    async def register_own(self, device_id: str, key_sha256: str, *, until: datetime) -> None:
        """A device that the service starts itself, under a name that was perhaps another one's before."""
        device = DeviceRecord(
            device_id=device_id,
            trust_class=TrustClass.TRUSTED,
            key_sha256=key_sha256,
            joined_by=device_rows.COORDINATOR,
            joined_at=clock.rfc3339(self._now()),
            expires_at=clock.rfc3339(until),
            revoked_at=None,
        )
        self.memory.note_device(await self._database.run(lambda c: device_rows.insert_device(c, device)))

    async def renew(self, device_id: str, key_sha256: str, *, until: datetime) -> DeviceRecord:
        """A later end for a device that is still let in. Raises Unauthenticated."""
        at = clock.rfc3339(self._now())

        def extend(connection: Connection) -> DeviceRecord:
            device_rows.admitted_device(connection, device_id, key_sha256, at=at)
            device_rows.renew_device(connection, device_id, expires_at=clock.rfc3339(until))
            return device_rows.admitted_device(connection, device_id, key_sha256, at=at)

        return self.memory.note_device(await self._database.run(extend))

    async def admitted(self, device_id: str, key_sha256: str) -> DeviceRecord:
        """Raises Unauthenticated `DEVICE_UNKNOWN`, `DEVICE_REVOKED`."""
        at = clock.rfc3339(self._now())
        return self.memory.note_device(
            await self._database.run(lambda c: device_rows.admitted_device(c, device_id, key_sha256, at=at))
        )

    async def revoke(self, device_id: str) -> DeviceRecord:
        """Raises NotFound `DEVICE_NOT_REGISTERED`."""
        at = clock.rfc3339(self._now())
        self.memory.forget(device_id)  # whatever comes of the rest
        return self.memory.note_device(
            await self._database.run(lambda c: device_rows.mark_device_revoked(c, device_id, at=at))
        )

    async def quarantine(self, device_id: str, reason: str, message: str) -> tuple[bool, list[str]]:
        """The device is let in no more: whether that is new, and the jobs from which checkpoints have gone.

        See `quarantine_rows.distrust_device`.
        """
        at = clock.rfc3339(self._now())
        new = Quarantine(device_id=device_id, reason=reason, message=message, quarantined_at=at)

        def put_out(connection: Connection) -> tuple[bool, list[str]]:
            first = quarantine_rows.insert_quarantine(connection, new)
            return first, quarantine_rows.distrust_device(connection, device_id, at=at)

        self.memory.note_quarantine(device_id, new)  # it is not let in while this waits for the database
        outcome = await self._database.run(put_out)
        self.memory.note_quarantine(device_id, new)  # who asked in between found none
        return outcome

    async def quarantines(self) -> list[Quarantine]:
        return await self._database.run(quarantine_rows.read_quarantines)

    async def reinstate(self, device_id: str) -> Quarantine:
        """It is let in again. Raises NotFound `DEVICE_NOT_QUARANTINED`."""
        ended = await self._database.run(lambda c: quarantine_rows.end_quarantine(c, device_id))
        self.memory.note_quarantine(device_id, None)
        return ended

    async def check_not_quarantined(self, device_id: str) -> None:
        """Raises Unauthenticated `DEVICE_QUARANTINED`."""
        found = await self._database.run(lambda c: quarantine_rows.find_quarantine(c, device_id))
        self.memory.note_quarantine(device_id, found)
        quarantine_rows.check_not_quarantined(found)

    async def devices(self) -> list[DeviceRecord]:
        return await self._database.run(device_rows.read_devices)
