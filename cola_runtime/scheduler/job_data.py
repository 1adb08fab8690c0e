"""A running job's rows: read from object storage, checked and tokenised as at submission."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from cola_runtime.data.cursor import step_rows
from cola_runtime.data.formats import Dataset, parse_dataset
from cola_runtime.data.held_out import HeldOutPrompts, held_out_prompts
from cola_runtime.data.metrics import evaluate
from cola_runtime.data.tokenize import TokenizedDataset, Tokenizer, longest_row
from cola_runtime.jobs.plan import DataSize
from cola_runtime.jobs.records import JobRecord
from cola_runtime.rows import Row
from cola_runtime.spec import JobSpec
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.types import BaseModelDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class JobData:
    """Training rows with the cursor over them, and held-out rows (none: ())."""

    spec: JobSpec
    training: Sequence[Row]
    evaluation: Sequence[Row]
    prompts: HeldOutPrompts | None = None  # of the held-out rows, where the job's metric generates

    @property
    def size(self) -> DataSize:
        return DataSize.of(self.training)

    def microbatches(self, version: int) -> list[list[Row]]:
        """The rows of the step that makes `version` into `version + 1`."""
        return step_rows(self.training, self.spec, version)

    def measures(
        self, mean_loss: float, predictions: Sequence[float], generated: Sequence[Sequence[int]] = ()
    ) -> dict[str, float]:
        """What the held-out rows say of the adapter that made these predictions: data/metrics.py."""
        return evaluate(
            self.spec.task,
            mean_loss=mean_loss,
            labels=[row.label for row in self.evaluation if row.label is not None],
            predictions=predictions,
            answers=() if self.prompts is None else self.prompts.answers(generated),
        )


async def load_job_data(
    record: JobRecord, spec: JobSpec, base: BaseModelDescription, storage: ObjectStorage
) -> JobData:
    """Off the event loop. Deterministic: the same bytes give the same rows as when the job was accepted."""
    return await asyncio.to_thread(_load, record, spec, base, storage)


def _load(record: JobRecord, spec: JobSpec, base: BaseModelDescription, storage: ObjectStorage) -> JobData:
    tokenizer = Tokenizer.of(base)

    def rows(key: str, name: str) -> tuple[Dataset, TokenizedDataset]:
        dataset = parse_dataset(storage.get(key), file_name=name)
        limit = longest_row(spec, context_length=base.context_length)
        return dataset, tokenizer.tokenize(
            dataset, max_length=limit, loss=spec.loss, truncate=spec.truncate, task=spec.task
        )

    training = rows(record.training_key, record.training_name)[1].rows
    if record.evaluation_key is None:
        return JobData(spec=spec, training=training, evaluation=())
    held_out = rows(record.evaluation_key, record.evaluation_name)
    prompts = None
    if spec.evaluation.new_tokens:
        prompts = held_out_prompts(
            *held_out, tokenizer, context_length=base.context_length, new_tokens=spec.evaluation.new_tokens
        )
    return JobData(spec=spec, training=training, evaluation=held_out[1].rows, prompts=prompts)
