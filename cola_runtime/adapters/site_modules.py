"""Which modules can be sites, and what a site of each is: Linear, GPT-2's Conv1D, Conv2d, Embedding.

Only a module that computes exactly what its class in torch does: a subclass that scales an embedding or
standardises a kernel is none, nor is a convolution that pads with anything but zeros, nor an embedding that
renormalises its table in the forward pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cola_runtime.types import Patch, Site, SiteKind


def site_kind(module: nn.Module) -> SiteKind | None:
    """None for a module that is no site."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return SiteKind.LINEAR
    if isinstance(module, Conv1D):
        return SiteKind.CONV1D
    if "weight" not in module._parameters:  # computed anew for every forward pass
        return None
    if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward:
        return SiteKind.CONV2D if module.padding_mode == "zeros" else None
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        return SiteKind.EMBEDDING if module.max_norm is None else None
    return None


def module_site(module: Any, *, index: int, name: str, input_group: int) -> Site:
    """The site of a module that `site_kind` has one for."""
    kind = site_kind(module)
    assert kind is not None, "the caller asked site_kind"
    out_features, in_features = _shape(module, kind)
    return Site(
        index=index,
        name=name,
        kind=kind,
        in_features=in_features,
        out_features=out_features,
        input_group=input_group,
        patch=module_patch(module),
        padding_index=module.padding_idx if kind is SiteKind.EMBEDDING else None,
    )


def module_patch(module: nn.Module) -> Patch | None:
    """How a Conv2d sees its input; None for any other module."""
    if not isinstance(module, nn.Conv2d):
        return None
    left, right, above, below = module._reversed_padding_repeated_twice  # `same` resolved, too
    return Patch(
        kernel=_pair(module.kernel_size),
        stride=_pair(module.stride),
        padding=(left, right, above, below),
        dilation=_pair(module.dilation),
        groups=module.groups,
    )


def weight_OI(module: nn.Module, site: Site) -> Tensor:
    """The site's weight as [out, in] (of one group), whichever way it is stored; a view."""
    parameter: Any = module.weight
    weight: Tensor = parameter.detach()
    if site.kind in (SiteKind.CONV1D, SiteKind.EMBEDDING):
        return weight.t()
    return weight.view(len(weight), -1)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width


def _shape(module: Any, kind: SiteKind) -> tuple[int, int]:
    """(out_features, in_features): of all groups."""
    if kind is SiteKind.CONV2D:
        height, width = module.kernel_size
        return module.out_channels, module.in_channels * height * width
    rows, columns = module.weight.shape
    return (rows, columns) if kind is SiteKind.LINEAR else (columns, rows)
