"""What `max_staleness: 1` costs in held-out loss, and saves in time, against exact jobs of the same seeds.

    python benchmarks/staleness.py [--quick] [--json] [--seed N] [--picture FILE.png]

Both jobs of a pair have the same initial weights and the same rows in the same order. All pairs are trained
mixed on one service in this process (store, gRPC streams, base model and devices are the real ones). Held-out
rows are evaluated at intervals; the step behind an evaluation is exact, as in any job. SmolLM2 on the demo's
film dialogue, with --quick the tiny random Llama. Then lone jobs of each kind, in turns, for the time; their
taps are activations, so that the device has work to overlap.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cola_runtime.base_model.pretrained import prepare_smollm2
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.client.values import Evaluation
from cola_runtime.demo.datasets import demo_tenants
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import four_tenants, service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.record import argument_parser, emit, record
from cola_runtime.testing.tiny_models import save_tiny_model

JOB_TIMEOUT_SECONDS = 3600.0
KINDS = ("exact", "stale")  # max_staleness 0 and 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is trained: a job of each kind for every rate and seed."""

    name: str
    model: Path
    training: bytes
    held_out: bytes
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    evaluate_every: int
    timed_steps: int


Curves = dict[tuple[str, float, int], list[Evaluation]]
"""(kind, learning rate, seed) -> the job's evaluations."""


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--picture", type=Path, help="draw the curves into this PNG file")
    arguments = parser.parse_args()
    started = datetime.now(UTC)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trial = (quick_trial if arguments.quick else smollm2_trial)(Path(folder), arguments.seed)
        curves, step_seconds = asyncio.run(measure(trial, Path(folder)))
    if arguments.picture is not None:
        draw(trial, curves, arguments.picture)
    results = {
        "model": trial.name,
        "steps": trial.steps,
        "evaluate_every": trial.evaluate_every,
        "held_out_loss": {f"{rate:g}": compared(curves, rate, trial.seeds) for rate in trial.rates},
        "lone_step_seconds": step_seconds,
        "lone_stale_over_exact": step_seconds["stale"] / step_seconds["exact"],
    }
    emit(record("staleness", results, seed=arguments.seed, started=started), arguments.json)


def quick_trial(folder: Path, seed: int) -> Trial:
    first, second = four_tenants("model", steps=1, encoding="auto", seed=seed)[:2]
    return Trial(
        name="tiny llama",
        model=save_tiny_model("llama", folder / "model"),
        training=first.training,
        held_out=second.training,
        rates=(1e-3, 1e-2),
        seeds=(seed, seed + 1),
        steps=30,
        evaluate_every=10,
        timed_steps=10,
    )


def smollm2_trial(folder: Path, seed: int) -> Trial:
    film = demo_tenants()[0]
    return Trial(
        name="smollm2-135m-instruct",
        model=prepare_smollm2(Path(".cache/models")),
        training=film.training,
        held_out=film.held_out,
        rates=(1e-3, 4e-3),
        seeds=(seed, seed + 1, seed + 2),
        steps=30,
        evaluate_every=10,
        timed_steps=8,
    )


async def measure(trial: Trial, folder: Path) -> tuple[Curves, dict[str, float]]:
    settings = service_for(folder / "service", model=trial.model, name="model", dtype="float32")
    async with running_in_process(settings) as (service, _):
        client = await tenant_client(service, "staleness")
        async with client:
            return await train_pairs(client, trial), await time_lone_jobs(client, trial)


async def train_pairs(client: AsyncClient, trial: Trial) -> Curves:
    handles = {
        key: await client.submit(
            job_spec(trial, *key, evaluation={"every": trial.evaluate_every, "keep_best": False}),
            training=trial.training,
            evaluation=trial.held_out,
        )
        for key in itertools.product(KINDS, trial.rates, trial.seeds)
    }
    for handle in handles.values():
        await handle.wait(JOB_TIMEOUT_SECONDS)
    return {key: await handle.evaluations() for key, handle in handles.items()}


async def time_lone_jobs(client: AsyncClient, trial: Trial) -> dict[str, float]:
    """Median seconds from one applied step to the next; the kinds take turns, one job at a time."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn, kind in itertools.product(range(3), KINDS):
        spec = job_spec(trial, kind, trial.rates[0], turn, steps=trial.timed_steps, encoding="activations")
        handle = await client.submit(spec, training=trial.training)
        await handle.wait(JOB_TIMEOUT_SECONDS)
        seconds[kind] += await _step_seconds(handle)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


async def _step_seconds(handle: AsyncJobHandle) -> list[float]:
    moments = [datetime.fromisoformat(step.applied_at) for step in await handle.metrics()]
    return [(after - before).total_seconds() for before, after in itertools.pairwise(moments)]


def job_spec(trial: Trial, kind: str, rate: float, seed: int, **changes: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": f"{kind}-{seed}",
            "base_model": "model",
            "adapter": {"rank": 8},
            "optimizer": {"learning_rate": rate, "max_grad_norm": 1.0},
            "steps": trial.steps,
            "rows_per_step": 4,
            "seed": seed,
            "checkpoint_every": trial.steps,  # no other step is made exact
            "max_staleness": KINDS.index(kind),
            **changes,
        }
    )


def compared(curves: Curves, rate: float, seeds: Sequence[int]) -> dict[str, Any]:
    """Held-out loss at each evaluation, mean over seeds; and each seed's stale less exact at the last."""
    last = {kind: [curves[kind, rate, seed][-1].value for seed in seeds] for kind in KINDS}
    return {
        **{kind: mean_curve(curves, kind, rate, seeds) for kind in KINDS},
        "stale_less_exact": [stale - exact for exact, stale in zip(*last.values(), strict=True)],
    }


def mean_curve(curves: Curves, kind: str, rate: float, seeds: Sequence[int]) -> list[float]:
    runs = [[each.value for each in curves[kind, rate, seed]] for seed in seeds]
    return [statistics.fmean(values) for values in zip(*runs, strict=True)]


def draw(trial: Trial, curves: Curves, path: Path) -> None:
    """Held-out loss over steps, one panel a rate: each seed thin, the mean over seeds thick."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(trial.rates), 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(trial.rates), squeeze=False)[0]
    for panel, rate in zip(panels, trial.rates, strict=True):
        for kind, colour in zip(KINDS, ("#0072B2", "#D55E00"), strict=True):
            runs = [[each.value for each in curves[kind, rate, seed]] for seed in trial.seeds]
            steps = [each.step for each in curves[kind, rate, trial.seeds[0]]]
            for run in runs:
                panel.plot(steps, run, color=colour, linewidth=0.8, alpha=0.45)
            mean = mean_curve(curves, kind, rate, trial.seeds)
            panel.plot(steps, mean, "o-", color=colour, label=f"max_staleness {KINDS.index(kind)}")
        panel.set_title(f"learning rate {rate:g}")
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss (nats per label token)")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{trial.name}, LoRA r = 8, {len(trial.seeds)} seeds (thin) and their mean")
    figure.savefig(path)


if __name__ == "__main__":
    main()
