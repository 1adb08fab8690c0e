"""Sites whose frozen weights are held in 8 or 4 bits and made dense for the moment of each product.

bitsandbytes quantises: `int8` has one scale per output feature (the absmax of its row over 127), `nf4` is
four bits of a normal distribution's quantiles with one float32 scale per 64 weights (arXiv:2305.14314).
Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cola_runtime.errors import InvalidInput
from cola_runtime.types import Site, SiteKind

QUANTIZATIONS = ("int8", "nf4")
NF4_BLOCK = 64  # weights with one scale


class QuantizedLinear(nn.Module):
    """y = x W^T + b of a W that is dense only within a product, forward and backward."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, quantization: str) -> None:
        super().__init__()
        import bitsandbytes.functional as library

        self.numel = weight_OI.numel() + (0 if bias_O is None else bias_O.numel())
        self._library: Any = library
        self._dtype = weight_OI.dtype
        self._state: Any = None
        if quantization == "nf4":
            packed, self._state = library.quantize_4bit(
                weight_OI.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4"
            )
            scales = self._state.absmax
        else:
            packed, scales, _ = library.int8_vectorwise_quant(weight_OI.to(torch.float16))
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dense W [O, I], a new tensor."""
        if self._state is not None:
            dense: Tensor = self._library.dequantize_4bit(self.packed, self._state)
        else:
            dense = self._library.int8_vectorwise_dequant(self.packed, self.scales)
        return dense.to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    """Keeps nothing: W is made dense again for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return functional.linear(x, module.weight, module.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.module.weight, None


def quantize_sites(
    model: Any,
    sites: Sequence[Site],
    quantization: str,
    *,
    tied_sites: Collection[int],
    device: torch.device,
) -> None:
    """Replace the Linear and Conv1D sites' modules in place, whatever names they have, by ones on `device`.

    A weight that is tied stays as it is, and so do convolutions and embeddings.

    Raises InvalidInput `QUANTIZATION_UNSUPPORTED` where the library is not installed, or for a float64 model.
    """
    _check(model)
    chosen = {
        id(module): _quantized(module, site, quantization, device)
        for site, module in ((site, model.get_submodule(site.name)) for site in sites)
        if site.index not in tied_sites and site.kind in (SiteKind.LINEAR, SiteKind.CONV1D)
    }
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in chosen:
                parent._modules[name] = chosen[id(child)]


def _quantized(module: nn.Module, site: Site, quantization: str, device: torch.device) -> QuantizedLinear:
    parameters: Any = module
    weight: Tensor = parameters.weight.detach().to(device)
    weight_OI = weight if site.kind is SiteKind.LINEAR else weight.t()
    bias_O = None if parameters.bias is None else parameters.bias.detach().to(device)
    return QuantizedLinear(weight_OI, bias_O, quantization).eval()


def _check(model: Any) -> None:
    if model.dtype == torch.float64:
        raise _unsupported("float64 weights are not quantised", "Serve the base model in another dtype.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise _unsupported(
            "bitsandbytes is not installed", "Install it: pip install 'cola_runtime[quantized]'."
        ) from error


def _unsupported(message: str, remedy: str) -> InvalidInput:
    return InvalidInput("QUANTIZATION_UNSUPPORTED", message, where="base_models.quantization", remedy=remedy)
