"""`cola device`: train adapters here, for a service elsewhere."""

from __future__ import annotations

import asyncio
import platform
import re
import secrets
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cola_runtime.config import JoinSettings
    from cola_runtime.device.config import DeviceConfig
    from cola_runtime.device.enrolment import Enrolment

TLS_SCHEME = "grpcs://"


def device(
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="URL", help="grpcs://host:port, or host:port here. COLA_COORDINATOR."),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Of the service, where no public authority signed it. COLA_CA."),
    ] = None,
    identity_dir: Annotated[
        Path | None, typer.Option(help="Where a device keeps its certificate. Default: cola-device.")
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
    """Join a service as a device, until Ctrl-C. The join token is read from COLA_JOIN_TOKEN.

    Over TLS it is needed once: for the certificate that the device keeps in its folder.
    """
    from cola_runtime import crash_points
    from cola_runtime.adapters.module_registry import import_adapter_modules
    from cola_runtime.cli.output import clean, print_text
    from cola_runtime.config import crash_setting, join_settings
    from cola_runtime.machine import keep_freed_memory
    from cola_runtime.process_environment import offer_tls_1_3_only, set_thread_environment

    offer_tls_1_3_only()  # before grpc is imported

    settings = join_settings(
        coordinator=coordinator,
        ca=ca,
        identity_dir=identity_dir,
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
    asyncio.run(_serve(config, _enrolment(settings, config)))


def device_config(settings: JoinSettings) -> DeviceConfig:
    """Raises InvalidInput `JOIN_TOKEN_MISSING`."""
    from cola_runtime.device.config import DeviceConfig
    from cola_runtime.errors import InvalidInput

    token = settings.join_token.get_secret_value()
    joined = _joined_as(settings.identity_dir) if settings.coordinator.startswith(TLS_SCHEME) else None
    if not token and joined is None:
        raise InvalidInput(
            "JOIN_TOKEN_MISSING",
            "a device needs the service's join token",
            where="COLA_JOIN_TOKEN",
            remedy="`cola devices token` makes one; on the service's own machine it is in `join-token`.",
        )
    return DeviceConfig(
        device_id=settings.device_id or joined or default_device_id(platform.node()),
        coordinator_endpoint=settings.coordinator.removeprefix(TLS_SCHEME),
        join_token=token,
        threads=settings.threads,
        credit_bytes=settings.credit_bytes,
    )


def _joined_as(identity_dir: Path) -> str | None:
    """The id that an earlier run joined under."""
    file = identity_dir / "device.pem"
    if not file.exists():
        return None
    from cola_runtime.transport.certificates import read_certificate

    return read_certificate(file.read_bytes()).name


def _enrolment(settings: JoinSettings, config: DeviceConfig) -> Enrolment | None:
    if not settings.coordinator.startswith(TLS_SCHEME):
        return None
    from cola_runtime.device.enrolment import Enrolment

    return Enrolment(config, ca=settings.ca, folder=settings.identity_dir)


def default_device_id(host: str) -> str:
    """The host's name made safe, and six random digits: two devices on one host differ."""
    safe = re.sub(r"[^A-Za-z0-9-]+", "-", host).strip("-")[:40] or "device"
    return f"{safe}-{secrets.token_hex(3)}"


async def _serve(config: DeviceConfig, enrolment: Enrolment | None) -> None:
    from cola_runtime.device.agent import DeviceAgent
    from cola_runtime.machine import keep_started_objects

    keep_started_objects()
    agent, stop = DeviceAgent(config, enrolment=enrolment), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.create_task(agent.run())
    asked = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    await agent.drain()
    await serving
