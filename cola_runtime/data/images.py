"""Labelled images to rows, which hold them as sent or as pixels, whichever is smaller.

So a job's rows take no more memory than its data. What is encoded the base model's service decodes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cola_runtime.data.labels import label_value
from cola_runtime.data.records import ImageRecord
from cola_runtime.data.violations import Problem, Problems
from cola_runtime.image_decoding import ImageRefused, decode_image
from cola_runtime.image_processing import read_image_processing
from cola_runtime.rows import EncodedImage, Image, Row
from cola_runtime.task_spec import LabelledTask

_NO_TOKENS, _NO_WEIGHTS = np.empty(0, np.int32), np.empty(0, np.float32)


class ImageReader:
    """Makes rows for the base model in a folder, by its own image processor."""

    def __init__(self, folder: Path, *, tokens: int) -> None:
        """`tokens` are computed for every image. Raises InvalidInput `IMAGE_PROCESSOR_UNSUPPORTED`."""
        self._processing = read_image_processing(folder)
        self._tokens = tokens

    def rows(self, records: Sequence[ImageRecord], task: LabelledTask, problems: Problems) -> list[Row]:
        """A row per record that can be decoded to the end. What is wrong with one goes to `problems`."""
        rows: list[Row] = []
        for record in records:
            try:
                rows.append(self._row(record, task))
            except Problem as problem:
                problems.add(problem, line=record.line)
        return rows

    def _row(self, record: ImageRecord, task: LabelledTask) -> Row:
        label = label_value(record, task)
        try:
            pixels = decode_image(record.image, self._processing)
        except ImageRefused as refused:
            raise Problem(
                refused.reason, f"image: {refused.message}", limit=refused.limit, actual=refused.actual
            ) from refused
        image: Image | EncodedImage = EncodedImage(content=record.image, tokens=self._tokens)
        if pixels.nbytes <= len(record.image):  # a large photograph: smaller, and never decoded again
            image = Image(pixels=pixels, tokens=self._tokens)
        return Row(tokens=_NO_TOKENS, weights=_NO_WEIGHTS, label=label, image=image)
