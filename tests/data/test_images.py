"""Labelled images: what is taken, what is refused and why, and that pixels are transformers' own."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from cola_runtime import image_decoding
from cola_runtime.data.formats import DatasetFormat, parse_dataset
from cola_runtime.data.report import dataset_report
from cola_runtime.data.tokenize import TokenizedDataset, Tokenizer
from cola_runtime.errors import InvalidInput
from cola_runtime.image_decoding import decode_image
from cola_runtime.image_processing import ImageProcessing, read_image_processing
from cola_runtime.task_spec import ClassificationTask, ImageClassificationTask

SPECIES = ImageClassificationTask(labels=("cat", "dog"))
VIT: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 20}}


def picture(height: int, width: int, mode: str = "RGB") -> Pillow.Image:
    random = np.random.default_rng(height * width)
    coarse = random.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    return Pillow.fromarray(coarse).resize((width, height), Pillow.Resampling.BICUBIC).convert(mode)


def encoded(image: Pillow.Image, form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def lines(*records: tuple[bytes | str, Any]) -> bytes:
    images = [i if isinstance(i, str) else base64.b64encode(i).decode() for i, _ in records]
    labels = [label for _, label in records]
    return b"".join(
        json.dumps({"image": image, "label": label}).encode() + b"\n"
        for image, label in zip(images, labels, strict=True)
    )


def folder_of(path: Path, processor: dict[str, Any], **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def rows_of(folder: Path, content: bytes, task: Any = SPECIES) -> TokenizedDataset:
    reader = Tokenizer(folder, bidirectional=True, image_tokens=17)
    return reader.tokenize(parse_dataset(content, file_name="pets.jsonl"), max_length=17, task=task)


def refused(folder: Path, content: bytes, task: Any = SPECIES) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        rows_of(folder, content, task)
    return caught.value


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return folder_of(tmp_path, VIT)


def test_rows_hold_what_is_smaller_and_the_report_counts_the_base_models_tokens(vit: Path) -> None:
    large, small = encoded(picture(60, 80)), encoded(picture(9, 7), "JPEG")
    content = lines((large, "dog"), (small, 0))
    tokenized = rows_of(vit, content)
    assert [row.label for row in tokenized.rows] == [1, 0]
    pixels, sent = (row.image for row in tokenized.rows)
    np.testing.assert_array_equal(pixels.pixels, decode_image(large, read_image_processing(vit)))
    assert sent.content == small
    assert len(small) < pixels.pixels.nbytes < len(large)
    dataset = parse_dataset(content, file_name="pets.jsonl")
    report = dataset_report(dataset, tokenized, steps=1)
    assert dataset.format is DatasetFormat.LABELLED_IMAGE
    assert (report.tokens, report.longest, report.label_tokens, report.truncated) == (34, 17, 2, 0)


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessor", {"size": {"height": 24, "width": 20}}),
    ("ViTImageProcessorFast", {"size": 24, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "do_rescale": True}),
    ("ViTFeatureExtractor", {"size": 16, "do_normalize": False}),
    (
        "ViTImageProcessor",
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 33, "width": 7}},
    ),
    ("DeiTImageProcessor", {"size": {"height": 40, "width": 36}, "crop_size": {"height": 24, "width": 25}}),
    ("BitImageProcessor", {"size": {"shortest_edge": 31}, "crop_size": {"height": 24, "width": 24}}),
    ("BitImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 24, "width": 24}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 28}, "crop_pct": 0.875}),
    ("ConvNextFeatureExtractor", {"size": 384, "rescale_factor": 0.01}),
]


@pytest.mark.parametrize(("kind", "fields"), PROCESSORS)
def test_pixels_are_those_of_transformers_own_image_processor(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor

    folder = folder_of(tmp_path, {"image_processor_type": kind, **fields})
    name = kind.replace("FeatureExtractor", "ImageProcessor")
    theirs = folder_of(tmp_path, {"image_processor_type": name, **fields})
    processor = AutoImageProcessor.from_pretrained(theirs)
    ours = read_image_processing(folder)
    for image in (picture(50, 70), picture(70, 50), picture(11, 13), picture(24, 24)):
        content = encoded(image)
        pixels = decode_image(content, ours)
        assert pixels.shape == ours.shape
        expected = np.stack(processor(Pillow.open(io.BytesIO(content)))["pixel_values"])[0]
        channels = np.arange(3)[:, None, None]
        np.testing.assert_array_equal(ours.normalised()[channels, pixels], expected.astype(np.float32))


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2", "swin", "convnextv2", "resnet"])
def test_a_file_that_names_no_processor_is_read_as_the_model_types_own(
    model_type: str, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor

    folder = folder_of(tmp_path, {"size": 32, "crop_size": 28}, model_type=model_type)
    processing, processor = read_image_processing(folder), AutoImageProcessor.from_pretrained(folder)
    content = encoded(picture(50, 70))
    expected = np.stack(processor(Pillow.open(io.BytesIO(content)))["pixel_values"])[0]
    channels = np.arange(3)[:, None, None]
    pixels = decode_image(content, processing)
    np.testing.assert_array_equal(processing.normalised()[channels, pixels], expected)


def test_an_image_is_upright_and_its_transparency_white(vit: Path) -> None:
    from transformers.image_transforms import convert_to_rgb
    from transformers.image_utils import load_image

    processing = whole(read_image_processing(vit))
    turned = Pillow.Exif()
    turned[0x0112] = 6
    jpeg = encoded(picture(24, 20), "JPEG", exif=turned)
    upright = np.asarray(load_image(Pillow.open(io.BytesIO(jpeg)))).transpose(2, 0, 1)
    assert upright.shape == (3, 20, 24)
    np.testing.assert_array_equal(decode_image(jpeg, whole(processing, height=20, width=24)), upright)
    for mode in ("RGBA", "LA", "P", "L", "1"):
        content = encoded(picture(24, 20, mode))
        expected = convert_to_rgb(Pillow.open(io.BytesIO(content)), return_numpy=True).transpose(2, 0, 1)
        np.testing.assert_array_equal(decode_image(content, processing), expected)


def whole(processing: ImageProcessing, *, height: int = 24, width: int = 20) -> ImageProcessing:
    """Without resizing."""
    fields = {name: getattr(processing, name) for name in processing.__dataclass_fields__}
    return ImageProcessing(**{**fields, "resize": None, "crop": (height, width)})


def test_a_grey_base_model_gets_one_channel(tmp_path: Path) -> None:
    grey = {**VIT, "image_mean": [0.5], "image_std": [0.5]}
    processing = read_image_processing(folder_of(tmp_path, grey, num_channels=1))
    assert decode_image(encoded(picture(30, 30)), processing).shape == (1, 24, 20)
    assert processing.normalised().shape == (1, 256)


def noise() -> bytes:
    return np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8).tobytes()


def test_what_is_no_whole_image_is_refused_with_its_row(vit: Path) -> None:
    good, photo = encoded(picture(30, 40)), encoded(picture(30, 40), "JPEG")
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 0xFF
    cases = {
        "IMAGE_FORMAT": [encoded(picture(9, 9), "GIF"), encoded(picture(9, 9), "BMP"), b"<svg/>", noise()],
        "IMAGE_BROKEN": [good[:60], good[: len(good) // 2], photo[:-40], photo[:300], bytes(damaged)],
    }
    for reason, contents in cases.items():
        for content in contents:
            error = refused(vit, lines((good, "cat"), (content, "dog")))
            assert (error.reason, error.where) == (reason, "pets.jsonl:2:1"), content[:8]


def test_more_than_eight_bits_a_value_are_refused(vit: Path) -> None:
    deep = encoded(Pillow.fromarray(np.full((9, 9), 40_000, np.uint16)))
    assert refused(vit, lines((deep, "cat"))).reason == "IMAGE_FORMAT"


def test_a_bomb_is_refused_before_it_is_decoded(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pillow.Image, "load", lambda self: pytest.fail("decoded"))
    for height, width in ((6000, 6000), (20_000, 20_000)):  # the second is above Pillow's own limit, too
        bomb = encoded_zeros(height, width)
        assert len(bomb) < 300_000
        error = refused(vit, lines((bomb, "cat")))
        assert error.reason == "IMAGE_TOO_LARGE"
        assert error.limit == f"{image_decoding.MAX_PIXELS} pixels"


def encoded_zeros(height: int, width: int) -> bytes:
    """A PNG of one-bit zeros, made without making the image."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes((1 + -(-width // 8)) * height), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_narrow_image_that_would_be_resized_to_an_endless_one_is_refused(tmp_path: Path) -> None:
    bit = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}}
    error = refused(folder_of(tmp_path, bit), lines((encoded_zeros(1, 30_000), "cat")))
    assert error.reason == "IMAGE_TOO_LARGE"
    assert "too narrow" in error.message


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.org/cat.png", "base64"),
        ("/etc/hostname", "base64"),
        ("data:image/png;base64,iVBORw0KGgo=", "base64"),
        (7, "expected a string"),
        ("", "is empty"),
    ],
)
def test_an_image_is_given_by_its_bytes_only(image: Any, message: str) -> None:
    line = json.dumps({"image": image, "label": 0}).encode()
    with pytest.raises(InvalidInput, match=message) as caught:
        parse_dataset(line, file_name="pets.jsonl")
    assert caught.value.reason == "DATASET_RECORD"


def test_errors_name_labels_and_never_show_an_image(vit: Path) -> None:
    good = encoded(picture(30, 40))
    error = refused(vit, lines((good, "cat"), (good, "dgo"), (good, 2)))
    assert error.reason == "LABEL_UNKNOWN"
    assert "did you mean 'dog'" in str(error)
    assert "2 to" not in str(error)
    assert base64.b64encode(good).decode()[:40] not in str(error)


def test_images_and_texts_are_not_taken_for_one_another(vit: Path) -> None:
    text = b'{"text": "a cat", "label": 0}\n'
    assert refused(vit, text).reason == "TASK_FORMAT"
    error = refused(vit, lines((encoded(picture(9, 9)), 0)), ClassificationTask(labels=2))
    assert error.reason == "TASK_FORMAT"
    with pytest.raises(InvalidInput, match="but line 1 is a labelled record"):
        parse_dataset(text + lines((encoded(picture(9, 9)), 0)), file_name="pets.jsonl")


@pytest.mark.parametrize(
    ("fields", "config", "cause"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, {}, "no image processor that is known"),
        ({}, {}, "no image processor that is known"),
        ({**VIT, "do_pad": True}, {}, "do_pad"),
        ({**VIT, "size": {"longest_edge": 3}}, {}, "size is"),
        ({**VIT, "size": {"shortest_edge": 24}}, {}, "makes all images alike"),
        ({**VIT, "size": {"height": 99_999, "width": 4}}, {}, "from 1 to 4096"),
        ({**VIT, "image_mean": [0.5]}, {}, "1 values for 3 channels"),
        (VIT, {"num_channels": 4}, "4 channels"),
    ],
)
def test_a_processor_that_is_not_followed_exactly_is_refused(
    fields: dict[str, Any], config: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=cause) as caught:
        Tokenizer(folder_of(tmp_path, fields, **config), bidirectional=True, image_tokens=17)
    assert caught.value.reason == "IMAGE_PROCESSOR_UNSUPPORTED"


def test_the_reader_needs_no_torch(vit: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from cola_runtime.data.tokenize import Tokenizer; from pathlib import Path\n"
        f"Tokenizer(Path({str(vit)!r}), bidirectional=True, image_tokens=17)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
