"""Made-up results, for tests of how they are shown."""

from __future__ import annotations

from dataclasses import replace

from cola_runtime.demo.result import DemoReport, ServiceResult, StepPoint, TenantResult

FILM = TenantResult(
    name="film",
    description="Film dialogue",
    rank=8,
    encoding="adapter_gradient",
    rows_per_step=8,
    learning_rate=2e-3,
    steps=tuple(
        StepPoint(step=step, loss=4.0 - step / 10, gradient_norm=1.0, learning_rate=2e-3)
        for step in range(1, 13)
    ),
    training_rows=160,
    held_out_rows=24,
    loss_before=4.25,
    loss_after=3.125,
    prompt="where have you been?",
    generation_before="in the bath. in the bath.",
    generation_after="at the club.",
    bytes_up=12 << 20,
    bytes_down=6 << 20,
    tokens_per_second=83.4,
    devices=("device-0", "device-1"),
    adapter_folder="demo-output/adapters/film",
    peft_loss=3.125003,
)
SPAM = replace(FILM, name="spam", encoding="activations", peft_loss=3.2)

REPORT = DemoReport(
    started_at="2026-11-22T10:00:00Z",
    service=ServiceResult(
        base_model="tiny",
        base_busy=0.934,
        base_steps=24,
        wall_seconds=171.2,
        peak_memory_bytes=3 << 30,
        machine="two cores",
        versions={"torch": "2.13.0"},
    ),
    tenants=(FILM, SPAM),
)
