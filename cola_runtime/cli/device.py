"""`cola device`: train adapters here, for a service elsewhere."""

from __future__ import annotations

import asyncio
import platform
import re
import secrets
import signal
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cola_runtime.config import JoinSettings
    from cola_runtime.device.config import DeviceConfig


def device(
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The service. Default: COLA_COORDINATOR.")
    ] = None,
    device_id: Annotated[
        str | None, typer.Option("--id", help="This device's name. Default: made from the host's.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with.")] = None,
    credit_bytes: Annotated[int | None, typer.Option(help="Gradient bytes that may be in flight.")] = None,
    adapter_module: Annotated[
        list[str] | None,
        typer.Option(metavar="PYTHON.MODULE", help="Registers adapter modules; repeatable."),
    ] = None,
) -> None:
    """Join a service as a device, until Ctrl-C. The join token is read from COLA_JOIN_TOKEN."""
    from cola_runtime import crash_points
    from cola_runtime.adapters.module_registry import import_adapter_modules
    from cola_runtime.cli.output import clean, print_text
    from cola_runtime.config import crash_setting, join_settings, set_thread_environment
    from cola_runtime.machine import keep_freed_memory

    settings = join_settings(
        coordinator=coordinator,
        device_id=device_id,
        threads=threads,
        credit_bytes=credit_bytes,
        adapter_modules=adapter_module,
    )
    crash_points.arm(crash_setting())
    config = device_config(settings)
    set_thread_environment(config.threads)  # before torch is imported
    keep_freed_memory()
    import_adapter_modules(settings.adapter_modules)
    print_text(
        ("Device ", "green"),
        (clean(config.device_id), "bold"),
        f" joins {clean(config.coordinator_endpoint)}",
    )
    asyncio.run(_serve(config))


def device_config(settings: JoinSettings) -> DeviceConfig:
    """Raises InvalidInput `JOIN_TOKEN_MISSING`."""
    from cola_runtime.device.config import DeviceConfig
    from cola_runtime.errors import InvalidInput

    token = settings.join_token.get_secret_value()
    if not token:
        raise InvalidInput(
            "JOIN_TOKEN_MISSING",
            "a device needs the service's join token",
            where="COLA_JOIN_TOKEN",
            remedy="It is in the file `join-token` of the service's data folder.",
        )
    return DeviceConfig(
        device_id=settings.device_id or default_device_id(platform.node()),
        coordinator_endpoint=settings.coordinator,
        join_token=token,
        threads=settings.threads,
        credit_bytes=settings.credit_bytes,
    )


def default_device_id(host: str) -> str:
    """The host's name made safe, and six random digits: two devices on one host differ."""
    safe = re.sub(r"[^A-Za-z0-9-]+", "-", host).strip("-")[:40] or "device"
    return f"{safe}-{secrets.token_hex(3)}"


async def _serve(config: DeviceConfig) -> None:
    from cola_runtime.device.agent import DeviceAgent

    agent, stop = DeviceAgent(config), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.create_task(agent.run())
    asked = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    await agent.drain()
    await serving
