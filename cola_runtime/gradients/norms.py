"""The norm that clipping goes by, in the two halves of torch.nn.utils.clip_grad_norm_, bit for bit.

Of a sharded adapter each device makes the first half, and the base model the second one for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_norms(gradients: Iterable[Tensor]) -> Tensor:
    """[tensors]: the 2-norm of each."""
    return torch.stack(torch._foreach_norm(list(gradients)))


def global_norm(norms_T: Tensor) -> Tensor:
    """The 2-norm of everything whose norms these are, []; not finite if one of them is not."""
    norm: Tensor = torch.linalg.vector_norm(norms_T)
    return norm
