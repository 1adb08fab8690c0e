"""What a base model's `preprocessor_config.json` makes of an image, in transformers' words and arithmetic.

The coordinator decodes, resizes and crops; the base model, which gets the uint8 values, normalises them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola_runtime.errors import InvalidInput

PROCESSOR_FILE = "preprocessor_config.json"
MAX_EDGE = 4096  # of what a base model takes
NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING = range(6)  # Pillow's filters
WARP_EDGE = 384  # from here on ConvNeXt's images are warped to a square instead of cropped

_STANDARD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_COMMON = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}
# transformers' image processors, and what each has where the file says nothing
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {**_COMMON, **_STANDARD, "resample": BILINEAR, "size": {"height": 224, "width": 224}},
    "DeiT": {
        **_COMMON,
        **_STANDARD,
        "resample": BICUBIC,
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    },
    "Bit": {
        **_COMMON,
        **_CLIP,
        "resample": BICUBIC,
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    },
    "ConvNext": {
        **_COMMON,
        **_STANDARD,
        "resample": BICUBIC,
        "size": {"shortest_edge": 384},
        "crop_pct": 224 / 256,
    },
}
# Where a file does not name its processor, as old ones do
_OF_MODEL_TYPE = {
    "vit": "ViT",
    "deit": "DeiT",
    "dinov2": "Bit",
    "swin": "ViT",
    "vit_msn": "ViT",
    "convnext": "ConvNext",
    "convnextv2": "ConvNext",
    "regnet": "ConvNext",
    "resnet": "ConvNext",
}
_EDGE_BY_DEFAULT = ("Bit", "ConvNext")  # a size that is one number is the shortest edge's
_SUFFIXES = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")

Size = tuple[int, int]
"""(height, width), in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProcessing:
    """From a decoded image to what the base model takes: resize, cut out the centre, rescale, normalise."""

    channels: int  # 3: RGB; 1: grey
    resize: Size | int | None  # to a size, to a shortest edge, or not
    resample: int  # Pillow's number of the filter
    crop: Size | None  # the centre; zeros around a smaller image
    rescale_factor: float | None
    mean: tuple[float, ...] | None  # of every channel
    std: tuple[float, ...] | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """[channels, height, width] of every image."""
        size = self.crop or self.resize
        assert isinstance(size, tuple)  # `read_image_processing` has looked
        return self.channels, *size

    def resized(self, size: Size) -> Size:
        """What an image of this size is resized to."""
        if self.resize is None or isinstance(self.resize, tuple):
            return self.resize or size
        height, width = size
        long = int(self.resize * max(size) / min(size))
        return (long, self.resize) if width <= height else (self.resize, long)

    def normalised(self) -> NDArray[np.float32]:
        """What each value of a pixel becomes, [channels, 256], with the processor's own roundings."""
        values_V = np.arange(256)
        if self.rescale_factor is None:
            values_V = values_V.astype(np.float32)
        else:
            values_V = (values_V.astype(np.float64) * self.rescale_factor).astype(np.float32)
        values_CV: NDArray[np.float32] = np.repeat(values_V[None], self.channels, axis=0)
        if self.mean is not None:
            mean_C1, std_C1 = (np.array(each, np.float32)[:, None] for each in (self.mean, self.std))
            values_CV = (values_CV - mean_C1) / std_C1
        return values_CV


def read_image_processing(folder: Path) -> ImageProcessing:
    """Raises InvalidInput `IMAGE_PROCESSOR_UNSUPPORTED`, with the reason, for what we do not do exactly."""
    fields, config = _fields(folder / PROCESSOR_FILE), _fields(folder / "config.json")
    kind = _kind(fields, config)
    fields = {**PROCESSORS[kind], **{key: value for key, value in fields.items() if value is not None}}
    channels = config.get("num_channels", 3)
    if fields.get("do_pad"):
        raise _unsupported("do_pad: images are not padded here")
    if channels not in (1, 3):
        raise _unsupported(f"the model takes {channels} channels")
    resize, crop = _resize_and_crop(kind, fields)
    if crop is None and not isinstance(resize, tuple):
        raise _unsupported("neither size nor crop_size makes all images alike")
    normalise = bool(fields["do_normalize"])
    return ImageProcessing(
        channels=channels,
        resize=resize,
        resample=_whole("resample", fields["resample"], least=NEAREST, most=HAMMING),
        crop=crop,
        rescale_factor=_number("rescale_factor", fields["rescale_factor"]) if fields["do_rescale"] else None,
        mean=_per_channel("image_mean", fields, channels) if normalise else None,
        std=_per_channel("image_std", fields, channels) if normalise else None,
    )


def _kind(fields: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """A key of PROCESSORS."""
    name = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or "")
    kind = next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s)), name)
    kind = kind or _OF_MODEL_TYPE.get(str(config.get("model_type")), "")
    if kind not in PROCESSORS:
        raise _unsupported(f"{name!r} is no image processor that is known here")
    return kind


def _resize_and_crop(kind: str, fields: Mapping[str, Any]) -> tuple[Size | int | None, Size | None]:
    resize = _size("size", fields["size"], edge=kind in _EDGE_BY_DEFAULT) if fields["do_resize"] else None
    crop = _size("crop_size", fields.get("crop_size"), edge=False) if fields["do_center_crop"] else None
    if isinstance(crop, int):
        raise _unsupported("crop_size has no height and width")
    if kind != "ConvNext" or resize is None:
        return resize, crop
    if not isinstance(resize, int) or crop is not None:
        raise _unsupported("a ConvNext image processor has a shortest_edge and no crop of its own")
    if resize >= WARP_EDGE:
        return (resize, resize), None
    return int(resize / _number("crop_pct", fields["crop_pct"])), (resize, resize)


def _size(name: str, value: Any, *, edge: bool) -> Size | int:
    """(height, width), or the shortest edge."""
    if isinstance(value, int):
        value = {"shortest_edge": value} if edge else {"height": value, "width": value}
    if isinstance(value, Mapping):
        given = {key: part for key, part in value.items() if part is not None}
        if given.keys() == {"height", "width"}:
            height, width = (_whole(f"{name}.{key}", given[key]) for key in ("height", "width"))
            return height, width
        if given.keys() == {"shortest_edge"}:
            return _whole(f"{name}.shortest_edge", given["shortest_edge"])
    raise _unsupported(f"{name} is {value!r:.80}, not height and width or a shortest_edge")


def _per_channel(name: str, fields: Mapping[str, Any], channels: int) -> tuple[float, ...]:
    value = fields[name]
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * channels
    if len(values) != channels:
        raise _unsupported(f"{name} has {len(values)} values for {channels} channels")
    return tuple(_number(name, each) for each in values)


def _whole(name: str, value: Any, *, least: int = 1, most: int = MAX_EDGE) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _unsupported(f"{name} is {value!r:.40}, not a whole number from {least} to {most}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _unsupported(f"{name} is {value!r:.40}, not a number")
    return float(value)


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _unsupported(f"there is no readable {path.name}") from error
    if not isinstance(fields, dict):
        raise _unsupported(f"{path.name} is no object")
    return fields


def _unsupported(cause: str) -> InvalidInput:
    return InvalidInput(
        "IMAGE_PROCESSOR_UNSUPPORTED",
        f"the base model's image processor can't be followed exactly: {cause}",
        where="base_model",
        remedy=f"Use a folder whose {PROCESSOR_FILE} is of one of these: {', '.join(PROCESSORS)}.",
    )
