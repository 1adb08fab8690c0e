"""A service in this process whose devices reach it through proxies that harm or record."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from cola_runtime.base_model.service import BaseModelService
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.config import ServiceSettings, TlsSettings
from cola_runtime.runtime.certified import Identify
from cola_runtime.runtime.coordinator import RunningService, running_coordinator
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.testing.chaos import Chaos
from cola_runtime.testing.in_process import JOIN_TOKEN, InProcessDevices, running_replica
from cola_runtime.transport.certificates import Authority, write_private
from cola_runtime.types import BaseModelDescription

Proxy = Callable[[str, Chaos], AbstractAsyncContextManager[str]]


class _Moved:
    """A base model that devices reach at another endpoint."""

    def __init__(self, base: BaseModelService, endpoint: str) -> None:
        self._base, self._endpoint = base, endpoint

    async def describe(self) -> BaseModelDescription:
        return replace(await self._base.describe(), gradient_endpoint=self._endpoint)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


@asynccontextmanager
async def harmed_service(
    settings: ServiceSettings, links: Mapping[str, tuple[Proxy, Chaos]]
) -> AsyncIterator[RunningService]:
    """A service in this process whose devices reach `base model` and `coordinator` through proxies."""
    devices = InProcessDevices(settings.devices.count)
    async with AsyncExitStack() as stack:
        base = await stack.enter_async_context(running_replica(settings, settings.base_models[0]))
        port = cast(BaseModelPort, base)
        if "base model" in links:
            proxy, chaos = links["base model"]
            endpoint = (await base.describe()).gradient_endpoint
            harmed = await stack.enter_async_context(proxy(endpoint, chaos))
            port = cast(BaseModelPort, _Moved(base, harmed))

        @asynccontextmanager
        async def devices_at(endpoint: str, identify: Identify) -> AsyncIterator[None]:
            async with AsyncExitStack() as inner:
                if "coordinator" in links:
                    proxy, chaos = links["coordinator"]
                    endpoint = await inner.enter_async_context(proxy(endpoint, chaos))
                await inner.enter_async_context(devices.running(endpoint, identify))
                yield

        yield await stack.enter_async_context(
            running_coordinator(settings, [port], JOIN_TOKEN, devices_at=devices_at)
        )


def tls_settings(folder: Path) -> TlsSettings:
    """Of an operator's certificate for this machine; its authority is in `ca.pem`."""
    authority = Authority.create()
    identity = authority.server(["localhost", "127.0.0.1"])
    (folder / "ca.pem").write_bytes(authority.certificate_pem)
    (folder / "server.pem").write_bytes(identity.certificate_pem)
    write_private(folder / "server.key", identity.key_pem)
    return TlsSettings(certificate=folder / "server.pem", key=folder / "server.key")


def client_of(service: RunningService, *, ca: Path | None) -> AsyncClient:
    """Of the first tenant."""
    scheme = "grpcs" if ca else "grpc"
    return AsyncClient(base_url=f"{scheme}://{service.endpoint}", api_key=service.first_key, ca=ca)
