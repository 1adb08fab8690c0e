"""A tenant's loss curve as inline SVG that follows the page's light or dark colours."""

from __future__ import annotations

from dataclasses import dataclass

from cola_runtime.demo.result import TenantResult, smoothed

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 14, 38
TICKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Maps steps [0, last] and losses [low, high] to the drawing's pixels."""

    last: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / self.last, 1)

    def y(self, loss: float) -> float:
        share = (loss - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)


def loss_curve_svg(tenant: TenantResult) -> str:
    """Thin: each step; thick: mean of 5; diamonds: held-out loss before and after. Holds no outside text."""
    losses = tuple(point.loss for point in tenant.steps)
    scale = _scale(tenant, losses)
    steps = tuple(point.step for point in tenant.steps)
    parts = [
        *_grid(scale),
        _polyline(scale, steps, losses, css="each"),
        _polyline(scale, steps, smoothed(losses), css="mean"),
        _diamond(scale, 0, tenant.loss_before),
        _diamond(scale, scale.last, tenant.loss_after),
    ]
    label = f"loss from {tenant.loss_before:.3f} to {tenant.loss_after:.3f} nats per label token"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _scale(tenant: TenantResult, losses: tuple[float, ...]) -> _Scale:
    values = (*losses, tenant.loss_before, tenant.loss_after)
    margin = 0.08 * (max(values) - min(values)) or 0.1
    last = max((point.step for point in tenant.steps), default=1)
    return _Scale(last=max(last, 1), low=min(values) - margin, high=max(values) + margin)


def _grid(scale: _Scale) -> list[str]:
    """Lines and numbers of the axes, and what they measure."""
    parts = []
    for tick in range(TICKS + 1):
        loss = scale.low + (scale.high - scale.low) * tick / TICKS
        y = scale.y(loss)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{loss:.2f}</text>')
    for step in sorted({round(scale.last * tick / TICKS) for tick in range(TICKS + 1)}):
        parts.append(f'<text x="{scale.x(step)}" y="{HEIGHT - 21}" text-anchor="middle">{step}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">optimizer step</text>')
    return parts


def _polyline(scale: _Scale, steps: tuple[int, ...], losses: tuple[float, ...], *, css: str) -> str:
    points = " ".join(f"{scale.x(step)},{scale.y(loss)}" for step, loss in zip(steps, losses, strict=True))
    return f'<polyline class="{css}" points="{points}"/>'


def _diamond(scale: _Scale, step: int, loss: float) -> str:
    x, y = scale.x(step), scale.y(loss)
    return f'<path class="held" d="M{x} {y - 6}l6 6l-6 6l-6 -6z"/>'
