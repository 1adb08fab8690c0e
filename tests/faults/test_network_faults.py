"""A network that is cut, one-way, lossy or slow between device and service: no step lost, none twice."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.config import DeviceSettings, ServiceSettings, TlsSettings
from cola_runtime.process_environment import child_environment
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.testing.exactness import service_for
from cola_runtime.testing.in_process import InProcessDevices, running_in_process
from cola_runtime.transport.certificates import Authority, write_private
from tests.faults.judging import MODEL, WAIT_SECONDS, Accept, Faultless, fault_job, judge, train_faultless
from tests.faults.namespaces import Cable, cable
from tests.faults.processes import reach

JOB = fault_job(steps=400, checkpoint_every=20)
LEASE_SECONDS = 3.0
OUTAGE_SECONDS = 8.0  # longer than a lease, shorter than keepalive takes to give a connection up
LONG_OUTAGE_SECONDS = 20.0  # longer than that, too: both ends hang up in the dark
FLAPS, FLAP_SECONDS = 12, 0.4

pytestmark = pytest.mark.timeout(300)

Harm = Callable[[Cable], Awaitable[float]]
"""Do it and undo it; returns the moment from which the job should go on."""


def for_seconds(seconds: float, begin: Callable[[Cable], None], end: Callable[[Cable], None]) -> Harm:
    """It lasts so long, and the job should go on from its end."""

    async def harm(laid: Cable) -> float:
        begin(laid)
        await asyncio.sleep(seconds)
        end(laid)
        return time.time()

    return harm


async def lossy(laid: Cable) -> float:
    """Half of the time nothing arrives, in bursts."""
    moment = time.time()
    for _ in range(FLAPS):
        laid.lose_to_device()
        await asyncio.sleep(FLAP_SECONDS)
        laid.find_device()
        await asyncio.sleep(FLAP_SECONDS)
    return moment


async def slow(laid: Cable) -> float:
    laid.slow("2mbit")
    return time.time()


HARMS: dict[str, Harm] = {
    "cut": for_seconds(OUTAGE_SECONDS, Cable.down, Cable.up),
    "cut for long": for_seconds(LONG_OUTAGE_SECONDS, Cable.down, Cable.up),
    "nothing reaches the service": for_seconds(OUTAGE_SECONDS, Cable.lose_to_service, Cable.find_service),
    "nothing reaches the device": for_seconds(OUTAGE_SECONDS, Cable.lose_to_device, Cable.find_device),
    "lossy": lossy,
    "slow": slow,
}


@pytest.fixture
def laid() -> Iterator[Cable]:
    with cable() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Faultless:
    return asyncio.run(train_faultless(model, tmp_path_factory.mktemp("undisturbed"), JOB))


@pytest.fixture
def settings(laid: Cable, model: Path, tmp_path: Path) -> ServiceSettings:
    """On the cable's address: so with TLS."""
    authority = Authority.create()
    identity = authority.server([laid.host])
    (tmp_path / "ca.pem").write_bytes(authority.certificate_pem)
    (tmp_path / "server.pem").write_bytes(identity.certificate_pem)
    write_private(tmp_path / "server.key", identity.key_pem)
    plain = service_for(tmp_path / "service", model=model, name=MODEL, dtype="float32")
    devices = DeviceSettings(
        count=0, listen=f"{laid.host}:0", heartbeat_seconds=0.5, lease_timeout_seconds=LEASE_SECONDS
    )
    return plain.model_copy(
        update={
            "listen": f"{laid.host}:0",
            "base_models": (plain.base_models[0].model_copy(update={"bind": f"{laid.host}:0"}),),
            "devices": devices,
            "tls": TlsSettings(certificate=tmp_path / "server.pem", key=tmp_path / "server.key"),
        }
    )


@asynccontextmanager
async def serving(
    laid: Cable, settings: ServiceSettings, folder: Path
) -> AsyncIterator[tuple[RunningService, InProcessDevices, AsyncClient]]:
    """With a `cola device` at the other end of the cable."""
    async with running_in_process(settings) as (service, devices):
        url, ca = f"grpcs://{service.endpoint}", folder / "ca.pem"
        async with AsyncClient(base_url=url, api_key=service.first_key, ca=ca) as client:
            token = (await client.create_join_token("trusted")).token
            command = [*laid.inside, sys.executable, "-m", "cola_runtime.cli.main", "device"]
            with (folder / "far.log").open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *(*command, "--coordinator", url, "--ca", str(ca), "--id", "far"),
                    *("--identity-dir", str(folder / "far")),
                    env=child_environment(COLA_JOIN_TOKEN=token),
                    stdout=log,
                    stderr=log,
                )
            try:
                yield service, devices, client
            finally:
                process.kill()
                await process.wait()


@pytest.mark.parametrize("harm", HARMS)
async def test_a_network_that_fails_for_a_while_costs_no_step(
    harm: str,
    laid: Cable,
    settings: ServiceSettings,
    tmp_path: Path,
    undisturbed: Faultless,
    accept: Accept,
) -> None:
    async with serving(laid, settings, tmp_path) as (_, _, client):
        handle = await client.submit(JOB.spec, training=JOB.training)
        await reach(handle, 10)
        fault = await HARMS[harm](laid)
        assert not (await handle.refresh()).ended, "the fault came too late"
        await handle.wait(WAIT_SECONDS)
        case = f"network: {harm}"
        outcome = await judge(
            handle, undisturbed, part="device", case=case, faults=[fault], data_dir=settings.data_dir
        )
    accept(outcome)


async def test_a_job_leaves_a_device_that_is_cut_off_and_heeds_it_no_more_when_it_is_back(
    laid: Cable, settings: ServiceSettings, tmp_path: Path, undisturbed: Faultless, accept: Accept
) -> None:
    """The device trains on in the dark, and what it sends when the network is back is of an older epoch."""
    async with serving(laid, settings, tmp_path) as (service, devices, client):
        handle = await client.submit(JOB.spec, training=JOB.training)
        await reach(handle, 45)  # behind a checkpoint
        await devices.start_certified("near", service.device_endpoint)
        fault = time.time()
        laid.lose_to_service()
        await asyncio.sleep(LEASE_SECONDS + 2.0)
        laid.find_service()
        await handle.wait(WAIT_SECONDS)
        assert {step.device_id for step in await handle.metrics()} == {"far", "near"}
        await devices.kill("near")
        outcome = await judge(
            handle,
            undisturbed,
            part="device",
            case="network: cut off beside another device",
            faults=[fault],
            data_dir=settings.data_dir,
        )
    accept(outcome)
