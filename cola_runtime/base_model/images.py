"""Opens image classifiers (ViT's family, convolutional ones) and finds what their classifier is given.

Shapes: B images, C channels, H height, W width, D features of the pooled hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cola_runtime.adapters.site_kinds import WHOLE_ROWS
from cola_runtime.base_model.accelerator import Accelerator
from cola_runtime.base_model.segments import MixedBatch
from cola_runtime.base_model.stock import check_complete, open_classifier
from cola_runtime.base_model.tracing import first_inputs
from cola_runtime.errors import InvalidInput
from cola_runtime.image_decoding import ImageRefused, decode_image
from cola_runtime.image_processing import ImageProcessing, read_image_processing
from cola_runtime.rows import EncodedImage, Image, Row
from cola_runtime.types import BaseStep, Site

# Their classifier is one dense layer over what the model pools by itself.
IMAGE_CLASSIFIERS = (
    *("vit", "vit_msn", "deit", "dinov2", "dinov2_with_registers", "swin"),
    *("convnext", "convnextv2", "resnet", "regnet"),
)
TRACED_IMAGES = 3

Shape = tuple[int, int, int]
"""[channels, height, width] of every image."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageInput:
    """What an image classifier takes."""

    processing: ImageProcessing
    values_CV: Tensor  # [channels, 256]: what a pixel's value is normalised to, in the model's dtype
    hidden_size: int  # of what the classifier is given

    @staticmethod
    def of(path: Path, model: Any, hidden_size: int) -> ImageInput:
        """Raises InvalidInput `IMAGE_PROCESSOR_UNSUPPORTED`."""
        processing = read_image_processing(path)
        values_CV = torch.from_numpy(processing.normalised()).to(model.dtype)
        return ImageInput(processing=processing, values_CV=values_CV, hidden_size=hidden_size)

    def at(self, accelerator: Accelerator) -> ImageInput:
        return replace(self, values_CV=accelerator.placed(self.values_CV))

    @property
    def shape(self) -> Shape:
        return self.processing.shape

    def decoded(self, step: BaseStep) -> BaseStep:
        """The step with its images decoded. One that cannot be is left as it is: its segment is refused."""
        segments = (
            replace(segment, rows=tuple(map(self._decoded, segment.rows))) for segment in step.segments
        )
        return replace(step, segments=tuple(segments))

    def _decoded(self, row: Row) -> Row:
        if not isinstance(row.image, EncodedImage):
            return row
        try:
            pixels = decode_image(row.image.content, self.processing)
        except ImageRefused:
            return row
        return replace(row, image=Image(pixels=pixels, tokens=row.image.tokens))

    def normalised(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 to the model's dtype."""
        channels_C11 = torch.arange(len(self.values_CV), device=self.values_CV.device)[:, None, None]
        return self.values_CV[channels_C11, pixels_BCHW.long()]


def is_image_classifier(path: Path) -> bool:
    """The folder's config.json describes one of IMAGE_CLASSIFIERS."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True).model_type in IMAGE_CLASSIFIERS


def read_image_classifier(path: Path, dtype: torch.dtype, attention: str | None) -> tuple[Any, ImageInput]:
    """The frozen classifier, whose logits are now what its own last dense layer was given.

    Raises InvalidInput `BASE_MODEL_UNSUPPORTED`, `IMAGE_PROCESSOR_UNSUPPORTED`.
    """
    from transformers import AutoModelForImageClassification

    model, missing = open_classifier(AutoModelForImageClassification, path, dtype, attention)
    check_complete(model, missing)
    images = ImageInput.of(path, model, _take_off_classifier(model))
    try:
        with torch.no_grad():
            pooled_BD = model(pixel_values=_drawn(model, images.shape)).logits
    except ValueError as error:  # the processor makes images of another size than the model takes
        raise _unsupported(str(error)) from error
    if pooled_BD.shape != (TRACED_IMAGES, images.hidden_size):
        raise _unsupported(f"{type(model).__name__} gives its classifier {tuple(pooled_BD.shape)}")
    return model, images


def pooled_hidden(model: Any, images: ImageInput, batch: MixedBatch) -> Tensor:
    """What each image's classifier is given, as a hidden state of one token: [B, 1, D]."""
    assert batch.images_BCHW is not None  # rows without an image are refused
    pooled_BD: Tensor = model(pixel_values=images.normalised(batch.images_BCHW)).logits
    return pooled_BD[:, None]


def traced_images(model: Any, shape: Shape, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The x of every module's first call over a few images, where it holds them one after the other.

    A module whose x mixes images, or leaves some out, is left out: tenants could not be told apart there.
    """
    drawn_BCHW = _drawn(model, shape)
    together = first_inputs(modules, lambda: model(pixel_values=drawn_BCHW))
    alone = first_inputs(modules, lambda: model(pixel_values=drawn_BCHW[-1:]))
    return {name: x for name, x in together.items() if name in alone and _holds(x, alone[name])}


def image_tokens(model: Any, sites: Sequence[Site], shape: Shape) -> int:
    """Positions of an image at the sites, their mean weighted by the sites' widths, rounded up.

    Of the sites that every kind can be at, if there are any: of a ViT exactly its patches and special tokens.
    Of a convolutional model, which has many positions where it is narrow, what taps of all sites hold;
    without sites, the positions of the last map.
    """
    sites = [site for site in sites if site.kind in WHOLE_ROWS] or sites
    positions: dict[int, int] = {}

    def count(site: Site, _module: nn.Module, _args: Any, output: Tensor) -> None:
        positions[site.index] = output.numel() // (TRACED_IMAGES * site.out_features)

    hooks = [model.get_submodule(site.name).register_forward_hook(partial(count, site)) for site in sites]
    try:
        with torch.no_grad():
            hidden = model.base_model(pixel_values=_drawn(model, shape)).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    if not sites:
        return int(hidden[0, 0].numel())
    widths = {site.index: site.in_features + site.out_features for site in sites}
    total = sum(positions[index] * width for index, width in widths.items())
    return -(-total // sum(widths.values()))


def _holds(x: Tensor, last: Tensor) -> bool:
    """Whether the x of a batch ends with the x of its last image alone, and is that long for each."""
    if x.numel() != TRACED_IMAGES * last.numel() or x.shape[-1] != last.shape[-1]:
        return False
    ending = x.reshape(TRACED_IMAGES, -1)[-1]
    difference = (ending - last.reshape(-1)).double()  # rounding, or another image
    return bool(difference.norm() < 0.1 * last.double().norm())


def _drawn(model: Any, shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TRACED_IMAGES, *shape, generator=generator).to(model.dtype)


def _take_off_classifier(model: Any) -> int:
    """Its last dense layer becomes the identity; returns how many features that takes."""
    classifier: Any = getattr(model, "classifier", None)
    last: Any = classifier[-1] if isinstance(classifier, nn.Sequential) else classifier
    if not isinstance(last, nn.Linear):
        raise _unsupported(f"{type(model).__name__}'s classifier is no dense layer")
    if last is classifier:
        model.classifier = nn.Identity()
    else:
        classifier[-1] = nn.Identity()
    return int(last.in_features)


def _unsupported(cause: str) -> InvalidInput:
    return InvalidInput(
        "BASE_MODEL_UNSUPPORTED",
        cause,
        where="base_model",
        remedy=f"Serve an image classifier of one of these types: {', '.join(IMAGE_CLASSIFIERS)}.",
    )
