"""The services Operators and Enrolment over gRPC: translates messages, and nothing else."""

from __future__ import annotations

import dataclasses

from cola_runtime.jobs.store import JobStore
from cola_runtime.proto import operators_pb2
from cola_runtime.server.operators import KnownDevice, OperatorDesk
from cola_runtime.server.rpc import Call

OPERATORS = operators_pb2.DESCRIPTOR.services_by_name["Operators"]
ENROLMENT = operators_pb2.DESCRIPTOR.services_by_name["Enrolment"]


class OperatorsMethods:
    """One method per rpc of both services."""

    def __init__(self, desk: OperatorDesk, store: JobStore) -> None:
        self._desk, self._store = desk, store

    async def CreateJoinToken(
        self, request: operators_pb2.CreateJoinTokenRequest, call: Call
    ) -> operators_pb2.JoinToken:
        token, record = await self._desk.create_token(
            request.trust_class,
            reusable=request.reusable,
            valid_seconds=request.valid_seconds,
            created_by=call.key_id,
        )
        return operators_pb2.JoinToken(
            token=token,
            token_id=record.token_id,
            trust_class=record.trust_class,
            reusable=record.reusable,
            expires_at=record.expires_at,
        )

    async def ListDevices(
        self, request: operators_pb2.ListDevicesRequest, call: Call
    ) -> operators_pb2.ListDevicesResponse:
        return operators_pb2.ListDevicesResponse(devices=map(_device, await self._desk.devices()))

    async def RevokeDevice(
        self, request: operators_pb2.RevokeDeviceRequest, call: Call
    ) -> operators_pb2.RegisteredDevice:
        return _device(await self._desk.revoke(request.device_id))

    async def ReinstateDevice(
        self, request: operators_pb2.ReinstateDeviceRequest, call: Call
    ) -> operators_pb2.RegisteredDevice:
        return _device(await self._desk.reinstate(request.device_id))

    async def ListAudit(
        self, request: operators_pb2.ListAuditRequest, call: Call
    ) -> operators_pb2.ListAuditResponse:
        found = await self._store.audit.entries(after=request.after, limit=request.limit or 100)
        entries = [operators_pb2.AuditEntry(**dataclasses.asdict(entry)) for entry in found]
        return operators_pb2.ListAuditResponse(entries=entries)

    async def JoinDevice(
        self, request: operators_pb2.JoinDeviceRequest, call: Call
    ) -> operators_pb2.JoinDeviceResponse:
        enrolled = await self._desk.join(request.join_token, request.device_id, request.certificate_request)
        return operators_pb2.JoinDeviceResponse(
            certificate=enrolled.certificate_pem,
            authority=enrolled.authority_pem,
            device_endpoint=enrolled.device_endpoint,
            trust_class=enrolled.device.trust_class,
            expires_at=enrolled.device.expires_at,
        )


def _device(device: KnownDevice) -> operators_pb2.RegisteredDevice:
    message = operators_pb2.RegisteredDevice(device_id=device.device_id)
    if (registered := device.registered) is not None:
        message.trust_class, message.joined_at = registered.trust_class, registered.joined_at
        message.expires_at, message.revoked_at = registered.expires_at, registered.revoked_at or ""
    if (quarantine := device.quarantine) is not None:
        message.quarantined_at, message.quarantine_reason = quarantine.quarantined_at, quarantine.reason
        message.quarantine_message = quarantine.message
    return message
