"""What `cola demo` prints at its end: true, narrow, and never read as markup."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from report_samples import FILM, REPORT, SPAM
from rich.console import Console

from cola_runtime.demo.result import DemoReport
from cola_runtime.demo.summary import summary


def printed(report: DemoReport) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(summary(report, Path("demo-output")))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_losses_the_check_and_the_place_are_printed_within_80_columns() -> None:
    text = printed(replace(REPORT, tenants=(FILM, SPAM)))
    assert "4.2500 → 3.1250" in text
    assert "passed" in text, "film's peft loss agrees"
    assert "FAILED" in text, "spam's does not"
    assert "demo-output" in text
    assert max(map(len, text.splitlines())) <= 80


def test_generated_text_is_shown_as_it_is() -> None:
    odd = replace(FILM, generation_after="[red]not markup[/red]\nsecond line")
    assert "film after: [red]not markup[/red] second line" in printed(replace(REPORT, tenants=(odd,)))
