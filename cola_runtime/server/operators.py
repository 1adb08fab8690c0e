"""What operators do with devices and the audit trail, and how a device gets its certificate."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cola_runtime.errors import Conflict, InvalidInput
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs.device_rows import DeviceRecord, TokenRecord
from cola_runtime.jobs.quarantine_rows import Quarantine
from cola_runtime.jobs.store import JobStore
from cola_runtime.server.limits import Limits
from cola_runtime.transport.certificates import Authority, requested_key_sha256
from cola_runtime.transport.handshake import check_device_id

DAY_SECONDS = 86_400


async def _nobody(_device_id: str, _why: str) -> None:
    """Who dismisses devices where none can join."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """What a device needs to dial in."""

    device: DeviceRecord
    certificate_pem: bytes
    authority_pem: bytes
    device_endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownDevice:
    """What the store knows of a device; without TLS it is known only while it is in quarantine."""

    device_id: str
    registered: DeviceRecord | None = None
    quarantine: Quarantine | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePort:
    """Where devices with certificates dial in, and who issues them."""

    authority: Authority
    endpoint: str  # host:port as devices reach it
    certificate_days: int


class OperatorDesk:
    """Join tokens, devices, audit. Without a device port no certificates are issued."""

    def __init__(
        self,
        store: JobStore,
        limits: Limits,
        *,
        port: DevicePort | None = None,
        dismiss: Callable[[str, str], Awaitable[None]] = _nobody,
    ) -> None:
        self._store, self._limits = store, limits
        self._port, self._dismiss = port, dismiss

    async def create_token(
        self, trust_class: str, *, reusable: bool, valid_seconds: int, created_by: str
    ) -> tuple[str, TokenRecord]:
        """A join token, in the clear for the only time.

        Raises InvalidInput `TRUST_CLASS_UNKNOWN`, `TOKEN_LIFE`.
        """
        if trust_class not in tuple(TrustClass):
            raise InvalidInput(
                "TRUST_CLASS_UNKNOWN",
                f"there is no trust class {trust_class[:60]!r}",
                where="trust_class",
                remedy=f"Use one of {', '.join(TrustClass)}.",
            )
        seconds = valid_seconds or DAY_SECONDS
        if seconds > self._limits.join_token_seconds:
            raise InvalidInput(
                "TOKEN_LIFE",
                "a join token is not valid for so long",
                where="valid_seconds",
                limit=self._limits.join_token_seconds,
                actual=seconds,
            )
        return await self._store.devices.create_token(
            TrustClass(trust_class),
            reusable=reusable,
            valid=timedelta(seconds=seconds),
            created_by=created_by,
        )

    async def join(self, join_token: str, device_id: str, request_pem: bytes) -> Enrolled:
        """A certificate for a new device; without a token, another one for a device's own key.

        Raises Unauthenticated `JOIN_TOKEN_WRONG`, `DEVICE_UNKNOWN`, `DEVICE_REVOKED`; InvalidInput
        `CERTIFICATE_REQUEST_INVALID`; ProtocolError `DEVICE_ID_INVALID`; Conflict `DEVICE_ID_TAKEN`,
        `TLS_OFF`.
        """
        if self._port is None:
            raise Conflict(
                "TLS_OFF",
                "this service has no TLS, so it issues no certificates",
                remedy="Join without TLS: `cola device --coordinator HOST:PORT` on the same machine.",
            )
        check_device_id(device_id)
        key = requested_key_sha256(request_pem)
        lifetime = timedelta(days=self._port.certificate_days)
        until = datetime.now(UTC) + lifetime
        registry = self._store.devices
        if join_token:
            device = await registry.join(join_token, device_id, key, until=until)
        else:
            device = await registry.renew(device_id, key, until=until)
        return Enrolled(
            device=device,
            certificate_pem=self._port.authority.device(device_id, request_pem, lifetime=lifetime),
            authority_pem=self._port.authority.certificate_pem,
            device_endpoint=self._port.endpoint,
        )

    async def devices(self) -> list[KnownDevice]:
        """Those that hold a certificate, and those in quarantine."""
        registry = self._store.devices
        registered = {device.device_id: device for device in await registry.devices()}
        put_out = {quarantine.device_id: quarantine for quarantine in await registry.quarantines()}
        return [
            KnownDevice(device_id=name, registered=registered.get(name), quarantine=put_out.get(name))
            for name in sorted(registered.keys() | put_out.keys())
        ]

    async def revoke(self, device_id: str) -> KnownDevice:
        """It is let in no more, and what it holds goes to other devices. Raises NotFound."""
        device = await self._store.devices.revoke(device_id)
        await self._dismiss(device_id, "an operator has revoked it")
        return KnownDevice(device_id=device_id, registered=device)

    async def reinstate(self, device_id: str) -> KnownDevice:
        """It is in quarantine no more. Raises NotFound `DEVICE_NOT_QUARANTINED`."""
        await self._store.devices.reinstate(device_id)
        registered = [each for each in await self._store.devices.devices() if each.device_id == device_id]
        return KnownDevice(device_id=device_id, registered=registered[0] if registered else None)
