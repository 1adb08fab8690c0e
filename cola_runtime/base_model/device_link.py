"""The base model's end of one device's gradient stream: an outbox, and credit for what is in flight."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from cola_runtime.base_model.sent_taps import SentTaps
from cola_runtime.errors import ProtocolError
from cola_runtime.proto import control_pb2
from cola_runtime.transport.frames import HEADER_BYTES, TensorAddress
from cola_runtime.transport.stream import FrameStream
from cola_runtime.transport.tensors import Parcel


class DeviceLink:
    """Sends taps in order, never more unconsumed bytes than the device's credit (or one larger parcel).

    The device is *parked* from the moment its credit is used up until its outbox is empty again. All methods
    belong to the event loop.
    """

    def __init__(
        self,
        stream: FrameStream[Any],
        *,
        device_id: str,
        credit_bytes: int,
        on_parked: Callable[[bool], None],
        sent: SentTaps,
    ) -> None:
        self._sent = sent
        self.stream = stream
        self.device_id = device_id
        self.parked = False
        self.gone = asyncio.Event()  # set by the server once nothing of this link is left
        self._credit_bytes = credit_bytes
        self._in_flight_bytes = 0
        self._outbox: deque[tuple[TensorAddress, Parcel] | control_pb2.GradientControl] = deque()
        self._outbox_bytes = 0
        self._on_parked = on_parked
        self._changed = asyncio.Event()
        self._replaced = asyncio.Event()

    @property
    def waiting_bytes(self) -> int:
        """Tensor bytes in the outbox, headers included."""
        return self._outbox_bytes

    def put_parcel(self, address: TensorAddress, parcel: Parcel) -> int:
        """Queue tensors behind everything queued before; returns their bytes on the stream."""
        self._outbox.append((address, parcel))
        self._outbox_bytes += parcel.wire_bytes
        self._changed.set()
        return parcel.wire_bytes

    def put_control(self, message: control_pb2.GradientControl) -> int:
        """Queue a control message in order with the tensors; it takes no credit. Returns its stream bytes."""
        self._outbox.append(message)
        self._changed.set()
        return HEADER_BYTES + message.ByteSize()

    def return_credit(self, consumed_bytes: int) -> None:
        """The device consumed bytes. Raises ProtocolError CREDIT_INVALID for more than were in flight."""
        if consumed_bytes > self._in_flight_bytes:
            raise ProtocolError(
                "CREDIT_INVALID",
                "more than was in flight",
                limit=self._in_flight_bytes,
                actual=consumed_bytes,
            )
        self._in_flight_bytes -= consumed_bytes
        self._changed.set()

    def replace(self) -> None:
        """End this link, because the device has opened a new one."""
        self._replaced.set()

    async def wait_replaced(self) -> None:
        await self._replaced.wait()

    async def send_forever(self) -> None:
        """Send as credit allows, until cancelled or the stream is lost."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._outbox and self._fits():
                await self._send_first()
            self._set_parked(bool(self._outbox))

    def _fits(self) -> bool:
        first = self._outbox[0]
        if not isinstance(first, tuple) or self._in_flight_bytes == 0:
            return True
        return self._in_flight_bytes + first[1].wire_bytes <= self._credit_bytes

    async def _send_first(self) -> None:
        first = self._outbox.popleft()
        if not isinstance(first, tuple):
            await self.stream.send_control(first)
            self._sent.control(first)
            return
        address, parcel = first
        self._outbox_bytes -= parcel.wire_bytes
        self._in_flight_bytes += parcel.wire_bytes
        self._sent.tensor(address, parcel.wire_bytes)
        await self.stream.send_frames(parcel.frames(address))

    def _set_parked(self, parked: bool) -> None:
        if parked != self.parked:
            self.parked = parked
            self._on_parked(parked)
