"""Divides one adapter's sites among several devices: a pure function of its spec. Torch-free.

The unit is an input group, the sites of one part that receive the same x: together, x travels once.
"""

from __future__ import annotations

from math import prod

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.errors import InvalidInput
from cola_runtime.types import Site

_Group = tuple[int, int]  # part, input group


def check_shards(spec: AdapterSpec, count: int) -> None:
    """Raises InvalidInput `SHARDS_TOO_MANY` when a shard would be left without sites."""
    groups = len({_group(part, site) for part, site in _sites(spec)})
    if count > groups:
        raise InvalidInput(
            "SHARDS_TOO_MANY",
            "sites that receive the same input stay on one device, and there are fewer inputs than shards",
            where="job.shards",
            limit=groups,
            actual=count,
            remedy="Use fewer shards, or name more target modules; nothing was created.",
        )


def shard_specs(spec: AdapterSpec, count: int) -> tuple[AdapterSpec, ...]:
    """The adapter as `count` smaller ones, which have all of its sites between them.

    Groups go, largest first (weights; then in catalogue order), to the shard that has least so far. Raises
    InvalidInput `SHARDS_TOO_MANY`.
    """
    if count == 1:
        return (spec,)
    check_shards(spec, count)
    weights = _weights_by_group(spec)
    loads = [0] * count
    shard_of: dict[_Group, int] = {}
    for group in sorted(weights, key=lambda group: -weights[group]):
        shard_of[group] = loads.index(min(loads))
        loads[shard_of[group]] += weights[group]
    return tuple(_restricted(spec, shard_of, number) for number in range(count))


def _weights_by_group(spec: AdapterSpec) -> dict[_Group, int]:
    """Group -> number of weights, in catalogue order."""
    weights: dict[_Group, int] = {}
    for part, site in sorted(_sites(spec), key=lambda entry: entry[1].index):
        shapes = site_weight_shapes(spec.kinds[site.index], site).values()
        group = _group(part, site)
        weights[group] = weights.get(group, 0) + sum(map(prod, shapes))
    return weights


def _restricted(spec: AdapterSpec, shard_of: dict[_Group, int], number: int) -> AdapterSpec:
    parts = []
    for index, part in enumerate(spec.parts):
        sites = tuple(site for site in part.sites if shard_of[_group(index, site)] == number)
        if sites:
            parts.append(AdapterPart(kind=part.kind, sites=sites))
    return AdapterSpec(parts=tuple(parts), seed=spec.seed, dtype=spec.dtype)


def _sites(spec: AdapterSpec) -> list[tuple[int, Site]]:
    return [(index, site) for index, part in enumerate(spec.parts) for site in part.sites]


def _group(part: int, site: Site) -> _Group:
    return part, site.input_group
