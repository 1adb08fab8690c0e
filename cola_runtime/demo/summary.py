"""What `cola demo` prints at its end: losses, one generation, the check and where everything lies."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cola_runtime.demo.report import format_bytes
from cola_runtime.demo.result import DemoReport, TenantResult


def summary(report: DemoReport, output: Path) -> Group:
    """Fits 80 columns. Generated text is shown as text, never as markup."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tenant", "held-out loss", "by peft", "check", "up", "down"):
        table.add_column(name, no_wrap=True)
    for tenant in report.tenants:
        table.add_row(*_cells(tenant))
    lines = [line for tenant in report.tenants for line in _generations(tenant)]
    places = f"report.html, loss_curves.png and adapters/ (PEFT folders) are in {output}"
    service = report.service
    facts = (
        f"{service.wall_seconds:.0f} s of training, base busy {service.base_busy:.0%}, "
        f"peak memory {format_bytes(service.peak_memory_bytes)}"
    )
    return Group(table, *lines, Text(facts), Text(places))


def _cells(tenant: TenantResult) -> tuple[str, ...]:
    return (
        tenant.name,
        f"{tenant.loss_before:.4f} → {tenant.loss_after:.4f}",
        "" if tenant.peft_loss is None else f"{tenant.peft_loss:.4f}",
        "passed" if all(tenant.checks) else "FAILED",
        format_bytes(tenant.bytes_up),
        format_bytes(tenant.bytes_down),
    )


def _generations(tenant: TenantResult) -> list[Text]:
    said = [
        ("prompt", tenant.prompt),
        ("before", tenant.generation_before),
        ("after", tenant.generation_after),
    ]
    return [
        Text(f"{tenant.name} {name}: {' '.join(text.split())}", overflow="ellipsis", no_wrap=True)
        for name, text in said
    ]
