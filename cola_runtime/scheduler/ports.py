"""What the coordinator asks of the base model (BaseModelService, or over Ray RemoteBaseModel), and who is
told of what devices do wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cola_runtime.adapter_spec import LeaseTerms
from cola_runtime.trace.spans import ProcessSpans
from cola_runtime.types import (
    BaseEvent,
    BaseModelDescription,
    BaseStep,
    BaseStepResult,
    Lease,
)

FaultListener = Callable[[str, str], None]
"""(device, reason of reasons.py; "" for none)"""


def nobody_hears(_device_id: str, _reason: str) -> None:
    """A FaultListener that does nothing."""


class BaseModelPort(Protocol):
    async def describe(self) -> BaseModelDescription: ...

    async def lease(self, lease: Lease, terms: LeaseTerms) -> None:
        """Accept the lease's device and epoch from now on; older epochs are fenced."""

    async def end_lease(self, job_id: str, epoch: int) -> None: ...

    async def forget_steps(self, job_id: str, epoch: int, *, before: int) -> None:
        """What was retained for steps of the lease that lead to versions up to `before` may go."""

    async def dismiss_device(self, device_id: str) -> None:
        """End the device's gradient stream; tickets that it was given before open none."""

    async def run(self, step: BaseStep) -> BaseStepResult: ...

    async def next_events(self, after: int) -> tuple[int, list[BaseEvent]]:
        """Events numbered above `after`, as soon as there is one; or none after a few seconds."""

    async def record_spans(self, on: bool) -> ProcessSpans:
        """Record what it does from now on, or no more; what was recorded until now."""

    async def generate(
        self,
        job_id: str | None,
        prompts: Sequence[Sequence[int]],
        *,
        checkpoint: bytes | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Sequence[int],
    ) -> list[list[int]]:
        """New tokens for every prompt, from the resident adapter, else from `checkpoint`; job None: the bare
        base model.
        """
