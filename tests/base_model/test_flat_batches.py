"""Rows end to end in one line give what a rectangle of padded rows gives, and compute less."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cola_runtime.base_model.mixed_pass import MixedPass
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.near_sizes import near_sizes
from cola_runtime.rows import Row
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.types import Segment
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import four_tenants, gradients_of, install_all, run_segments


def rows_of(lengths: list[int], seed: int) -> tuple[Row, ...]:
    drawn = np.random.default_rng(seed)
    return tuple(
        Row(tokens=drawn.integers(3, 250, n).astype(np.int32), weights=(np.arange(n) > 0).astype(np.float32))
        for n in lengths
    )


LENGTHS = [[5, 40, 7, 7], [12], [3, 90], [13], [30, 20]]  # the first and the last stack, padded


def loaded(tiny_folder: TinyFolder, dtype: str = "float64") -> tuple[TappedModel, list[Segment]]:
    model = TappedModel.load(tiny_folder("llama", dtype), dtype=dtype, attention="eager", threads=1)
    tenants = four_tenants(model.sites, dtype)
    install_all(model, tenants)
    segments = [
        replace(member.segment(), rows=rows_of(lengths, seed), loss_denominator=float(sum(lengths)))
        for seed, (member, lengths) in enumerate(zip(tenants, LENGTHS, strict=True))
    ]
    return model, segments


def test_a_line_of_rows_gives_the_rectangles_gradients_with_fewer_tokens(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, segments = loaded(tiny_folder)
    tenants = four_tenants(model.sites, "float64")
    assert model.describe("", "").unpadded
    flat, flat_taps = run_segments(model, segments)
    monkeypatch.setattr(MixedPass, "lays_flat", property(lambda _self: False))
    padded, padded_taps = run_segments(model, segments)
    assert flat.real_tokens == padded.real_tokens == 227
    assert flat.computed_tokens == 227 + 9
    assert padded.computed_tokens == 10 * 90
    for position, member in enumerate(tenants):
        assert flat.losses[position].loss_sum == pytest.approx(padded.losses[position].loss_sum, rel=1e-12)
        found, expected = (gradients_of(taps, position, member) for taps in (flat_taps, padded_taps))
        assert max(relative_difference(found, expected).values()) < 1e-10


def test_what_a_buffer_held_before_reaches_nobody_through_the_padding(tiny_folder: TinyFolder) -> None:
    """0 * NaN = NaN: the padding behind a segment's rows lies in buffers that a broken tenant has used."""
    model, segments = loaded(tiny_folder, "float32")
    segments = [segments[0], segments[4]]
    expected = run_segments(model, segments)
    tenants = four_tenants(model.sites, "float32")
    broken = {key: torch.full_like(weight, math.nan) for key, weight in tenants[1].weights.items()}
    model.install(replace(segments[0].lease, job_id="broken", epoch=1), tenants[1].spec, 0, broken)
    lease = replace(segments[0].lease, job_id="broken", epoch=1)
    run_segments(model, [replace(segments[0], lease=lease, version=0, rows=rows_of([64, 64], 3))])
    found = run_segments(model, segments)
    assert found[0].losses == expected[0].losses
    for position, member in ((0, tenants[0]), (1, tenants[4])):
        after, before = (gradients_of(taps, position, member) for _, taps in (found, expected))
        assert all(torch.equal(after[key], gradient) for key, gradient in before.items())


@given(st.lists(st.integers(1, 60), max_size=12), st.integers(0, 30))
def test_near_sizes_are_the_cheapest_parts(sizes: list[int], further: int) -> None:
    def cost(parts: list[list[int]]) -> int:
        return sum(len(part) * max(sizes[n] for n in part) + further for part in parts)

    parts = near_sizes(sizes, further=further)
    assert sorted(n for part in parts for n in part) == list(range(len(sizes)))
    ordered = sorted(range(len(sizes)), key=sizes.__getitem__)
    for cuts in range(1 << max(0, len(sizes) - 1)) if len(sizes) <= 8 else (0,):
        edges = [0, *(n + 1 for n in range(len(sizes) - 1) if cuts >> n & 1), len(sizes)]
        tried = [ordered[a:b] for a, b in pairwise(edges) if b > a]
        assert cost(parts) <= cost(tried)
