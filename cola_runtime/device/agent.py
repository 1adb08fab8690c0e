"""The device's life: dial the coordinator, serve its leases, reconnect, until stopped."""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from cola_runtime.device.backoff import Backoff
from cola_runtime.device.config import DeviceConfig
from cola_runtime.device.control_session import ControlSession
from cola_runtime.device.enrolment import Dial, Enrolment
from cola_runtime.device.trial import optimizer_speed
from cola_runtime.device.worker import DeviceWorker
from cola_runtime.errors import ColaError
from cola_runtime.machine import yield_to_streams
from cola_runtime.proto import control_pb2
from cola_runtime.transport.endpoints import DEVICES, connect
from cola_runtime.transport.frames import PROTOCOL_VERSION
from cola_runtime.transport.handshake import introduce
from cola_runtime.transport.reader import FrameLimits
from cola_runtime.transport.tls import device_credentials

logger = logging.getLogger(__name__)

CANCEL_AGAIN_SECONDS = 1.0
DRAIN_SECONDS = 20.0  # below the 30 s that Kubernetes gives a process by default


class DeviceAgent:
    """One device. `run()` serves until `stop()`; both belong to one event loop.

    That loop owns both streams; one worker thread owns every adapter (`DeviceWorker`), so that arithmetic
    never stalls a heartbeat and the order of arrivals is the order of work. A lost control stream ends all
    leases: the coordinator grants them again with a higher epoch.
    """

    def __init__(self, config: DeviceConfig, *, enrolment: Enrolment | None = None) -> None:
        self._config = config
        self._enrolment = enrolment
        self._plain = enrolment is None and config.identity is None  # then the join token says who may join
        self._worker = DeviceWorker()
        self._thread = ThreadPoolExecutor(1, "device-worker", self._begin_thread)
        self._stopping = asyncio.Event()
        self._session: ControlSession | None = None
        self._numbers_per_second = 0.0

    async def run(self) -> None:
        """Serve until stopped, reconnecting with growing pauses."""
        loop = asyncio.get_running_loop()
        self._numbers_per_second = await loop.run_in_executor(self._thread, optimizer_speed)
        serving = asyncio.create_task(self._serve_forever())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            while not serving.done():  # a call may fail of it instead, and another be tried
                serving.cancel()
                await asyncio.wait((serving,), timeout=CANCEL_AGAIN_SECONDS)
            with suppress(asyncio.CancelledError):
                await serving
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_thread(self) -> None:
        torch.set_num_threads(self._config.threads)
        yield_to_streams()

    async def drain(self) -> None:
        """Give every adapter back at its next step boundary, so that nothing is computed again; then stop."""
        if self._session is not None:
            with suppress(ColaError, TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    await self._session.drain()
        self.stop()

    def stop(self) -> None:
        """Let `run` close both streams and return."""
        self._stopping.set()

    async def _serve_forever(self) -> None:
        pause = Backoff(self._config)
        while True:
            try:
                await self._attach_once(pause)
            except ColaError as error:
                logger.warning("not joined: %s", error, extra={"event": "device.control_lost"})
            except Exception:
                logger.exception("serving failed; joining again", extra={"event": "device.failed"})
            await asyncio.get_running_loop().run_in_executor(self._thread, self._worker.end_all)
            await pause.wait()

    async def _attach_once(self, pause: Backoff) -> None:
        dial = await self._dial()
        stream = await connect(dial.endpoint, DEVICES, credentials=dial.credentials)
        try:
            welcome = await introduce(stream, self._hello(), limits=FrameLimits())
            pause.reset()
            logger.info("joined %s", stream.peer, extra={"event": "device.joined"})
            self._session = ControlSession(
                self._config,
                stream,
                welcome,
                worker=self._worker,
                thread=self._thread,
                credentials=dial.credentials,
            )
            await self._session.run()
        finally:
            self._session = None
            await stream.close()

    async def _dial(self) -> Dial:
        if self._enrolment is not None:
            return await self._enrolment.dial()
        identity = self._config.identity
        credentials = device_credentials(identity) if identity else None
        return Dial(endpoint=self._config.coordinator_endpoint, credentials=credentials)

    def _hello(self) -> control_pb2.DeviceControl:
        hello = control_pb2.DeviceHello(
            device_id=self._config.device_id,
            join_token=self._config.join_token if self._plain else "",
            protocol_version=PROTOCOL_VERSION,
            threads=self._config.threads,
            pid=os.getpid(),
            numbers_per_second=self._numbers_per_second,
        )
        return control_pb2.DeviceControl(hello=hello)
