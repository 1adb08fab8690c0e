"""LoRA's mathematics at one site: h = f(x) + s * B A x (arXiv:2106.09685).

Shapes: N rows, I in_features, O out_features, R rank. Knows nothing of base models, optimizers or the wire.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from cola_runtime.types import AdapterSpec, Site, TensorKey, TensorKind

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def torch_dtype(spec: AdapterSpec) -> torch.dtype:
    """The dtype of the adapter's weights and gradients on the device: float32 or float64."""
    return _DTYPES[spec.dtype]


def weight_shapes(spec: AdapterSpec) -> dict[TensorKey, tuple[int, int]]:
    """Shape of every weight, in catalogue order, A before B: LORA_A [R, I], LORA_B [O, R]."""
    shapes: dict[TensorKey, tuple[int, int]] = {}
    for site in spec.sites:
        shapes[TensorKey(site.index, TensorKind.LORA_A)] = (spec.rank, site.in_features)
        shapes[TensorKey(site.index, TensorKind.LORA_B)] = (site.out_features, spec.rank)
    return shapes


def initial_weights(spec: AdapterSpec) -> dict[TensorKey, Tensor]:
    """A from U(-1/sqrt(I), 1/sqrt(I)), B zero: an adapter that changes nothing yet.

    LORA_A [R, I] is peft's kaiming_uniform(a=sqrt(5)); LORA_B [O, R]. A site's factors depend on (spec.seed,
    rank, site name, site shape) alone, never on the other sites. The draw is in float64 and then rounded, so
    that float32 and float64 adapters of one seed agree to rounding.
    """
    weights: dict[TensorKey, Tensor] = {}
    for site in spec.sites:
        weights[TensorKey(site.index, TensorKind.LORA_A)] = _initial_a(spec, site)
        weights[TensorKey(site.index, TensorKind.LORA_B)] = torch.zeros(
            site.out_features, spec.rank, dtype=torch_dtype(spec)
        )
    return weights


def _initial_a(spec: AdapterSpec, site: Site) -> Tensor:
    # numpy's PCG64 takes the whole 128 bit key; torch's CPU generator would keep 32 bits of it.
    key = hashlib.sha256(f"{spec.seed}/{site.name}".encode()).digest()[:16]
    uniform = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
    bound = site.in_features**-0.5
    draw_RI = (2.0 * uniform.random((spec.rank, site.in_features)) - 1.0) * bound
    return torch.from_numpy(draw_RI).to(torch_dtype(spec))


def lora_gradient(
    x_NI: Tensor, grad_NO: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """dA = s (g B)^T x  [R, I]  and  dB = s g^T (x A^T)  [O, R], the vector-Jacobian product of s B A x.

    Sums over rows: g = dL/dh already carries the loss's normalisation. All four tensors share one dtype.
    """
    grad_b_OR = scaling * (grad_NO.T @ (x_NI @ a_RI.T))
    grad_a_RI = scaling * ((grad_NO @ b_OR).T @ x_NI)
    return grad_a_RI, grad_b_OR
