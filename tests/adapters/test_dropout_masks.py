"""The masks of LoRA dropout: what they depend on, what they do not, and how many entries they drop."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cola_runtime.adapter_spec import LoraKind
from cola_runtime.adapters.dropout import SegmentDropout
from cola_runtime.adapters.numpy_draws import uniform_bits
from cola_runtime.testing.tiny_models import tiny_sites

SITES = tiny_sites("llama")
DRAW = SegmentDropout(dropout=0.3, seed=7, version=4, rows=(0, 1, 2), lengths=(9, 5, 12))


def test_a_mask_is_true_where_x_is_kept_and_false_on_padding() -> None:
    mask = DRAW.mask(SITES[0], 15)
    assert (mask.shape, mask.dtype) == ((45, SITES[0].in_features), torch.bool)
    for row, length in enumerate(DRAW.lengths):
        assert not mask[15 * row + length : 15 * (row + 1)].any()


def test_the_share_of_dropped_entries_is_p() -> None:
    for dropout in (0.01, 0.3, 0.9):
        mask = replace(DRAW, dropout=dropout, rows=(0,), lengths=(2000,)).mask(SITES[0], 2000)
        entries = mask.numel()
        deviation = (dropout * (1 - dropout) / entries) ** 0.5
        assert abs(1 - mask.double().mean().item() - dropout) < 4 * deviation
        columns = 1 - mask.double().mean(dim=0)
        assert columns.std().item() == pytest.approx((dropout * (1 - dropout) / 2000) ** 0.5, rel=0.4)


def test_a_row_has_the_same_mask_however_it_is_padded_or_split() -> None:
    whole = DRAW.mask(SITES[1], 12).view(3, 12, -1)
    padded = DRAW.mask(SITES[1], 40).view(3, 40, -1)
    last = replace(DRAW, rows=(2,), lengths=(12,)).mask(SITES[1], 12)
    assert torch.equal(padded[:, :12], whole)
    assert torch.equal(last, whole[2])
    longer = replace(DRAW, lengths=(14, 5, 12)).mask(SITES[1], 14).view(3, 14, -1)
    assert torch.equal(longer[0, :9], whole[0, :9])


def test_every_seed_version_row_and_site_has_masks_of_its_own() -> None:
    draws = [
        (DRAW, SITES[0]),
        (replace(DRAW, seed=8), SITES[0]),
        (replace(DRAW, version=5), SITES[0]),
        (replace(DRAW, rows=(3, 4, 5)), SITES[0]),
        (DRAW, SITES[1]),
        (DRAW, SITES[2]),  # all three share one x
    ]
    masks = [draw.mask(site, 12).view(3, 12, -1)[:, :5, :32].flatten().double() for draw, site in draws]
    masks.append(masks[0].view(3, -1)[[1, 2, 0]].flatten())  # the rows differ from each other
    for one, other in combinations(masks, 2):
        correlation = torch.corrcoef(torch.stack([one, other]))[0, 1].item()
        assert abs(correlation) < 0.2


def test_a_larger_p_drops_more_of_the_same_draw() -> None:
    few, many = (replace(DRAW, dropout=p).mask(SITES[0], 12) for p in (0.2, 0.6))
    assert not (many & ~few).any()


def test_the_draw_is_the_same_today_and_tomorrow() -> None:
    """Written down once: a change would give a resumed job other masks than it began with."""
    assert uniform_bits("dropout/0/0/0/q", 3).tolist() == [3010753186, 1811925375, 1001177300]
    assert uniform_bits("a", 5).tolist() == uniform_bits("a", 8)[:5].tolist()
    assert uniform_bits("a", 5).dtype == np.uint32


def test_a_share_just_below_one_keeps_next_to_nothing() -> None:
    assert replace(DRAW, dropout=1 - 2**-40).mask(SITES[0], 12).sum() < 3


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_share_has_a_range(dropout: float) -> None:
    with pytest.raises(ValidationError):
        LoraKind(dropout=dropout)
