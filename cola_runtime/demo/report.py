"""report.html: one file that needs nothing else, made from a DemoReport; and loss_curves.png beside it.

Everything that comes from outside (prompts, generated text, names, paths) is escaped, and the page forbids
scripts and outside resources by its own content security policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

from cola_runtime.demo.curves import loss_curve_svg
from cola_runtime.demo.page_style import STYLE
from cola_runtime.demo.picture import TENANT_COLOURS, write_loss_curves
from cola_runtime.demo.result import PEFT_LOSS_TOLERANCE, DemoReport, TenantResult

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_LEGEND = (
    "Thin line: loss of each step. Thick line: mean of 5 steps. Diamonds: held-out loss before and after. "
    "All in nats per label token."
)
_NOT_RUN = '<span class="soft">not run</span>'
_COLUMNS = (
    *("Tenant", "Rank", "Encoding", "Rows × steps", "Held-out loss", "Perplexity"),
    *("Sent up", "Sent down", "Tokens/s", "Checks"),
)


def write_report(report: DemoReport, folder: Path) -> tuple[Path, Path]:
    """Write `report.html` and `loss_curves.png` into `folder`, made if missing; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "report.html", folder / "loss_curves.png"
    page.write_text(render_report(report), encoding="utf-8")
    write_loss_curves(report.tenants, picture)
    return page, picture


def render_report(report: DemoReport) -> str:
    """The whole page as text."""
    body = "".join(
        (_header(report), _tiles(report), _table(report.tenants), _cards(report.tenants), _footer(report))
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>cola_runtime demo</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def format_bytes(count: float) -> str:
    """Binary units, three significant digits: `41.3 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _header(report: DemoReport) -> str:
    count = len(report.tenants)
    return (
        f"<h1>{count} tenant{'s' if count != 1 else ''}, one frozen base model</h1>"
        f'<p class="soft">{escape(report.service.base_model)} · started {escape(report.started_at)} · '
        f"{escape(report.service.machine)}</p>"
    )


def _tiles(report: DemoReport) -> str:
    service = report.service
    steps = sum(len(tenant.steps) for tenant in report.tenants)
    checks = [passed for tenant in report.tenants for passed in tenant.checks]
    tiles = (
        (format_duration(service.wall_seconds), "training, all tenants"),
        (f"{100 * service.base_busy:.0f} %", "base model busy"),
        (f"{steps} / {service.base_steps}", "optimizer steps / mixed base steps"),
        (format_bytes(sum(t.bytes_up + t.bytes_down for t in report.tenants)), "on the wire, both ways"),
        (format_bytes(service.peak_memory_bytes), "peak memory, all processes"),
        (f"{sum(checks)} of {len(checks)}", "checks passed"),
    )
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)
    return f'<div class="tiles">{cells}</div>'


def _table(tenants: Iterable[TenantResult]) -> str:
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "".join(_table_row(tenant, _colour(index)) for index, tenant in enumerate(tenants))
    return (
        '<h2>Side by side</h2><div class="card wide" style="--tenant: transparent; padding: 4px 8px">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _table_row(tenant: TenantResult, colour: str) -> str:
    perplexity = f"{_perplexity(tenant.loss_before)} → {_perplexity(tenant.loss_after)}"
    cells = (
        f'<span class="dot"></span>{escape(tenant.name)}',
        str(tenant.rank),
        escape(tenant.encoding),
        f"{tenant.rows_per_step} × {len(tenant.steps)}",
        f"{tenant.loss_before:.3f} → {tenant.loss_after:.3f}",
        perplexity,
        format_bytes(tenant.bytes_up),
        format_bytes(tenant.bytes_down),
        f"{tenant.tokens_per_second:.1f}",
        _checks(tenant),
    )
    return f'<tr style="--tenant: {colour}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.1f}" if loss < 50 else "∞"


def _checks(tenant: TenantResult) -> str:
    if not tenant.checks:
        return _NOT_RUN
    return _badge(all(tenant.checks), "passed", "failed")


def _colour(index: int) -> str:
    return TENANT_COLOURS[index % len(TENANT_COLOURS)]


def _badge(good: bool, yes: str, no: str) -> str:
    return f'<span class="badge {"good" if good else "bad"}">{yes if good else no}</span>'


def _cards(tenants: Iterable[TenantResult]) -> str:
    cards = "".join(_card(tenant, _colour(index)) for index, tenant in enumerate(tenants))
    return f'<h2>Tenant by tenant</h2><p class="legend">{_LEGEND}</p><div class="cards">{cards}</div>'


def _card(tenant: TenantResult, colour: str) -> str:
    change = f"held-out loss {tenant.loss_before:.3f} → {tenant.loss_after:.3f}"
    return (
        f'<section class="card" style="--tenant: {colour}"><h3>{escape(tenant.name)} '
        f'<span class="badge {"good" if tenant.learned else "bad"}">{change}</span></h3>'
        f'<p class="soft">{escape(tenant.description)}</p>{loss_curve_svg(tenant)}{_generations(tenant)}'
        f"{_facts(tenant)}</section>"
    )


def _generations(tenant: TenantResult) -> str:
    said = (
        ("prompt", tenant.prompt, ""),
        ("before", tenant.generation_before, ""),
        ("after", tenant.generation_after, "after"),
    )
    rows = (
        f'<span>{label}</span><q class="{css}">{escape(text.strip()) or "<i>nothing</i>"}</q>'
        for label, text, css in said
    )
    return f'<div class="said">{"".join(rows)}</div>'


def _facts(tenant: TenantResult) -> str:
    settings = (
        f"rank {tenant.rank}, {tenant.rows_per_step} rows a step, learning rate {tenant.learning_rate:g}"
    )
    facts = (
        ("Data", f"{tenant.training_rows} training rows, {tenant.held_out_rows} held out"),
        ("LoRA", settings),
        ("On the wire", _wire(tenant)),
        ("Trained on", escape(" → ".join(tenant.devices))),
        ("PEFT folder", f"<code>{escape(tenant.adapter_folder)}</code>"),
        ("By peft, new process", _peft_check(tenant)),
    )
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts) + "</dl>"


def _wire(tenant: TenantResult) -> str:
    a_step = tenant.bytes_up / max(1, len(tenant.steps))
    return (
        f"{format_bytes(tenant.bytes_up)} up ({format_bytes(a_step)} a step, {escape(tenant.encoding)}), "
        f"{format_bytes(tenant.bytes_down)} down"
    )


def _peft_check(tenant: TenantResult) -> str:
    if tenant.peft_loss is None or tenant.peft_difference is None:
        return _NOT_RUN
    badge = _badge(tenant.peft_difference <= PEFT_LOSS_TOLERANCE, "equal", "differs")
    return (
        f"{badge} held-out loss {tenant.peft_loss:.6f}, "
        f"difference {tenant.peft_difference:.1e} (allowed {PEFT_LOSS_TOLERANCE:.0e})"
    )


def _footer(report: DemoReport) -> str:
    versions = ", ".join(f"{escape(name)} {escape(value)}" for name, value in report.service.versions.items())
    folder = escape(report.tenants[0].adapter_folder if report.tenants else "FOLDER")
    return (
        "<h2>Use an adapter elsewhere</h2><p>Each folder is an ordinary PEFT adapter of the base model:</p>"
        "<pre>from peft import PeftModel\n"
        f'model = PeftModel.from_pretrained(base_model, "{folder}")</pre>'
        f'<h2>Versions</h2><p class="soft">{versions}</p>'
    )
