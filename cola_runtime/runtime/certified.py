"""The coordinator's ports, with TLS or on loopback, and the certificates of what the service itself starts.

Without TLS there is one port, for clients and devices. With it clients dial `listen`, where the operator's
certificate is shown, and devices a port of their own, which lets only this service's certificates through.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cola_runtime.config import DEFAULT_DEVICE_PORT, BaseModelSettings, ServiceSettings
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.device_pool import DevicePool
from cola_runtime.server.grpc_server import serve_jobs
from cola_runtime.server.operators import DevicePort, OperatorDesk
from cola_runtime.server.service import FineTuningService
from cola_runtime.transport.certificates import (
    Authority,
    Identity,
    certificate_request,
    new_key,
    read_certificate,
)
from cola_runtime.transport.endpoints import DEVICES, serve_streams
from cola_runtime.transport.host_calls import HostCalls
from cola_runtime.transport.tls import PemFiles, check_plaintext, device_port_credentials

STOP_GRACE_SECONDS = 2.0
OWN_DEVICE_LIFE = timedelta(days=365)  # at most; each start of the service issues another

Identify = Callable[[str], Awaitable[Identity | None]]
"""device id -> the certificate of a device that the service starts itself; None where there is no TLS."""


async def no_identity(_device_id: str) -> None:
    """Devices on this machine, without TLS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """The coordinator's open ports."""

    endpoint: str  # of clients
    tls: bool
    device_endpoint: str  # as devices reach it
    identify: Identify
    servers: tuple[Any, ...]

    async def close(self) -> None:
        for server in self.servers:
            await server.stop(STOP_GRACE_SECONDS)


def check_listeners(settings: ServiceSettings) -> None:
    """Raises InvalidInput `PLAINTEXT_REFUSED` for an address off loopback without TLS."""
    if settings.tls.certificate is None:
        check_plaintext(settings.listen, where="listen")
        for number, base_model in enumerate(settings.base_models):
            check_plaintext(base_model.bind, where=f"base_models.{number}.bind")


def base_model_identity(settings: ServiceSettings, chosen: BaseModelSettings) -> Identity | None:
    """What one of its base models shows to devices; None where there is no TLS."""
    if settings.tls.certificate is None:
        return None
    hosts = _hosts(chosen.bind, chosen.advertise)
    return _authority(settings).server(hosts)


async def open_doors(settings: ServiceSettings, service: FineTuningService, pool: DevicePool) -> Doors:
    """Raises InvalidInput `PLAINTEXT_REFUSED`, `TLS_FILE`; Unavailable `PORT_IN_USE`, `TLS_FLOOR`."""
    hosts = HostCalls(settings.hosts)
    if settings.tls.certificate is None or settings.tls.key is None:
        streams = {DEVICES: pool.on_stream}
        server, port = await serve_jobs(service, settings.listen, streams=streams, hosts=hosts)
        endpoint = _at(settings.listen, port)
        return Doors(
            endpoint=endpoint,
            tls=False,
            device_endpoint=endpoint,
            identify=no_identity,
            servers=(server,),
        )
    public = PemFiles(settings.tls.certificate, settings.tls.key).credentials()
    authority = _authority(settings)
    bind = settings.devices.listen or _at(settings.listen, DEFAULT_DEVICE_PORT)
    identity = authority.server(_hosts(bind, settings.devices.advertise))
    of_devices, device_endpoint = await serve_streams(
        bind,
        {DEVICES: pool.on_stream},
        credentials=device_port_credentials(identity),
        where="devices.listen",
        interceptors=(hosts,),
    )
    device_endpoint = settings.devices.advertise or device_endpoint
    desk = OperatorDesk(
        service.store,
        service.limits,
        port=DevicePort(
            authority=authority,
            endpoint=device_endpoint,
            certificate_days=settings.devices.certificate_days,
        ),
        dismiss=pool.dismiss,
    )
    server, port = await serve_jobs(service, settings.listen, desk=desk, credentials=public, hosts=hosts)
    return Doors(
        endpoint=_at(settings.listen, port),
        tls=True,
        device_endpoint=device_endpoint,
        identify=_identifier(authority, service.store),
        servers=(server, of_devices),
    )


def _identifier(authority: Authority, store: JobStore) -> Identify:
    async def identify(device_id: str) -> Identity:
        key_pem = new_key()
        pem = authority.device(device_id, certificate_request(key_pem), lifetime=OWN_DEVICE_LIFE)
        certificate = read_certificate(pem)
        await store.devices.register_own(device_id, certificate.key_sha256, until=certificate.expires_at)
        return Identity(certificate_pem=pem, key_pem=key_pem, authority_pem=authority.certificate_pem)

    return identify


def _authority(settings: ServiceSettings) -> Authority:
    return Authority.open(settings.data_dir / "authority")


def _hosts(bind: str, advertise: str | None) -> list[str]:
    """What a peer may have dialled: the name given out first, then this machine's own."""
    named = [endpoint.rpartition(":")[0] for endpoint in (advertise, bind) if endpoint]
    return list(dict.fromkeys([*named, "localhost", "127.0.0.1"]))


def _at(bind: str, port: int) -> str:
    return f"{bind.rpartition(':')[0]}:{port}"
