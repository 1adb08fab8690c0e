"""What a device must be told."""

from __future__ import annotations

from dataclasses import dataclass

from cola_runtime.transport.certificates import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """One device. It dials the coordinator, whose leases name a base model's gradient endpoint."""

    device_id: str  # 1 to 63 letters, digits, '.', '_' or '-'
    coordinator_endpoint: str  # host:port
    join_token: str = ""  # without TLS shown in each hello; with it, once, for a certificate
    identity: Identity | None = None  # of a device that the service itself has started, with TLS
    threads: int = 1  # of torch, for gradient and optimizer work
    credit_bytes: int = 64 << 20  # how much the base model may have in flight towards this device
    first_retry_seconds: float = 0.2  # doubles after every failed attempt
    last_retry_seconds: float = 5.0
