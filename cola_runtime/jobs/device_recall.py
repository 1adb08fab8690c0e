"""What the job store last said of devices: so they come back while its database is away.

A device comes back with the identity and trust class that it had. Only this coordinator changes what is
remembered here, so one that it revoked or put out stays out, even if the database has yet to hear of that.
One of which the store has not spoken is refused with the outage.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, TypeVar

from cola_runtime import clock, ids
from cola_runtime.errors import Unavailable
from cola_runtime.jobs.device_rows import DeviceRecord, TokenRecord, check_admitted, wrong_token
from cola_runtime.jobs.quarantine_rows import Quarantine, check_not_quarantined
from cola_runtime.jobs.recall import Newest, Reads

if TYPE_CHECKING:
    from cola_runtime.jobs.registry import DeviceRegistry

MOST_DEVICES = 10_000

Known = TypeVar("Known")


class DeviceMemory:
    """Belongs to the event loop. Everything by the device's id."""

    def __init__(self, now: clock.Clock) -> None:
        self._now = now
        self._devices = Newest[DeviceRecord](MOST_DEVICES)
        self._tokens = Newest[tuple[str, TokenRecord]](MOST_DEVICES)  # with the digest of what was shown
        self._quarantines = Newest[Quarantine | None](MOST_DEVICES)

    def note_device(self, found: DeviceRecord) -> DeviceRecord:
        self._devices.note(found.device_id, found)
        return found

    def note_token(self, token: str, device_id: str, found: TokenRecord) -> None:
        """The device was let in with this join token."""
        self._tokens.note(device_id, (ids.api_key_digest(token), found))

    def note_quarantine(self, device_id: str, found: Quarantine | None) -> None:
        self._quarantines.note(device_id, found)

    def forget(self, device_id: str) -> None:
        """Whose it is, or with what it came."""
        self._devices.values.pop(device_id, None)
        self._tokens.values.pop(device_id, None)

    def admitted(self, device_id: str, key_sha256: str) -> DeviceRecord | None:
        """None: nothing is known of it. Raises as the registry's."""
        found = self._devices.values.get(device_id)
        return None if found is None else check_admitted(found, key_sha256, at=clock.rfc3339(self._now()))

    def trust_by_token(self, token: str, device_id: str) -> TokenRecord | None:
        """None: the device never came with this token. Raises as the registry's."""
        digest, found = self._tokens.values.get(device_id, ("", None))
        if found is None or not hmac.compare_digest(digest, ids.api_key_digest(token)):
            return None
        if found.expires_at <= clock.rfc3339(self._now()):
            raise wrong_token()
        return found

    def checked_not_quarantined(self, device_id: str) -> bool:
        """False: nobody has asked of it. Raises as the registry's."""
        if device_id not in self._quarantines.values:
            return False
        check_not_quarantined(self._quarantines.values[device_id])
        return True


class DeviceRecall:
    """The registry's questions of who is let in, and what it said last while its database is away."""

    def __init__(self, registry: DeviceRegistry) -> None:
        self._registry, self._memory = registry, registry.memory
        self._reads = Reads()

    async def admitted(self, device_id: str, key_sha256: str) -> DeviceRecord:
        """As the registry's. Raises Unavailable for a device of which nothing is known."""
        return await self._reads.ask(
            lambda: self._registry.admitted(device_id, key_sha256),
            lambda outage: _known(self._memory.admitted(device_id, key_sha256), outage),
        )

    async def trust_by_token(self, token: str, device_id: str) -> TokenRecord:
        """As `admitted`, of a device without certificate."""
        return await self._reads.ask(
            lambda: self._registry.trust_by_token(token, device_id),
            lambda outage: _known(self._memory.trust_by_token(token, device_id), outage),
        )

    async def check_not_quarantined(self, device_id: str) -> None:
        """As `admitted`."""

        def recalled(outage: Unavailable) -> None:
            if not self._memory.checked_not_quarantined(device_id):
                raise outage

        await self._reads.ask(lambda: self._registry.check_not_quarantined(device_id), recalled)


def _known(found: Known | None, outage: Unavailable) -> Known:
    if found is None:
        raise outage
    return found
