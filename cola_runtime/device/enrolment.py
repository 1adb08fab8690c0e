"""A device's certificate: got with a join token once, kept in a folder, renewed with the device's own key."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cola_runtime.device.config import DeviceConfig
from cola_runtime.errors import ColaError, InvalidInput
from cola_runtime.proto import operators_pb2
from cola_runtime.transport.certificates import (
    Identity,
    certificate_request,
    new_key,
    read_certificate,
    write_private,
)
from cola_runtime.transport.enrolment import join_device
from cola_runtime.transport.tls import device_credentials, server_authority

if TYPE_CHECKING:
    import grpc

RENEW_BEFORE = timedelta(days=10)
RENEW_SHARE = 3  # or the last third of the certificate's life, if that is shorter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """Where the coordinator takes this device's stream, and what it shows there."""

    endpoint: str
    credentials: grpc.ChannelCredentials | None


class Enrolment:
    """Of one device that joins over TLS. Without a folder it is forgotten when the process ends."""

    def __init__(self, config: DeviceConfig, *, ca: Path | None, folder: Path | None) -> None:
        self._config, self._ca, self._folder = config, ca, folder
        self._identity, self._endpoint = _read(folder)
        self._joined_at = datetime.now(UTC)
        if self._identity is not None and _name(self._identity) != config.device_id:
            raise InvalidInput(
                "DEVICE_ID_MISMATCH",
                f"the folder holds the certificate of {_name(self._identity)!r}",
                where=str(folder),
                remedy=f"Start the device with --id {_name(self._identity)}, or give another folder.",
            )

    async def dial(self) -> Dial:
        """Joins or renews if that is due. Raises what the service refused it with, or Unavailable."""
        if self._identity is None:
            await self._join(new_key(), self._config.join_token)
        elif self._due(self._identity):
            try:
                await self._join(self._identity.key_pem, "")
            except ColaError as error:  # the present one may do for some time
                logger.warning("certificate not renewed: %s", error, extra={"event": "device.not_renewed"})
        assert self._identity is not None
        return Dial(endpoint=self._endpoint, credentials=device_credentials(self._identity))

    def _due(self, identity: Identity) -> bool:
        left = read_certificate(identity.certificate_pem).expires_at - datetime.now(UTC)
        lived = datetime.now(UTC) - self._joined_at
        return left < min(RENEW_BEFORE, (left + lived) / RENEW_SHARE)

    async def _join(self, key_pem: bytes, join_token: str) -> None:
        request = operators_pb2.JoinDeviceRequest(
            join_token=join_token,
            device_id=self._config.device_id,
            certificate_request=certificate_request(key_pem),
        )
        credentials = server_authority(self._ca)
        answer = await join_device(self._config.coordinator_endpoint, request, credentials=credentials)
        self._identity = Identity(
            certificate_pem=answer.certificate, key_pem=key_pem, authority_pem=answer.authority
        )
        self._endpoint, self._joined_at = answer.device_endpoint, datetime.now(UTC)
        if self._folder is not None:
            _write(self._folder, self._identity, self._endpoint)
        logger.info("certificate until %s", answer.expires_at, extra={"event": "device.certified"})


def _name(identity: Identity) -> str:
    return read_certificate(identity.certificate_pem).name


def _read(folder: Path | None) -> tuple[Identity | None, str]:
    """What an earlier run has left; the endpoint is written last."""
    if folder is None or not (folder / "endpoint").exists():
        return None, ""
    identity = Identity(
        certificate_pem=(folder / "device.pem").read_bytes(),
        key_pem=(folder / "device.key").read_bytes(),
        authority_pem=(folder / "authority.pem").read_bytes(),
    )
    return identity, (folder / "endpoint").read_text(encoding="utf-8")


def _write(folder: Path, identity: Identity, endpoint: str) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(folder / "device.key", identity.key_pem)
    write_private(folder / "device.pem", identity.certificate_pem)
    write_private(folder / "authority.pem", identity.authority_pem)
    write_private(folder / "endpoint", endpoint.encode())
