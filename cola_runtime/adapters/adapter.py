"""A whole adapter: one small module per site, whatever the kinds."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterSpec,
    HeadKind,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
    ModuleKind,
)
from cola_runtime.adapters.head import SiteHead
from cola_runtime.adapters.linear import SiteLinear
from cola_runtime.adapters.linearized_lora import SiteLinearizedLora
from cola_runtime.adapters.lora import SiteLora
from cola_runtime.adapters.mlp import SiteMlp
from cola_runtime.adapters.modules import SiteModule
from cola_runtime.adapters.site_adapter import SiteAdapter
from cola_runtime.types import Site, TensorKey

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def torch_dtype(spec: AdapterSpec) -> torch.dtype:
    """The dtype of the adapter's weights and gradients on the device: float32 or float64."""
    return _DTYPES[spec.dtype]


def site_adapter(kind: AdapterKind, site: Site) -> SiteAdapter:
    """The mathematics of `kind` at `site`. Raises InvalidInput ADAPTER_MODULE_UNKNOWN."""
    match kind:
        case LoraKind():
            return SiteLora(kind, site)
        case LinearizedLoraKind():
            return SiteLinearizedLora(kind, site)
        case LinearKind():
            return SiteLinear(kind, site)
        case MlpKind():
            return SiteMlp(kind, site)
        case ModuleKind():
            return SiteModule(kind, site)
        case HeadKind():
            return SiteHead(kind, site)
        case _:
            assert_never(kind)


def site_adapters(spec: AdapterSpec) -> dict[int, SiteAdapter]:
    """Site index -> the mathematics there, in catalogue order."""
    return {site.index: site_adapter(spec.kinds[site.index], site) for site in spec.sites}


def initial_weights(spec: AdapterSpec) -> dict[TensorKey, Tensor]:
    """Version 0: an adapter that changes nothing yet. A site's weights never depend on the other sites."""
    dtype = torch_dtype(spec)
    return {
        key: weight.to(dtype)
        for adapter in site_adapters(spec).values()
        for key, weight in adapter.initial_weights(spec.seed).items()
    }
