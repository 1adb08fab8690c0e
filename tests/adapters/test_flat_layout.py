"""An adapter's tensors and its vector are each other's, without and with a copy."""

from __future__ import annotations

import pytest
import torch

from cola_runtime.adapter_spec import AdapterKind, LinearKind, LoraKind
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.flat_layout import FlatLayout
from cola_runtime.types import Site, SiteKind
from tests.adapters.adapter_samples import spec_of

SITE = Site(index=0, name="layer", kind=SiteKind.LINEAR, in_features=6, out_features=5, input_group=0)
KINDS: list[AdapterKind] = [LoraKind(rank=4, alpha=8.0), LinearKind(bias=False)]


@pytest.mark.parametrize("kind", KINDS)
def test_views_lie_on_the_vector_in_catalogue_order(kind: AdapterKind) -> None:
    layout = FlatLayout(spec_of((kind, (SITE,))))
    vector_P = torch.arange(layout.numel, dtype=torch.float64)
    views = layout.views(vector_P)
    assert {key: tuple(view.shape) for key, view in views.items()} == layout.shapes
    assert torch.equal(torch.cat([view.reshape(-1) for view in views.values()]), vector_P)
    vector_P.zero_()
    assert not any(view.any() for view in views.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_vector_is_a_copy_also_of_an_adapter_of_one_tensor(kind: AdapterKind) -> None:
    weights = initial_weights(spec_of((kind, (SITE,))))
    layout = FlatLayout(spec_of((kind, (SITE,))))
    vector_P = layout.flat(weights)
    for key, view in layout.views(vector_P).items():
        assert torch.equal(view, weights[key])
        weights[key].add_(1.0)
        assert not torch.equal(view, weights[key])
