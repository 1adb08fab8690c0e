"""Real handshakes: who gets through a device port, what a public port speaks, and where plaintext may be."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509

from cola_runtime.errors import ColaError, InvalidInput, Unauthenticated, Unavailable
from cola_runtime.proto import control_pb2
from cola_runtime.transport.certificates import (
    Authority,
    Identity,
    certificate_request,
    new_key,
    read_certificate,
    requested_key_sha256,
    write_private,
)
from cola_runtime.transport.endpoints import GRADIENTS, Connection, connect, serve_streams
from cola_runtime.transport.stream import FrameStream
from cola_runtime.transport.tls import PemFiles, device_credentials, device_port_credentials

HOSTS = ["localhost", "127.0.0.1"]
SECONDS = 5.0
REFUSED_SECONDS = 0.5  # gRPC dials again and again after a failed handshake


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


def device(authority: Authority, name: str = "d1", *, lifetime: timedelta = timedelta(days=1)) -> Identity:
    key = new_key()
    certificate = authority.device(name, certificate_request(key), lifetime=lifetime)
    return Identity(certificate_pem=certificate, key_pem=key, authority_pem=authority.certificate_pem)


async def _who(stream: FrameStream[Any]) -> None:
    """Tell the peer what name TLS has verified of it."""
    name = read_certificate(stream.certificate).name if stream.certificate else "nobody"
    refusal = control_pb2.GradientControl(refusal=control_pb2.Refusal(message=name))
    await stream.send_control(refusal)
    await stream.flush()


@asynccontextmanager
async def port(credentials: grpc.ServerCredentials | None, bind: str = "127.0.0.1:0") -> AsyncIterator[str]:
    server, endpoint = await serve_streams(bind, {GRADIENTS: _who}, credentials=credentials)
    try:
        yield endpoint
    finally:
        await server.stop(0)


async def ask(endpoint: str, credentials: grpc.ChannelCredentials | None, *, seconds: float = SECONDS) -> str:
    stream: Connection[Any] = await connect(
        endpoint, GRADIENTS, credentials=credentials, timeout_seconds=seconds
    )
    try:
        (item,) = await stream.receive(timeout_seconds=SECONDS)
        return str(item.message.refusal.message)  # type: ignore[union-attr]
    finally:
        await stream.close()


def handshake(endpoint: str, version: ssl.TLSVersion) -> str | None:
    """The version that a peer of only this version gets to speak, and None where it gets nowhere."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    host, _, number = endpoint.rpartition(":")
    try:
        with socket.create_connection((host, int(number)), SECONDS) as raw, context.wrap_socket(raw) as tls:
            return tls.version()
    except OSError:
        return None


async def test_a_device_port_lets_its_own_devices_in_and_knows_them_by_name(authority: Authority) -> None:
    async with port(device_port_credentials(authority.server(HOSTS))) as endpoint:
        assert await ask(endpoint, device_credentials(device(authority, "west-3"))) == "west-3"


async def test_a_device_port_lets_nobody_else_in(authority: Authority) -> None:
    ours = authority.certificate_pem
    other = Authority.create()
    stranger = device(other)
    forged = Identity(certificate_pem=stranger.certificate_pem, key_pem=stranger.key_pem, authority_pem=ours)
    own = device(authority)
    mismatched = Identity(certificate_pem=own.certificate_pem, key_pem=new_key(), authority_pem=ours)
    cases = {
        "plaintext": None,
        "no certificate": grpc.ssl_channel_credentials(ours),
        "another authority's": device_credentials(forged),
        "expired": device_credentials(device(authority, lifetime=timedelta(seconds=-1))),
        "a server's": device_credentials(authority.server(HOSTS)),
        "without its key": device_credentials(mismatched),
    }
    async with port(device_port_credentials(authority.server(HOSTS))) as endpoint:
        refused = await asyncio.gather(
            *(ask(endpoint, credentials, seconds=REFUSED_SECONDS) for credentials in cases.values()),
            return_exceptions=True,
        )
        for case, error in zip(cases, refused, strict=True):
            assert isinstance(error, ColaError), f"{case}: {error}"
        assert await ask(endpoint, device_credentials(own)) == "d1", "the port still serves"


async def test_a_device_trusts_no_service_of_another_authority_or_another_name(authority: Authority) -> None:
    own = device_credentials(device(authority))
    for identity in (Authority.create().server(HOSTS), authority.server(["elsewhere.example"])):
        async with port(device_port_credentials(identity)) as endpoint:
            with pytest.raises(Unavailable):
                await ask(endpoint, own, seconds=REFUSED_SECONDS)


async def test_every_tls_port_speaks_tls_1_3_and_refuses_1_2(authority: Authority, tmp_path: Path) -> None:
    identity = authority.server(HOSTS)
    for credentials in (device_port_credentials(identity), pem_files(tmp_path, identity).credentials()):
        async with port(credentials) as endpoint:
            found = {
                version.name: await asyncio.to_thread(handshake, endpoint, version)
                for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
            }
            assert found == {"TLSv1_2": None, "TLSv1_3": "TLSv1.3"}


def test_a_process_that_would_answer_tls_1_2_does_not_begin_to_serve() -> None:
    """What grpc does by itself: the check sees it, so the test above can fail."""
    program = (
        "import asyncio, grpc\n"
        "from cola_runtime.transport.certificates import Authority\n"
        "from cola_runtime.transport.endpoints import serve_streams\n"
        "from cola_runtime.transport.tls import device_port_credentials\n"
        "async def main():\n"
        "    identity = Authority.create().server(['127.0.0.1'])\n"
        "    try:\n"
        "        await serve_streams('127.0.0.1:0', {}, credentials=device_port_credentials(identity))\n"
        "    except Exception as error:\n"
        "        print(error.reason)\n"
        "asyncio.run(main())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_SSL_CIPHER_SUITES"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "TLS_FLOOR"


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0", "example.com:0", "10.0.0.1:0"])
async def test_plaintext_off_loopback_is_refused_with_the_reason(bind: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        async with port(None, bind):
            pass
    assert (caught.value.reason, caught.value.actual) == ("PLAINTEXT_REFUSED", bind)
    assert "tls.certificate" in caught.value.remedy


def pem_files(folder: Path, identity: Identity) -> PemFiles:
    folder.mkdir(exist_ok=True)
    (folder / "server.pem").write_bytes(identity.certificate_pem)
    write_private(folder / "server.key", identity.key_pem)
    return PemFiles(folder / "server.pem", folder / "server.key")


async def test_a_renewed_certificate_is_shown_without_a_restart(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create()
    trusting = {
        name: grpc.ssl_channel_credentials(each.certificate_pem)
        for name, each in (("old", authority), ("new", other))
    }
    async with port(pem_files(tmp_path, authority.server(HOSTS)).credentials()) as endpoint:
        assert await ask(endpoint, trusting["old"]) == "nobody"
        pem_files(tmp_path, other.server(HOSTS))
        os.utime(tmp_path / "server.pem", ns=(1, 1))
        assert await ask(endpoint, trusting["new"]) == "nobody"
        with pytest.raises(Unavailable):
            await ask(endpoint, trusting["old"], seconds=REFUSED_SECONDS)
        (tmp_path / "server.pem").unlink()
        assert await ask(endpoint, trusting["new"]) == "nobody", "unreadable files leave it as it is"


def test_missing_tls_files_are_said_before_the_port_opens(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        PemFiles(tmp_path / "none.pem", tmp_path / "none.key").credentials()
    assert caught.value.reason == "TLS_FILE"


def test_an_authority_keeps_its_key_to_its_owner_and_issues_what_it_says(tmp_path: Path) -> None:
    first = Authority.open(tmp_path / "authority")
    assert Authority.open(tmp_path / "authority").certificate_pem == first.certificate_pem
    assert (tmp_path / "authority" / "authority.key").stat().st_mode & 0o777 == 0o600
    key = new_key()
    request = certificate_request(key)
    pem = first.device("d1", request, lifetime=timedelta(days=3))
    shown = read_certificate(pem)
    assert (shown.name, shown.key_sha256) == ("d1", requested_key_sha256(request))
    constraints = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(
        x509.BasicConstraints
    )
    assert not constraints.value.ca, "a device cannot issue"


@pytest.mark.parametrize("request_pem", [b"", b"none", b"x" * 10_000, "tampered", "rsa"])
def test_only_a_signed_p256_request_is_certified(request_pem: bytes | str) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding

    if request_pem == "tampered":
        der = bytearray(x509.load_pem_x509_csr(certificate_request(new_key())).public_bytes(Encoding.DER))
        der[-3] ^= 1
        request_pem = (
            ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()
        )
    elif request_pem == "rsa":
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        request_pem = builder.sign(
            rsa.generate_private_key(public_exponent=65537, key_size=2048), hashes.SHA256()
        ).public_bytes(Encoding.PEM)
    assert isinstance(request_pem, bytes)
    with pytest.raises(InvalidInput) as caught:
        requested_key_sha256(request_pem)
    assert caught.value.reason == "CERTIFICATE_REQUEST_INVALID"


def test_what_is_no_certificate_of_ours_is_no_identity() -> None:
    with pytest.raises(Unauthenticated) as caught:
        read_certificate(b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
    assert caught.value.reason == "CERTIFICATE_INVALID"
