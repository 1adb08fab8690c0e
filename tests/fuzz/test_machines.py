"""State machines beside plain models: leases, the frame reader, join tokens with their devices.

Jobs have theirs in tests/jobs/test_job_machine.py.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection

from cola_runtime.errors import Conflict, ProtocolError, Unauthenticated
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs import schema
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.transport.frames import DType, TensorAddress, WireTensor, tensor_frames
from cola_runtime.transport.reader import FrameLimits, FrameReader, ReceivedTensor
from cola_runtime.types import Lease, StepApplied, TensorKind

JOBS = ("job-a", "job-b")
DEVICES = ("d0", "d1")
MIB = 1 << 20


class LeaseMachine(RuleBasedStateMachine):
    """Only the newest epoch of a job counts; a lost lease stays lost; reports wait to be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.book = LeaseBook()
        self.loop = asyncio.new_event_loop()
        self.epochs = dict.fromkeys(JOBS, 0)
        self.open: dict[str, tuple[Lease, str | None, set[int]]] = {}  # job -> lease, why lost, versions

    leases = Bundle("leases")

    @rule(target=leases, job=st.sampled_from(JOBS), device=st.sampled_from(DEVICES))
    def take(self, job: str, device: str) -> Lease:
        self.epochs[job] += 1
        lease = Lease(job_id=job, epoch=self.epochs[job], device_id=device)
        self.book.open(lease, replica="tiny/0")
        self.open[job] = (lease, None, set())
        return lease

    @rule(lease=leases, version=st.integers(0, 3))
    def apply(self, lease: Lease, version: int) -> None:
        self.book.applied(StepApplied(lease=lease, version=version))
        if self._is_open(lease):
            self.open[lease.job_id][2].add(version)

    @rule(lease=leases, reason=st.sampled_from(["DEVICE_LOST", "DRAINING"]))
    def lose(self, lease: Lease, reason: str) -> None:
        self.book.lose(lease, reason=reason, message="")
        if self._is_open(lease) and self.open[lease.job_id][1] is None:
            self.open[lease.job_id] = (lease, reason, self.open[lease.job_id][2])

    @rule(device=st.sampled_from(DEVICES))
    def lose_device(self, device: str) -> None:
        self.book.lose_device(device, reason="DEVICE_LOST", message="")
        for job, (lease, why, versions) in self.open.items():
            if lease.device_id == device and why is None:
                self.open[job] = (lease, "DEVICE_LOST", versions)

    @rule(lease=leases)
    def close(self, lease: Lease) -> None:
        self.book.close(lease)
        if self._is_open(lease):
            del self.open[lease.job_id]

    @rule(lease=leases, version=st.integers(0, 3))
    def wait(self, lease: Lease, version: int) -> None:
        waiting = self.book.wait_version(lease, version, timeout_seconds=0.001)
        _, why, versions = self.open[lease.job_id] if self._is_open(lease) else (lease, "LEASE_ENDED", set())
        if why is None and version in versions:
            assert self.loop.run_until_complete(waiting).version == version
            versions -= {older for older in versions if older < version}
        else:
            with pytest.raises(LeaseLost) as lost:
                self.loop.run_until_complete(waiting)
            assert lost.value.reason == (why or "LEASE_TIMEOUT")

    def teardown(self) -> None:
        self.loop.close()

    def _is_open(self, lease: Lease) -> bool:
        return lease.job_id in self.open and self.open[lease.job_id][0].epoch == lease.epoch

    @invariant()
    def only_living_leases_are_current(self) -> None:
        for job in JOBS:
            lease, why, _ = self.open.get(job, (None, None, None))
            assert self.book.current(job) == (lease if why is None else None)


class ReaderMachine(RuleBasedStateMachine):
    """Chunks of several tensors, interleaved: each arrives whole and once, or the stream ends."""

    LIMITS = FrameLimits(max_tensor_bytes=3 * MIB, max_open_tensors=2, max_open_bytes=4 * MIB)

    def __init__(self) -> None:
        super().__init__()
        self.reader = FrameReader(self.LIMITS)
        self.under_way: dict[int, tuple[bytes, list[bytes]]] = {}  # site -> content, chunks to come
        self.begun: set[int] = set()

    sites = Bundle("sites")

    @rule(
        target=sites, site=st.integers(0, 2), size=st.sampled_from([0, 7, MIB + 1, 2 * MIB + 5, 2 * MIB + 9])
    )
    def begin(self, site: int, size: int) -> Any:
        if site in self.under_way:
            return multiple()
        content = bytes([site + 1]) * size
        address = TensorAddress(job_id="job-" + "0" * 32, epoch=1, version=0, kind=TensorKind.BLOB, site=site)
        tensor = WireTensor(dtype=DType.UINT8, shape=(size,), data=memoryview(content))
        chunks = [header + bytes(payload) for header, payload in tensor_frames(address, tensor)]
        self.under_way[site] = (content, chunks)
        return site

    @rule(site=sites)
    def send(self, site: int) -> None:
        if site not in self.under_way:
            return
        content, chunks = self.under_way[site]
        new, open_bytes = site not in self.begun, sum(len(self.under_way[s][0]) for s in self.begun)
        fits = len(self.begun) < 2 and open_bytes + len(content) <= self.LIMITS.max_open_bytes
        if new and not fits:
            self._refused(chunks[0], "TOO_MANY_OPEN_TENSORS")
            return
        received = self.reader.feed(chunks.pop(0))
        self.begun.add(site)
        if chunks:
            assert received == []
            return
        self.begun.discard(site)
        del self.under_way[site]
        (item,) = received
        assert isinstance(item, ReceivedTensor)
        assert (item.address.site, bytes(item.data)) == (site, content)

    @rule(site=sites)
    def repeat(self, site: int) -> None:
        """The chunk after the next one, or the last one again: out of order either way."""
        chunks = self.under_way[site][1] if site in self.begun else []
        if len(chunks) > 1:
            self._refused(chunks[1], "TENSOR_OUT_OF_ORDER")

    @rule(site=sites, at=st.integers(12, 87), bit=st.integers(0, 7))
    def damage(self, site: int, at: int, bit: int) -> None:
        if site in self.under_way:
            chunk = bytearray(self.under_way[site][1][0])
            chunk[at] ^= 1 << bit
            self._refused(bytes(chunk), None)

    def _refused(self, message: bytes, reason: str | None) -> None:
        with pytest.raises(ProtocolError) as caught:
            self.reader.feed(message)
        assert reason in (None, caught.value.reason)
        self.reader = FrameReader(self.LIMITS)  # a new stream begins with nothing
        self.under_way.clear()
        self.begun.clear()

    @invariant()
    def what_is_open_is_what_was_begun(self) -> None:
        assert self.reader.incomplete == bool(self.begun)


class JoinMachine(RuleBasedStateMachine):
    """A token makes one device unless it is reusable; an id belongs to one key; who is revoked stays out."""

    url = "sqlite://"

    def __init__(self) -> None:
        super().__init__()
        self.now = datetime(2026, 1, 2, tzinfo=UTC)
        self.loop = asyncio.new_event_loop()
        self.store = self._run(JobStore.open(self.url, now=lambda: self.now))
        self._run(self.store._database.run(self._forget_other_examples))
        self.devices: dict[str, dict[str, Any]] = {}

    def _run(self, coroutine: Any) -> Any:
        async def go() -> Any:
            return await coroutine

        return self.loop.run_until_complete(go())

    @staticmethod
    def _forget_other_examples(connection: Connection) -> None:
        for table in (schema.join_tokens, schema.devices):
            connection.execute(table.delete())

    tokens = Bundle("tokens")
    spent = Bundle("spent")

    @rule(target=tokens, trust=st.sampled_from(TrustClass), reusable=st.booleans())
    def make(self, trust: TrustClass, reusable: bool) -> dict[str, Any]:
        token, _ = self._run(
            self.store.devices.create_token(
                trust, reusable=reusable, valid=timedelta(hours=2), created_by="key-1"
            )
        )
        return {"token": token, "trust": trust, "reusable": reusable, "until": self.now + timedelta(hours=2)}

    @rule(target=spent, made=consumes(tokens), device=st.sampled_from(DEVICES), key=st.sampled_from("ab"))
    def join(self, made: dict[str, Any], device: str, key: str) -> Any:
        """With a token that nobody has used."""
        if made["until"] <= self.now:
            self._refused(made, device, key, Unauthenticated)
            return made
        known = self.devices.get(device)
        if known and (known["key"] != key or known["revoked"] or known["trust"] is not made["trust"]):
            self._refused(made, device, key, Conflict)
            return made if made["reusable"] else multiple()  # a refused join has used nothing up
        record = self._join(made, device, key)
        assert record.trust_class is made["trust"]
        self.devices[device] = {"key": key, "trust": made["trust"], "revoked": False}
        return made

    @rule(made=spent, device=st.sampled_from(("d8", "d9")))
    def join_again(self, made: dict[str, Any], device: str) -> None:
        if made["until"] <= self.now or not made["reusable"]:
            self._refused(made, device, "c", Unauthenticated)

    @rule(device=st.sampled_from(DEVICES), key=st.sampled_from("ab"))
    def come_in(self, device: str, key: str) -> None:
        known = self.devices.get(device)
        coming = self.store.devices.admitted(device, key * 64)
        if known and known["key"] == key and not known["revoked"]:
            assert self._run(coming).trust_class is known["trust"]
        else:
            with pytest.raises(Unauthenticated):
                self._run(coming)

    @rule(device=st.sampled_from(DEVICES))
    def revoke(self, device: str) -> None:
        if device in self.devices:
            self._run(self.store.devices.revoke(device))
            self.devices[device]["revoked"] = True

    @rule(hours=st.integers(1, 3))
    def pass_time(self, hours: int) -> None:
        self.now += timedelta(hours=hours)

    def _join(self, made: dict[str, Any], device: str, key: str) -> Any:
        until = self.now + timedelta(days=3000)
        return self._run(self.store.devices.join(made["token"], device, key * 64, until=until))

    def _refused(self, made: dict[str, Any], device: str, key: str, kind: type[Exception]) -> None:
        with pytest.raises(kind):
            self._join(made, device, key)

    def teardown(self) -> None:
        self._run(self.store.close())
        self.loop.close()


@pytest.mark.timeout(1800)
def test_devices_join_alike_on_either_database(url: str, request: pytest.FixtureRequest) -> None:
    class Machine(JoinMachine):
        pass

    Machine.url = url
    run_machine(Machine, 3, request)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("machine", "examples"), [(LeaseMachine, 15), (ReaderMachine, 40)])
def test_it_does_what_its_model_does(
    machine: type[RuleBasedStateMachine], examples: int, request: pytest.FixtureRequest
) -> None:
    run_machine(machine, examples, request)


def run_machine(machine: type[RuleBasedStateMachine], examples: int, request: pytest.FixtureRequest) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25 * examples if request.config.getoption("--fuzz") else examples,
            stateful_step_count=30,
            deadline=None,
            database=None,
            derandomize=not request.config.getoption("--fuzz"),
            suppress_health_check=list(HealthCheck),
        ),
    )
