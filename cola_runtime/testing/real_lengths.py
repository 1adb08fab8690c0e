"""Row lengths of real text, in tokens of SmolLM2, for benchmarks of the scheduler."""

from __future__ import annotations

from pathlib import Path

from cola_runtime.base_model.pretrained import prepare_smollm2
from cola_runtime.data.formats import parse_dataset
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.demo.datasets import demo_tenants
from cola_runtime.task_spec import CausalLmTask

CACHE = Path(".cache/models")
CONTEXT_LENGTH = 2048


def demo_row_lengths(rows: int = 1600) -> dict[str, list[int]]:
    """Demo tenant -> tokens of each of at most `rows` rows (film dialogue, messages, German talk, chat)."""
    tokenizer = Tokenizer(str(prepare_smollm2(CACHE)))
    lengths = {}
    for tenant in demo_tenants(training_rows=rows):
        dataset = parse_dataset(tenant.training, file_name=tenant.tenant)
        tokenized = tokenizer.tokenize(
            dataset, max_length=CONTEXT_LENGTH, loss="completion", truncate=False, task=CausalLmTask()
        )
        lengths[tenant.tenant] = [row.length for row in tokenized.rows]
    return lengths
