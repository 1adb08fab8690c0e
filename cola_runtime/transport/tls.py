"""Who may listen without TLS, and the credentials of those who listen or dial with it: TLS 1.3 only.

grpcio cannot be told a lowest version. It can be told which of TLS 1.2's cipher suites to offer: with
`offer_tls_1_3_only` (process_environment.py) that is one for pre-shared keys, of which there are none, so
that no handshake below TLS 1.3 can succeed. `check_floor` dials every TLS port once, to see that it is so.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from contextlib import suppress
from pathlib import Path

import grpc
import grpc.aio

from cola_runtime.config import is_loopback
from cola_runtime.errors import InvalidInput, Unavailable
from cola_runtime.transport.certificates import Identity

FLOOR_CHECK_SECONDS = 5.0
TLS_HANDSHAKE_RECORD = b"\x16"

logger = logging.getLogger(__name__)


def check_plaintext(bind: str, *, where: str) -> None:
    """Raises InvalidInput `PLAINTEXT_REFUSED` unless `bind` is on loopback."""
    if not is_loopback(bind):
        raise InvalidInput(
            "PLAINTEXT_REFUSED",
            f"{bind} can be reached from other machines, and without TLS keys and gradients could be read",
            where=where,
            limit="127.0.0.0/8, ::1 or localhost without TLS",
            actual=bind,
            remedy="Set tls.certificate and tls.key (docs/security.md), or listen on 127.0.0.1.",
        )


async def bind_port(
    server: grpc.aio.Server, bind: str, *, credentials: grpc.ServerCredentials | None, where: str
) -> int:
    """Add the port to a server that is about to start. Raises InvalidInput, Unavailable `PORT_IN_USE`."""
    if credentials is None:
        check_plaintext(bind, where=where)
    try:
        if credentials is None:
            return int(server.add_insecure_port(bind))
        return int(server.add_secure_port(bind, credentials))
    except RuntimeError as error:
        raise Unavailable(
            "PORT_IN_USE",
            f"cannot listen on {bind}",
            where=where,
            remedy="Give another address, or stop who has it; with TLS, see that certificate and key match.",
        ) from error


async def check_floor(endpoint: str) -> None:
    """Raises Unavailable `TLS_FLOOR` if the TLS port answers a TLS 1.2 handshake."""
    host, _, port = endpoint.rpartition(":")
    reached = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))  # nosec B104 # noqa: S104 (compared)
    if await asyncio.to_thread(_answers_tls_1_2, reached, int(port)):
        raise Unavailable(
            "TLS_FLOOR",
            f"{endpoint} would answer TLS 1.2",
            limit="TLS 1.3",
            remedy="Start it with `cola serve`, or call offer_tls_1_3_only before grpc is imported.",
        )


def _answers_tls_1_2(host: str, port: int) -> bool:
    """The port's first answer to a hello of TLS 1.2 at most is a handshake, not an alert or an end.

    What follows does not matter: a device port would go on to refuse us for want of a certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # our own port, asked one thing
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    try:
        with socket.create_connection((host, port), FLOOR_CHECK_SECONDS) as raw:
            raw.sendall(outgoing.read())
            return raw.recv(1) == TLS_HANDSHAKE_RECORD
    except OSError:
        return False


class PemFiles:
    """An operator's certificate chain and key, read again whenever one of the files has changed."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self._read_at: tuple[int, ...] = ()

    def credentials(self) -> grpc.ServerCredentials:
        """For a public port: no client certificate is asked for. Raises InvalidInput `TLS_FILE`."""
        try:
            first = self._read()
        except OSError as error:
            raise InvalidInput(
                "TLS_FILE",
                f"cannot read {error.filename}: {error.strerror}",
                where="tls",
                remedy="tls.certificate and tls.key must be PEM files that the service can read.",
            ) from error
        return grpc.dynamic_ssl_server_credentials(first, self._changed, require_client_authentication=False)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        self._read_at = self._changed_at()
        certificate, key = (file.read_bytes() for file in self._files)
        return grpc.ssl_server_certificate_configuration([(key, certificate)])

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked at each handshake, in a thread of gRPC's; what cannot be read leaves everything as it is."""
        try:
            if self._changed_at() == self._read_at:
                return None
            logger.info("TLS certificate read again", extra={"event": "tls.reloaded"})
            return self._read()
        except OSError as error:
            logger.warning("TLS files cannot be read: %s", error, extra={"event": "tls.unreadable"})
            return None

    def _changed_at(self) -> tuple[int, ...]:
        return tuple(file.stat().st_mtime_ns for file in self._files)


def device_port_credentials(identity: Identity) -> grpc.ServerCredentials:
    """For a port that lets only this service's devices through, by a certificate of its authority."""
    return grpc.ssl_server_credentials(
        [(identity.key_pem, identity.certificate_pem)],
        root_certificates=identity.authority_pem,
        require_client_auth=True,
    )


def device_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """For a device that dials one of these."""
    return grpc.ssl_channel_credentials(identity.authority_pem, identity.key_pem, identity.certificate_pem)


def server_authority(file: Path | None) -> grpc.ChannelCredentials:
    """For whoever dials a public port: the certificates in `file`, or those the system trusts.

    Raises InvalidInput `TLS_FILE`.
    """
    try:
        return grpc.ssl_channel_credentials(file.read_bytes() if file else None)
    except OSError as error:
        raise InvalidInput("TLS_FILE", f"cannot read {file}: {error.strerror}", where="ca") from error


def peer_certificate(context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes | None:
    """The certificate that the peer of a call was let in with, PEM; None where none was asked for."""
    found = context.auth_context().get("x509_pem_cert")
    return bytes(found[0]) if found else None
