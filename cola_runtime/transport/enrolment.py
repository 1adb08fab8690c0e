"""The one call that a device makes at the public port: a certificate for its key."""

from __future__ import annotations

import grpc
import grpc.aio

from cola_runtime.proto import operators_pb2, operators_pb2_grpc
from cola_runtime.transport.status import error_from_rpc

JOIN_SECONDS = 20.0


async def join_device(
    endpoint: str, request: operators_pb2.JoinDeviceRequest, *, credentials: grpc.ChannelCredentials
) -> operators_pb2.JoinDeviceResponse:
    """Raises what the service refused it with, or Unavailable."""
    async with grpc.aio.secure_channel(endpoint, credentials) as channel:
        stub = operators_pb2_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
        try:
            return await stub.JoinDevice(request, timeout=JOIN_SECONDS)  # type: ignore[no-any-return]
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from failure
