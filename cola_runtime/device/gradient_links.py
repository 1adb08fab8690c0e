"""A device's gradient streams: one to each base model replica that computes rows of its adapters.

A lease names its replica's endpoint, which is dialled when the first such lease comes. A stream that is lost
keeps the leases: the next one sends each adapter's current weights, and a step whose taps were lost must be
computed again. An endpoint that no lease names any more is dialled no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING

from cola_runtime.device.answers import Update
from cola_runtime.device.backoff import Backoff
from cola_runtime.device.config import DeviceConfig
from cola_runtime.device.enrolment import Dial
from cola_runtime.device.gradient_link import GradientLink
from cola_runtime.errors import ColaError, Unauthenticated
from cola_runtime.types import Lease

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger(__name__)

OnMessages = Callable[[GradientLink, list[bytes]], Awaitable[None]]
CurrentUpdates = Callable[[Collection[str]], Awaitable[list[Update]]]


class GradientLinks:
    """Belongs to one control session; everything runs on its event loop."""

    def __init__(
        self,
        config: DeviceConfig,
        *,
        ticket: str,
        credentials: grpc.ChannelCredentials | None,
        current: CurrentUpdates,
        on_messages: OnMessages,
    ) -> None:
        """`current` makes the updates of the named jobs' present weights."""
        self._config, self._ticket, self._credentials = config, ticket, credentials
        self._current, self._on_messages = current, on_messages
        self._leases: dict[str, tuple[Lease, str]] = {}  # by job, with the endpoint of its replica
        self._links: dict[str, GradientLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Until one raises what ends the whole session, as a ticket that is too old."""
        try:
            await self._ended
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def of(self, lease: Lease) -> GradientLink | None:
        """The stream to the lease's replica, while there is one."""
        _, endpoint = self._leases.get(lease.job_id, (lease, ""))
        return self._links.get(endpoint)

    def open(self, lease: Lease, endpoint: str) -> None:
        """The lease's taps come from `endpoint`, and its weights go there."""
        self._leases[lease.job_id] = (lease, endpoint)
        if endpoint not in self._tasks:
            self._tasks[endpoint] = asyncio.create_task(self._serve(endpoint), name=f"gradients {endpoint}")

    def end(self, lease: Lease) -> None:
        """Nothing happens when a newer lease holds the job."""
        held, _ = self._leases.get(lease.job_id, (None, ""))
        if held is not None and held.epoch <= lease.epoch:
            del self._leases[lease.job_id]

    def _jobs(self, endpoint: str) -> frozenset[str]:
        return frozenset(job_id for job_id, (_, at) in self._leases.items() if at == endpoint)

    async def _serve(self, endpoint: str) -> None:
        pause = Backoff(self._config)
        try:
            while self._jobs(endpoint):
                try:
                    await self._attach(endpoint, pause)
                except Unauthenticated:  # the ticket is too old: the coordinator gives another, if it may
                    raise
                except ColaError as error:
                    logger.warning("lost %s: %s", endpoint, error, extra={"event": "device.gradients_lost"})
                await pause.wait()
        except Exception as error:
            if not self._ended.done():
                self._ended.set_exception(error)
        finally:
            self._tasks.pop(endpoint, None)

    async def _attach(self, endpoint: str, pause: Backoff) -> None:
        dial = Dial(endpoint=endpoint, credentials=self._credentials)
        link = await GradientLink.attach(dial, self._config, ticket=self._ticket)
        self._links[endpoint] = link
        pause.reset()
        try:
            for update in await self._current(self._jobs(endpoint)):
                await link.send_update(update)
            await link.serve(lambda messages: self._on_messages(link, messages))
        finally:
            del self._links[endpoint]
            await link.close()
