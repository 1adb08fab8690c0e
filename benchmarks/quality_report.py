"""What the cells of quality.py say: figures over the seeds, coincidence with peft, table and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality_studies import BOUND, INTERVALS, Study, cell_of

from cola_runtime.testing.cells import Cells
from cola_runtime.testing.exactness import largest_difference

LABELS = {
    "full": "full fine-tuning",
    "peft": "LoRA, peft",
    "lora": "LoRA (= joint)",
    "linear": "Linear",
    "mlp": "MLP",
    "alone": "8 tenants, alone",
    "merged": "8 alone, merged after",
    "collaboration": "8 tenants, collaboration",
    **{f"interval-{interval}": f"LoRA, interval {interval}" for interval in INTERVALS},
}
COLOURS = {"full": "#000000", "peft": "#999999", "lora": "#0072B2", "linear": "#D55E00", "mlp": "#009E73"}


def summary(cells: Cells, studies: Sequence[Study], seeds: Sequence[int]) -> dict[str, Any]:
    """Per data set: each arm's measures by seed, how near LoRA is to peft; which cells are missing."""
    coincidence = {study.name: coincidences(cells, study, seeds) for study in studies}
    return {
        "seeds": list(seeds),
        "arms": {
            study.name: {arm: measured(cells, study, arm, seeds) for arm in LABELS} for study in studies
        },
        "untrained": {study.name: untrained(cells, study, seeds[0]) for study in studies},
        "rates": {study.name: study.chosen for study in studies},
        "coincidence": coincidence,
        "missing": [
            cell_of(study, arm, seed).name
            for study in studies
            for arm in LABELS
            for seed in seeds
            if arm != "merged" and found(cells, study, arm, seed) is None
        ],
        "within_bounds": all(
            within(study, coincidence[study.name]) for study in studies if coincidence[study.name]
        ),
    }


def found(cells: Cells, study: Study, arm: str, seed: int) -> dict[str, Any] | None:
    return cells.find(cell_of(study, arm, seed))


def measured(cells: Cells, study: Study, arm: str, seeds: Sequence[int]) -> dict[str, list[float]]:
    """By measure, one value a seed; seeds that are missing are left out."""
    of_seeds = [measures for seed in seeds if (measures := measures_of(cells, study, arm, seed)) is not None]
    names = ("loss", study.metric if study.metric != "loss" else "perplexity")
    return {name: [each[name] for each in of_seeds] for name in names}


def measures_of(cells: Cells, study: Study, arm: str, seed: int) -> dict[str, float] | None:
    """`merged`: the mean of the adapters of those who trained alone, in the same cell."""
    cell = found(cells, study, "alone" if arm == "merged" else arm, seed)
    measures: dict[str, float] | None = (
        None if cell is None else cell["merged" if arm == "merged" else "measures"]
    )
    return measures


def untrained(cells: Cells, study: Study, seed: int) -> dict[str, float]:
    cell = found(cells, study, "lora", seed)
    return {} if cell is None else cell["untrained"]


def coincidences(cells: Cells, study: Study, seeds: Sequence[int]) -> dict[str, float]:
    """Largest over the seeds: of the adapters' tensors and the held-out loss, relative, from peft's LoRA."""
    worst: dict[str, float] = {}
    for arm in ("lora", *(f"interval-{interval}" for interval in INTERVALS)):
        pairs = [
            (ours, theirs, seed)
            for seed in seeds
            if (ours := found(cells, study, arm, seed)) and (theirs := found(cells, study, "peft", seed))
        ]
        for ours, theirs, seed in pairs:
            tensors = largest_difference(
                *(cells.weights(cell_of(study, each, seed).name) for each in (arm, "peft"))
            )
            loss = abs(ours["measures"]["loss"] / theirs["measures"]["loss"] - 1)
            worst[f"{arm}_tensors"] = max(tensors, worst.get(f"{arm}_tensors", 0.0))
            worst[f"{arm}_loss"] = max(loss, worst.get(f"{arm}_loss", 0.0))
    exact = found(cells, study, "float64", seeds[0])
    if exact is not None:
        worst["float64_tensors"] = exact["max_relative_difference"]
        worst["float64_loss"] = exact["loss_relative_difference"]
    return worst


def within(study: Study, coincidence: dict[str, float]) -> bool:
    bounds = {"float64_tensors": study.exact_bound, "float64_loss": study.exact_bound}
    return all(value <= bounds.get(name, BOUND) for name, value in coincidence.items())


def table(results: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    names = list(results["arms"])
    measures = {name: next(iter(results["arms"][name].values())).keys() for name in names}
    columns = [(name, measure) for name in names for measure in measures[name]]
    lines = ["| arm | " + " | ".join(f"{name}, {measure}" for name, measure in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    before = [f"{results['untrained'][name].get(measure, float('nan')):.4f}" for name, measure in columns]
    lines.append(f"| untrained | {' | '.join(before)} |")
    for arm, label in LABELS.items():
        values = [_spread(results["arms"][name][arm][measure]) for name, measure in columns]
        lines.append(f"| {label} | {' | '.join(values)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "missing"
    seeds = "" if len(values) == 3 else f" ({len(values)} seed{'s' * (len(values) > 1)})"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}{seeds}"


def draw(results: dict[str, Any], cells: Cells, studies: Sequence[Study], folder: Path) -> None:
    """quality.png: held-out measures of all arms. quality_loss.png: the training losses of the first five."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for name, height, panel_of in (("quality.png", 4.2, _arms_panel), ("quality_loss.png", 3.4, _loss_panel)):
        figure = Figure(figsize=(4.6 * len(studies), height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(studies), squeeze=False)[0]
        for panel, study in zip(panels, studies, strict=True):
            panel_of(panel, results, cells, study)
            panel.grid(alpha=0.3)
        panels[0].legend(frameon=False, fontsize=8)
        figure.savefig(folder / name)


def _arms_panel(panel: Any, results: dict[str, Any], cells: Cells, study: Study) -> None:
    arms = list(reversed(LABELS))
    for place, arm in enumerate(arms):
        values = results["arms"][study.name][arm][study.metric]
        if values:
            colour = COLOURS.get(arm, "#56B4E9" if arm.startswith("interval") else "#CC79A7")
            seeds = "each seed" if place == 0 else None
            panel.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.5, label=seeds)
            mean = "their mean" if place == 0 else None
            panel.plot(statistics.fmean(values), place, "|", color=colour, markersize=16, label=mean)
    panel.set_yticks(range(len(arms)), [LABELS[arm] for arm in arms], fontsize=8)
    better = "held-out accuracy (right is better)"
    panel.set_xlabel(
        better if study.metric == "accuracy" else "held-out loss, nats a label token (left is better)"
    )
    before = results["untrained"][study.name].get(study.metric, float("nan"))
    panel.set_title(f"{study.name}, {study.base_model}; untrained {before:.3f}", fontsize=9)


def _loss_panel(panel: Any, results: dict[str, Any], cells: Cells, study: Study) -> None:
    window = max(1, study.steps // 10)
    for arm, colour in COLOURS.items():
        runs = [cell["losses"] for seed in results["seeds"] if (cell := found(cells, study, arm, seed))]
        if not runs:
            continue
        mean = [statistics.fmean(losses) for losses in zip(*runs, strict=True)]
        smooth = [statistics.fmean(mean[max(0, at + 1 - window) : at + 1]) for at in range(len(mean))]
        wide = 5 if arm == "peft" else 1.5
        panel.plot(range(1, len(smooth) + 1), smooth, color=colour, linewidth=wide, label=LABELS[arm])
    panel.set_title(
        f"{study.name}: training loss, mean of seeds, of the last {window} step{'s' * (window > 1)}",
        fontsize=9,
    )
    panel.set_xlabel("step")
