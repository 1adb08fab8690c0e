"""Who is let in as a device, and with which trust class. Nothing that a device says of itself counts here."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cola_runtime.errors import Unauthenticated
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs.device_recall import DeviceRecall
from cola_runtime.jobs.registry import DeviceRegistry
from cola_runtime.transport.certificates import read_certificate
from cola_runtime.transport.handshake import gradient_ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    trust: TrustClass
    until: datetime | None = None  # end of the certificate, or of the token, that it has shown


class DeviceGate:
    """Knows devices by certificate, or where there are none, on loopback, by join token.

    While the job store is away, as it was when it last spoke of them (`DeviceRecall`).
    """

    def __init__(self, registry: DeviceRegistry, *, join_token: str) -> None:
        self._devices = DeviceRecall(registry)
        self._join_token = join_token

    async def admit(self, hello: Any, certificate: bytes | None) -> Admission:
        """What the device may do, and until when.

        Raises Unauthenticated: `DEVICE_ID_MISMATCH`, `DEVICE_UNKNOWN`, `DEVICE_REVOKED`, `JOIN_TOKEN_WRONG`,
        `DEVICE_QUARANTINED`. Unavailable while the job store is away: it never spoke of this device.
        """
        admission = await self._identify(hello, certificate)
        await self._devices.check_not_quarantined(hello.device_id)
        return admission

    async def _identify(self, hello: Any, certificate: bytes | None) -> Admission:
        if certificate is None:
            if hmac.compare_digest(hello.join_token.encode(), self._join_token.encode()):
                return Admission(trust=TrustClass.TRUSTED)
            token = await self._devices.trust_by_token(hello.join_token, hello.device_id)
            return Admission(trust=token.trust_class, until=datetime.fromisoformat(token.expires_at))
        shown = read_certificate(certificate)
        if shown.name != hello.device_id:
            raise Unauthenticated(
                "DEVICE_ID_MISMATCH",
                f"the certificate is of {shown.name!r}, and the device says it is {hello.device_id!r}",
                remedy="Start the device with the id that it joined under.",
            )
        device = await self._devices.admitted(shown.name, shown.key_sha256)
        return Admission(trust=device.trust_class, until=shown.expires_at)

    def ticket(self, device_id: str) -> str:
        """With which the device introduces itself to the base model."""
        return gradient_ticket(self._join_token, device_id)
