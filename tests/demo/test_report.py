"""The report: self-contained, escaped, and true to the values it was given."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_samples import FILM, REPORT, SPAM

from cola_runtime.demo.curves import loss_curve_svg
from cola_runtime.demo.report import format_bytes, format_duration, render_report, write_report
from cola_runtime.demo.result import smoothed

HOSTILE = '<script>alert("x")</script><img src=http://a.b/c onerror=x>'


class Page(HTMLParser):
    """Collects a page's text and tags, and that every element is closed."""

    void = frozenset({"meta", "br", "img", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_well_formed_and_shows_every_tenants_values() -> None:
    page = Page(render_report(REPORT))
    assert page.open == []
    for expected in ("4.250 → 3.125", "70.1 → 22.8", "8 × 12", "12 MiB", "6 MiB", "1 MiB a step", "83.4"):
        assert expected in page.text
    for expected in ("device-0 → device-1", FILM.adapter_folder, FILM.prompt, FILM.generation_after):
        assert expected in page.text
    for expected in ("2 min 51 s", "93 %", "24 / 24", "36 MiB", "3 GiB", "torch 2.13.0"):
        assert expected in page.text


def test_page_needs_nothing_from_outside() -> None:
    page = render_report(REPORT)
    assert not {"script", "link", "img", "iframe", "object"} & set(Page(page).tags)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize("field", ["name", "description", "prompt", "generation_before", "generation_after"])
def test_text_from_outside_is_escaped(field: str) -> None:
    tenant = replace(FILM, **{field: HOSTILE})
    page = Page(render_report(replace(REPORT, tenants=(tenant,))))
    assert not {"script", "img"} & set(page.tags)
    assert HOSTILE in page.text


@pytest.mark.parametrize("field", ["adapter_folder", "encoding"])
def test_names_of_a_job_are_escaped(field: str) -> None:
    page = Page(render_report(replace(REPORT, tenants=(replace(FILM, **{field: HOSTILE}),))))
    assert not {"script", "img"} & set(page.tags)


def test_failed_check_is_shown_as_failed_and_a_missing_one_as_not_run() -> None:
    unchecked = replace(FILM, peft_loss=None)
    passed, failed, none = (
        Page(render_report(replace(REPORT, tenants=(t,)))).text for t in (FILM, SPAM, unchecked)
    )
    assert "1 of 1checks passed" in passed and "passed" in passed and "differs" not in passed
    assert "0 of 1checks passed" in failed and "failed" in failed and "7.5e-02" in failed
    assert "0 of 0checks passed" in none and none.count("not run") == 2


def test_checks_hold_exactly_up_to_their_tolerance() -> None:
    assert FILM.checks == (True,)
    assert replace(FILM, peft_loss=3.125 - 0.99e-4).checks == (True,)
    assert replace(FILM, peft_loss=3.125 - 1.01e-4).checks == (False,)


def test_loss_that_rose_is_not_shown_as_good() -> None:
    assert 'class="badge good">held-out' in render_report(replace(REPORT, tenants=(FILM,)))
    assert 'class="badge bad">held-out' in render_report(
        replace(REPORT, tenants=(replace(FILM, loss_after=4.5),))
    )


def test_curve_keeps_every_point_inside_its_axes() -> None:
    root = ElementTree.fromstring(loss_curve_svg(FILM))
    width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
    lines = [line.attrib["points"].split() for line in root.iter("polyline")]
    assert [len(line) for line in lines] == [12, 12]
    for x, y in (map(float, point.split(",")) for line in lines for point in line):
        assert 0 < x <= width and 0 <= y < height
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights == sorted(heights), "a falling loss must be drawn falling"


@pytest.mark.parametrize("steps", [(), FILM.steps[:1]])
def test_tenant_with_hardly_a_step_still_gets_a_report(steps: tuple[()], tmp_path: Path) -> None:
    page, picture = write_report(replace(REPORT, tenants=(replace(FILM, steps=steps),)), tmp_path / "new")
    assert page.stat().st_size > 1000 and picture.stat().st_size > 1000


def test_picture_has_a_panel_for_each_tenant_in_its_own_colour(tmp_path: Path) -> None:
    _, picture = write_report(REPORT, tmp_path)
    image = Image.open(picture).convert("RGB")
    assert image.width >= 1500 and image.height >= 500
    colours = {colour for _, colour in image.getcolors(image.width * image.height) or ()}
    assert (0x00, 0x72, 0xB2) in colours and (0xD5, 0x5E, 0x00) in colours
    left = image.crop((0, 0, image.width // 2, image.height))
    assert (0xD5, 0x5E, 0x00) not in {c for _, c in left.getcolors(left.width * left.height) or ()}


def test_smoothed_is_the_mean_of_the_last_five() -> None:
    assert smoothed((1.0, 2.0, 3.0, 4.0, 5.0, 11.0)) == (1.0, 1.5, 2.0, 2.5, 3.0, 5.0)
    assert smoothed(()) == ()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (43_300_000, "41.3 MiB"), (2**31, "2 GiB")],
)
def test_bytes_are_shown_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(2.34, "2.3 s"), (60, "1 min 00 s"), (171.2, "2 min 51 s")])
def test_durations_are_shown_in_minutes_and_seconds(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
