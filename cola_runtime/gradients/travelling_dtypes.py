"""In which dtype a gradient travels: the narrowest that holds what the base model computes. Torch-free.

A base model in bfloat16 makes every gradient in bfloat16, and the adapter's float32 is made of it by widening
and by the scaling s. Widening can wait for the device; a power of two only moves the exponent, of which both
dtypes have as many (but for numbers below 1.2e-38). float16 has fewer, and what was under a loss scale leaves
in the adapter's dtype.
"""

from __future__ import annotations

from math import frexp

from cola_runtime.adapter_spec import AdapterKind, HeadKind, ModuleKind

NARROW = "bfloat16"


def own_gradient_dtype(kind: AdapterKind, *, base: str, adapter: str, loss_scaled: bool) -> str:
    """Of `adapter_gradient` taps. A head's are made in float32, and a registered module's as it likes."""
    if isinstance(kind, HeadKind | ModuleKind) or abs(frexp(kind.scaling)[0]) != 0.5:
        return adapter
    return product_dtype(base=base, adapter=adapter, loss_scaled=loss_scaled)


def product_dtype(*, base: str, adapter: str, loss_scaled: bool) -> str:
    """Of `weight_gradient` taps, which no scaling is part of."""
    return NARROW if base == NARROW and not loss_scaled else adapter
