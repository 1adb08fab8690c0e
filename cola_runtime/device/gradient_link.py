"""The device's stream to the base model: taps in, credit and weights out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from cola_runtime import crash_points
from cola_runtime.device.answers import Norms, Refused, Update
from cola_runtime.device.config import DeviceConfig
from cola_runtime.device.enrolment import Dial
from cola_runtime.proto import control_pb2
from cola_runtime.transport import control
from cola_runtime.transport.endpoints import GRADIENTS, Connection, connect
from cola_runtime.transport.frames import PROTOCOL_VERSION
from cola_runtime.transport.handshake import introduce
from cola_runtime.transport.reader import FrameLimits
from cola_runtime.transport.stream import Item

GradientItem = Item[control_pb2.GradientControl]
OnMessages = Callable[[list[bytes]], Awaitable[None]]


class GradientLink:
    """One attached gradient stream. Updates are sent whole, one after the other."""

    def __init__(self, stream: Connection[Any]) -> None:
        self._stream = stream
        self._sending = asyncio.Lock()

    @classmethod
    async def attach(cls, dial: Dial, config: DeviceConfig, *, ticket: str) -> GradientLink:
        """Dial the base model and introduce this device. Raises what it was refused with, or Unavailable."""
        stream = await connect(dial.endpoint, GRADIENTS, credentials=dial.credentials)
        hello = control_pb2.GradientHello(
            device_id=config.device_id,
            ticket=ticket,
            protocol_version=PROTOCOL_VERSION,
            credit_bytes=config.credit_bytes,
        )
        try:
            await introduce(stream, control_pb2.GradientControl(hello=hello), limits=_limits(config))
        except BaseException:
            await stream.close()
            raise
        return cls(stream)

    async def serve(self, on_messages: OnMessages) -> None:
        """Read until the base model closes, handing all messages that have arrived to `on_messages` at once.

        They are for `decode`, which another thread may call. Reading goes on while `on_messages` runs; the
        credit bounds what gathers meanwhile.
        """
        waiting: list[bytes] = []
        arrived = asyncio.Event()
        reader = asyncio.create_task(self._read(waiting, arrived))
        try:
            while not reader.done():
                await arrived.wait()
                arrived.clear()
                while waiting:
                    batch, waiting[:] = list(waiting), []
                    await on_messages(batch)
            await reader
        finally:
            reader.cancel()

    def decode(self, messages: Iterable[bytes]) -> Iterator[GradientItem]:
        """What the messages complete, in order. Raises ProtocolError at the first bad frame."""
        yield from self._stream.take_unread()
        for message in messages:
            yield from self._stream.decode(message)

    async def _read(self, waiting: list[bytes], arrived: asyncio.Event) -> None:
        try:
            while (message := await self._stream.receive_message()) is not None:
                waiting.append(message)
                arrived.set()
        finally:
            arrived.set()

    async def send_credit(self, credit_bytes: int) -> None:
        """Tell the base model that so many bytes were consumed."""
        credit = control_pb2.Credit(bytes=credit_bytes)
        await self._stream.send_control(control_pb2.GradientControl(credit=credit))

    async def send_refusal(self, refused: Refused) -> None:
        refusal = control_pb2.Refusal(
            lease=control.lease_to_proto(refused.lease), reason=refused.reason, message=refused.message
        )
        await self._stream.send_control(control_pb2.GradientControl(refusal=refusal))

    async def send_norms(self, made: Norms) -> None:
        norms = control_pb2.ShardNorms(
            lease=control.lease_to_proto(made.lease), version=made.version, norms=made.norms
        )
        await self._stream.send_control(control_pb2.GradientControl(shard_norms=norms))

    async def send_update(self, update: Update) -> None:
        """All weights of a version, then its UpdateEnd."""
        async with self._sending:
            await self._stream.send_frames(update.frames)
            crash_points.reach("device.update_begun")
            end = _update_end(update, await asyncio.wrap_future(update.link))
            await self._stream.send_control(control_pb2.GradientControl(update_end=end))
        crash_points.reach("device.update_sent")

    async def close(self) -> None:
        await self._stream.close()


def _update_end(update: Update, link: bytes) -> control_pb2.UpdateEnd:
    return control_pb2.UpdateEnd(
        lease=control.lease_to_proto(update.lease),
        version=update.version,
        learning_rate=update.learning_rate,
        gradient_norm=update.gradient_norm,
        device_seconds=update.seconds,
        chain=link,
    )


def _limits(config: DeviceConfig) -> FrameLimits:
    return FrameLimits(max_open_bytes=max(2 * config.credit_bytes, 1 << 30), packs=True)
