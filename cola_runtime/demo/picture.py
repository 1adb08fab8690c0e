"""loss_curves.png: one panel per tenant, all with the same axes in the same units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_runtime.demo.result import TenantResult, smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinguishable with every common form of colour blindness. Shared with the report.
TENANT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK = "#2b3440"
_FAINT = "#d9dee5"
_COLUMNS = 2
_PANEL_INCHES = (5.4, 3.1)


def write_loss_curves(tenants: Sequence[TenantResult], path: Path) -> Path:
    """Draw training loss over steps, and held-out loss before and after; returns `path`.

    Thin line: each step's loss; thick line: mean over the last 5; diamonds: held-out loss. Loads matplotlib,
    with the file backend only.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_text_style()):
        columns = min(_COLUMNS, max(1, len(tenants)))
        rows = max(1, math.ceil(len(tenants) / columns))
        size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows + 0.7)
        figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        _draw_panels(figure, tenants, shape=(rows, columns))
        figure.savefig(path)
    return path


def _text_style() -> dict[str, Any]:
    return {
        "font.size": 10.5,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.parse_math": False,
    }


def _draw_panels(figure: Figure, tenants: Sequence[TenantResult], *, shape: tuple[int, int]) -> None:
    panels = figure.subplots(*shape, squeeze=False).ravel()
    for index, panel in enumerate(panels):
        if index < len(tenants):
            _draw_tenant(panel, tenants[index], colour=TENANT_COLOURS[index % len(TENANT_COLOURS)])
        else:
            panel.set_axis_off()
    figure.supxlabel("optimizer step", fontsize=11.5)
    figure.supylabel("loss (nats per label token)", fontsize=11.5)
    figure.suptitle("Loss of each tenant, trained together on one frozen base model", fontsize=13.5)


def _draw_tenant(panel: Any, tenant: TenantResult, *, colour: str) -> None:
    steps = [point.step for point in tenant.steps]
    losses = tuple(point.loss for point in tenant.steps)
    panel.plot(steps, losses, color=colour, linewidth=1, alpha=0.4, label="each step")
    panel.plot(steps, smoothed(losses), color=colour, linewidth=2.4, label="mean of 5 steps")
    last = steps[-1] if steps else 0
    held_out = (tenant.loss_before, tenant.loss_after)
    panel.plot(
        (0, last),
        held_out,
        "D",
        color="white",
        markeredgecolor=_INK,
        markersize=7,
        label="held-out",
        zorder=5,
    )
    for step, loss, side in ((0, tenant.loss_before, 1), (last, tenant.loss_after, -1)):
        _label_loss(panel, step, loss, side=side)
    _dress(panel, tenant, last=last)


def _label_loss(panel: Any, step: int, loss: float, *, side: int) -> None:
    """Write a held-out loss beside its diamond, on the side that points into the panel."""
    panel.annotate(
        f"{loss:.3f}",
        (step, loss),
        xytext=(side * 8, 8),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        fontsize=9.5,
        fontweight="bold",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        zorder=6,
    )


def _dress(panel: Any, tenant: TenantResult, *, last: int) -> None:
    settings = f"rank {tenant.rank}, {tenant.rows_per_step} rows a step, {tenant.encoding}"
    panel.set_title(tenant.name, fontsize=12, fontweight="bold", loc="left")
    panel.set_title(settings, fontsize=9.5, loc="right")
    panel.set_xlim(-0.03 * max(last, 1), 1.03 * max(last, 1))
    panel.margins(y=0.18)
    panel.grid(color=_FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    for edge in ("top", "right"):
        panel.spines[edge].set_visible(False)
    panel.legend(fontsize=8.5, frameon=False, loc="best", ncols=3)
