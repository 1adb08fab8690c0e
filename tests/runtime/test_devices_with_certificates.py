"""A service with TLS: devices join by token, are placed by trust class and revoked; who did it is kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from cola_runtime.base_model.service import BaseModelService
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.client.values import AuditEntry
from cola_runtime.config import DeviceSettings, ServiceSettings, TlsSettings
from cola_runtime.device.agent import DeviceAgent
from cola_runtime.device.config import DeviceConfig
from cola_runtime.device.enrolment import Enrolment
from cola_runtime.errors import ColaError, Conflict, InvalidInput, NotFound, Unauthenticated
from cola_runtime.runtime import certified
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import service_for
from cola_runtime.testing.in_process import InProcessDevices, running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.transport.certificates import Authority, new_key, read_certificate, write_private

WAIT_SECONDS = 60.0
ROWS = b"".join(json.dumps({"prompt": "ab" * n, "completion": "cde"}).encode() + b"\n" for n in range(1, 9))


def job(name: str, *trust: str) -> JobSpec:
    fields = {"name": name, "base_model": "tiny", "steps": 2, "rows_per_step": 4}
    return JobSpec.model_validate({**fields, **({"trust": trust} if trust else {})})


@dataclass(frozen=True, kw_only=True)
class Site:
    """A running service with TLS, its operator, and devices of other people."""

    service: RunningService
    devices: InProcessDevices
    operator: AsyncClient
    ca: Path
    folder: Path

    def enrolment(self, device_id: str, token: str) -> tuple[DeviceConfig, Enrolment]:
        config = DeviceConfig(
            device_id=device_id,
            coordinator_endpoint=self.service.endpoint,
            join_token=token,
            first_retry_seconds=0.02,
        )
        return config, Enrolment(config, ca=self.ca, folder=self.folder / device_id)

    @asynccontextmanager
    async def device(self, device_id: str, token: str) -> AsyncIterator[None]:
        config, enrolment = self.enrolment(device_id, token)
        agent = DeviceAgent(config, enrolment=enrolment)
        task = asyncio.create_task(agent.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def audited(self, kind: str) -> AuditEntry:
        """The first audit entry of the kind, as soon as there is one."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            found = [entry for entry in await self.operator.audit(limit=1000) if entry.kind == kind]
            if found:
                return found[0]
            assert time.monotonic() < deadline, kind
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), dtype="float32")


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> ServiceSettings:
    authority = Authority.create()
    identity = authority.server(["localhost", "127.0.0.1"])
    (tmp_path / "ca.pem").write_bytes(authority.certificate_pem)
    (tmp_path / "server.pem").write_bytes(identity.certificate_pem)
    write_private(tmp_path / "server.key", identity.key_pem)
    plain = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    devices = DeviceSettings(count=0, listen="127.0.0.1:0", heartbeat_seconds=0.1)
    tls = TlsSettings(certificate=tmp_path / "server.pem", key=tmp_path / "server.key")
    return plain.model_copy(update={"devices": devices, "tls": tls})


@asynccontextmanager
async def site(settings: ServiceSettings, folder: Path) -> AsyncIterator[Site]:
    async with running_in_process(settings) as (service, devices):
        url, ca = f"grpcs://{service.endpoint}", folder / "ca.pem"
        async with AsyncClient(base_url=url, api_key=service.first_key, ca=ca) as operator:
            yield Site(service=service, devices=devices, operator=operator, ca=ca, folder=folder)


async def waits(handle: AsyncJobHandle, containing: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        reason = (await handle.refresh()).waiting_reason
        if containing in reason:
            return
        assert time.monotonic() < deadline, reason
        await asyncio.sleep(0.02)


async def test_a_job_goes_only_to_devices_of_the_classes_it_accepts(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    async with site(settings, tmp_path) as at:
        token = (await at.operator.create_join_token("community")).token
        async with at.device("garage", token):
            careful = await at.operator.submit(job("careful"), training=ROWS)
            await waits(careful, "garage cannot train it: the job accepts devices of trust trusted only")
            open_ = await at.operator.submit(job("open", "community"), training=ROWS)
            assert (await open_.wait(WAIT_SECONDS)).state == "succeeded"
            assert {step.device_id for step in await open_.metrics()} == {"garage"}
            assert await careful.metrics() == []
            await at.devices.start_certified("own", at.service.device_endpoint)
            assert (await careful.wait(WAIT_SECONDS)).state == "succeeded"
            assert {step.device_id for step in await careful.metrics()} == {"own"}
            classes = {each.device_id: each.trust_class for each in (await at.operator.describe()).devices}
            assert classes == {"garage": "community", "own": "trusted"}


async def test_a_revoked_device_is_put_out_and_stays_out(
    settings: ServiceSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    dismiss = BaseModelService.dismiss_device

    async def noting(base: BaseModelService, device_id: str) -> None:
        await dismiss(base, device_id)
        ended.append(device_id)

    monkeypatch.setattr(BaseModelService, "dismiss_device", noting)
    async with site(settings, tmp_path) as at:
        token = (await at.operator.create_join_token("community", reusable=True)).token
        async with at.device("garage", token), at.device("attic", token):
            running = await at.operator.submit(job("open", "community"), training=ROWS)
            await running.wait(WAIT_SECONDS)
            revoked = await at.operator.revoke_device("garage")
            assert revoked.revoked_at
            assert ended == ["garage"], "its gradient stream, too"
            await at.audited("device.refused")
            connected = {each.device_id for each in (await at.operator.describe()).devices}
            assert connected == {"attic"}
        _, renewing = at.enrolment("garage", "")
        with pytest.raises(Unauthenticated) as caught:
            await renewing._join(renewing._identity.key_pem, "")  # type: ignore[union-attr]
        assert caught.value.reason == "DEVICE_REVOKED"
        _, again = at.enrolment("garage", token)
        with pytest.raises(Conflict) as taken:
            await again._join(new_key(), token)
        assert taken.value.reason == "DEVICE_ID_TAKEN"
        with pytest.raises(NotFound):
            await at.operator.revoke_device("nobody")


async def test_a_join_token_makes_one_device_and_a_device_renews_with_its_own_key(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    async with site(settings, tmp_path) as at:
        token = (await at.operator.create_join_token("trusted")).token
        _, first = at.enrolment("west", token)
        await first.dial()
        key_file = tmp_path / "west" / "device.key"
        assert key_file.stat().st_mode & 0o777 == 0o600
        before = (tmp_path / "west" / "device.pem").read_bytes()
        _, restarted = at.enrolment("west", "")
        await restarted.dial()
        assert (tmp_path / "west" / "device.pem").read_bytes() == before, "kept: nothing was due"
        await restarted._join(key_file.read_bytes(), "")
        after = (tmp_path / "west" / "device.pem").read_bytes()
        assert after != before
        assert read_certificate(after).key_sha256 == read_certificate(before).key_sha256
        refused: list[ColaError] = []
        for name, secret in (("east", token), ("east", "join-guess"), ("east", "")):
            _, other = at.enrolment(name, secret)
            with pytest.raises(Unauthenticated) as caught:
                await other._join(new_key(), secret)
            refused.append(caught.value)
        assert [error.reason for error in refused] == [
            "JOIN_TOKEN_WRONG",
            "JOIN_TOKEN_WRONG",
            "DEVICE_UNKNOWN",
        ]
        assert str(refused[0]) == str(refused[1]), "a used token looks like one that never was"
        with pytest.raises(InvalidInput, match="west"):
            Enrolment(
                DeviceConfig(device_id="east", coordinator_endpoint=""), ca=at.ca, folder=tmp_path / "west"
            )
        made = {each.device_id: each.trust_class for each in await at.operator.registered_devices()}
        assert made == {"west": "trusted"}


async def test_a_certificate_lets_in_its_own_device_only(settings: ServiceSettings, tmp_path: Path) -> None:
    async with site(settings, tmp_path) as at:
        identity = await at.devices.identify("own")
        at.devices.start("another", at.service.device_endpoint, identity=identity)
        refusal = await at.audited("device.refused")
        assert (refusal.actor, refusal.message) == ("ipv4:127.0.0.1", "DEVICE_ID_MISMATCH")
        assert (await at.operator.describe()).devices == ()


async def test_a_device_whose_certificate_ends_is_put_out(
    settings: ServiceSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certified, "OWN_DEVICE_LIFE", timedelta(seconds=2))
    async with site(settings, tmp_path) as at:
        await at.devices.start_certified("own", at.service.device_endpoint)
        left = await at.audited("device.left")
        assert (left.actor, left.message) == ("own", "its certificate has expired")


async def test_a_token_of_no_class_or_without_end_is_refused(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    async with site(settings, tmp_path) as at:
        for trust, seconds, reason in (
            ("friends", 60, "TRUST_CLASS_UNKNOWN"),
            ("trusted", 10**9, "TOKEN_LIFE"),
        ):
            with pytest.raises(InvalidInput) as caught:
                await at.operator.create_join_token(trust, valid_seconds=seconds)
            assert caught.value.reason == reason
        short = await at.operator.create_join_token("trusted", valid_seconds=1)
        await asyncio.sleep(1.1)
        _, late = at.enrolment("late", short.token)
        with pytest.raises(Unauthenticated):
            await late.dial()


async def test_who_did_what_is_kept_for_operators(settings: ServiceSettings, tmp_path: Path) -> None:
    async with site(settings, tmp_path) as at:
        made = await at.operator.create_key("alice")
        url = f"grpcs://{at.service.endpoint}"
        async with AsyncClient(base_url=url, api_key=made.key, ca=at.ca) as alice:
            handle = await alice.submit(job("chat"), training=ROWS)
            await handle.cancel()
            with pytest.raises(NotFound):
                await alice.job("somebody-elses")
        async with AsyncClient(base_url=url, api_key="tml-guess", ca=at.ca) as stranger:
            for _ in range(30):
                with pytest.raises(Unauthenticated):
                    await stranger.jobs()
        (key,) = [each for each in await at.operator.keys() if each.tenant == "alice"]
        await at.operator.revoke_key(key.key_id)
        entries = await at.operator.audit(limit=1000)
        told = [(e.kind, e.actor == key.key_id, e.tenant, e.subject) for e in entries]
        assert ("key.created", False, "default", key.key_id) in told
        assert ("job.submitted", True, "alice", handle.job_id) in told
        assert ("job.cancelled", True, "alice", handle.job_id) in told
        assert ("job.not_found", True, "", "") in told
        assert ("key.revoked", False, "default", key.key_id) in told
        assert [e.kind for e in entries].count("login.refused") == 10, "thirty guesses, bounded"
        assert [e.id for e in entries] == sorted(e.id for e in entries)
        assert await at.operator.audit(after=entries[-1].id) == []
        assert made.key not in str(entries)
    async with site(settings.model_copy(), tmp_path) as at:  # durable
        assert at.service.first_key is None
        kept = await at.service.store.audit.entries(limit=1000)
        assert [(e.id, e.kind) for e in kept][: len(entries)] == [(e.id, e.kind) for e in entries]
