"""Opens the SDK's client for a command."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cola_runtime.client.sdk import AsyncClient, Client


@contextmanager
def connected(url: str | None) -> Iterator[Client]:
    from cola_runtime.client.sdk import Client

    with Client(base_url=url) as client:
        yield client


@asynccontextmanager
async def connected_async(url: str | None) -> AsyncIterator[AsyncClient]:
    from cola_runtime.client.sdk import AsyncClient

    async with AsyncClient(base_url=url) as client:
        yield client
