"""How the SDK reaches a service: the URL, the channel, the key, and what to say if nothing answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import grpc.aio

import cola_runtime
from cola_runtime.config import DEFAULT_GRPC_PORT, ClientSettings, is_loopback
from cola_runtime.errors import ColaError, InvalidInput, Unavailable
from cola_runtime.transport.status import SDK_METADATA

MAX_MESSAGE_BYTES = 16 << 20
_TLS_SIGNS = ("handshake", "certificate", "hostname verification")  # in gRPC's words for a refused one
KEEPALIVE_MILLISECONDS = 30_000  # the service allows one each 10 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """host:port of a service, and whether the connection is encrypted."""

    target: str
    tls: bool


def parse_base_url(base_url: str) -> Address:
    """`grpc://host[:port]` is plain, `grpcs://host[:port]` is TLS."""
    parts = urlsplit(base_url if "://" in base_url else f"grpc://{base_url}")
    try:
        port = parts.port or DEFAULT_GRPC_PORT
    except ValueError as error:
        raise _bad_url(base_url, str(error)) from error
    if parts.scheme not in ("grpc", "grpcs"):
        raise _bad_url(base_url, f"unknown scheme {parts.scheme!r}")
    if not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise _bad_url(base_url, "it is more or less than a scheme, a host and a port")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Address(target=f"{host}:{port}", tls=parts.scheme == "grpcs")


def open_channel(settings: ClientSettings) -> grpc.aio.Channel:
    address = parse_base_url(settings.base_url)
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),  # retried here, where what is idempotent is known
        ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
        ("grpc.http2.max_pings_without_data", 0),  # a silent event stream is watched as well
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if address.tls:
        return grpc.aio.secure_channel(address.target, _roots(settings.ca), options=options)
    if settings.api_key.get_secret_value() and not is_loopback(address.target):
        raise InvalidInput(
            "PLAINTEXT_REFUSED",
            f"the API key would travel to {address.target} for anyone on the way to read",
            where="COLA_BASE_URL",
            remedy=f"Use grpcs://{address.target}; with a private certificate authority also COLA_CA.",
        )
    return grpc.aio.insecure_channel(address.target, options=options)


def _roots(ca: Path | None) -> grpc.ChannelCredentials:
    """The certificates in the file, or those the system trusts."""
    try:
        return grpc.ssl_channel_credentials(ca.read_bytes() if ca else None)
    except OSError as error:
        raise InvalidInput(
            "TLS_FILE", f"cannot read {ca}: {error.strerror}", where="COLA_CA", remedy="Give a PEM file."
        ) from error


def call_metadata(settings: ClientSettings) -> tuple[tuple[str, str], ...]:
    key = settings.api_key.get_secret_value().strip()
    sdk = ((SDK_METADATA, cola_runtime.__version__),)
    if not key:
        return sdk
    if not key.isascii() or not key.isprintable():
        raise InvalidInput(
            "KEY_INVALID",
            "the API key holds characters that no key has",
            where="COLA_API_KEY",
            remedy="Set COLA_API_KEY to a key as `cola keys create` printed it.",
        )
    return (*sdk, ("authorization", f"Bearer {key}"))


def explained(error: ColaError, target: str) -> ColaError:
    """The same error; if nothing answered at all, one that says where and what to do."""
    if error.reason not in ("UNAVAILABLE", "CANCELLED"):  # of gRPC itself, not of a service
        return error
    if any(sign in error.message.lower() for sign in _TLS_SIGNS):
        return Unavailable(
            "TLS_REFUSED",
            f"no encrypted connection to {target}: its certificate is not accepted, or it speaks no TLS",
            where="COLA_BASE_URL",
            remedy="See that the host is the certificate's, that it has not expired, and that COLA_CA is its "
            "authority. Nothing was sent, and nothing is sent without TLS instead.",
        )
    return Unavailable(
        "SERVICE_UNREACHABLE",
        f"no service answers at {target}",
        where="COLA_BASE_URL",
        remedy="Start one with `cola serve`, or set COLA_BASE_URL to where it listens.",
    )


def _bad_url(base_url: str, problem: str) -> InvalidInput:
    return InvalidInput(
        "BASE_URL_INVALID",
        f"{base_url!r} is not the address of a service: {problem}",
        where="COLA_BASE_URL",
        remedy="Give grpc://host:port, or grpcs://host:port for TLS.",
    )
