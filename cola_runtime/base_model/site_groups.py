"""The modules that share one input, with the products of their frozen weights.

Adapters see a site's input as features [B, T, I] and add to outputs [B, T, O], whatever the site kind: T is
the tokens of a row, or the positions of a convolution's output.
Shapes: B rows, T tokens or positions, I in_features, O out_features, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from cola_runtime.adapters.features import divided
from cola_runtime.adapters.patches import folded, patches, positions
from cola_runtime.adapters.site_modules import weight_OI
from cola_runtime.base_model.quantized import QuantizedLinear
from cola_runtime.types import Patch, Site, SiteKind


class SiteGroup:
    """Linear and Conv1D modules of one x [..., I]: its features are x itself."""

    def __init__(self, sites: Sequence[Site], modules: Sequence[nn.Module]) -> None:
        self.sites = tuple(sites)
        self.modules = tuple(modules)
        self.fused_weight: Tensor | None = None  # [sum O, I]; the modules' weights are views of it
        self.fused_bias: Tensor | None = None
        self.widths = [site.out_features for site in sites]
        weight: Any = modules[0].weight
        self.dtype: torch.dtype = weight.dtype  # of the outputs
        self.spans_layers = False  # some of its sites' layers are computed again without the others'

    def fuse(self) -> None:
        """Move the weights of several plain Linear sites into one buffer. Each keeps its own as a view."""
        if len(self.modules) < 2 or any(type(module) is not nn.Linear for module in self.modules):
            return
        biases = [module.bias for module in self.modules]
        if any(bias is None for bias in biases) and not all(bias is None for bias in biases):
            return
        self.fused_weight = _share_buffer([module.weight for module in self.modules])
        if biases[0] is not None:
            self.fused_bias = _share_buffer(biases)

    def arranged(self, x: Tensor, rows: int) -> Tensor:
        """The modules' input as the group keeps it: with B rows in front.

        Some models flatten rows and tokens into one dimension: adapters are slices of rows.
        """
        return x.reshape(rows, -1, x.shape[-1])

    def features(self, x: Tensor) -> Tensor:
        """[B, T, I], or ids [B, T, 1], of an arranged input."""
        return x

    def base_outputs(self, x_BTI: Tensor) -> list[Tensor]:
        """f(x) of every site, [B, T, O]; fused sites are column slices of one tensor."""
        if self.fused_weight is not None:
            fused = functional.linear(x_BTI, self.fused_weight, self.fused_bias)
            return list(torch.split(fused, self.widths, dim=-1))
        return [type(module).forward(module, x_BTI) for module in self.modules]

    def output(self, output_BTO: Tensor, x: Tensor) -> Tensor:
        """A module's output as it returns it for its own input x."""
        return output_BTO.view(*x.shape[:-1], -1)

    def input_gradient(self, grads_BTO: Sequence[Tensor], x_BTI: Tensor) -> Tensor:
        """Sum over the sites of g W, in the shape of the arranged input."""
        if self.fused_weight is not None:
            return torch.cat(list(grads_BTO), dim=-1) @ self.fused_weight
        products = [
            grad @ _dense_OI(module, site)
            for grad, module, site in zip(grads_BTO, self.modules, self.sites, strict=True)
        ]
        return sum(products[1:], start=products[0])

    def feature_gradient(self, dx: Tensor, features: Tensor) -> Tensor:
        """What adapters add their dx to, [B, T, I]."""
        return dx

    def with_adapters(self, dx: Tensor, dfeatures: Tensor) -> Tensor:
        """The arranged input's gradient, the adapters' share included."""
        return dx


def _dense_OI(module: nn.Module, site: Site) -> Tensor:
    return module.weight if isinstance(module, QuantizedLinear) else weight_OI(module, site)


class EmbeddingGroup(SiteGroup):
    """Embeddings of the same ids [B, T], which have no gradient."""

    def arranged(self, x: Tensor, rows: int) -> Tensor:
        return x.reshape(rows, -1, 1)

    def base_outputs(self, ids_BT1: Tensor) -> list[Tensor]:
        return [type(module).forward(module, ids_BT1[..., 0]) for module in self.modules]

    def output(self, output_BTO: Tensor, x: Tensor) -> Tensor:
        return output_BTO.view(*x.shape, -1)


class ConvolutionGroup(SiteGroup):
    """Convolutions with equal patches of the same images [B, C, H, W]; T is their output's positions."""

    def arranged(self, x: Tensor, rows: int) -> Tensor:
        return x

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Patches are made anew for the backward pass: kept, they would take x kernel size times."""
        return patches(x_BCHW, self._patch).contiguous()

    def base_outputs(self, x_BCHW: Tensor) -> list[Tensor]:
        images = [type(module).forward(module, x_BCHW) for module in self.modules]
        return [image.permute(0, 2, 3, 1).contiguous().flatten(1, 2) for image in images]

    def output(self, output_BTO: Tensor, x_BCHW: Tensor) -> Tensor:
        return self._images(output_BTO, x_BCHW).contiguous()

    def input_gradient(self, grads_BTO: Sequence[Tensor], x_BCHW: Tensor) -> Tensor:
        """As torch's own convolution computes it."""
        products = [
            self._convolution_backward(self._images(grad_BTO, x_BCHW), module, x_BCHW)
            for grad_BTO, module in zip(grads_BTO, self.modules, strict=True)
        ]
        return sum(products[1:], start=products[0])

    def feature_gradient(self, dx: Tensor, features: Tensor) -> Tensor:
        return torch.zeros_like(features)

    def with_adapters(self, dx: Tensor, dfeatures: Tensor) -> Tensor:
        height, width = dx.shape[-2:]
        return dx.add_(folded(dfeatures, self._patch, (height, width)))

    @property
    def _patch(self) -> Patch:
        patch = self.sites[0].patch
        assert patch is not None  # `site_group` has looked
        return patch

    def _images(self, rows_BTO: Tensor, x_BCHW: Tensor) -> Tensor:
        """[B, O, H', W'], a view."""
        return divided(rows_BTO, 1, *positions(self._patch, *x_BCHW.shape[-2:])).permute(0, 3, 1, 2)

    def _convolution_backward(self, grad_BOHW: Tensor, module: Any, x_BCHW: Tensor) -> Tensor:
        left, right, above, below = self._patch.padding
        images, channels, height, width = x_BCHW.shape
        padded = (images, channels, height + above + below, width + left + right)
        dx: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            padded,
            module.weight.detach(),
            grad_BOHW,
            stride=self._patch.stride,
            dilation=self._patch.dilation,
            groups=self._patch.groups,
        )
        return dx[:, :, above : above + height, left : left + width].contiguous()


def site_group(sites: Sequence[Site], modules: Sequence[nn.Module]) -> SiteGroup:
    """The group of these sites, which are of one kind."""
    if sites[0].kind is SiteKind.EMBEDDING:
        return EmbeddingGroup(sites, modules)
    return SiteGroup(sites, modules) if sites[0].patch is None else ConvolutionGroup(sites, modules)


def _share_buffer(parameters: Sequence[Any]) -> Tensor:
    fused = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, torch.split(fused, [len(p) for p in parameters]), strict=True):
        parameter.data = part
    return fused
