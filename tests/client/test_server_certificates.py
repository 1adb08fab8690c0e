"""What the client does with a service that does not prove who it is: it sends nothing, and says why."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.errors import ColaError
from cola_runtime.transport.certificates import Authority, Identity

HOSTS = ["localhost", "127.0.0.1"]


class Listener(grpc.GenericRpcHandler):
    """A port that notes every call that gets through to it."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> None:
        self.heard.append(handler_call_details.method)

    async def open(self, identity: Identity | None) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(handlers=[self])
        if identity is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            pair = [(identity.key_pem, identity.certificate_pem)]
            port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
        await server.start()
        return server, port


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


@pytest.mark.parametrize("case", ["good", "expired", "another host", "another authority", "no TLS"])
async def test_a_service_that_does_not_prove_who_it_is_hears_nothing(
    authority: Authority, tmp_path: Path, case: str
) -> None:
    listener = Listener()
    identities = {
        "good": authority.server(HOSTS),
        "expired": authority.server(HOSTS, lifetime=timedelta(seconds=-1)),
        "another host": authority.server(["elsewhere.example"]),
        "another authority": Authority.create().server(HOSTS),
        "no TLS": None,
    }
    (tmp_path / "ca.pem").write_bytes(authority.certificate_pem)
    server, port = await listener.open(identities[case])
    url = f"grpcs://localhost:{port}"
    try:
        async with AsyncClient(base_url=url, api_key="tml-secret", ca=tmp_path / "ca.pem") as client:
            with pytest.raises(ColaError) as caught:
                await client.jobs()
    finally:
        await server.stop(0)
    if case == "good":
        assert (caught.value.reason, listener.heard) == ("UNIMPLEMENTED", ["/cola.v1.Jobs/ListJobs"])
        return
    assert (caught.value.reason, listener.heard) == ("TLS_REFUSED", [])
    assert "COLA_CA" in caught.value.remedy
