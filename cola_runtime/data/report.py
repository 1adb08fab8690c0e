"""What a tenant is told of a dataset before anything is trained on it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from cola_runtime.data.formats import Dataset, DatasetFormat
from cola_runtime.data.tokenize import TokenizedDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """A checked dataset in numbers; lengths are in tokens, of a pair both texts'."""

    rows: int
    tokens: int
    label_tokens: int
    longest: int
    median: int  # of an even number of rows the lower middle one
    truncated: int  # rows that were cut
    steps: int  # optimizer steps of the job over it
    format: DatasetFormat
    literal_markup_rows: int  # rows whose text spells a special token; it was encoded as text


def dataset_report(dataset: Dataset, tokenized: TokenizedDataset, *, steps: int) -> DatasetReport:
    lengths = [row.length for row in tokenized.rows]
    return DatasetReport(
        rows=len(lengths),
        tokens=sum(lengths),
        label_tokens=sum(row.label_tokens for row in tokenized.rows),
        longest=max(lengths),
        median=statistics.median_low(lengths),
        truncated=tokenized.truncated_rows,
        steps=steps,
        format=dataset.format,
        literal_markup_rows=tokenized.literal_markup_rows,
    )
