"""Whatever order calls come in, the store agrees with a model of eight lines, and its invariants hold."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from job_samples import new_job, step

from cola_runtime import ids
from cola_runtime.errors import Conflict, Fenced
from cola_runtime.jobs.records import JobRecord
from cola_runtime.jobs.state import TERMINAL_STATES, TRANSITIONS, JobState, Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.types import Lease

TOTAL_STEPS = 4
Result = TypeVar("Result")


class JobMachine(RuleBasedStateMachine):
    url = "sqlite://"  # machines on one database make a job each

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.run(self.create())
        self.state = JobState.QUEUED
        self.version = 0
        self.epoch = 0
        self.leased = False
        self.event_count = 1

    async def create(self) -> None:
        self.store = await JobStore.open(self.url)
        tenant = await self.store.create_tenant(f"acme-{ids.new_job_id()}")
        self.job_id = (await self.store.create_job(new_job(tenant, total_steps=TOTAL_STEPS))).job_id

    def run(self, call: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(call)

    def attempt(self, call: Coroutine[Any, Any, object], *, allowed: bool) -> None:
        try:
            self.run(call)
        except (Conflict, Fenced):
            assert not allowed
        else:
            assert allowed

    @rule(trigger=st.sampled_from(Trigger))
    def move(self, trigger: Trigger) -> None:
        allowed = trigger in TRANSITIONS[self.state]
        self.attempt(self.store.transition(self.job_id, trigger), allowed=allowed)
        if allowed:
            self.state = TRANSITIONS[self.state][trigger]
            self.event_count += 1
            self.leased = self.leased and self.state is JobState.RUNNING

    @rule()
    def lease(self) -> None:
        allowed = self.state in (JobState.QUEUED, JobState.RUNNING)
        self.attempt(self.store.grant_lease(self.job_id, "device-1"), allowed=allowed)
        if allowed:
            self.epoch += 1
            self.event_count += 1
            self.leased = True

    @rule(number=st.integers(1, TOTAL_STEPS), epoch_back=st.integers(0, 1))
    def record(self, number: int, epoch_back: int) -> None:
        lease = self.held(epoch_back)
        may = self.leased and epoch_back == 0 and self.state is JobState.RUNNING
        known = [each for each in self.run(self.store.steps(self.job_id)) if each.step == number]
        repeated = bool(known) and known[0].epoch == self.epoch
        is_next = number == self.version + 1
        self.attempt(self.store.record_step(step(lease, number)), allowed=may and (repeated or is_next))
        if may and is_next:
            self.version += 1
            self.event_count += 1

    @rule(version=st.integers(0, TOTAL_STEPS), epoch_back=st.integers(0, 1))
    def rewind(self, version: int, epoch_back: int) -> None:
        allowed = self.leased and epoch_back == 0 and version <= self.version
        self.attempt(self.store.rewind(self.held(epoch_back), version), allowed=allowed)
        if allowed and version < self.version:
            self.version = version
            self.event_count += 1

    def held(self, epoch_back: int) -> Lease:
        return Lease(job_id=self.job_id, epoch=self.epoch - epoch_back, device_id="device-1")

    @invariant()
    def the_record_is_the_models(self) -> None:
        job: JobRecord = self.run(self.store.job(self.job_id))
        assert (job.state, job.version, job.epoch) == (self.state, self.version, self.epoch)
        assert (job.device_id is not None) == self.leased
        assert job.ended == (job.state in TERMINAL_STATES)

    @invariant()
    def steps_have_no_gap_and_add_up(self) -> None:
        steps = self.run(self.store.steps(self.job_id))
        assert [each.step for each in steps] == list(range(1, self.version + 1))
        assert sum(each.tokens for each in steps) == self.run(self.store.job(self.job_id)).tokens

    @invariant()
    def every_change_is_one_event(self) -> None:
        assert len(self.run(self.store.events(self.job_id))) == self.event_count

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.close()


def test_the_store_does_what_the_model_does(url: str) -> None:
    class Machine(JobMachine):
        pass

    served = url.startswith("postgresql")
    Machine.url = url if served else JobMachine.url
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=8 if served else 15,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
