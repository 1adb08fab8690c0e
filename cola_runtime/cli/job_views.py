"""How jobs, events and steps look in a terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from cola_runtime.cli.output import (
    age,
    byte_size,
    clean,
    number,
    print_fields,
    print_table,
    state_text,
    stdout,
)

if TYPE_CHECKING:
    from cola_runtime.client.sdk import Checkpoint, Evaluation, Event, Job, JobEstimate, Step
    from cola_runtime.spec import PartSpec

SHORT_ID_CHARACTERS = 12
LEVEL_STYLES = {"info": "", "warning": "yellow", "error": "red"}
SPARKS = "▁▂▃▄▅▆▇█"
CSV_COLUMNS = (
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens",
    "label_tokens",
    "bytes_up",
    "bytes_down",
    "base_seconds",
    "device_seconds",
    "device_id",
    "epoch",
    "applied_at",
)


def short_id(job_id: str) -> str:
    return job_id[:SHORT_ID_CHARACTERS]


def print_jobs(jobs: Sequence[Job]) -> None:
    columns = ("JOB", "NAME", "STATE", ">STEP", ">LOSS", "DEVICE", "WAITING FOR", ">CREATED")
    rows = [
        (
            short_id(job.job_id),
            job.name,
            state_text(job.state),
            f"{job.version}/{job.total_steps}",
            number(job.last_loss),
            job.device_id or "-",
            job.failure_reason or job.waiting_reason or "-",
            age(job.created_at),
        )
        for job in jobs
    ]
    print_table(columns, rows, empty="No jobs yet. `cola run -f job.yaml` makes one.")


def print_job(job: Job) -> None:
    print_fields(
        {
            "job": job.job_id,
            "name": job.name,
            "state": state_text(job.state),
            "waiting for": job.waiting_reason,
            "failure": f"{job.failure_reason}: {job.failure_message}" if job.failure_reason else "",
            "base model": f"{job.base_model}, replica {job.replica}" if job.replica else job.base_model,
            "adapter": "; ".join(map(_adapter_part, job.spec.adapter_parts)),
            "step": f"{job.version} of {job.total_steps}",
            "loss": number(job.last_loss),
            "held-out loss": held_out(job),
            "tokens": _tokens(job),
            "wire": f"{job.encoding}, {byte_size(job.bytes_up)} up, {byte_size(job.bytes_down)} down",
            "time": f"base {job.base_seconds:.1f} s, device {job.device_seconds:.1f} s",
            "deadline": _deadline(job),
            "device": job.device_id,
            "created": f"{job.created_at} ({age(job.created_at)})",
            "finished": job.finished_at,
        }
    )


def print_estimate(estimate: JobEstimate) -> None:
    held_out = f", and {estimate.evaluation_tokens:,} of held-out rows" if estimate.evaluation_tokens else ""
    wire = f"{byte_size(estimate.bytes_up)} up, {byte_size(estimate.bytes_down)} down"
    meets = {None: "", True: "it is met", False: "it is missed"}[estimate.meets_deadline]
    print_fields(
        {
            "steps": f"{estimate.steps:,}",
            "tokens": f"{estimate.tokens:,} ({estimate.label_tokens:,} labels){held_out}",
            "time": f"{estimate.seconds:,.1f} s, of them {estimate.base_seconds:,.1f} s of the base model, "
            f"of which it has {estimate.share:.0%}",
            "deadline": meets,
            "wire": f"{estimate.encoding}, {wire}",
            "memory": f"{byte_size(estimate.bank_bytes)} beside the base model",
            "assuming": "\n".join(estimate.assumptions),
        }
    )


def _deadline(job: Job) -> str:
    if not job.deadline_missed_at:
        return job.deadline_at
    return f"{job.deadline_at}, missed"


def _tokens(job: Job) -> str:
    evaluated = f", and {job.evaluation_tokens:,} of held-out rows" if job.evaluation_tokens else ""
    repeated = f"; {job.repeated_steps} steps were repeated" if job.repeated_steps else ""
    return f"{job.tokens:,} ({job.label_tokens:,} labels){evaluated}{repeated}"


def _adapter_part(part: PartSpec) -> str:
    """`lora, rank 8, alpha 16, all-linear`: what differs from the kind's defaults, rank and alpha always."""
    shown = {"rank", "alpha", "hidden"}
    fields = part.model_dump(exclude={"kind", "target_modules"})
    defaults = {name: field.default for name, field in type(part).model_fields.items()}
    texts = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in fields.items()
        if name in shown or value != defaults[name]
    ]
    targets = part.target_modules
    return ", ".join([part.kind, *texts, targets if isinstance(targets, str) else " ".join(targets)])


def held_out(job: Job) -> str:
    before, after = job.evaluation_loss_before, job.evaluation_loss_after
    return "" if before is None else f"{number(before)} before, {number(after)} after"


def event_line(event: Event) -> Text:
    clock = event.created_at[11:19]
    style = LEVEL_STYLES.get(event.level, "")
    return Text.assemble(
        (f"{clean(clock)} ", "dim"), (f"{clean(event.kind):<18} ", "cyan"), (clean(event.message), style)
    )


def print_events(events: Sequence[Event]) -> None:
    rows = [
        (
            event.id,
            event.created_at[:19],
            event.level,
            event.kind,
            event.message,
            json.dumps(dict(event.data)),
        )
        for event in events
    ]
    print_table((">ID", "TIME", "LEVEL", "KIND", "MESSAGE", "DATA"), rows, empty="No events.")


def print_steps(steps: Sequence[Step]) -> None:
    rows = [
        (
            step.step,
            number(step.loss),
            f"{step.learning_rate:.3g}",
            number(step.gradient_norm, 3),
            step.tokens,
            step.label_tokens,
            byte_size(step.bytes_up),
            byte_size(step.bytes_down),
            step.device_id,
            step.epoch,
        )
        for step in steps
    ]
    columns = (
        ">STEP",
        ">LOSS",
        ">LR",
        ">GRAD NORM",
        ">TOKENS",
        ">LABELS",
        ">UP",
        ">DOWN",
        "DEVICE",
        ">EPOCH",
    )
    print_table(columns, rows, empty="No steps yet.")
    if len(steps) > 1:
        stdout().print(Text(f"loss {sparkline([step.loss for step in steps])}", style="cyan"))


def steps_csv(steps: Sequence[Step]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows([getattr(step, name) for name in CSV_COLUMNS] for step in steps)
    return text.getvalue()


def print_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """The primary metric is the first column; a sparkline of it below."""
    primary = evaluations[0].primary if evaluations else ""
    names = sorted({name for each in evaluations for name in each.metrics}, key=lambda n: (n != primary, n))
    rows = [
        (
            each.step,
            *(number(each.metrics.get(name)) for name in names),
            _best_mark(each.best),
            age(each.created_at),
        )
        for each in evaluations
    ]
    columns = (">STEP", *(f">{name.upper()}" for name in names), "BEST", ">MADE")
    print_table(columns, rows, empty="No evaluations: the job has no held-out rows, or has not begun.")
    if len(evaluations) > 1:
        stdout().print(Text(f"{primary} {sparkline([each.value for each in evaluations])}", style="cyan"))


def _best_mark(best: bool) -> str:
    return "best" if best else ""


def print_checkpoints(checkpoints: Sequence[Checkpoint]) -> None:
    rows = [
        (
            each.version,
            byte_size(each.bytes),
            each.sha256[:16],
            _best_mark(each.best),
            "pinned" if each.pinned else "",
            age(each.created_at),
        )
        for each in checkpoints
    ]
    print_table(
        (">VERSION", ">SIZE", "SHA-256", "BEST", "PINNED", ">MADE"), rows, empty="No checkpoints yet."
    )


def sparkline(values: Sequence[float], *, width: int = 40) -> str:
    """The values as bars of eight heights, thinned to `width`."""
    if len(values) > width:
        values = [values[i * (len(values) - 1) // (width - 1)] for i in range(width)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = (high - low) or 1.0
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1))] for value in values)
