"""A convolution as a linear map of patches: one row per position of its output.

Shapes: B images, C channels, H height, W width, L positions, I = C * kernel height * kernel width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cola_runtime.types import Patch


def positions(patch: Patch, height: int, width: int) -> tuple[int, int]:
    """Height and width of the convolution's output for an image of these; their product is L."""
    left, right, above, below = patch.padding
    spans = [dilation * (kernel - 1) for dilation, kernel in zip(patch.dilation, patch.kernel, strict=True)]
    return (
        (height + above + below - spans[0] - 1) // patch.stride[0] + 1,
        (width + left + right - spans[1] - 1) // patch.stride[1] + 1,
    )


def patches(x_BCHW: Tensor, patch: Patch) -> Tensor:
    """[B, L, I], features channel by channel as in the convolution's weight. Differentiable.

    Of patches that do not overlap one copy of the image; else each number once per patch that it is in.
    """
    padded = functional.pad(x_BCHW, patch.padding) if any(patch.padding) else x_BCHW
    for axis, (kernel, stride, dilation) in enumerate(
        zip(patch.kernel, patch.stride, patch.dilation, strict=True), start=2
    ):
        padded = padded.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return padded.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def folded(grad_BLI: Tensor, patch: Patch, size: tuple[int, int]) -> Tensor:
    """The gradient of images of `size` (H, W) from that of their `patches`: each number's sum."""
    left, right, above, below = patch.padding
    height, width = size
    padded = functional.fold(
        grad_BLI.transpose(1, 2),
        (height + above + below, width + left + right),
        kernel_size=patch.kernel,
        dilation=patch.dilation,
        stride=patch.stride,
    )
    return padded[:, :, above : above + height, left : left + width]
