"""Every fault of a stream, both ways, between a device and the base model and the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cola_runtime.config import DeviceSettings, TlsSettings
from cola_runtime.scheduler import primitives
from cola_runtime.testing.chaos import LASTING, Chaos, FaultKind, StreamFault, Way
from cola_runtime.testing.chaos_proxy import byte_proxy, frame_proxy
from cola_runtime.testing.exactness import service_for
from tests.faults.judging import MODEL, WAIT_SECONDS, Accept, Faultless, Outcome, fault_job, judge
from tests.faults.proxied import client_of, harmed_service, tls_settings

PROXIES = {"bytes": byte_proxy, "frames": frame_proxy}
HEALS_AFTER_SECONDS = {"coordinator": 5.0, "base model": 18.0}  # later than a stalled peer is given up
OF_TLS = frozenset({
    FaultKind.CUT, FaultKind.HALF_CLOSE, FaultKind.DUPLICATE, FaultKind.REORDER, FaultKind.CORRUPT
})  # fmt: skip
AT = {  # a unit in the middle of the job; of frames, weights to the base model and taps from it
    ("base model", "frames", Way.TO_SERVER): 11,
    ("base model", "frames", Way.TO_CLIENT): 12,
    **{("base model", "bytes", way): 12 for way in Way},
    **{("coordinator", "frames", way): 3 for way in Way},
    **{("coordinator", "bytes", way): 8 for way in Way},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCase:
    link: str  # to whom the device's stream goes
    proxy: str
    kind: FaultKind
    way: Way
    tls: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} of {self.proxy}{' of TLS' * self.tls}, device and {self.link}, {self.way}"

    @property
    def quick(self) -> bool:
        """One of each link in a plain run."""
        return self.proxy == "frames" and (self.link, self.kind, self.way) in {
            ("base model", FaultKind.CUT, Way.TO_CLIENT),
            ("base model", FaultKind.DUPLICATE, Way.TO_SERVER),
            ("coordinator", FaultKind.CORRUPT, Way.TO_SERVER),
        }


def cases() -> list[StreamCase]:
    """A frame cannot be stalled for long by who speaks gRPC: its pings are answered by the proxy itself.

    Of TLS, what it makes another fault of: a byte that is changed or comes twice ends the connection.
    """
    plain = [
        StreamCase(link=link, proxy=proxy, kind=kind, way=way)
        for link in ("base model", "coordinator")
        for proxy in PROXIES
        for kind in FaultKind
        for way in Way
        if not (proxy == "frames" and kind is FaultKind.STALL)
        and not (proxy == "bytes" and kind is FaultKind.DROP)  # TCP itself sends again what is lost
    ]
    return plain + [
        replace(case, tls=True) for case in plain if case.proxy == "bytes" and case.kind in OF_TLS
    ]


async def heal(case: StreamCase, chaos: Chaos) -> float:
    """Wait for the fault, and end it in time if it would last; returns its moment."""
    await chaos.struck.wait()
    moment = time.time()
    if case.kind in LASTING:
        await asyncio.sleep(HEALS_AFTER_SECONDS[case.link] if case.kind is FaultKind.STALL else 2.0)
        chaos.clear()
    return moment


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.quick] if case.quick else []) for case in cases()],
)
async def test_a_faulty_stream_costs_no_step(
    case: StreamCase, model: Path, tmp_path: Path, faultless: Faultless, accept: Accept
) -> None:
    at = AT[case.link, case.proxy, case.way]
    chaos = Chaos(StreamFault(kind=case.kind, way=case.way, at=at, bytes_per_second=50_000))
    outcome, _ = await harmed(case, chaos, model, tmp_path, faultless)
    accept(outcome)


@pytest.mark.parametrize("way", Way)
async def test_a_lost_end_of_a_step_is_noticed_when_the_step_has_taken_too_long(
    way: Way, model: Path, tmp_path: Path, faultless: Faultless, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing follows it that would show a gap, on a stream that no network loses a frame of."""
    monkeypatch.setattr(primitives, "APPLY_TIMEOUT_SECONDS", 2.0)  # of 600, which a slow device may take
    case = StreamCase(link="base model", proxy="frames", kind=FaultKind.DROP, way=way)
    chaos = Chaos(StreamFault(kind=case.kind, way=way, at=AT["base model", "frames", way] + 1))
    outcome, lost = await harmed(case, chaos, model, tmp_path, faultless)
    assert outcome.kept, outcome
    assert lost == ["LEASE_TIMEOUT"]


async def harmed(
    case: StreamCase, chaos: Chaos, model: Path, folder: Path, faultless: Faultless
) -> tuple[Outcome, list[str]]:
    """The outcome of a job whose stream suffers it, and why it lost its leases."""
    devices = DeviceSettings(
        count=1, heartbeat_seconds=0.5, lease_timeout_seconds=3.0, listen="127.0.0.1:0" if case.tls else None
    )
    tls = tls_settings(folder) if case.tls else TlsSettings()
    settings = service_for(folder, model=model, name=MODEL, dtype="float32").model_copy(
        update={"devices": devices, "tls": tls}
    )
    async with (
        harmed_service(settings, {case.link: (PROXIES[case.proxy], chaos)}) as service,
        client_of(service, ca=folder / "ca.pem" if case.tls else None) as client,
    ):
        healing = asyncio.create_task(heal(case, chaos))
        handle = await client.submit(fault_job().spec, training=fault_job().training)
        await handle.wait(WAIT_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(healing), 30)
        faults = [healing.result()] if healing.done() else []
        healing.cancel()
        outcome = await judge(
            handle, faultless, part="stream", case=case.name, faults=faults, data_dir=folder
        )
        events = [event async for event in handle.events(follow=False)]
    return outcome, [str(event.data["reason"]) for event in events if event.kind == "lease.lost"]
