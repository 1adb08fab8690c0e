"""How an adapter's sites are divided among devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import pytest

from cola_runtime.adapter_spec import (
    AdapterPart,
    AdapterSpec,
    HeadKind,
    LinearKind,
    LoraKind,
    adapter_spec_from_fields,
    head_part,
)
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.adapters.shards import check_shards, shard_specs
from cola_runtime.errors import InvalidInput
from cola_runtime.types import Site, SiteKind


def layer(number: int) -> Iterator[Site]:
    """q, k and v of one x, a projection back, and an MLP of two."""
    features = {"q": (8, 8), "k": (8, 4), "v": (8, 4), "o": (8, 8), "up": (8, 32), "down": (32, 8)}
    groups = {"q": 0, "k": 0, "v": 0, "o": 1, "up": 2, "down": 3}
    for position, (name, (inputs, outputs)) in enumerate(features.items()):
        yield Site(
            index=6 * number + position,
            name=f"layers.{number}.{name}",
            kind=SiteKind.LINEAR,
            in_features=inputs,
            out_features=outputs,
            input_group=4 * number + groups[name],
        )


SITES = tuple(site for number in range(3) for site in layer(number))
PLAIN = AdapterSpec(parts=(AdapterPart(kind=LinearKind(bias=True), sites=SITES),), seed=3)
MIXED = AdapterSpec(
    parts=(
        AdapterPart(kind=LoraKind(rank=2), sites=tuple(s for s in SITES if s.name.endswith((".v", ".o")))),
        AdapterPart(kind=LinearKind(), sites=tuple(s for s in SITES if s.name.endswith((".q", ".k", ".up")))),
        head_part(HeadKind(labels=3), SITES, hidden_size=8),
    ),
    seed=3,
)


def weight_count(spec: AdapterSpec) -> int:
    return sum(map(prod, weight_shapes(spec).values()))


@pytest.mark.parametrize("spec", [PLAIN, MIXED], ids=["one part", "several parts and a head"])
@pytest.mark.parametrize("count", range(1, 9))
def test_every_weight_is_in_one_shard_and_sites_of_one_part_with_one_input_in_the_same(
    spec: AdapterSpec, count: int
) -> None:
    shards = shard_specs(spec, count)
    assert len(shards) == count
    shapes = [weight_shapes(shard) for shard in shards]
    assert {key: shape for each in shapes for key, shape in each.items()} == weight_shapes(spec)
    assert sum(len(each) for each in shapes) == len(weight_shapes(spec))
    for shard in shards:
        assert (shard.seed, shard.dtype) == (spec.seed, spec.dtype)
        assert shard.kinds == {site.index: spec.kinds[site.index] for site in shard.sites}
    for part in spec.parts:
        homes = {site.index: n for n, shard in enumerate(shards) for site in shard.sites}
        groups = {(site.input_group, homes[site.index]) for site in part.sites}
        assert len(groups) == len({group for group, _ in groups}), "x would travel twice"


def test_the_weights_are_balanced_as_well_as_whole_groups_allow() -> None:
    for count in (2, 3, 4):
        loads = [weight_count(shard) for shard in shard_specs(PLAIN, count)]
        largest_group = 8 * 32 + 32
        assert max(loads) - min(loads) <= largest_group


def test_the_largest_groups_are_placed_first() -> None:
    """In catalogue order the two small ones would be apart, and the large one with one of them."""
    sites = tuple(
        replace(site, index=number, input_group=number, out_features=outputs)
        for number, (site, outputs) in enumerate(zip(SITES, (1, 1, 2), strict=False))
    )
    spec = AdapterSpec(parts=(AdapterPart(kind=LinearKind(), sites=sites),), seed=0)
    assert [[site.index for site in shard.sites] for shard in shard_specs(spec, 2)] == [[2], [0, 1]]


def test_an_equal_spec_is_divided_equally_wherever_it_comes_from() -> None:
    received = adapter_spec_from_fields(MIXED.model_dump(mode="json"))
    assert shard_specs(received, 3) == shard_specs(MIXED, 3)


def test_more_shards_than_inputs_are_refused() -> None:
    check_shards(PLAIN, 12)
    with pytest.raises(InvalidInput) as caught:
        check_shards(PLAIN, 13)
    assert (caught.value.reason, caught.value.limit, caught.value.actual) == ("SHARDS_TOO_MANY", "12", "13")
