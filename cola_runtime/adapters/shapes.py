"""Shape and name of every weight of an adapter, in catalogue order. Torch-free."""

from __future__ import annotations

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterSpec,
    HeadKind,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
)
from cola_runtime.adapters.module_registry import module_shapes
from cola_runtime.types import Site, TensorKey, TensorKind

Shape = tuple[int, ...]


def weight_shapes(spec: AdapterSpec) -> dict[TensorKey, Shape]:
    """Shape of every weight, site by site in catalogue order, each kind's weights in a fixed order."""
    return {
        key: shape
        for site in spec.sites
        for key, shape in site_weight_shapes(spec.kinds[site.index], site).items()
    }


def site_weight_shapes(kind: AdapterKind, site: Site) -> dict[TensorKey, Shape]:
    """At a conv2d site factors and full-rank weights are convolutions' own, as PEFT has them: A is
    [rank, channels, kernel height, kernel width], B [out, rank / groups, 1, 1].

    Raises InvalidInput ADAPTER_MODULE_UNKNOWN for a module that is not registered here, _INVALID.
    """
    inputs, outputs = site.in_features, site.out_features
    shapes: dict[TensorKind, Shape]
    match kind:
        case LoraKind():
            a, b = _factor_shapes(kind.rank, site)
            shapes = {TensorKind.LORA_A: a, TensorKind.LORA_B: b}
        case LinearizedLoraKind():
            a, b = _factor_shapes(kind.rank, site)
            shapes = {TensorKind.DELTA_A: a, TensorKind.DELTA_B: b}
        case LinearKind():
            shapes = {TensorKind.WEIGHT: (outputs, *_input_shape(site, site.groups))}
            if kind.bias:
                shapes[TensorKind.BIAS] = (outputs,)
        case MlpKind():
            shapes = {
                TensorKind.MLP_IN: (kind.hidden, inputs),
                TensorKind.MLP_IN_BIAS: (kind.hidden,),
                TensorKind.MLP_OUT: (outputs, kind.hidden),
                TensorKind.MLP_OUT_BIAS: (outputs,),
            }
        case HeadKind():
            shapes = {TensorKind.WEIGHT: (outputs, inputs), TensorKind.BIAS: (outputs,)}
        case _:
            return {
                TensorKey(site.index, TensorKind.MODULE, slot): shape
                for slot, shape in enumerate(module_shapes(kind, inputs, outputs))
            }
    return {TensorKey(site.index, tensor): shape for tensor, shape in shapes.items()}


def _factor_shapes(rank: int, site: Site) -> tuple[Shape, Shape]:
    ones = () if site.patch is None else (1, 1)
    return (rank, *_input_shape(site)), (site.out_features, rank // site.groups, *ones)


def _input_shape(site: Site, groups: int = 1) -> Shape:
    """The last dimensions of a weight over x, or over one of its groups."""
    inputs = site.in_features // groups
    if site.patch is None:
        return (inputs,)
    height, width = site.patch.kernel
    return (inputs // (height * width), height, width)


def weight_names(spec: AdapterSpec) -> dict[TensorKey, str]:
    """`<site name>/lora_a`, `<site name>/module.0`: how files name the weights."""
    names = {site.index: site.name for site in spec.sites}
    return {key: f"{names[key.site]}/{_short_name(key)}" for key in weight_shapes(spec)}


def _short_name(key: TensorKey) -> str:
    name = key.kind.name.lower()
    return f"{name}.{key.slot}" if key.kind is TensorKind.MODULE else name
